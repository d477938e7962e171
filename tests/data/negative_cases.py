"""A reader that never sees the picture, and captions for it."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmcl_data.build.world import Scene, Sound, WorldConfig, choose, make_world, say
from mmcl_data.build.world.pairs import World
from mmcl_data.build.world.samples import Job, _describe, _rng
from mmcl_data.negatives.edits import article
from mmcl_data.negatives.parsing import WORD

Pairs = Sequence[tuple[str, str]]
"""(caption, negative)."""


def blind_accuracy(train: Pairs, test: Pairs, decay: float = 1e-3, steps: int = 200) -> float:
    """The share of held-out pairs in which a linear reader of 1- to 3-grams, as written, finds the negative.

    It is trained on differences, sees both texts of a pair together, and a tie counts half: no logistic regression that
    judges single texts could separate pairs better.
    """
    counts = Counter(gram for pair in train for text in pair for gram in set(_grams(text)))
    numbers = {gram: place for place, gram in enumerate(sorted(g for g, count in counts.items() if count > 1))}
    rows, held = _differences(train, numbers), _differences(test, numbers)
    weights = torch.zeros(len(numbers), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = softplus(-(rows @ weights)).mean() + decay * weights.square().sum()
        loss.backward()
        optimizer.step()
    scores = (held @ weights.detach()).double().round(decimals=5)
    return ((scores > 0).double() + 0.5 * (scores == 0).double()).mean().item()


def split(pairs: Pairs, fold: int = 0, folds: int = 2) -> tuple[Pairs, Pairs]:
    """Train and test, so that all pairs of a caption are on one side."""
    captions = {caption: place for place, caption in enumerate(dict.fromkeys(caption for caption, _ in pairs))}
    held = [captions[caption] % folds == fold for caption, _ in pairs]
    sides = {side: [pair for pair, out in zip(pairs, held, strict=True) if out is side] for side in (False, True)}
    return sides[False], sides[True]


def world_captions(count: int, max_objects: int = 2) -> tuple[World, list[tuple[Scene | Sound, str]]]:
    """Scenes and sounds of the training split, half each, with what one says of them."""
    world, made = make_world(WorldConfig(max_objects=max_objects), seed=0), []
    for source, index in itertools.product(("image_text", "audio_text"), range(count // 2)):
        job = Job("train", source, index)
        rng = _rng(world, job)
        content = _describe(world, job, rng)
        subject = content.scene or content.sound
        made.append((subject, say(subject, choose(subject, world.config, rng))))
    return world, made


ANIMALS = ("dog", "cat", "horse", "cow", "pig", "goat", "elephant", "owl", "duck")
THINGS = ("car", "bus", "truck", "train", "bicycle", "umbrella", "ball", "apple", "orange", "table", "bench")
COLOURS = ("white", "black", "red", "brown", "blue", "green", "orange", "yellow")
PEOPLE = ("man", "woman", "boy", "girl", "baby")
MANNERS = ("loudly", "quietly", "slowly", "quickly")
RELATIONS = ("in front of", "behind", "left of", "right of", "above", "below", "next to", "near")
DOES = ("sits", "stands", "walks", "runs")
SAYS = ("talks", "sings", "laughs", "cries", "coughs")
CALLS = ("barks", "meows", "growls", "howls")
TIMES = ("while", "before", "after")


def made_captions(count: int) -> list[str]:
    """Captions of many kinds, by a grammar of their own; the first words of a list are frequent, the last ones rare."""
    rng = np.random.default_rng(0)

    def one(*lists: tuple[str, ...]) -> str:
        words = lists[rng.integers(len(lists))]
        weights = 1 / np.arange(1.5, len(words) + 1)
        return words[rng.choice(len(words), p=weights / weights.sum())]

    def named(*lists: tuple[str, ...]) -> str:
        chance, colour = rng.random(), one(COLOURS)
        second = one(tuple(word for word in COLOURS if word != colour))
        like = "" if chance < 0.4 else f"{colour} " if chance < 0.8 else f"{colour} and {second} "
        phrase = like + one(*lists)
        return f"{article(phrase)} {phrase}"

    def picture() -> str:
        return f"{named(ANIMALS, PEOPLE)} {one(DOES)} {one(RELATIONS)} {named(THINGS, ANIMALS)}"

    def things() -> str:
        more = f" and {named(THINGS)}" if rng.random() < 0.5 else ""
        return f"{named(PEOPLE)} with {named(THINGS)}{more}"

    def many() -> str:
        number, other = one(("two", "three", "four")), one(("two", "three", "four"))
        return f"{number} {one(ANIMALS[:4])}s behind {other} {one(COLOURS)} {one(ANIMALS[:4], PEOPLE[2:4])}s"

    def sound() -> str:
        second = f"{named(PEOPLE, ANIMALS)} {one(SAYS, CALLS)} {one(MANNERS)}"
        first = f"{named(ANIMALS)} {one(CALLS, SAYS)} {one(MANNERS)}"
        return f"{first} {one(TIMES)} {second}" if rng.random() < 0.7 else f"{second} {one(TIMES)} {first}"

    made = [(picture, things, many, sound)[number % 4]() for number in range(count)]
    return [f"{text[0].upper()}{text[1:]}." for text in made]


def _grams(text: str) -> list[str]:
    """As written, with the spaces before words: NegCLIP's leak is there."""
    tokens = ["", *(text[a:b] for a, b in _with_spaces(text)), ""]
    return [" ".join(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1)]


def _with_spaces(text: str) -> list[tuple[int, int]]:
    """Spans of words, and of signs with the space before them."""
    spans = [match.span() for match in WORD.finditer(text)]
    return [(a - (a > 0 and text[a - 1] == " " and not text[a].isalnum()), b) for a, b in spans]


def _differences(pairs: Pairs, numbers: dict[str, int]) -> Tensor:
    rows = torch.zeros(len(pairs), len(numbers))
    for row, pair in enumerate(pairs):
        for text, sign in zip(pair, (1.0, -1.0), strict=True):
            for gram in _grams(text):
                if gram in numbers:
                    rows[row, numbers[gram]] += sign
    return rows
