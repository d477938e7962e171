"""Captions of scenes and sounds, all paraphrases of one, and foils: minimally different captions that are false.

A foil's falsehood rests on what sampling guarantees: no two objects of a scene are the same colour and shape, no two
events of a sound the same pitch and timbre.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmcl_data.build.world.config import WorldConfig
from mmcl_data.build.world.grammar import FORMS, Form
from mmcl_data.build.world.scenes import Scene
from mmcl_data.build.world.sounds import Sound

MENTIONED = 0.3
"""How often a caption says size, texture or loudness, each by itself; it then says it of every thing."""


class Item(NamedTuple):
    """A thing as captions see it."""

    attribute: str
    """Colour or pitch."""
    noun: str
    """Shape or timbre."""
    details: tuple[str, ...]
    """Size and texture, or loudness: said or left out."""


@dataclass(frozen=True, slots=True)
class Wording:
    """Which of an arrangement's forms is used, and which details are said."""

    form: int
    mentioned: tuple[bool, ...]


def items(subject: Scene | Sound) -> tuple[Item, ...]:
    """The things of a scene or sound in its own order."""
    if isinstance(subject, Scene):
        return tuple(Item(o.colour, o.shape, (o.size, o.texture)) for o in subject.objects)
    return tuple(Item(e.pitch, e.timbre, (e.loudness,)) for e in subject.events)


def meaning(subject: Scene | Sound) -> tuple[Any, ...]:
    """What its shortest captions say: equal for two subjects that such captions cannot tell apart."""
    things = [item[:2] for item in items(subject)]
    return (_arrangement(subject), *(sorted(things) if _arrangement(subject) == "overlap" else things))


def choose(subject: Scene | Sound, config: WorldConfig, rng: np.random.Generator) -> Wording:
    """A wording, every form as likely as any other."""
    forms = _forms(subject, config)
    said = (rng.random(2) < MENTIONED).tolist()
    may = _may_mention(subject, config)
    return Wording(forms[rng.integers(len(forms))], tuple(a and b for a, b in zip(may, said, strict=False)))


def say(subject: Scene | Sound, wording: Wording) -> str:
    """The caption in this wording."""
    return _fill(_form(subject, wording).text, items(subject), wording)


def true_captions(subject: Scene | Sound, config: WorldConfig) -> set[str]:
    """Everything the grammar can truly say of all of `subject`. A negative must not be among them."""
    masks: list[tuple[bool, ...]] = [()]
    for may in _may_mention(subject, config):
        masks = [(*mask, said) for mask in masks for said in ((False, True) if may else (False,))]
    return {say(subject, Wording(form, mask)) for form in _forms(subject, config) for mask in masks}


def foils(subject: Scene | Sound, wording: Wording, rng: np.random.Generator) -> dict[str, str]:
    """Wrong captions in the same wording, by kind; a kind is absent where it would be true.

    attribute: two things exchange colour or pitch. relation (scenes) and order (sounds): the relation word is
    inverted. swap: the first two things exchange places, so that the words stay the same.
    """
    things, form = items(subject), _form(subject, wording)
    wrong: dict[str, str] = {}
    mixed = [
        (i, j)
        for j in range(len(things))
        for i in range(j)
        if things[i].attribute != things[j].attribute and things[i].noun != things[j].noun
    ]
    if mixed:
        i, j = mixed[rng.integers(len(mixed))]
        exchanged = list(things)
        exchanged[i] = things[i]._replace(attribute=things[j].attribute)
        exchanged[j] = things[j]._replace(attribute=things[i].attribute)
        wrong["attribute"] = _fill(form.text, exchanged, wording)
    if form.wrong:
        kind = "relation" if isinstance(subject, Scene) else "order"
        wrong[kind] = _fill(form.wrong[rng.integers(len(form.wrong))], things, wording)
        wrong["swap"] = _fill(form.text, (things[1], things[0], *things[2:]), wording)
    return wrong


def _arrangement(subject: Scene | Sound) -> str:
    return subject.layout if isinstance(subject, Scene) else subject.order


def _all_forms(subject: Scene | Sound) -> tuple[Form, ...]:
    return FORMS[_arrangement(subject), len(subject.objects if isinstance(subject, Scene) else subject.events)]


def _form(subject: Scene | Sound, wording: Wording) -> Form:
    return _all_forms(subject)[wording.form]


def _forms(subject: Scene | Sound, config: WorldConfig) -> list[int]:
    free = config.mention_order == "free"
    return [index for index, form in enumerate(_all_forms(subject)) if free or form.canonical]


def _may_mention(subject: Scene | Sound, config: WorldConfig) -> tuple[bool, ...]:
    return (config.sizes, config.textures) if isinstance(subject, Scene) else (True,)


def _fill(text: str, things: Sequence[Item], wording: Wording) -> str:
    phrases = [_phrase(thing, wording.mentioned) for thing in things]
    return text.format(*(f"{_article(phrase)} {phrase}" for phrase in phrases), bare=phrases[0])


def _phrase(thing: Item, mentioned: Sequence[bool]) -> str:
    details = [word for word, said in zip(thing.details, mentioned, strict=True) if said]
    return " ".join([*details, thing.attribute, thing.noun])


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"
