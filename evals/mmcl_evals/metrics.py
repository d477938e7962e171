"""Figures of an evaluation as pure functions of scores: which decisions were right, and how sure that makes us.

Ties go against the model, everywhere: a score only wins if it is strictly greater, and among equal scores the worst
order is assumed. An encoder that maps everything to one point therefore gets 0, not 100 % (which the first-listed
candidate gets under argmax) and not chance. NaN wins against nothing and loses to everything.

Shape letters beyond those of `mmcl.types`: `q` queries, `i` items to choose from, `c` classes.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmcl.types import Score

Z_95 = 1.959963984540054
"""The normal distribution holds 95 % within so many standard deviations."""


def cosines(x: Float[Tensor, "q d"], y: Float[Tensor, "i d"]) -> Float[Tensor, "q i"]:
    """Cosine of every unit vector of `x` with every one of `y`.

    Summed in float64 and then rounded, so that equal vectors get equal scores whatever their place in the matrix:
    blocked float32 products differ in the last bit, which would turn ties into lucky wins.
    """
    return (x.double() @ y.double().T).float()


def paired_cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each unit vector of `x` with the one of `y` in the same place; rounded like `cosines`."""
    return (x.double() * y.double()).sum(dim=1).float()


def accuracy_hits(scores: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether the true class scores strictly above every other class."""
    return recall_hits(1, scores, torch.arange(scores.shape[1]) == labels[:, None])


def recall_hits(k: int, scores: Float[Tensor, "q i"], relevant: Bool[Tensor, "q i"]) -> Bool[Tensor, " q"]:
    """Whether any relevant item is among the first `k`; an equal-scored irrelevant item ranks before a relevant one.

    The best relevant item stands behind exactly the irrelevant ones that score at least as much, so no sort is needed.
    """
    best = scores.masked_fill(~relevant | scores.isnan(), -math.inf).amax(dim=1, keepdim=True)
    before = ~relevant & ~(scores < best)  # not `>=`: a NaN of an irrelevant item counts as before
    return (before.sum(dim=1) < k) & (best[:, 0] > -math.inf)


def pair_hits(true: Float[Tensor, " n"], foil: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether the true caption scores strictly above the wrong one."""
    return true > foil


def recall_chance(k: int, num_relevant: Int[Tensor, " q"], num_items: int) -> float:
    """Recall at `k` of a random order, exactly: the mean over queries of 1 - C(N - m, k) / C(N, k).

    Queries differ in their number `m` of relevant items (hypergeometric: none of them among `k` of `N` drawn).
    """
    drawn = torch.arange(k, dtype=torch.float64)
    irrelevant = (num_items - num_relevant).double()[:, None]
    missed = ((irrelevant - drawn).clamp(min=0) / (num_items - drawn)).prod(dim=1)
    return float(1 - missed.mean())


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share of `hits` in `n` independent decisions; without any, all of [0, 1].

        (p + z^2/2n  -+  z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22(158). Unlike p -+ z s,
    it stays within [0, 1] and keeps a width at 0 and at 1.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z_95**2
    centre = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if hits == 0 else (centre - half) / (1 + z2 / n)  # exact ends: rounding left 1e-18 there
    high = 1.0 if hits == n else (centre + half) / (1 + z2 / n)
    return low, high


def score(hits: Bool[Tensor, " n"], chance: float) -> Score:
    """The share of `hits` with its interval; NaN if there was nothing to decide."""
    n, right = len(hits), int(hits.sum())
    low, high = wilson(right, n)
    return Score(value=right / n if n else math.nan, n=n, chance=chance, low=low, high=high)
