"""What is heard when, as an expression: events, one after another (Seq) or at the same time (Mix).

The idea is CompA's, Ghosh et al. 2024, https://arxiv.org/abs/2310.08753. What a tree says is, for every two events,
which is before the other or that they overlap; `canonical` trees are equal where that is equal. A wrong tree is one
that says something else of some two events, or binds an attribute to another event, so that it can never be a
paraphrase or a part.

Trees are kept to what can be said plainly: up to four events; a Seq of events and overlays of events; an overlay of
events, one part of which may be two events in sequence. Two sequences at once would leave open how they interlock.

Corruptions are symmetric: if one leads from x to y, one leads from y to x. `arrange` draws trees in proportion to the
number of their corruptions, so that for a random corruption (x, y) is as likely as (y, x): text alone cannot tell which
of the two was true.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, combinations, product
from typing import Any, Literal, NamedTuple, TypeVar

from mmcl.errors import ConfigError
from mmcl_data.order import mix

T = TypeVar("T")
MAX_EVENTS = 4
Operator = Literal["order_swap", "seq_to_mix", "mix_to_seq", "att_swap"]
OPERATORS: tuple[Operator, ...] = ("order_swap", "seq_to_mix", "mix_to_seq", "att_swap")
"""Two parts of a sequence exchange places; neighbours in it sound at once; of what sounds at once some comes first; two
events exchange an attribute."""


@dataclass(frozen=True, slots=True)
class Event:
    """One sound."""

    label: str
    """A noun phrase, as `captions.plain_label` gives it."""
    attributes: tuple[tuple[str, str], ...] = ()
    """Kind and word, in the order of speaking: (("loudness", "quiet"), ("pitch", "deep"))."""
    clip: str = ""
    """Which recording; says nothing."""

    @property
    def phrase(self) -> str:
        """Attributes and label. An article stays in front: "an owl" -> "a quiet owl"."""
        words = [word for _, word in self.attributes]
        article, _, noun = self.label.partition(" ")
        if not words or not noun or article not in ("a", "an", "the"):
            return " ".join([*words, self.label])
        article = article if article == "the" else "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words, noun])


@dataclass(frozen=True, slots=True)
class Seq:
    """One part after another."""

    parts: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """All parts at the same time, from beginning to end."""

    parts: tuple["Tree", ...]


Tree = Event | Seq | Mix


class Step(NamedTuple):
    """What was done to a tree, and what it became."""

    operator: Operator
    tree: Tree


def events_of(tree: Tree) -> list[Event]:
    """The events in the order in which the tree names them."""
    return [tree] if isinstance(tree, Event) else [event for part in tree.parts for event in events_of(part)]


def flat(tree: Tree) -> Tree:
    """The same without a Seq in a Seq, a Mix in a Mix or one of a single part."""
    if isinstance(tree, Event):
        return tree
    kind, parts = type(tree), [flat(part) for part in tree.parts]
    merged = tuple(inner for part in parts for inner in (part.parts if isinstance(part, kind) else (part,)))
    return merged[0] if len(merged) == 1 else kind(merged)


def canonical(tree: Tree) -> Tree:
    """What the tree says and nothing else: equal for trees that say the same."""
    tree = flat(tree)
    if isinstance(tree, Event):
        return Event(tree.phrase)
    parts = tuple(canonical(part) for part in tree.parts)
    return Seq(parts) if isinstance(tree, Seq) else Mix(tuple(sorted(parts, key=_key)))


def _key(tree: Tree) -> tuple[int, Any]:
    if isinstance(tree, Event):
        return 0, tree.label
    return (1 if isinstance(tree, Seq) else 2), tuple(map(_key, tree.parts))


def is_sayable(tree: Tree) -> bool:
    """Whether the tree is among those that have captions."""
    tree = flat(tree)
    if isinstance(tree, Event):
        return True
    if not 1 < len(events_of(tree)) <= MAX_EVENTS:
        return False
    inner = [part for part in tree.parts if not isinstance(part, Event)]
    if any(not isinstance(event, Event) for part in inner for event in part.parts):
        return False
    return isinstance(tree, Seq) or not inner or (len(inner) == 1 and len(inner[0].parts) == 2)


def entails(tree: Tree, claim: Tree) -> bool:
    """Whether all that `claim` says is so in `tree`: some of its events, in the same relations."""
    events, before = _timing(tree)
    claimed, claimed_before = _timing(claim)
    phrases = [event.phrase for event in events]
    candidates = [[n for n, phrase in enumerate(phrases) if phrase == event.phrase] for event in claimed]
    pairs = [(i, j) for i in range(len(claimed)) for j in range(len(claimed)) if i != j]
    return any(
        len(set(chosen)) == len(chosen)
        and all(((i, j) in claimed_before) == ((chosen[i], chosen[j]) in before) for i, j in pairs)
        for chosen in product(*candidates)
    )


def _timing(tree: Tree) -> tuple[list[Event], set[tuple[int, int]]]:
    """The events, and which of them are before which."""
    if isinstance(tree, Event):
        return [tree], set()
    events: list[Event] = []
    before: set[tuple[int, int]] = set()
    for part in tree.parts:
        inner, inner_before = _timing(part)
        first = len(events)
        if isinstance(tree, Seq):
            before |= {(i, first + j) for i in range(first) for j in range(len(inner))}
        before |= {(first + i, first + j) for i, j in inner_before}
        events += inner
    return events, before


def subtrees(tree: Tree) -> list[Tree]:
    """What is true of parts of the sound: runs of a sequence, some of what sounds at once, down to single events.

    Each once, without the tree itself.
    """
    tree = flat(tree)
    found: dict[Tree, Tree] = {}
    for part in _parts(tree):
        found.setdefault(canonical(part), part)
        for inner in subtrees(part):
            found.setdefault(canonical(inner), inner)
    return list(found.values())


def _parts(tree: Tree) -> Iterator[Tree]:
    if isinstance(tree, Seq):
        count = len(tree.parts)
        runs = [(i, k) for i in range(count) for k in range(i + 1, count + 1) if k - i < count]
        yield from (flat(Seq(tree.parts[i:k])) for i, k in runs)
    elif isinstance(tree, Mix):
        for size in range(1, len(tree.parts)):
            yield from (flat(Mix(chosen)) for chosen in combinations(tree.parts, size))


def corrupt(tree: Tree, seed: int = 0) -> list[Step]:
    """Every wrong tree of the same events that is one step away, with the step; in an order that follows from `seed`.

    None is entailed by `tree`, and no two say the same.

    Raises:
        ConfigError: the tree is not sayable.
    """
    if not is_sayable(tree):
        raise ConfigError(
            f"a tree of {len(events_of(tree))} events or of this depth has no captions: {canonical(tree)}"
        )
    tree = flat(tree)
    events = events_of(tree)
    places = iter(_placeholders(len(events)))
    steps = [Step(operator, _filled(found, events)) for operator, found in _steps(canonical(_mapped(tree, places)))]
    steps += [Step("att_swap", _mapped(tree, iter(swapped))) for swapped in attribute_swaps(events)]
    found: dict[Tree, Step] = {}
    for step in steps:
        if not entails(tree, step.tree):
            found.setdefault(canonical(step.tree), step)
    return shuffled(found.values(), seed)


def shuffled(things: Iterable[T], seed: int) -> list[T]:
    """The things in an order that follows from `seed`."""
    held = list(things)
    return [held[place] for place in sorted(range(len(held)), key=lambda place: mix(seed, place))]


def attribute_swaps(events: Sequence[Event]) -> list[list[Event]]:
    """The events, two of which have exchanged an attribute of one kind, in every way that makes a difference."""
    found = []
    for i, j in combinations(range(len(events)), 2):
        ours, theirs = dict(events[i].attributes), dict(events[j].attributes)
        if events[i].label == events[j].label:
            continue
        for kind, word in ours.items():
            if theirs.get(kind, word) != word:
                swapped = list(events)
                swapped[i], swapped[j] = _with(events[i], kind, theirs[kind]), _with(events[j], kind, word)
                found.append(swapped)
    return found


def arrange(events: Sequence[Event], draw: float) -> Tree:
    """A tree of these events, which follows from `draw` in [0, 1).

    Its chance is in proportion to the number of its corruptions.
    """
    if len(events) == 1:
        return events[0]
    trees, steps = _arrangements(len(events))
    swaps = len(attribute_swaps(events))
    sums = list(accumulate(len(steps[tree]) + swaps for tree in trees))
    number = next(number for number, total in enumerate(sums) if draw * sums[-1] < total)
    return _filled(trees[number], events)


def as_json(tree: Tree) -> dict[str, Any]:
    """The tree for a json member."""
    match tree:
        case Event():
            return {"event": tree.label, "attributes": dict(tree.attributes), "clip": tree.clip}
        case Seq():
            return {"seq": [as_json(part) for part in tree.parts]}
        case Mix():
            return {"mix": [as_json(part) for part in tree.parts]}


def _with(event: Event, kind: str, word: str) -> Event:
    return replace(event, attributes=tuple((k, word if k == kind else w) for k, w in event.attributes))


def _placeholders(count: int) -> list[Event]:
    return [Event(str(number)) for number in range(count)]


def _mapped(tree: Tree, events: Iterator[Event]) -> Tree:
    """The tree with other events in the same places."""
    return next(events) if isinstance(tree, Event) else type(tree)(tuple(_mapped(part, events) for part in tree.parts))


def _filled(tree: Tree, events: Sequence[Event]) -> Tree:
    """A tree of placeholders, with events for their numbers."""
    return _mapped(tree, iter([events[int(place.label)] for place in events_of(tree)]))


@cache
def _arrangements(count: int) -> tuple[list[Tree], dict[Tree, list[Step]]]:
    """All sayable trees of so many placeholders, and where one step leads from each."""
    assert count <= MAX_EVENTS, count
    steps: dict[Tree, list[Step]] = {}
    left = [canonical(Seq(tuple(_placeholders(count))))]
    while left:
        tree = left.pop()
        if tree not in steps:
            found: dict[Tree, Operator] = {}
            for operator, changed in _changes(tree):
                if is_sayable(changed) and canonical(changed) != tree:
                    found.setdefault(canonical(changed), operator)
            steps[tree] = [Step(operator, changed) for changed, operator in found.items()]
            left += found
    return list(steps), steps


def _steps(tree: Tree) -> list[Step]:
    return _arrangements(len(events_of(tree)))[1][tree]


def _changes(tree: Tree) -> Iterator[Step]:
    if isinstance(tree, Event):
        return
    yield from _changes_of_seq(tree.parts) if isinstance(tree, Seq) else _changes_of_mix(tree.parts)
    for place, part in enumerate(tree.parts):
        for operator, changed in _changes(part):
            yield Step(operator, type(tree)((*tree.parts[:place], changed, *tree.parts[place + 1 :])))


def _changes_of_seq(parts: tuple[Tree, ...]) -> Iterator[Step]:
    for i, j in combinations(range(len(parts)), 2):
        yield Step("order_swap", Seq((*parts[:i], parts[j], *parts[i + 1 : j], parts[i], *parts[j + 1 :])))
    for i, j, k in combinations(range(len(parts) + 1), 3):
        yield Step("seq_to_mix", Seq((*parts[:i], Mix((Seq(parts[i:j]), Seq(parts[j:k]))), *parts[k:])))


def _changes_of_mix(parts: tuple[Tree, ...]) -> Iterator[Step]:
    """Each part stays, comes first, or comes second."""
    for roles in product((0, 1, 2), repeat=len(parts)):
        rest, first, second = (
            tuple(part for part, role in zip(parts, roles, strict=True) if role == wanted) for wanted in (0, 1, 2)
        )
        if first and second:
            yield Step("mix_to_seq", Mix((Seq((Mix(first), Mix(second))), *rest)))
