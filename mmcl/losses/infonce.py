"""Symmetric InfoNCE over a global batch, each rank computing only its own rows.

    L = 1/2N sum_i [ -log softmax_j(s x_i.y_j)[i]  -log softmax_j(s y_i.x_j)[i] ]

CLIP, Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3. A rank holds n of the N rows, as many as it
happens to have, possibly none, and returns its share such that the mean over ranks is L: the convention of `dist`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmcl.dist import ONE_PROCESS, Shard, rows_of


def info_nce(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
) -> Float[Tensor, ""]:
    """How badly each x picks its y among all N, and each y its x. Collective when `shard` has several ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.

    Returns:
        world / N times the sum over this rank's rows; the mean over ranks is the loss of the global batch. With N = 0
        the result is 0 and every input still gets its (zero) gradient, so that no rank leaves a collective out.
    """
    counts = shard.counts(len(x), x.device)
    every_x, every_y = shard.gather(x, counts), shard.gather(y, counts)
    with torch.autocast(x.device.type, enabled=False):
        x, y, every_x, every_y, scale = (value.float() for value in (x, y, every_x, every_y, scale))
        total = sum(counts)
        if total == 0:
            return (every_x.sum() + every_y.sum()) * scale * 0.0
        target = rows_of(shard, counts, x.device)
        x_to_y = scale * x @ every_y.T  # (n, N)
        y_to_x = scale * y @ every_x.T  # (n, N)
        losses = cross_entropy(x_to_y, target, reduction="sum") + cross_entropy(y_to_x, target, reduction="sum")
        return losses * (shard.world / (2 * total))
