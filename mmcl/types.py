"""The values that travel between the packages, and the seams at which parts are swapped.

Shape letters, here and everywhere: `b` rows of a batch on this rank, `n` rows that have a modality, `d` embedding
size, `l` tokens of a caption, `h w` pixels, `t` samples of a sound. A batch is ragged by modality: a row may lack an
image, a caption or a sound, and a tower only ever sees the rows that have what it reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Modality = Literal["image", "text", "audio"]
Pair = Literal["image_text", "audio_text", "image_audio"]
MODALITIES: tuple[Modality, ...] = ("image", "text", "audio")
IdKind = Literal["sample", "caption", "image"]
ID_KINDS: tuple[IdKind, ...] = ("sample", "caption", "image")
"""What the ids of a row tell apart."""
OWN, WRONG, RIGHT = 0, 1, 2
"""What a value is to the row that it belongs to."""
PAIRS: dict[Pair, tuple[Modality, Modality]] = {
    "image_text": ("image", "text"),
    "audio_text": ("audio", "text"),
    "image_audio": ("image", "audio"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """What a model reads: data is decoded to exactly this."""

    image_size: int
    """Side of the square image in pixels."""
    resize_mode: Literal["shortest", "longest", "squash"]
    """As open_clip's: crop the longer side, pad the shorter one, or ignore the aspect."""
    sample_rate: int
    """Of sounds, in Hz."""
    clip_samples: int
    """Length of a sound in samples: longer ones are cut, shorter ones padded with silence."""
    context_length: int
    """Tokens of a caption, start and end included."""

    def nothing(self) -> "dict[Modality, Tensor]":
        """What a batch holds of each modality when no row has any: tensors of no rows."""
        return {
            "image": torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8),
            "text": torch.zeros(0, self.context_length, dtype=torch.long),
            "audio": torch.zeros(0, self.clip_samples),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of a batch on one rank, ragged by modality."""

    size: int
    """Number of rows, whatever they hold."""
    values: Mapping[Modality, Tensor]
    """image: uint8 (n, 3, h, w); text: int64 tokens (n, l); audio: float32 waveforms in [-1, 1], (n, t).
    Every modality is there, if only with n = 0."""
    rows: Mapping[Modality, Int[Tensor, " n"]]
    """For each modality the row that each of its values belongs to, ascending; several values may be of one row, of
    which at most one is its own."""
    ids: Int[Tensor, "b k"]
    """A column for each of ID_KINDS: the number of the sample in the data, which never changes; hashes of the caption
    and of the image, -1 where there is none. Equal ids are equal things."""
    seeds: Int[Tensor, " b"]
    """What is random about a row follows from its seed: another one for the same sample in another epoch."""
    roles: Mapping[Modality, Int[Tensor, " n"]] = field(default_factory=dict)
    """What each value is to its row: `OWN`, `WRONG` (a hard negative) or `RIGHT` (a further positive). A modality that
    is not named has own values only. The same modalities on all ranks, whatever rows they hold."""
    keys: tuple[str, ...] = ()
    """Where each row came from, `shard#key`."""
    facts: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """The json member of each row."""
    skipped: int = 0
    """Samples that belonged here and could not be used; others took their places."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return replace(
            self,
            values={name: value.to(device, non_blocking=True) for name, value in self.values.items()},
            rows={name: rows.to(device, non_blocking=True) for name, rows in self.rows.items()},
            ids=self.ids.to(device, non_blocking=True),
            seeds=self.seeds.to(device, non_blocking=True),
            roles={name: roles.to(device, non_blocking=True) for name, roles in self.roles.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """A batch in the shared space: unit vectors, ragged by modality like the batch."""

    values: Mapping[Modality, Float[Tensor, "n d"]]
    rows: Mapping[Modality, Int[Tensor, " n"]]

    def pair(self, pair: Pair) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Both sides of `pair`, for the rows that have both, in the same order."""
        x, y = PAIRS[pair]
        x_has, y_has = self.having(pair)
        return self.values[x][x_has], self.values[y][y_has]

    def having(self, pair: Pair) -> tuple[Bool[Tensor, " x"], Bool[Tensor, " y"]]:
        """Which values of either side of `pair` are of rows that have both."""
        x, y = PAIRS[pair]
        return torch.isin(self.rows[x], self.rows[y]), torch.isin(self.rows[y], self.rows[x])


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What a model learns beside its towers."""

    scales: Mapping[Pair, Float[Tensor, ""]]
    """Logit scales, 1 / temperature."""
    biases: Mapping[Pair, Float[Tensor, ""]] = field(default_factory=dict)
    """Logit biases, where the model has any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One figure of an evaluation, with what is needed to judge it."""

    value: float
    n: int
    """Number of decisions it is a mean of."""
    chance: float
    """What a model that knows nothing reaches."""
    low: float
    high: float
    """Ends of the 95 % interval."""


class Stream(Protocol):
    """Training data in an order that can be gone on with anywhere."""

    def batches(self) -> Iterator[Batch]:
        """This rank's rows of the global batches from where the stream stands, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: behind the batch that was given last. JSON, the same on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            CheckpointError: the order is not the one of the state; names what changed.
        """
        ...

    def judge(self, skipped: int, rows: int) -> None:
        """Told on all ranks alike, now and then: since the last time so many samples were skipped for so many rows.

        Raises:
            TooManyBadSamples: that is too many to go on.
        """
        ...


class Encoder(Protocol):
    """A model as evaluations see it. No gradients; results on the CPU in float32."""

    def embed(self, batch: Batch) -> Embeddings:
        """Unit embeddings of whatever the batch holds."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit embeddings of captions, (len(texts), d)."""
        ...


class Evaluator(Protocol):
    """A benchmark: yields named scores of an encoder. All ranks run it, on the same data."""

    @property
    def name(self) -> str: ...

    def run(self, encoder: Encoder) -> Iterator[tuple[str, Score]]: ...
