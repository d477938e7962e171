"""What training changes of a sample before a model reads it, drawn from the sample's own seed and nothing else.

Here is what has to happen while a sample is decoded: which part of an image and of a sound is read, and which words of
a caption are kept. What can be done to whole batches on their device is in `mmcl.augment`.

"Improved baselines for vision-language pre-training", Fini et al. 2023, https://arxiv.org/abs/2305.08675, has
`scale=[0.5, 1]` for images, and for captions stop words dropped with 0.8, two words swapped with 0.4 and words dropped
with 0.2 (EDA, Wei and Zou 2019, https://arxiv.org/abs/1901.11196). Its synonyms need a thesaurus and are left out.
"""

import math
import re
from dataclasses import dataclass

from mmcl.errors import ConfigError
from mmcl_data.order import mix, uniform

_IMAGE, _SOUND, _WORDS = 1, 2, 3
"""What a draw is for, so that one sample's choices do not go together."""

STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "out",
        "she",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "too",
        "up",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "will",
        "with",
        "you",
        "your",
    ]
)

_TOKEN = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image, whatever its size: share of the area, logarithm of width over height, and where it lies."""

    area: float
    log_ratio: float
    left: float
    top: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the part of an image of that size; as large as fits where it would not fit."""
        ratio = math.exp(self.log_ratio)
        wide = math.sqrt(width * height * self.area * ratio)
        shrink = max(1.0, wide / width, wide / ratio / height)
        w, h = (max(1, min(most, round(side / shrink))) for side, most in ((wide, width), (wide / ratio, height)))
        left, top = round(self.left * (width - w)), round(self.top * (height - h))
        return left, top, left + w, top + h


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Which part of an image and of a long sound is seen."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Share of an image's area, drawn between these: random resized crop. [1, 1] is off: the whole image, as
    `model.resize_mode` says."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Width over height of that part, drawn between these on a logarithmic scale."""
    sound: bool = True
    """Sounds longer than a clip are cut at a random place; else in the middle."""

    def __post_init__(self) -> None:
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ConfigError(f"data.decode.crop.{name}={[low, high]}: expected 0 < low <= high <= {most:g}")

    def box(self, seed: int) -> Box | None:
        """The part of an image that the sample of this seed shows."""
        if self.scale == (1.0, 1.0):
            return None
        area, ratio, left, top = uniform(mix(seed, _IMAGE), 4)
        low, high = (math.log(bound) for bound in self.ratio)
        return Box(self.scale[0] + area * (self.scale[1] - self.scale[0]), low + ratio * (high - low), left, top)

    def place(self, seed: int) -> float:
        """Where in a long sound a clip begins, in [0, 1)."""
        return uniform(mix(seed, _SOUND), 1)[0] if self.sound else 0.5


@dataclass(frozen=True, kw_only=True)
class Words:
    """How captions are worn down. Swaps unlearn order: not beside negatives that teach it."""

    stop_words: float = 0.0
    """Chance of each stop word to be dropped."""
    swap: float = 0.0
    """Chance of a caption that two of its words change places."""
    drop: float = 0.0
    """Chance of each word to be dropped."""

    def __post_init__(self) -> None:
        for name in ("stop_words", "swap", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.decode.words.{name}={getattr(self, name)}: expected a chance from 0 to 1")

    def changed(self, caption: str, seed: int) -> str:
        """The caption of the sample of this seed; never without a word."""
        if not (self.stop_words or self.swap or self.drop):
            return caption
        words = _TOKEN.findall(caption)
        chances = uniform(mix(seed, _WORDS), 2 * len(words) + 3)
        kept = [
            word
            for word, stop, drop in zip(words, chances[3::2], chances[4::2], strict=True)
            if not (stop < self.stop_words and word.casefold() in STOP_WORDS) and drop >= self.drop
        ]
        if chances[0] < self.swap and len(kept) > 1:
            first = int(chances[1] * len(kept))
            second = (first + 1 + int(chances[2] * (len(kept) - 1))) % len(kept)
            kept[first], kept[second] = kept[second], kept[first]
        return " ".join(kept) or caption
