"""Contrast of mixtures: a mixed x is, in parts, the x of two rows, and its targets are the y of both.

    t_ij = l_i [j = i] + (1 - l_i) [j = o_i],      c_j = sum_i t_ij
    L = 1/2N [ -sum_ij t_ij log softmax_j(s x_i.y_j)[j]  -sum_ij t_ij / c_j log softmax_i(s x_i.y_j)[i] ]

M3CoL, Kumar et al. 2024, https://arxiv.org/abs/2409.17777. x_i is mixed of rows i and o_i in the shares l_i and
1 - l_i; y is not mixed. For training against shared relations: a sound of two events is near the captions of both.

Two deviations from the released code, https://github.com/RaghavSinghal10/M3CoL. The targets of a column add up to 1:
there they are the transposed targets of the rows, which add up to c_j, so that a row which is drawn as a partner often
counts often. And a row that is its own partner has the whole of its target, where there 1 - l_i takes the place of l_i.

A rank holds n of the N rows, possibly none, mixes rows of its own only, and returns its share such that the mean over
ranks is L.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.losses.rows import as_keys, dot, exact
from mmcl.losses.rows import share as share_of_mean
from mmcl.losses.tiles import log_sum_exp


def mix(x: Float[Tensor, "n d"], share: Float[Tensor, " n"], other: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Unit vectors between x_i and x[other_i], as new tensors: share_i x_i + (1 - share_i) x[other_i], normalised.

    This is manifold mixup, Verma et al. 2019, https://arxiv.org/abs/1806.05236, at the last layer: it mixes embeddings
    and not inputs, so that one forward pass gives both the clean and the mixed ones. Opposite vectors in equal shares
    give the zero vector.
    """
    x, share = exact(x, share)
    share = share[:, None]
    return normalize(share * x + (1 - share) * x[other], dim=-1)


def mixup(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    share: Float[Tensor, " n"],
    other: Int[Tensor, " n"],
) -> Float[Tensor, ""]:
    """How badly each mixed x picks the y of both its rows, and each y the x it is in. Collective if there are ranks.

    Args:
        x: unit vectors of this rank's rows, mixed already: of inputs, or by `mix`.
        y: unit vectors of the same rows, the other side, not mixed, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        share: from 0 to 1, how much of x_i is of its own row; it gets no gradient. All 1 is InfoNCE.
        other: which of this rank's rows the rest of x_i is of; may be i itself.

    Returns:
        A share whose mean over ranks is the loss of the global batch. A column that is nobody's target (its row has
        share 0 and is nobody's partner) adds 0, without a gradient, and counts in N.
    """
    x, scale, share = exact(x, scale, share.detach())
    keys = as_keys(y, shard)
    queries = scale * x
    values = keys.values[keys.own]
    rows, columns = log_sum_exp(queries, keys)
    own, partner = share * dot(queries, values), (1 - share) * dot(queries, values[other])
    target = share.index_add(0, other, 1 - share)
    some = target > 0
    pulls = own.index_add(0, other, partner) / target.masked_fill(~some, 1.0)
    losses = rows - own - partner + torch.where(some, columns - pulls, 0.0)
    return share_of_mean(losses, keys.counts, shard) / 2
