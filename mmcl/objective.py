"""What a step minimises: a weighted sum of named terms, each one of the losses on one pair of modalities, or on all.

Terms are computed in a fixed order, and every rank computes all of them whatever rows it holds, so that all ranks meet
in the same collectives. A modality that serves several pairs is gathered once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Gathered, Shard
from mmcl.errors import CheckpointError, ConfigError
from mmcl.losses import HardNegatives, Positives
from mmcl.losses.infonce import check_targets
from mmcl.terms import (
    DCLConfig,
    GlobalContrastConfig,
    HNNCEConfig,
    InfoNCEConfig,
    MixupConfig,
    ModularConfig,
    MultiPositiveConfig,
    MultiViewConfig,
    MVDHELConfig,
    MVInfoNCEConfig,
    PairTerm,
    Sides,
    SigmoidConfig,
)
from mmcl.types import ID_KINDS, PAIRS, RIGHT, WRONG, Batch, Embeddings, IdKind, Learned, Modality, Pair

Negatives = Mapping[Modality, HardNegatives]
"""Hard negatives by the modality they are made of; their rows count among the rows of the batch."""
FurtherPositives = Mapping[Modality, Positives]
"""Likewise."""
NO_POSITIVES: FurtherPositives = {}


def negatives_in(outputs: Mapping[str, Tensor], batch: Batch) -> Negatives:
    """The hard negatives of a batch, given what the model made of its values."""
    found: dict[Modality, HardNegatives] = {}
    for modality, roles in batch.roles.items():
        wrong = roles == WRONG
        found[modality] = HardNegatives(
            values=outputs[modality][wrong], rows=batch.rows[modality][wrong], seen_by="all"
        )
    return found


def positives_in(outputs: Mapping[str, Tensor], batch: Batch) -> FurtherPositives:
    """The further positives of a batch, given what the model made of its values."""
    found: dict[Modality, Positives] = {}
    for modality, roles in batch.roles.items():
        right = roles == RIGHT
        found[modality] = Positives(values=outputs[modality][right], rows=batch.rows[modality][right])
    return found


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms of the loss. A term whose weights are empty or 0 is off."""

    info_nce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    """Softmax over the global batch, both ways."""
    dcl: DCLConfig = field(default_factory=DCLConfig)
    """Decoupled contrast."""
    hn_nce: HNNCEConfig = field(default_factory=HNNCEConfig)
    """Negatives that count by how hard they are."""
    sigmoid: SigmoidConfig = field(default_factory=SigmoidConfig)
    """SigLIP."""
    multi_positive: MultiPositiveConfig = field(default_factory=MultiPositiveConfig)
    """SupCon across modalities."""
    mixup: MixupConfig = field(default_factory=MixupConfig)
    """Mixtures of two rows."""
    global_contrast: GlobalContrastConfig = field(default_factory=GlobalContrastConfig)
    """SogCLR, iSogCLR, FastCLIP."""
    modular: ModularConfig = field(default_factory=ModularConfig)
    """CompA's modular contrast: several right captions."""
    mv_info_nce: MVInfoNCEConfig = field(default_factory=MVInfoNCEConfig)
    """All modalities of a row against all embeddings."""
    mv_dhel: MVDHELConfig = field(default_factory=MVDHELConfig)
    """All modalities of a row together, and each modality spread out."""
    false_negatives: list[IdKind] = field(default_factory=list)
    """Rows that share one of these (`sample`, `caption`, `image`) are no negatives of each other."""
    own_negatives: list[Pair] = field(default_factory=list)
    """Pairs in which a hard negative counts for its own row alone (CompA); in the others for every row (NegCLIP)."""

    def __post_init__(self) -> None:
        for name, term in self.terms():
            weights = _weights(term)
            wrong = {pair: weight for pair, weight in weights.items() if pair not in {*PAIRS, ""} or not weight >= 0}
            if wrong:
                raise ConfigError(
                    f"objective.{name}.weights={wrong}: expected {list(PAIRS)} with weights that are not negative"
                )
        active = {name: term for name, term, _, _ in self.active()}
        if not active:
            raise ConfigError(f"objective: no term has a positive weight; expected one for some of {list(PAIRS)}")
        if unknown := set(self.own_negatives) - set(PAIRS):
            raise ConfigError(f"objective.own_negatives={sorted(unknown)}: expected some of {list(PAIRS)}")
        if unknown := set(self.false_negatives) - set(ID_KINDS):
            raise ConfigError(f"objective.false_negatives={sorted(unknown)}: expected some of {list(ID_KINDS)}")
        check_targets(0.0, taught=self.info_nce.soft_targets, masked=bool(self.false_negatives))
        if self.false_negatives and (unmasked := [name for name, term in active.items() if not term.masks]):
            raise ConfigError(
                f"objective.false_negatives={self.false_negatives} has no meaning for {unmasked}: leave one of them out"
            )

    def terms(self) -> Iterator[tuple[str, PairTerm | MultiViewConfig]]:
        """Name and config of every kind of term."""
        for entry in fields(self):
            if isinstance(term := getattr(self, entry.name), PairTerm | MultiViewConfig):
                yield entry.name, term

    def active(self) -> Iterator[tuple[str, PairTerm | MultiViewConfig, Pair | None, float]]:
        """Kind, config, pair (or all, None) and weight of the terms that are computed, in their order."""
        for name, term in self.terms():
            weights = _weights(term)
            for pair in (*PAIRS, ""):
                if (weight := weights.get(pair, 0.0)) > 0:
                    yield name, term, pair or None, weight


def _weights(term: PairTerm | MultiViewConfig) -> Mapping[Pair | str, float]:
    """Weights of a term by pair; under no name if it is one for all of them."""
    return {"": term.weight} if isinstance(term, MultiViewConfig) else {**term.weights}


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
        self.step = 0
        """How often it was computed."""
        self.tables = {
            f"{name}_{pair}": table
            for name, term, pair, _ in config.active()
            if isinstance(term, PairTerm) and (table := term.table())
        }

    def terms(
        self,
        embeddings: Embeddings,
        learned: Learned,
        ids: Int[Tensor, "b k"],
        shard: Shard,
        negatives: Negatives,
        positives: FurtherPositives = NO_POSITIVES,
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        """Weight and value of each term by name, such as `info_nce_image_text`. Collective, backward too.

        Once for each step of a run, since it may learn from the batch.

        Args:
            embeddings: of this rank's rows.
            learned: scales and biases of the model.
            ids: of this rank's rows, a column for each of ID_KINDS.
            shard: this rank.
            negatives: hard negatives of this rank's rows, where the data has some; every rank gives the same
                modalities, if only with no rows.
            positives: likewise what is right for rows beside their own.
        """
        self.step += 1
        found: dict[str, tuple[float, Tensor]] = {}
        sides: dict[Pair, Sides] = {}
        gathers = Gathers(embeddings, shard)
        for name, term, pair, weight in self.config.active():
            if isinstance(term, MultiViewConfig) or pair is None:
                assert isinstance(term, MultiViewConfig)
                scale = torch.stack(list(learned.scales.values())).log().mean().exp()
                found[name] = weight, term.loss(embeddings, scale, shard)
                continue
            if pair not in sides:
                sides[pair] = self._sides(pair, gathers, learned, ids, negatives, positives)
            full = f"{name}_{pair}"
            found[full] = weight, term.loss(replace(sides[pair], table=self.tables.get(full)))
        return found

    def _sides(
        self,
        pair: Pair,
        gathers: Gathers,
        learned: Learned,
        ids: Int[Tensor, "b k"],
        negatives: Negatives,
        positives: FurtherPositives,
    ) -> Sides:
        first, second = PAIRS[pair]
        values, rows = gathers.embeddings.values, gathers.embeddings.rows
        x_has, y_has = gathers.embeddings.having(pair)
        own = rows[first][x_has]
        kinds = [ID_KINDS.index(kind) for kind in self.config.false_negatives]
        return Sides(
            x=values[first][x_has],
            keys=gathers.keys(second, y_has),
            scale=learned.scales[pair],
            bias=learned.biases.get(pair),
            shard=gathers.shard,
            ids=ids[own],
            same=ids[own][:, kinds] if kinds else None,
            negatives=self._negatives(pair, negatives[second], own) if second in negatives else None,
            positives=_of_rows(positives[second], own) if second in positives else None,
            table=None,
            step=self.step,
        )

    def _negatives(self, pair: Pair, negatives: HardNegatives, own: Int[Tensor, " n"]) -> HardNegatives:
        found = _of_rows(negatives, own)
        return replace(found, seen_by="own") if pair in self.config.own_negatives else found

    def state(self) -> dict[str, Tensor]:
        """What it keeps from step to step, the same on all ranks."""
        if not self.tables:
            return {}
        return {"step": torch.tensor(self.step), **{name: table.values for name, table in self.tables.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Back to a saved state.

        Raises:
            CheckpointError: it is that of another objective.
        """
        if state.keys() != (expected := self.state().keys()):
            raise CheckpointError(
                f"the checkpoint holds {sorted(state)} of an objective, this run keeps {sorted(expected)}: resume with "
                "the objective that was saved"
            )
        if state:
            self.step = int(state["step"])
            for name, table in self.tables.items():
                table.load(state[name])


Beside = TypeVar("Beside", HardNegatives, Positives)


def _of_rows(beside: Beside, rows: Int[Tensor, " n"]) -> Beside:
    """Those of some rows of the batch, by their place among these."""
    kept = torch.isin(beside.rows, rows)
    return replace(beside, values=beside.values[kept], rows=torch.searchsorted(rows, beside.rows[kept]))
