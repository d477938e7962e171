"""Sigmoid loss: every pair of the batch is its own yes-or-no question (SigLIP).

    L = 1/N sum_ij log( 1 + exp(-z_ij (s x_i.y_j + b)) ),      z_ij = 1 where j = i, and -1 elsewhere

SigLIP, Zhai et al. 2023, https://arxiv.org/abs/2303.15343. There s starts at 10 and b at -10, so that at first nearly
everything is said to be a no, as nearly everything is.

Nothing has to be normalised over rows or columns, so that one walk gives the loss and its gradients: three matrix
products where softmax losses take four. It is also why a rank needs no statistics of others.

A rank holds n of the N rows, possibly none, and returns its share such that the mean over ranks is L.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.losses.rows import HardNegatives, as_keys, dot, exact, share
from mmcl.losses.tiles import Skip, sum_of_softplus


def sigmoid(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    same: Int[Tensor, "n k"] | None = None,
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How badly each pair of an x and a y is told to belong together or not. Collective when `shard` has several ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        bias: the logit bias b.
        shard: this rank; ranks may hold different numbers of rows.
        same: ids of this rank's rows, k kinds of them. A pair of two rows that share an id is not asked about (false
            negatives); ids below 0 match nothing.
        negatives: y-like embeddings that belong to no x: further columns with z = -1.

    Returns:
        world / N times the sum over this rank's rows; the mean over ranks is the loss of the global batch.
    """
    x, scale, bias = exact(x, scale, bias)
    keys = as_keys(y, shard)
    queries = scale * x
    own = softplus(-dot(queries, keys.values[keys.own]) - bias).sum()
    total = own + sum_of_softplus(queries, keys, bias, Skip(own=True, same=same))
    if negatives is not None:
        total = total + _of_negatives(queries, bias, negatives, shard)
    return share(total, keys.counts, shard)


def _of_negatives(
    queries: Float[Tensor, "n d"], bias: Float[Tensor, ""], negatives: HardNegatives, shard: Shard
) -> Float[Tensor, ""]:
    """Collective if all rows see them."""
    (values,) = exact(negatives.values)
    if negatives.seen_by == "all":
        return sum_of_softplus(queries, shard.gather(values), bias)
    return softplus(dot(queries[negatives.rows], values) + bias).sum()
