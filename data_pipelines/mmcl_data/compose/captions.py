"""Trees in words, in several ways, each of which `read_caption` reads back: no caption has two meanings.

    chain       A, then B | A, followed by B | A, and after that B | A before B
                B, preceded by A | B, and before that A | B, but before that A | B after A
    overlay     A together with B | A along with B | A and B at the same time | A at the same time as B
    both        CHAIN, with C throughout | C throughout, with CHAIN

A chain is told forwards or backwards equally often and joined by one connective, with a comma where a part of it is an
overlay; the parts of an overlay are named in any order. Labels are noun phrases of the data, which are not inflected:
an article stays where the data have one, and none is added, as nobody knows which labels are plural. What joins is
reserved and cannot be part of a label.
"""

import re
from collections.abc import Iterator, Sequence

from mmcl.errors import DataError
from mmcl_data.compose.tree import Event, Mix, Seq, Tree, canonical, events_of, flat, is_sayable
from mmcl_data.order import uniform

MAX_WORDS = 8
RESERVED = frozenset(
    ("and", "after", "along", "before", "followed", "preceded", "same", "then", "throughout", "together")
)
_SINGLE = ("", "the sound of ", "a recording of ")
_FORWARDS = (", then ", ", followed by ", ", and after that ", " before ")
_BACKWARDS = (", preceded by ", ", and before that ", ", but before that ", " after ")
"""The last of each only between events."""
_TOGETHER = (" together with ", " along with ")
_AT_ONCE, _AS = " at the same time", " at the same time as "
_LEAD = re.compile(r"^(?:(?:the |a |an )?(?:sounds?|recording) of )+")
_PLAIN = re.compile(r"[\w'’&/();.\- ]+")


def plain_label(text: str) -> str:
    """A label as captions can hold it: "Chirp, tweet" -> "chirp (tweet)", "Boat and ship_horn." -> "boat & ship horn".

    Raises:
        DataError: it is empty, no noun phrase by its length and signs, or holds a word that joins.
    """
    text = re.sub(r"\band\b", "&", " ".join(text.replace("_", " ").lower().split()))
    first, *more = [part.strip(" .") for part in re.split(r"[,()]", text) if part.strip(" .")] or [""]
    label = _LEAD.sub("", f"{first} ({'; '.join(more)})" if more else first)
    words = re.findall(r"\w+", label)
    if not words or len(words) > MAX_WORDS or not _PLAIN.fullmatch(label):
        raise DataError(f"{text!r} is no label: expected a noun phrase of up to {MAX_WORDS} words")
    if found := RESERVED.intersection(words):
        raise DataError(f"the label {text!r} holds {min(found)!r}, which joins labels in captions")
    return label


def render_caption(tree: Tree, seed: int) -> str:
    """The tree in words; which words follows from `seed`. Labels are as `plain_label` gives them.

    `read_caption` of it is `canonical(tree)`.
    """
    tree, draws = flat(tree), iter(uniform(seed, 16))
    assert is_sayable(tree), tree
    if isinstance(tree, Event):
        return _pick(_SINGLE, draws) + tree.phrase
    if isinstance(tree, Seq):
        return _chain(tree.parts, draws)
    chains = [part for part in tree.parts if isinstance(part, Seq)]
    if not chains:
        return _overlay(tree.parts, draws, alone=True)
    chain = _chain(chains[0].parts, draws)
    rest = _listed(_shuffled([event.phrase for event in tree.parts if isinstance(event, Event)], draws))
    return _pick((f"{rest} throughout, with {chain}", f"{chain}, with {rest} throughout"), draws)


def read_caption(text: str) -> Tree:
    """The canonical tree that a caption says.

    Raises:
        DataError: it is none of `render_caption`.
    """
    if found := re.fullmatch(r"(.+) throughout, with (.+)", text):
        rest, chain = found.groups()
    elif found := re.fullmatch(r"(.+), with (.+) throughout", text):
        chain, rest = found.groups()
    else:
        return _checked(_read_chain(text), text)
    if not isinstance(sequence := _read_chain(chain), Seq):
        raise DataError(f"{text!r} is no caption of the grammar: {chain!r} is no sequence")
    return _checked(Mix((sequence, *_read_list(rest))), text)


def _pick(choices: Sequence[str], draws: Iterator[float]) -> str:
    return choices[int(next(draws) * len(choices))]


def _shuffled(phrases: list[str], draws: Iterator[float]) -> list[str]:
    return [phrases.pop(int(next(draws) * len(phrases))) for _ in range(len(phrases))]


def _listed(phrases: Sequence[str]) -> str:
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last


def _chain(parts: Sequence[Tree], draws: Iterator[float]) -> str:
    texts = [part.phrase if isinstance(part, Event) else _overlay(part.parts, draws) for part in parts]
    forwards = next(draws) < 0.5
    joiners = _FORWARDS if forwards else _BACKWARDS
    joiner = _pick(joiners if all(isinstance(part, Event) for part in parts) else joiners[:-1], draws)
    return joiner.join(texts if forwards else texts[::-1])


def _overlay(parts: Sequence[Tree], draws: Iterator[float], *, alone: bool = False) -> str:
    phrases = _shuffled([event.phrase for part in parts for event in events_of(part)], draws)
    joiner = _pick((*_TOGETHER, _AT_ONCE, _AS) if alone and len(phrases) == 2 else (*_TOGETHER, _AT_ONCE), draws)
    return _listed(phrases) + joiner if joiner == _AT_ONCE else f"{phrases[0]}{joiner}{_listed(phrases[1:])}"


def _read_chain(text: str) -> Tree:
    for joiner in (*_FORWARDS, *_BACKWARDS):  # those with a comma first: ", and after that " holds " after "
        if joiner[0] == "," and joiner in text:
            break
    else:
        joiner = next((j for j in (_FORWARDS[-1], _BACKWARDS[-1]) if j in text), "")
    if not joiner:
        return _read_overlay(text)
    parts = [_read_overlay(part) for part in text.split(joiner)]
    return Seq(tuple(parts if joiner in _FORWARDS else parts[::-1]))


def _read_overlay(text: str) -> Tree:
    for joiner in (*_TOGETHER, _AS):
        first, joined, rest = text.partition(joiner)
        if joined:
            return Mix((Event(first), *_read_list(rest)))
    if text.endswith(_AT_ONCE):
        return Mix(_read_list(text.removesuffix(_AT_ONCE)))
    return Event(next(text.removeprefix(lead) for lead in reversed(_SINGLE) if text.startswith(lead)))


def _read_list(text: str) -> tuple[Tree, ...]:
    return tuple(Event(phrase) for phrase in re.split(r", | and ", text))


def _checked(tree: Tree, text: str) -> Tree:
    for event in events_of(tree):
        if not _PLAIN.fullmatch(event.label) or RESERVED.intersection(re.findall(r"\w+", event.label)):
            raise DataError(f"{text!r} is no caption of the grammar: {event.label!r} is no label")
    if not is_sayable(tree):
        raise DataError(f"{text!r} is no caption of the grammar: such a tree is said in another way")
    return canonical(tree)
