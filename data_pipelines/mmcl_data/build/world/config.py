"""The settings of the world and the words it is made of.

The vocabulary, the number of objects and the mention order are settings because they decide what a plain CLIP can
learn. A setting `num_x` takes the first so many words.
"""

from dataclasses import dataclass
from typing import Literal

from mmcl.errors import ConfigError

Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "hexagon", "ring", "moon")
COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "green": (25, 150, 50),
    "blue": (30, 55, 210),
    "yellow": (245, 220, 30),
    "purple": (130, 35, 170),
    "orange": (250, 125, 10),
    "cyan": (40, 215, 225),
    "white": (250, 250, 250),
    "pink": (255, 130, 190),
    "brown": (105, 55, 20),
}
"""Far apart from each other and from the greys of the backgrounds."""
SIZES = ("large", "small")
TEXTURES = ("plain", "striped", "dotted")

TIMBRES = ("bell", "drum", "flute", "buzzer", "whistle", "organ", "guitar", "horn", "siren", "rattle")
PITCHES: dict[str, float] = {
    word: 150.0 * (1600 / 150) ** (step / 5)
    for step, word in enumerate(("deep", "low", "mid", "high", "bright", "shrill"))
}
"""Fundamental in Hz: equal steps of 1.6, about eight semitones, so that 64 mel bands keep neighbours apart."""
LOUDNESSES = ("loud", "quiet")

_RANGES: dict[str, tuple[float, float]] = {
    "num_shapes": (2, len(SHAPES)),
    "num_colours": (2, len(COLOURS)),
    "num_timbres": (2, len(TIMBRES)),
    "num_pitches": (2, len(PITCHES)),
    "min_objects": (1, 3),
    "max_objects": (1, 3),
    "image_size": (32, 512),
    "clip_seconds": (0.5, 30.0),
    "sample_rate": (8000, 48000),
    "held_out": (0.0, 0.5),
    "samples_per_shard": (1, 1_000_000),
}
_CHOICES = {"mention_order": ("free", "fixed"), "image_format": ("jpg", "png")}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """What the world is made of; with a seed it decides every byte."""

    num_shapes: int = 8
    """Of circle, square, triangle, star, cross, diamond, heart, hexagon, ring, moon."""
    num_colours: int = 8
    """Of red, green, blue, yellow, purple, orange, cyan, white, pink, brown."""
    num_timbres: int = 8
    """Of bell, drum, flute, buzzer, whistle, organ, guitar, horn, siren, rattle."""
    num_pitches: int = 6
    """Of deep, low, mid, high, bright, shrill."""
    min_objects: int = 1
    """Fewest objects of a training scene and events of a training sound. Test samples have `max_objects`."""
    max_objects: int = 2
    """Most objects of a scene and events of a sound, 1 to 3. Relations need 2."""
    mention_order: Literal["free", "fixed"] = "free"
    """fixed: the left, upper or earlier part is named first, so that the order of words gives the relation away."""
    sizes: bool = True
    """Objects are large or small and captions sometimes say so; otherwise all are large."""
    textures: bool = True
    """Objects are plain, striped or dotted and captions sometimes say so; otherwise all are plain."""
    image_size: int = 64
    """Side of the square images in pixels."""
    clip_seconds: float = 2.0
    """Length of every sound."""
    sample_rate: int = 16000
    """Of sounds, in Hz."""
    held_out: float = 0.125
    """Share of the (colour, shape) and of the (pitch, timbre) pairs that training never sees."""
    samples_per_shard: int = 1000
    """Samples in one tar."""
    image_format: Literal["jpg", "png"] = "jpg"
    """jpg has quality 90; png is lossless and larger."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}={value} is out of range: choose from {low} to {high}")
        for name, words in _CHOICES.items():
            if (value := getattr(self, name)) not in words:
                raise ConfigError(f"{name}={value!r} is unknown: choose one of {', '.join(words)}")
        if self.min_objects > self.max_objects:
            raise ConfigError(
                f"min_objects={self.min_objects} exceeds max_objects={self.max_objects}: lower it or raise max_objects"
            )

    @property
    def shapes(self) -> tuple[str, ...]:
        return SHAPES[: self.num_shapes]

    @property
    def colours(self) -> tuple[str, ...]:
        return tuple(COLOURS)[: self.num_colours]

    @property
    def timbres(self) -> tuple[str, ...]:
        return TIMBRES[: self.num_timbres]

    @property
    def pitches(self) -> tuple[str, ...]:
        return tuple(PITCHES)[: self.num_pitches]
