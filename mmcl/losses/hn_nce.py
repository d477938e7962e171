"""InfoNCE whose negatives count by how hard they are (HN-NCE).

    L = 1/2N sum_i [ -s_ii + log( alpha exp(s_ii) + sum_{j in J_i} w_ij exp(s_ij) )  + the same over columns ]
    w_ij = |J_i| exp(beta s_ij) / sum_{k in J_i} exp(beta s_ik),      s_ij = s x_i.y_j,      J_i = all j != i that count

DiHT, Radenovic et al. 2023, https://arxiv.org/abs/2301.02280. alpha = 1 with beta = 0 is InfoNCE, alpha = 0 decoupled
(DCL where beta = 0 too). The paper adds up both directions; this is their mean, like every loss here.

All of it is done on logarithms, where the weighted sum is a difference of two plain ones:

    log sum_j w_ij exp(s_ij) = log |J_i| + log sum_j exp((1 + beta) s_ij) - log sum_j exp(beta s_ij)

so that scale 100 overflows nothing, and w_ij has its normaliser in its own row, or in its own column for the other
direction. The weights have their gradient: the paper does not say that they are constants.

A rank holds n of the N rows, possibly none, and returns its share such that the mean over ranks is L.
"""

import math

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
    log_add,
    log_number_of_others,
    log_sum_exp_of_others,
    share,
)


def hn_nce(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    alpha: float = 1.0,
    beta: float = 0.25,
    same: Int[Tensor, "n k"] | None = None,
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How badly each x picks its y, and each y its x, when near misses count more. Collective when `shard` has ranks.

    Costs InfoNCE twice, since two sums are walked, unless beta is 0.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        alpha: how much a row's own column counts in its denominator, from 0 to 1.
        beta: how much more harder negatives count than easier ones; at 0 all count 1. It multiplies logits, so that
            beta * s is the sharpness.
        same: ids of this rank's rows, k kinds of them. Rows that share an id are no negatives of each other: they are
            not in J, neither in its sums nor in its size. Ids below 0 match nothing.
        negatives: y-like embeddings that only serve as further columns of x, and never ask. Those that row i sees are
            members of J_i like any other: they add to its size, to the normaliser of w_i, and have a weight.

    Returns:
        world / N times the sum over this rank's rows; the mean over ranks is the loss of the global batch. A row
        whose J is empty adds 0 in that direction, without a gradient, whatever alpha is, and counts in N.

    Raises:
        ConfigError: `alpha` outside [0, 1] or `beta` below 0.
    """
    check_hardness(alpha, beta)
    x, scale = exact(x, scale)
    keys = as_keys(y, shard)
    queries = scale * x
    own = dot(queries, keys.values[keys.own])
    sides = log_sum_exp_of_others((1 + beta) * queries, keys, same, negatives)
    if beta:
        soft = log_sum_exp_of_others(beta * queries, keys, same, negatives)
        counts = log_number_of_others(keys, same, negatives)
        sides = [
            torch.where(sharp > -torch.inf, count + sharp - of_weights, -torch.inf)
            for sharp, of_weights, count in zip(sides, soft, counts, strict=True)
        ]
    losses = torch.stack([_losses(own, side, alpha) for side in sides]).sum(0)
    return share(losses, keys.counts, shard) / 2


def check_hardness(alpha: float, beta: float) -> None:
    """Raise `ConfigError` for weights that cannot be."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha}: expected the share of a row's own column, 0 <= alpha <= 1")
    if not beta >= 0:
        raise ConfigError(f"beta={beta}: expected 0 or more, since below 0 easy negatives would count most")


def _losses(own: Float[Tensor, " n"], others: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    every = log_add(own + math.log(alpha), others) if alpha else others
    return torch.where(others > -torch.inf, every - own, 0.0)
