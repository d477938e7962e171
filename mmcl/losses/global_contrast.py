"""Contrast with the whole data set and not with a batch: each row keeps a running estimate of its own denominator.

    g_i = 1/|J_i| sum_{j in J_i} exp((x_i.y_j - x_i.y_i) / tau),      J_i = all j != i of the batch that count
    u_i <- (1 - gamma) u_i + gamma g_i,      u_i <- g_i where the row was never seen
    l_i = log(eps + u_i),      whose gradient is that of g_i, divided by eps + u_i

and the same by column, with estimates of their own. l is the mean over i and over both directions, and the loss is

    FastCLIP-v0                   l                                  tau is learnt
    SogCLR, FastCLIP-v1           tau l                              tau stays
    FastCLIP-v3                   tau (rho + l)                      tau is learnt
    iSogCLR, FastCLIP-v2          mean of tau_i (rho + l_i)          every row, on each side, has a tau of its own

SogCLR, Yuan et al. 2022, https://arxiv.org/abs/2202.12387; iSogCLR, Qiu et al. 2023, https://arxiv.org/abs/2305.11965;
FastCLIP, Wei et al. 2024, https://arxiv.org/abs/2407.01445, in which gamma falls from 1, as the caller sees to. With
gamma = 1 and no eps, l is DCL but for the logarithm of how many J are.

Deviations from the released code. Estimates are kept as logarithms, which need no running shift and no repair of what
under- or overflowed. A row's first estimate is its g, so that none is pulled towards 0. J of SogCLR and iSogCLR does
not have i itself. FastCLIP-v2 has the factor tau_i of its formula, which its code leaves out; in FastCLIP-v3 a
temperature gets of l what the formula says, where the code gives it twice that.

These are pure functions: estimates go in and come out, and `mmcl.objective` keeps them by the number of the sample.
A rank holds n of the N rows, possibly none, and returns its share such that the mean over ranks is the loss.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses.rows import HardNegatives, as_keys, dot, exact, log_number_of_others, log_sum_exp_of_others, share
from mmcl.losses.tiles import Skip, expected_logits, log_sum_exp_of_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """What this step knew or learnt of this rank's rows, by row (first column) and by column (second)."""

    log_u: Float[Tensor, "n 2"]
    """Minus infinity where nothing is known yet."""
    tau: Float[Tensor, "n 2"] | None = None
    """Temperatures that each row has of its own."""
    tau_gradient: Float[Tensor, "n 2"] | None = None
    """Of a row's term, not of the mean, by its temperature; comes out only."""


def global_contrast(  # noqa: PLR0913 (what composes, each by name)
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    past: Estimates,
    gamma: float,
    times_tau: bool = True,
    rho: float = 0.0,
    eps: float = 1e-14,
    same: Int[Tensor, "n k"] | None = None,
    negatives: HardNegatives | None = None,
) -> tuple[Float[Tensor, ""], Estimates]:
    """How badly x and y of a row are told from the whole data set, with one temperature. Collective if there are ranks.

    Args:
        x: unit vectors of this rank's rows, one side of the pair.
        y: unit vectors of the same rows, the other side, or what `shard.gather` made of them.
        scale: the logit scale, 1 / tau. Give it detached where tau is to stay.
        shard: this rank; ranks may hold different numbers of rows.
        past: estimates of these rows so far.
        gamma: how much of an estimate is of this batch, above 0 and up to 1.
        times_tau: whether the loss is multiplied by tau.
        rho: what is added to l before that; it holds a learnt tau down, as l falls when tau grows.
        eps: added to u.
        same: ids of this rank's rows, k kinds of them. Rows that share an id are not in each other's J (false
            negatives); ids below 0 match nothing.
        negatives: y-like embeddings that are members of the J of rows, and never ask.

    Returns:
        A share whose mean over ranks is the loss of the global batch, and the estimates with this batch in them. A
        row whose J is empty adds 0 in that direction, without a gradient, keeps its estimate, and counts in N.
    """
    x, scale = exact(x, scale)
    keys = as_keys(y, shard)
    queries = scale * x
    own = dot(queries, keys.values[keys.own])
    sums = log_sum_exp_of_others(queries, keys, same, negatives)
    counts = log_number_of_others(keys, same, negatives)
    log_g = torch.stack([of_side - count - own for of_side, count in zip(sums, counts, strict=True)], 1)
    log_g = log_g.masked_fill(torch.stack(sums, 1) == -torch.inf, -torch.inf)
    log_u = _averaged(past.log_u, log_g.detach(), gamma)
    losses, counted = _surrogate(log_g, log_u, eps)
    losses = torch.where(counted, (losses + rho) / scale if times_tau else losses, 0.0)
    return share(losses.sum(1), keys.counts, shard) / 2, Estimates(log_u=log_u)


def individual_contrast(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    shard: Shard = ONE_PROCESS,
    *,
    past: Estimates,
    gamma: float,
    rho: float,
    eps: float = 1e-14,
    same: Int[Tensor, "n k"] | None = None,
) -> tuple[Float[Tensor, ""], Estimates]:
    """Likewise where each row has two temperatures of its own, `past.tau`. Collective if there are ranks.

    Rows and columns have different logits, so both sides are gathered and walked: ten matrix products where one
    temperature takes four. The gradient of each tau comes with the estimates; the caller moves it.
    """
    assert past.tau is not None
    (x,) = exact(x)
    keys = as_keys(y, shard)
    others = Skip(own=True, same=same)
    count, _ = log_number_of_others(keys, same, None)
    sides = (x, keys), (keys.values[keys.own], shard.gather(x))
    log_g, reach = [], []
    for (asking, asked), tau in zip(sides, past.tau.unbind(1), strict=True):
        queries = asking / tau[:, None]
        own = dot(queries, asked.values[asked.own])
        total = log_sum_exp_of_rows(queries, asked, others)
        log_g.append(torch.where(total > -torch.inf, total - count - own, -torch.inf))
        reach.append(expected_logits(queries, asked, total, others) - own.detach())
    loss, tau_gradient, log_u = _robust(torch.stack(log_g, 1), torch.stack(reach, 1), past, gamma, rho, eps)
    return share(loss.sum(1), keys.counts, shard) / 2, Estimates(log_u=log_u, tau=past.tau, tau_gradient=tau_gradient)


def _robust(
    log_g: Float[Tensor, "n 2"], reach: Float[Tensor, "n 2"], past: Estimates, gamma: float, rho: float, eps: float
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"], Float[Tensor, "n 2"]]:
    """The terms tau_i (rho + l_i), their gradients by tau, and the estimates.

    `reach` is the mean of (x_i.y_j - x_i.y_i) / tau over J, each by its share of g: minus tau times the gradient of
    log g by tau.
    """
    log_u = _averaged(past.log_u, log_g.detach(), gamma)
    losses, counted = _surrogate(log_g, log_u, eps)
    ratio = torch.where(counted, (log_g.detach() - losses.detach()).exp(), 0.0)
    gradient = torch.where(counted, rho + losses.detach() - ratio * reach, 0.0)
    assert past.tau is not None
    return torch.where(counted, past.tau * (rho + losses), 0.0), gradient, log_u


def _averaged(past: Float[Tensor, "n 2"], log_g: Float[Tensor, "n 2"], gamma: float) -> Float[Tensor, "n 2"]:
    """The logarithm of (1 - gamma) u + gamma g; of g where there is no u yet, of u where there is no g."""
    if not 0 < gamma <= 1:
        raise ConfigError(f"gamma={gamma}: expected how much of an estimate is of this batch, 0 < gamma <= 1")
    kept = past + (math.log(1 - gamma) if gamma < 1 else -math.inf)
    mixed = torch.logaddexp(kept, log_g + math.log(gamma))
    mixed = torch.where(past == -torch.inf, log_g, mixed)
    return torch.where(log_g == -torch.inf, past, mixed)


def _surrogate(
    log_g: Float[Tensor, "n 2"], log_u: Float[Tensor, "n 2"], eps: float
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, "n 2"]]:
    """log(eps + u) with the gradient of g / (eps + u), and where there is a g."""
    counted = log_g.detach() > -torch.inf
    values = torch.logaddexp(log_u, torch.full_like(log_u, math.log(eps) if eps else -math.inf))
    log_g = torch.where(counted, log_g, 0.0)
    ratio = torch.where(counted, (log_g.detach() - values).exp(), 0.0)
    return torch.where(counted, values, 0.0) + ratio * (log_g - log_g.detach()), counted
