"""The rules that make negatives, one a function: a parsed caption, random numbers and pools in, a wrong caption out.

A rule returns None where it does not apply, and where what it would say may still be true. Replacements are drawn by
frequency and swaps at random, so that their proposals are symmetric; a rule whose proposals are not says by how much.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from mmcl_data.negatives.edits import apply, article, exchanged, moved, replaced
from mmcl_data.negatives.guards import (
    Span,
    are_alike,
    attributes_of,
    breaks_gender,
    class_of,
    frame_of,
    has_actor,
    is_attested,
    is_colour,
    is_countable,
    is_mutual,
    is_said,
    moves,
    needs_of,
    same_noun,
    say_the_same,
    says_where,
    sides_of,
    verb_phrases,
    word_at,
)
from mmcl_data.negatives.lexicon import Lexicon
from mmcl_data.negatives.parsing import WORD, Caption, Thing
from mmcl_data.negatives.pools import OPEN_POOLS, Pools, thing_pool, time_pool
from mmcl_data.order import mix

T = TypeVar("T")


@dataclass(slots=True)
class Draws:
    """Numbers in [0, 1) that follow from a seed, one after another."""

    seed: int
    count: int = 0
    _bits: int = 0

    def __call__(self) -> float:
        self.count += 1
        if self.count % 2:
            self._bits = mix(self.seed, self.count)
            return (self._bits >> 32) / (1 << 32)
        return (self._bits & 0xFFFFFFFF) / (1 << 32)

    def pick(self, things: Sequence[T]) -> T:
        """One of `things`, which must be some."""
        return things[int(self() * len(things))]

    def two(self, things: Sequence[T]) -> tuple[T, T]:
        """Two of `things`, in their order."""
        first = int(self() * len(things))
        second = int(self() * (len(things) - 1))
        second += second >= first
        return things[min(first, second)], things[max(first, second)]


class Proposal(NamedTuple):
    """A wrong caption."""

    text: str
    odds: float = 0.0
    """What to add to the logarithm of p(negative) / p(caption) before it is accepted: where the opposite change is
    proposed less often than this one, or words are more."""


Operator = Callable[[Caption, Draws, Pools], Proposal | None]


def replace_obj(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """Another thing of the same kind, by frequency: "a dog on a bench" -> "a cat on a bench".

    One that the lexicon does not know must have been seen beside one of its new neighbours.
    """
    places = [(thing, pool) for thing in caption.things if (pool := thing_pool(caption, thing, pools.lexicon))]
    if not places:
        return None
    thing, pool = draws.pick(places)
    new = pools.draw(pool, draws())
    if new is None or is_said(caption, new, pools.lexicon) or breaks_gender(caption, pool):
        return None
    if pool in OPEN_POOLS and not is_attested(caption, thing, new, pools):
        return None
    return Proposal(apply(caption, [replaced(caption, thing.head, thing.end, new)]))


def replace_att(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """Another attribute, number or manner of the same kind: "a red car" -> "a blue car"."""
    places = list(attributes_of(caption, pools.lexicon))
    if not places:
        return None
    place, entry = draws.pick(places)
    new = pools.draw(entry.kind, draws())
    if new is None or pools.lexicon.attributes[new].sense == entry.sense:
        return None
    if entry.kind in pools.lexicon.attested and not pools.pairs[new, word_at(caption, place + 1)]:
        return None
    if new in caption.words[max(0, place - 2) : place + 3]:  # "black and black"
        return None
    return Proposal(apply(caption, [replaced(caption, place, place + 1, new)]))


def replace_rel(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """The opposite place, or another action in the same form: "left of" -> "right of", "sits" -> "stands"."""
    lexicon = pools.lexicon
    places = [(r.start, r.end, r.entry, r.entry.kind) for r in caption.relations if says_where(caption, r, lexicon)]
    for place, (word, tag) in enumerate(zip(caption.words, caption.tags, strict=True)):
        if tag[:2] == "VB" and place not in caption.inert and (entry := lexicon.verbs.get(word)):
            if not has_actor(caption, place, entry.kind, lexicon):
                continue
            places.append((place, place + 1, entry, f"{entry.kind} {entry.form}"))
    if not places:
        return None
    start, end, entry, pool = draws.pick(places)
    new = pools.draw(pool, draws())
    if new is None or (lexicon.relations.get(new) or lexicon.verbs[new]).sense == entry.sense:
        return None
    return Proposal(apply(caption, [replaced(caption, start, end, new)]))


def swap_obj(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """Two things change places with all that is said of them: "a cat chases a dog" -> "a dog chases a cat"."""
    lexicon = pools.lexicon
    things = [thing for thing in caption.things if moves(caption, thing, lexicon)]
    if len(things) < 2:
        return None
    one, other = draws.two(things)
    known = all(caption.words[thing.end - 1] in lexicon.nouns for thing in (one, other))
    alike = class_of(caption, one, lexicon) == class_of(caption, other, lexicon)
    if not known or not alike or is_mutual(caption, one, other, lexicon):
        return None
    return Proposal(exchanged(caption, (one.start, one.end), (other.start, other.end)))


def swap_att(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """Two things change attributes of one kind: "a red cup and a blue bowl" -> "a blue cup and a red bowl"."""
    lexicon = pools.lexicon
    places = [
        (place, entry, thing)
        for thing in caption.things
        for place, entry in attributes_of(caption, lexicon, range(thing.start, thing.head))
    ]
    if len(places) < 2:
        return None
    (place, entry, one), (its_place, its_entry, other) = draws.two(places)
    if one is other or entry.kind != its_entry.kind or entry.sense == its_entry.sense:
        return None
    if same_noun(caption, one, other, lexicon) and is_mutual(caption, one, other, lexicon):
        return None
    return Proposal(exchanged(caption, (place, place + 1), (its_place, its_place + 1)))


def add_obj(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """A thing more at the end, "a plate and a fork" for "a plate", or one less and wrong, "a cup" for "a plate and a
    fork", so that negatives are no longer than captions."""
    last = [thing for thing in caption.things[-2:] if is_countable(caption, thing, pools.lexicon)]
    if not last or last[-1] is not caption.things[-1]:
        return None
    if any(word[0].isalnum() for word in caption.words[last[-1].end :]):
        return None
    pool = thing_pool(caption, last[-1], pools.lexicon)
    new = pool and pools.draw(pool, draws())
    if not pool or not new or is_said(caption, new, pools.lexicon):
        return None
    odds = pools.log_share("and") + pools.log_share_of_pool(pool)
    named = f"{article(new)} {new}"
    if len(last) == 2 and caption.words[last[0].end : last[1].start] == ("and",):
        if word_at(caption, last[0].start - 1) in (",", "between"):
            return None
        start, end = last[0].start, last[1].end
        shorter = apply(caption, [(start, end, moved(caption, start, last[0].end))])
        return _one_less(caption, shorter, apply(caption, [replaced(caption, start, end, named)]), odds, draws, pools)
    start, end = last[-1].start, last[-1].end
    return Proposal(apply(caption, [(start, end, f"{moved(caption, start, end)} and {named}")]), odds)


def add_att(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """A colour more, "a red and white car" for "a red car", or one less and wrong, "a blue car" for "a red and white
    car", so that negatives are no longer than captions."""
    lexicon = pools.lexicon
    places = [(p, entry) for p, entry in attributes_of(caption, lexicon) if entry.kind == "colour"]
    places = [(p, entry) for p, entry in places if p < 2 or not is_colour(caption, p - 2, lexicon)]
    if not places:
        return None
    place, entry = draws.pick(places)
    new = pools.draw(entry.kind, draws())
    pair = word_at(caption, place + 1) == "and" and is_colour(caption, place + 2, lexicon)
    said = {entry.sense, lexicon.attributes[caption.words[place + 2]].sense} if pair else {entry.sense}
    if new is None or lexicon.attributes[new].sense in said:
        return None
    odds = pools.log_share("and") + pools.log_share_of_pool(entry.kind)
    if pair:
        shorter = apply(caption, [(place, place + 3, caption.slice(place, place + 1))])
        text = apply(caption, [replaced(caption, place, place + 3, new)])
        return _one_less(caption, shorter, text, odds, draws, pools)
    return Proposal(apply(caption, [(place, place + 1, f"{caption.slice(place, place + 1)} and {new}")]), odds)


def order_swap(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """Another order in time: "before" for "after" or "while", or what comes first and what comes then change places."""
    places = [relation for relation in caption.relations if relation.phrase in pools.lexicon.times]
    if not places:
        return None
    relation = draws.pick(places)
    if draws() < 0.5:
        new = pools.draw(time_pool(caption, relation), draws())
        if new is None or new == relation.phrase:
            return None
        return Proposal(apply(caption, [replaced(caption, relation.start, relation.end, new)]))
    before, after = sides_of(caption, relation, places)
    if relation.phrase == "while" or not are_alike(caption, before, after):
        return None
    return Proposal(exchanged(caption, before, after))


def swap_noun_phrases(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's first: two noun phrases of more than two words."""
    things = [t for t in caption.things if t.end - t.start > 2 and moves(caption, t, pools.lexicon)]
    return _swap_things(caption, [(t, (t.start, t.end)) for t in things], draws, pools)


def swap_verb_phrases(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's second: two verb phrases, here of one form that go on alike."""
    phrases = list(verb_phrases(caption))
    if len(phrases) < 2:
        return None
    one, other = draws.two(phrases)
    if needs_of(caption, one) != needs_of(caption, other) or caption.slice(*one) == caption.slice(*other):
        return None
    if set(caption.words[one[1] : other[0]]) <= pools.lexicon.joining:
        return None
    return Proposal(exchanged(caption, one, other))


def swap_nouns(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's third: two singular nouns."""
    return _swap_things(caption, _heads(caption, "NN", pools.lexicon), draws, pools)


def swap_plurals(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's fourth: two plural nouns."""
    return _swap_things(caption, _heads(caption, "NNS", pools.lexicon), draws, pools)


def swap_adverbs(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's fifth: two adverbs of manner."""
    places = [place for place, tag in enumerate(caption.tags) if tag == "RB" and caption.words[place].endswith("ly")]
    if len(places) < 2:
        return None
    one, other = draws.two(places)
    if set(caption.words[one + 1 : other]) <= pools.lexicon.joining:
        return None
    return Proposal(exchanged(caption, (one, one + 1), (other, other + 1)))


def swap_adjectives(caption: Caption, draws: Draws, pools: Pools) -> Proposal | None:
    """NegCLIP's sixth: two adjectives of two things."""
    things = [t for t in caption.things if caption.words[t.end - 1] not in pools.lexicon.unswappable]
    places = [(t, (p, p + 1)) for t in things for p in range(t.start, t.head) if caption.tags[p] == "JJ"]
    return _swap_things(caption, places, draws, pools)


OPERATORS: Mapping[str, Operator] = {
    rule.__name__: rule
    for rule in (
        replace_obj,
        replace_att,
        replace_rel,
        swap_obj,
        swap_att,
        add_obj,
        add_att,
        order_swap,
        swap_noun_phrases,
        swap_verb_phrases,
        swap_nouns,
        swap_plurals,
        swap_adverbs,
        swap_adjectives,
    )
}
"""By name, as SugarCrepe and NegCLIP call them."""


def _one_less(caption: Caption, shorter: str, text: str, odds: float, draws: Draws, pools: Pools) -> Proposal | None:
    """`text` instead of `shorter`, once `shorter` is accepted as the opposite of one more, which `odds` belong to."""
    less, new = WORD.findall(shorter.lower()), WORD.findall(text.lower())
    if draws() >= math.exp(min(0.0, pools.lift(caption.words, less) - odds)):
        return None
    return Proposal(text, pools.lift(less, new) - pools.lift(caption.words, new))


def _swap_things(caption: Caption, places: Sequence[tuple[Thing, Span]], draws: Draws, pools: Pools) -> Proposal | None:
    """Exchange a stretch of one thing with that of another, unless either thing can stand on either side."""
    if len(places) < 2:
        return None
    (one, span), (other, its_span) = draws.two(places)
    if one is other or say_the_same(caption, span, its_span, pools.lexicon):
        return None
    if span[1] == one.end and frame_of(caption, one) != frame_of(caption, other):
        return None
    whole = span[1] > one.head or same_noun(caption, one, other, pools.lexicon)
    if whole and is_mutual(caption, one, other, pools.lexicon):
        return None
    return Proposal(exchanged(caption, span, its_span))


def _heads(caption: Caption, tag: str, lexicon: Lexicon) -> list[tuple[Thing, Span]]:
    things = [t for t in caption.things if caption.tags[t.end - 1] == tag and moves(caption, t, lexicon)]
    return [(thing, (thing.head, thing.end)) for thing in things]
