"""Supervised contrast across modalities: all rows of a group are right answers for each other.

    L = -1/2N sum_i 1/|P(i)| sum_{p in P(i)} [ log softmax_j(s x_i.y_j)[p] + log softmax_j(s y_i.x_j)[p] ]

SupCon, Khosla et al. 2020, https://arxiv.org/abs/2004.11362, equation 2 (the sum outside the logarithm), with the other
modality as the contrast. P(i) is i and all rows of its group, such as the five captions of one image, which InfoNCE
would hold against each other. All positives stay in the denominator, as in the paper.

The positive logits of a row add up to one product with the sum of its group's keys, so that no (N, N) matrix of
positives is ever made.

A rank holds n of the N rows, possibly none, and a group may have rows on any ranks. A rank returns its share such that
the mean over ranks is L.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.losses.rows import HardNegatives, as_keys, dot, exact, share, sum_with_negatives
from mmcl.losses.tiles import log_sum_exp_and_own


def multi_positive(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    groups: Int[Tensor, " n"],
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How badly each x picks the y of its group among all N, and each y the x. Collective when `shard` has ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        groups: of this rank's rows; those of one group, on whatever rank, are positives of each other. Below 0: a row
            that is its own only positive. With no two alike, this is InfoNCE.
        negatives: y-like embeddings that only serve as further columns of x, and never ask.

    Returns:
        A share whose mean over ranks is the loss of the global batch; alone it is not that of this rank's rows, since
        the pull on a column is counted where its rows are.
    """
    x, scale = exact(x, scale)
    keys = as_keys(y, shard)
    queries = scale * x
    rows, columns, _ = log_sum_exp_and_own(queries, keys)
    positive = dot(queries, _means_of_groups(keys, groups, shard))
    # both directions pull at a pair of one group with the same 1/|P|, so over all ranks their sums are equal
    total = (columns - 2 * positive).sum()
    return (
        share(total + sum_with_negatives(rows, torch.ones_like(rows), queries, negatives, shard), keys.counts, shard)
        / 2
    )


def _means_of_groups(keys: Gathered, groups: Int[Tensor, " n"], shard: Shard) -> Float[Tensor, "n d"]:
    """The mean key of each row's group over all ranks. Collective."""
    every = shard.gather_like(groups.long(), keys.counts)
    lone = -1 - torch.arange(len(every), device=every.device)
    _, group = torch.where(every < 0, lone, every).unique(return_inverse=True)
    totals = torch.zeros_like(keys.values).index_add(0, group, keys.values)  # there are at most N groups
    sizes = torch.zeros_like(keys.values[:, 0]).index_add(0, group, torch.ones_like(keys.values[:, 0]))
    of_rows = group[keys.own]
    return totals[of_rows] / sizes[of_rows, None]
