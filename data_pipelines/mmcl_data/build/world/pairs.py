"""Which attribute-object pairs exist, which are kept from training, and how picture and sound correspond."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmcl.errors import ConfigError
from mmcl_data.build.world.config import WorldConfig

Split = Literal["train", "test", "classes"]
Source = Literal["image_text", "audio_text", "image_audio_text"]
SPLITS: tuple[Split, ...] = ("train", "test", "classes")
SOURCES: tuple[Source, ...] = ("image_text", "audio_text", "image_audio_text")
Words = tuple[str, str]
"""An attribute and its bearer: (colour, shape) or (pitch, timbre)."""

_HOLD_OUT = len(SPLITS)  # after the splits' own numbers, so that no sample shares these random numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A config and a seed with what follows from both for every sample."""

    config: WorldConfig
    seed: int
    held_out_image: tuple[Words, ...]
    """(colour, shape), never in training."""
    held_out_audio: tuple[Words, ...]
    """(pitch, timbre), never in training."""
    train: dict[Source, tuple[Words, ...]]
    """What training samples of a source are made of; (colour, shape) where there is an image."""
    everything: dict[Source, tuple[Words, ...]]
    """The same without anything held out, for the test split."""


def make_world(config: WorldConfig, seed: int) -> World:
    """Choose the held-out pairs and check that enough is left to train on.

    Raises:
        ConfigError: `held_out` leaves fewer different pairs than a sample may have objects.
    """
    image = [(colour, shape) for colour in config.colours for shape in config.shapes]
    audio = [(pitch, timbre) for pitch in config.pitches for timbre in config.timbres]
    rng = np.random.default_rng([seed, _HOLD_OUT])
    no_image = hold_out(config.colours, config.shapes, config.held_out, rng)
    no_audio = hold_out(config.pitches, config.timbres, config.held_out, rng)
    world = World(
        config=config,
        seed=seed,
        held_out_image=no_image,
        held_out_audio=no_audio,
        everything={"image_text": tuple(image), "audio_text": tuple(audio), "image_audio_text": tuple(image)},
        train={
            "image_text": tuple(p for p in image if p not in no_image),
            "audio_text": tuple(p for p in audio if p not in no_audio),
            "image_audio_text": tuple(p for p in image if p not in no_image and sound_of(p, config) not in no_audio),
        },
    )
    for source, pairs in world.train.items():
        different = {sound_of(p, config) for p in pairs} if source == "image_audio_text" else set(pairs)
        if len(different) < config.max_objects:
            raise ConfigError(
                f"held_out={config.held_out} leaves {len(different)} different pairs to train {source} on, and a "
                f"sample may need max_objects={config.max_objects}: lower held_out or raise num_shapes and num_colours"
            )
    return world


def sound_of(pair: Words, config: WorldConfig) -> Words:
    """The (pitch, timbre) that a (colour, shape) sounds like; where the vocabularies differ in size, it wraps."""
    colour, shape = config.colours.index(pair[0]), config.shapes.index(pair[1])
    return config.pitches[colour % config.num_pitches], config.timbres[shape % config.num_timbres]


def pick(
    pairs: Sequence[Words], count: int, rng: np.random.Generator, key: Callable[[Words], Words] = lambda pair: pair
) -> list[Words]:
    """`count` of `pairs`, no two with the same key: two alike would make "left of" true both ways."""
    chosen: dict[Words, Words] = {}
    for index in rng.permutation(len(pairs)):
        chosen.setdefault(key(pairs[index]), pairs[index])
        if len(chosen) == count:
            break
    return list(chosen.values())


def hold_out(
    attributes: Sequence[str], bearers: Sequence[str], share: float, rng: np.random.Generator
) -> tuple[Words, ...]:
    """Cells along shuffled diagonals of the table: no word loses many more of its pairs than another, none all."""
    flipped = len(bearers) > len(attributes)
    longer, shorter = (bearers, attributes) if flipped else (attributes, bearers)
    rows, columns = rng.permutation(list(longer)).tolist(), rng.permutation(list(shorter)).tolist()
    chosen = []
    for n in range(max(1, round(share * len(rows) * len(columns))) if share else 0):
        row, diagonal = n % len(rows), n // len(rows)
        cell = rows[row], columns[(row + diagonal) % len(columns)]
        chosen.append((cell[1], cell[0]) if flipped else cell)
    return tuple(sorted(chosen))
