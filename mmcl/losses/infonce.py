"""Symmetric InfoNCE over a global batch, each rank computing only its own rows.

    L = 1/2N sum_i [ -log softmax_j(s x_i.y_j)[i]  -log softmax_j(s y_i.x_j)[i] ]

CLIP, Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3. A rank holds n of the N rows, as many as it
happens to have, possibly none, and returns its share such that the mean over ranks is L: the convention of `dist`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses.rows import (
    HardNegatives,
    as_keys,
    dot,
    exact,
    relative,
    share,
    sum_with_negatives,
)
from mmcl.losses.tiles import Skip, log_sum_exp_and_own, means


def info_nce(  # noqa: PLR0913 (what composes, each by name)
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    same: Int[Tensor, "n k"] | None = None,
    weights: Float[Tensor, " n"] | None = None,
    smoothing: float = 0.0,
    teacher: Float[Tensor, "n t"] | None = None,
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How badly each x picks its y among all N, and each y its x. Collective when `shard` has several ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        same: ids of this rank's rows, k kinds of them, such as sample, caption and image. Rows that share an id are
            no negatives of each other (false negatives); ids below 0 match nothing.
        weights: how much each row counts, relative to the others; their mean over the global batch is made 1.
            GCL, Zhu et al. 2024, https://arxiv.org/abs/2404.08535.
        smoothing: the share of the target that is spread over all columns that count, own one included.
            Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7.
        teacher: unit vectors of the rows of x from a frozen or strong model. Targets of x become
            w_ij / sum_j w_ij with w_ij = (t_i.t_j + 1) / 2 in place of the own column alone; targets of y stay.
            CWCL, Srinivasa et al. 2023, https://arxiv.org/abs/2309.14580. The teacher gets no gradient.
        negatives: y-like embeddings that only serve as further columns of x, and never ask.

    Returns:
        world / N times the sum over this rank's rows; the mean over ranks is the loss of the global batch. With N = 0
        the result is 0 and every input still gets its (zero) gradient, so that no rank leaves a collective out.

    Raises:
        ConfigError: `smoothing` outside [0, 1), or `teacher` together with `same` or `smoothing`, which contradict it.
    """
    check_targets(smoothing, taught=teacher is not None, masked=same is not None)
    x, scale = exact(x, scale)
    keys = as_keys(y, shard)
    queries = scale * x
    rows, columns, own = log_sum_exp_and_own(queries, keys, same)
    of_row = of_column = own
    if smoothing:
        of_row, of_column = (torch.lerp(own, mean, smoothing) for mean in _means(queries, keys, same))
    if teacher is not None:
        of_row = _taught(queries, keys, teacher, shard)
    counted = torch.ones_like(rows) if weights is None else relative(weights, keys.counts, shard)
    total = (counted * (columns - of_row - of_column)).sum()
    return share(total + sum_with_negatives(rows, counted, queries, negatives, shard), keys.counts, shard) / 2


def check_targets(smoothing: float, *, taught: bool, masked: bool) -> None:
    """Raise `ConfigError` for targets that cannot be, or contradict each other."""
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing={smoothing}: expected a share of the target, 0 <= smoothing < 1")
    if taught and (masked or smoothing):
        raise ConfigError(
            "soft targets (teacher) give every column its target, so they cannot go with false negatives (same) or "
            "smoothing: leave those out"
        )


def _means(
    queries: Float[Tensor, "n d"], keys: Gathered, same: Int[Tensor, "n k"] | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean logit of each row and each column over what counts there. Collective, backward too.

    Where everything counts the mean of products is the product with the mean, and costs next to nothing.
    """
    if same is not None:
        return means(queries, keys, Skip(same=same))
    n = max(1, sum(keys.counts))
    return (
        dot(queries, keys.values.sum(0, keepdim=True) / n),
        dot(keys.values[keys.own], keys.shard.sum(queries.sum(0, keepdim=True)) / n),
    )


def _taught(
    queries: Float[Tensor, "n d"], keys: Gathered, teacher: Float[Tensor, "n t"], shard: Shard
) -> Float[Tensor, " n"]:
    """The mean logit of each row under the teacher's targets, sum_j w_ij q_i.y_j / sum_j w_ij. Collective.

    w_ij is linear in t_j, so that the sums over all columns are (t + 1, d + 1) numbers, and not (N, N).
    """
    with torch.autocast(queries.device.type, enabled=False):
        (taught,) = exact(teacher.detach())
        one = taught.new_ones(len(taught), 1)
        taught, values = torch.cat([taught, one], 1), torch.cat([keys.values[keys.own], one], 1)
        mixed = taught @ shard.sum(taught.T @ values)  # (n, d + 1): sum_j (t_i.t_j + 1) [y_j, 1]
        return dot(queries, mixed[:, :-1]) / mixed[:, -1].clamp(min=torch.finfo(mixed.dtype).eps)
