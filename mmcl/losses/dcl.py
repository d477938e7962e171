"""Decoupled contrastive loss, cross-modal: a row's own column pulls, but takes no part in what pushes.

    L = 1/2N sum_i [ -2 w_i s x_i.y_i + log sum_{j != i} exp(s x_i.y_j) + log sum_{j != i} exp(s y_i.x_j) ]

DCL, Yeh et al. 2022, https://arxiv.org/abs/2110.06848: w_i = 1. DCLW, there too:
w_i = 2 - exp(x_i.y_i / sigma) / mean_k exp(x_k.y_k / sigma), without a gradient. The paper has two views of one
modality and also takes the negatives of a view from among its own kind; here they are those of the other side.

The loss can be negative. In InfoNCE a row that is right already has next to no gradient, because its own column is most
of the denominator; here it goes on pushing, which helps small batches and never lets go.

A rank holds n of the N rows, possibly none, and returns its share such that the mean over ranks is L.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses.rows import HardNegatives, as_keys, dot, exact, log_sum_exp_of_others, share


def dcl(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    sigma: float = 0.0,
    same: Int[Tensor, "n k"] | None = None,
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How near each x is to its y, and how far both are from all others. Collective when `shard` has several ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        sigma: 0 is DCL. Above 0 it is DCLW: rows whose pair is far apart pull more, the more so the smaller sigma is;
            the mean weight over the global batch is 1. The paper takes 0.5.
        same: ids of this rank's rows, k kinds of them. Rows that share an id are no negatives of each other (false
            negatives); ids below 0 match nothing.
        negatives: y-like embeddings that only serve as further columns of x, and never ask.

    Returns:
        world / N times the sum over this rank's rows; the mean over ranks is the loss of the global batch. A row
        without any negative (N = 1, or all of them masked) has nothing to be told from: it adds 0 in that direction,
        without a gradient, and counts in N. Its cosine still takes part in the mean of the weights.

    Raises:
        ConfigError: `sigma` below 0.
    """
    check_sigma(sigma)
    x, scale = exact(x, scale)
    keys = as_keys(y, shard)
    queries = scale * x
    cosines = dot(x, keys.values[keys.own])
    own = scale * cosines
    if sigma:
        own = own * _weights(cosines.detach() / sigma, sum(keys.counts), shard)
    sides = torch.stack(log_sum_exp_of_others(queries, keys, same, negatives))
    losses = torch.where(sides > -torch.inf, sides - own, 0.0).sum(0)
    return share(losses, keys.counts, shard) / 2


def check_sigma(sigma: float) -> None:
    """Raise `ConfigError` for a sigma that cannot be."""
    if not sigma >= 0:
        raise ConfigError(f"sigma={sigma}: expected 0 for DCL, or more for DCLW (the paper takes 0.5)")


def _weights(logits: Float[Tensor, " n"], total: int, shard: Shard) -> Float[Tensor, " n"]:
    """2 - exp(l_i) / mean exp(l), by logarithms: a small sigma overflows otherwise. Collective."""
    mean = shard.log_sum_exp(logits.logsumexp(0, keepdim=True)) - math.log(max(1, total))
    return 2 - (logits - mean).exp()
