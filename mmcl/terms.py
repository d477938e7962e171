"""The terms that an objective can have: for each loss what of it a config says, and how it is called on one pair.

A term is off as long as none of its weights is positive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses import (
    Estimates,
    HardNegatives,
    Positives,
    dcl,
    global_contrast,
    hn_nce,
    individual_contrast,
    info_nce,
    mix,
    mixup,
    modular,
    multi_positive,
    mv_dhel,
    mv_info_nce,
    sigmoid,
)
from mmcl.losses.dcl import check_sigma
from mmcl.losses.hn_nce import check_hardness
from mmcl.losses.infonce import check_targets
from mmcl.tables import SampleTable
from mmcl.types import ID_KINDS, PAIRS, Embeddings, IdKind, Pair

Weights = dict[Pair, float]
Method = Literal["sogclr", "isogclr", "fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """One pair of modalities on this rank: what a term sees."""

    x: Float[Tensor, "n d"]
    keys: Gathered
    """The second side on all ranks."""
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None
    shard: Shard
    ids: Int[Tensor, "n k"]
    """Of these rows, a column for each of ID_KINDS."""
    same: Int[Tensor, "n k"] | None
    """The ids of which rows that share one are no negatives of each other."""
    negatives: HardNegatives | None
    """Of the second side, by rows of the pair."""
    positives: Positives | None
    """Likewise."""
    table: SampleTable | None
    """What the term keeps of every sample."""
    step: int
    """Of the run, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class PairTerm:
    """A loss on pairs of modalities."""

    masks: ClassVar[bool] = True
    """Whether false negatives can be left out of it."""

    weights: Weights = field(default_factory=dict)
    """Weight of each pair (`image_text`, `audio_text`, `image_audio`); one that is not named, or has 0, is left out."""

    def table(self) -> SampleTable | None:
        """What it keeps of every sample, at the start."""
        return None

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        """The term on one pair. Collective, backward too."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class InfoNCEConfig(PairTerm):
    """Symmetric InfoNCE, the loss of CLIP."""

    weights: Weights = field(default_factory=lambda: dict.fromkeys(PAIRS, 1.0))
    """Weight of each pair (`image_text`, `audio_text`, `image_audio`); one that is not named, or has 0, is left out."""
    smoothing: float = 0.0
    """Share of the target that is spread over all columns."""
    soft_targets: bool = False
    """CWCL: columns are targets of the first side by how near they are to it there; meant for a frozen first tower."""

    def __post_init__(self) -> None:
        check_targets(self.smoothing, taught=self.soft_targets, masked=False)

    def loss(self, side: Sides) -> Float[Tensor, ""]:
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
class DCLConfig(PairTerm):
    """Decoupled contrast: a row's own column is not in its denominator."""

    sigma: float = 0.0
    """0 is DCL; above it DCLW, where far pairs pull more (the paper takes 0.5)."""

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        return dcl(
            side.x, side.keys, side.scale, side.shard, sigma=self.sigma, same=side.same, negatives=side.negatives
        )


@dataclass(frozen=True, kw_only=True)
class HNNCEConfig(PairTerm):
    """InfoNCE whose negatives count by how hard they are."""

    alpha: float = 1.0
    """How much a row's own column counts in its denominator, from 0 to 1."""
    beta: float = 0.25
    """How much more harder negatives count; 0 is all alike."""

    def __post_init__(self) -> None:
        check_hardness(self.alpha, self.beta)

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        more = {"same": side.same, "negatives": side.negatives}
        return hn_nce(side.x, side.keys, side.scale, side.shard, alpha=self.alpha, beta=self.beta, **more)


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(PairTerm):
    """SigLIP: each pair of rows is a yes-or-no question. Needs `model.init_bias`, and wants `model.init_scale` 10."""

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        if side.bias is None:
            raise ConfigError("objective.sigmoid needs logit biases: set model.init_bias (SigLIP starts at -10)")
        more = {"same": side.same, "negatives": side.negatives}
        return sigmoid(side.x, side.keys, side.scale, side.bias, side.shard, **more)


@dataclass(frozen=True, kw_only=True)
class MultiPositiveConfig(PairTerm):
    """SupCon across modalities: rows of one group are right answers for each other."""

    masks: ClassVar[bool] = False

    groups: IdKind = "image"
    """What the rows of a group share: `sample`, `caption` or `image`."""

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        groups = side.ids[:, ID_KINDS.index(self.groups)]
        return multi_positive(side.x, side.keys, side.scale, side.shard, groups=groups, negatives=side.negatives)


@dataclass(frozen=True, kw_only=True)
class ModularConfig(PairTerm):
    """CompA's modular contrast: a row may have several right captions; without any it is InfoNCE."""

    masks: ClassVar[bool] = False

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        nobody = Positives(values=side.x[:0], rows=torch.zeros(0, dtype=torch.long, device=side.x.device))
        positives = side.positives or nobody
        return modular(side.x, side.keys, side.scale, side.shard, positives=positives, negatives=side.negatives)


@dataclass(frozen=True, kw_only=True)
class MixupConfig(PairTerm):
    """Mixed embeddings of the first side against clean ones of the second; hard negatives take no part."""

    masks: ClassVar[bool] = False

    alpha: float = 0.15
    """Shares are drawn from Beta(alpha, alpha): the smaller, the nearer to one of the two rows."""
    rows: float = 0.5
    """Share of the rows that are mixed at all."""

    def __post_init__(self) -> None:
        if self.alpha <= 0 or not 0 <= self.rows <= 1:
            raise ConfigError(
                f"objective.mixup: alpha={self.alpha} must be positive, and rows={self.rows} a share from 0 to 1"
            )

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        n, device = len(side.x), side.x.device
        alpha = torch.tensor(self.alpha, device=device)
        share = torch.distributions.Beta(alpha, alpha).sample((n,))
        share = torch.where(torch.rand(n, device=device) < self.rows, share, 1.0)
        other = torch.randperm(n, device=device)
        mixed = mix(side.x, share, other)
        return mixup(mixed, side.keys, side.scale, side.shard, share=share, other=other)


@dataclass(frozen=True, kw_only=True)
class GlobalContrastConfig(PairTerm):
    """SogCLR, iSogCLR, FastCLIP: each sample keeps an estimate of its denominator over the data, for small batches."""

    method: Method = "fastclip_v3"
    """`sogclr`, `isogclr` or `fastclip_v0` to `fastclip_v3`."""
    gamma: float = 0.2
    """How much of an estimate is of this batch; at the end, where it falls."""
    gamma_steps: int = 0
    """FastCLIP: steps in which it falls from 1 along a cosine; the authors take half of the run."""
    rho: float = 6.5
    """Of a learnt temperature (isogclr, fastclip_v2, fastclip_v3): the higher, the smaller it stays."""
    eps: float = 1e-14
    """Added to an estimate; larger ones (1e-6 with hundreds of millions of samples) steady it."""
    tau_lr: float = 0.01
    """Rate of the temperatures that each sample has of its own (isogclr, fastclip_v2). They start at 1 / scale of the
    pair, as it is when a sample is first seen."""
    tau_range: tuple[float, float] = (0.01, 1.0)
    """Where those stay."""

    @property
    def individual(self) -> bool:
        """Whether each sample has temperatures of its own."""
        return self.method in ("isogclr", "fastclip_v2")

    def __post_init__(self) -> None:
        where = "objective.global_contrast"
        if self.method not in get_args(Method):
            raise ConfigError(f"{where}.method={self.method!r}: expected one of {list(get_args(Method))}")
        falls = self.method.startswith("fastclip")
        if falls != (self.gamma_steps > 0) and any(weight > 0 for weight in self.weights.values()):
            raise ConfigError(
                f"{where}: method={self.method} with gamma_steps={self.gamma_steps}: gamma falls in FastCLIP, which "
                "needs gamma_steps, and stays in SogCLR (fastclip_v1) and iSogCLR (fastclip_v2), which have 0"
            )
        if not 0 < self.gamma <= 1 or self.rho < 0 or self.eps < 0 or self.tau_lr < 0:
            raise ConfigError(f"{where}: expected 0 < gamma <= 1, and rho, eps and tau_lr not negative, found {self}")
        low, high = self.tau_range
        if not 0 < low <= high:
            raise ConfigError(f"{where}.tau_range={self.tau_range}: expected two numbers, 0 < low <= high")

    def table(self) -> SampleTable:
        """By row and by column: the logarithm of the estimate; temperature, both its moments and how often it moved."""
        unknown = [-math.inf] * 2
        return SampleTable([*unknown, *[math.nan] * 2, *[0.0] * 5] if self.individual else unknown)

    def gamma_at(self, step: int) -> float:
        """FastCLIP, section 5.1: from 1 to `gamma` along a cosine."""
        if step >= self.gamma_steps:
            return self.gamma
        return self.gamma + (1 - self.gamma) * 0.5 * (1 + math.cos(math.pi * step / self.gamma_steps))

    def loss(self, side: Sides) -> Float[Tensor, ""]:
        assert side.table is not None
        ids, counts = side.ids[:, ID_KINDS.index("sample")], side.keys.counts
        kept = side.table.read(ids)
        gamma = self.gamma_at(side.step - 1)
        if self.individual:
            if side.negatives is not None:
                raise ConfigError(f"objective.global_contrast: method={self.method} does not take hard negatives")
            tau = torch.where(kept[:, 2:4].isnan(), 1 / side.scale.detach(), kept[:, 2:4])
            past = Estimates(log_u=kept[:, :2], tau=tau)
            more = {"gamma": gamma, "rho": self.rho, "eps": self.eps, "same": side.same}
            loss, now = individual_contrast(side.x, side.keys, side.shard, past=past, **more)
            assert now.tau_gradient is not None
            moved = self._moved(tau, now.tau_gradient, kept[:, 4:6], kept[:, 6:8], kept[:, 8:])
            rows = torch.cat([now.log_u, *moved], 1)
        else:
            scale = side.scale.detach() if self.method in ("sogclr", "fastclip_v1") else side.scale
            loss, now = global_contrast(
                side.x,
                side.keys,
                scale,
                side.shard,
                past=Estimates(log_u=kept),
                gamma=gamma,
                times_tau=self.method != "fastclip_v0",
                rho=self.rho if self.method == "fastclip_v3" else 0.0,
                eps=self.eps,
                same=side.same,
                negatives=side.negatives,
            )
            rows = now.log_u
        side.table.write(ids, rows, counts, side.shard)
        return loss

    def _moved(
        self,
        tau: Float[Tensor, "n 2"],
        gradient: Float[Tensor, "n 2"],
        first: Float[Tensor, "n 2"],
        second: Float[Tensor, "n 2"],
        times: Float[Tensor, "n 1"],
    ) -> Sequence[Tensor]:
        """Temperatures after a step of momentum (iSogCLR) or Adam (FastCLIP-v2), and what the next one needs."""
        gradient, times = gradient.float().clamp(-5, 5), times + 1
        if self.method == "isogclr":
            first = torch.lerp(first, gradient, 0.9)
            step = first
        else:
            first, second = torch.lerp(first, gradient, 0.1), torch.lerp(second, gradient.square(), 0.001)
            step = first / (1 - 0.9**times) / ((second / (1 - 0.999**times)).sqrt() + 1e-8)
        return (tau - self.tau_lr * step).clamp(*self.tau_range), first, second, times


@dataclass(frozen=True, kw_only=True)
class MultiViewConfig:
    """A loss over the three modalities of a row at once; its scale is the geometric mean of those of the pairs.

    Hard negatives take no part.
    """

    masks: ClassVar[bool] = False

    weight: float = 0.0
    """Weight of the term; 0 leaves it out."""

    def loss(self, embeddings: Embeddings, scale: Float[Tensor, ""], shard: Shard) -> Float[Tensor, ""]:
        """The term. Collective, backward too."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MVInfoNCEConfig(MultiViewConfig):
    """All modalities of a row against all embeddings."""

    def loss(self, embeddings: Embeddings, scale: Float[Tensor, ""], shard: Shard) -> Float[Tensor, ""]:
        return mv_info_nce(embeddings, scale, shard)


@dataclass(frozen=True, kw_only=True)
class MVDHELConfig(MultiViewConfig):
    """All modalities of a row together, and each modality spread out; not for retrieval by itself."""

    def loss(self, embeddings: Embeddings, scale: Float[Tensor, ""], shard: Shard) -> Float[Tensor, ""]:
        return mv_dhel(embeddings, scale, shard)
