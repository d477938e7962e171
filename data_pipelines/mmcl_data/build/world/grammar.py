"""The forms in which an arrangement of things can be said, and for each form the same words with the relation undone.

Every form is listed once for each order of mention: "{0} left of {1}" is also "{1} right of {0}". Wrong forms keep the
template, the things and their order of mention, and invert the relation alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Form:
    """One way to say an arrangement. {0} is its first thing with an article, {bare} its only thing without one."""

    text: str
    canonical: bool
    """Things are named in the order of the arrangement: leftmost, topmost or earliest first."""
    wrong: tuple[str, ...] = ()
    """The same with a relation inverted."""


class _Direction(NamedTuple):
    of: str
    to: str
    on_its: str
    """Of the second thing named; "it" where it is above or below several."""
    sweep: str
    """Of a chain of things that each stand so to the next."""


_DIRECTIONS = {
    "left": _Direction("left of", "to the left of", "on its left", "from left to right"),
    "right": _Direction("right of", "to the right of", "on its right", "from right to left"),
    "above": _Direction("above", "above", "above it", "from top to bottom"),
    "below": _Direction("below", "below", "below it", "from bottom to top"),
}
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "before": "after", "after": "before"}
_A, _B, _C = "{0}", "{1}", "{2}"

SINGLE_IMAGE = ("one {bare}", "there is one {bare}", "a picture of one {bare}")
SINGLE_SOUND = ("one {bare}", "the sound of one {bare}", "one {bare} is heard")
"""Forms without an article, so that they are grammatical for every class: the zero-shot templates."""


def _side(x: str, y: str, where: str) -> list[str]:
    said, inverse = _DIRECTIONS[where], _DIRECTIONS[_INVERSE[where]]
    return [
        f"{x} {said.of} {y}",
        f"{x} is {said.to} {y}",
        f"there is {x} {said.of} {y}",
        f"{x} with {y} {inverse.on_its}",
    ]


def _chain(x: str, y: str, z: str, where: str) -> list[str]:
    said = _DIRECTIONS[where]
    return [
        f"{x} {said.of} {y}, which is {said.of} {z}",
        f"there is {x} {said.to} {y}, which is {said.to} {z}",
        f"{x}, {y} and {z} {said.sweep}",
    ]


def _pair_first(x: str, y: str, z: str, side: str, level: str) -> list[str]:
    text = f"{x} {_DIRECTIONS[side].of} {y}, both {_DIRECTIONS[level].of} {z}"
    return [text, f"there is {text}"]


def _pair_last(x: str, y: str, z: str, side: str, level: str) -> list[str]:
    return [f"{z} with {x} {_DIRECTIONS[side].of} {y} {_DIRECTIONS[level].on_its}"]


def _two_sounds(x: str, y: str, when: str) -> list[str]:
    if when == "before":
        return [f"{x}, then {y}", f"{x} before {y}", f"{x} followed by {y}", f"{x} is heard before {y}"]
    return [f"{x}, but first {y}", f"{x} after {y}", f"{x} preceded by {y}", f"{x} is heard after {y}"]


def _three_sounds(x: str, y: str, z: str, when: str) -> list[str]:
    if when == "before":
        return [
            f"{x}, then {y}, then {z}",
            f"{x} before {y}, which is before {z}",
            f"{x} followed by {y}, followed by {z}",
        ]
    return [
        f"{x}, but first {y}, and before that {z}",
        f"{x} after {y}, which is after {z}",
        f"{x} preceded by {y}, preceded by {z}",
    ]


def _both_ways(say: Callable[..., list[str]], things: tuple[str, ...], relation: str) -> tuple[Form, ...]:
    """Forms of a chain, from either end."""
    forms = []
    for order, said, canonical in ((things, relation, True), (things[::-1], _INVERSE[relation], False)):
        texts = zip(say(*order, said), say(*order, _INVERSE[said]), strict=True)
        # "X with Y on its right" is as canonical as "X left of Y": what counts is who is named first
        forms += [Form(text, canonical, (wrong,)) for text, wrong in texts]
    return tuple(forms)


def _pair(level: str) -> tuple[Form, ...]:
    """Forms of "A left of B, both `level` C"."""
    forms = []
    for x, y, side in ((_A, _B, "left"), (_B, _A, "right")):
        for say, third in ((_pair_first, level), (_pair_last, level)):
            texts = say(x, y, _C, side, third)
            besides = say(x, y, _C, _INVERSE[side], third)
            upside_down = say(x, y, _C, side, _INVERSE[third])
            canonical = side == "left" and say is _pair_first
            forms += [Form(t, canonical, (b, u)) for t, b, u in zip(texts, besides, upside_down, strict=True)]
    return tuple(forms)


def _overlap(x: str, y: str) -> list[str]:
    return [f"{x} while {y} plays", f"{x} together with {y}", f"{x} and {y} at the same time"]


FORMS: dict[tuple[str, int], tuple[Form, ...]] = {
    ("single", 1): tuple(Form(t, True) for t in (_A, f"there is {_A}", f"a picture of {_A}", *SINGLE_IMAGE)),
    ("row", 2): _both_ways(_side, (_A, _B), "left"),
    ("column", 2): _both_ways(_side, (_A, _B), "above"),
    ("row", 3): _both_ways(_chain, (_A, _B, _C), "left"),
    ("column", 3): _both_ways(_chain, (_A, _B, _C), "above"),
    ("pair_above", 3): _pair("above"),
    ("pair_below", 3): _pair("below"),
    ("solo", 1): tuple(Form(t, True) for t in (_A, f"there is {_A}", f"the sound of {_A}", *SINGLE_SOUND)),
    ("sequence", 2): _both_ways(_two_sounds, (_A, _B), "before"),
    ("sequence", 3): _both_ways(_three_sounds, (_A, _B, _C), "before"),
    ("overlap", 2): tuple(Form(text, order[0] == _A) for order in ((_A, _B), (_B, _A)) for text in _overlap(*order)),
}
"""By arrangement and number of things."""
