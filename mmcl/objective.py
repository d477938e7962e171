"""What a step minimises: a weighted sum of named terms, each one of the losses on one pair of modalities.

Terms are computed in a fixed order, and every rank computes all of them whatever rows it holds, so that all ranks meet
in the same collectives. A modality that serves several pairs is gathered once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses import HardNegatives, info_nce
from mmcl.types import ID_KINDS, PAIRS, Embeddings, IdKind, Learned, Modality, Pair

Weights = dict[Pair, float]
Negatives = Mapping[Modality, HardNegatives]
"""Hard negatives by the modality they are made of; their rows count among the rows of the batch."""


@dataclass(frozen=True, kw_only=True)
class InfoNCEConfig:
    """Symmetric InfoNCE, the loss of CLIP."""

    weights: Weights = field(default_factory=lambda: dict.fromkeys(PAIRS, 1.0))
    """Weight of each pair; a pair that is not named, or has 0, is left out."""
    smoothing: float = 0.0
    """Share of the target that is spread over all columns."""
    soft_targets: bool = False
    """CWCL: columns are targets of the first side by how near they are to it there; meant for a frozen first tower."""

    def loss(self, side: "Sides") -> Float[Tensor, ""]:
        """This term on one pair."""
        return info_nce(
            side.x,
            side.keys,
            side.scale,
            side.shard,
            same=side.same,
            smoothing=self.smoothing,
            teacher=side.x if self.soft_targets else None,
            negatives=side.negatives,
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms of the loss. A term whose weights are empty is off."""

    info_nce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    """Softmax over the global batch, both ways."""
    false_negatives: list[IdKind] = field(default_factory=list)
    """Rows that share one of these (`sample`, `caption`, `image`) are no negatives of each other."""

    def __post_init__(self) -> None:
        if not any(True for _ in self.active()):
            raise ConfigError(f"objective: no term has a positive weight; expected one for some of {list(PAIRS)}")
        for name, term in self.by_pair():
            wrong = {pair: weight for pair, weight in term.weights.items() if pair not in PAIRS or weight < 0}
            if wrong:
                raise ConfigError(
                    f"objective.{name}.weights={wrong}: expected {list(PAIRS)} with weights that are not negative"
                )
        if unknown := set(self.false_negatives) - set(ID_KINDS):
            raise ConfigError(f"objective.false_negatives={sorted(unknown)}: expected some of {list(ID_KINDS)}")

    def by_pair(self) -> Iterator[tuple[str, Any]]:
        """Name and config of every kind of term that is a loss of one pair."""
        for entry in fields(self):
            if hasattr(term := getattr(self, entry.name), "weights"):
                yield entry.name, term

    def active(self) -> Iterator[tuple[str, Any, Pair, float]]:
        """Kind, config, pair and weight of the terms that are computed, in their order."""
        for name, term in self.by_pair():
            for pair in PAIRS:
                if (weight := term.weights.get(pair, 0.0)) > 0:
                    yield name, term, pair, weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """One pair of modalities on this rank: what a term sees."""

    pair: Pair
    x: Float[Tensor, "n d"]
    keys: Gathered
    """The second side on all ranks."""
    scale: Float[Tensor, ""]
    shard: Shard
    ids: Int[Tensor, "n k"]
    """Of these rows, a column for each of ID_KINDS."""
    same: Int[Tensor, "n k"] | None
    """The ids of which rows that share one are no negatives of each other."""
    negatives: HardNegatives | None
    """Of the second side, by rows of the pair."""


class Gathers:
    """The pairs of a batch of embeddings, with one gather for each modality that is a second side. Collective."""

    def __init__(self, embeddings: Embeddings, shard: Shard) -> None:
        self.embeddings, self.shard = embeddings, shard
        self.every: dict[Modality, Gathered] = {}

    def keys(self, modality: Modality, has: Tensor) -> Gathered:
        """Of the rows of all ranks those that have the other side too; `has` says which of this rank's."""
        if modality not in self.every:
            self.every[modality] = self.shard.gather(self.embeddings.values[modality])
        every = self.every[modality]
        kept = self.shard.gather_like(has.to(torch.uint8), every.counts).bool()
        counts = tuple(int(part.sum()) for part in kept.split(list(every.counts)))
        return every if counts == every.counts else Gathered(every.values[kept], counts, self.shard)


class Objective:
    """The sum of terms that a config names. What it keeps from step to step is part of a checkpoint."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def terms(
        self, embeddings: Embeddings, learned: Learned, ids: Int[Tensor, "b k"], shard: Shard, negatives: Negatives
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        """Weight and value of each term by name, such as `info_nce_image_text`. Collective, backward too.

        Args:
            embeddings: of this rank's rows.
            learned: scales and biases of the model.
            ids: of this rank's rows, a column for each of ID_KINDS.
            shard: this rank.
            negatives: hard negatives of this rank's rows, where the data has some.
        """
        found: dict[str, tuple[float, Tensor]] = {}
        sides: dict[Pair, Sides] = {}
        gathers = Gathers(embeddings, shard)
        for name, term, pair, weight in self.config.active():
            if pair not in sides:
                sides[pair] = self._sides(pair, gathers, learned, ids, negatives)
            found[f"{name}_{pair}"] = weight, term.loss(sides[pair])
        return found

    def _sides(
        self, pair: Pair, gathers: Gathers, learned: Learned, ids: Int[Tensor, "b k"], negatives: Negatives
    ) -> Sides:
        first, second = PAIRS[pair]
        values, rows = gathers.embeddings.values, gathers.embeddings.rows
        x_has, y_has = torch.isin(rows[first], rows[second]), torch.isin(rows[second], rows[first])
        own = rows[first][x_has]
        kinds = [ID_KINDS.index(kind) for kind in self.config.false_negatives]
        return Sides(
            pair=pair,
            x=values[first][x_has],
            keys=gathers.keys(second, y_has),
            scale=learned.scales[pair],
            shard=gathers.shard,
            ids=ids[own],
            same=ids[own][:, kinds] if kinds else None,
            negatives=_of_rows(negatives[second], own) if second in negatives else None,
        )

    def state(self) -> dict[str, Tensor]:
        """What it keeps from step to step, the same on all ranks."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Back to a saved state."""
        if state:
            raise ConfigError(f"the checkpoint holds {sorted(state)[:3]} of an objective that this run does not have")


def _of_rows(negatives: HardNegatives, rows: Int[Tensor, " n"]) -> HardNegatives:
    """The hard negatives of some rows of the batch, by their place among these."""
    kept = torch.isin(negatives.rows, rows)
    place = torch.searchsorted(rows, negatives.rows[kept])
    return HardNegatives(values=negatives.values[kept], rows=place, seen_by=negatives.seen_by)
