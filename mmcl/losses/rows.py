"""What the objectives do with rows: gathered keys, further columns, sums that may be empty, a share of a mean."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Gathered, Shard
from mmcl.losses.tiles import Skip, log_sum_exp, log_sum_exp_of_rows, sum_of_log_sum_exp


@dataclass(frozen=True, kw_only=True, slots=True)
class HardNegatives:
    """Embeddings that are wrong for a row on purpose, such as its caption with two words swapped. They never ask."""

    values: Float[Tensor, "m d"]
    """Unit vectors, any number for each row."""
    rows: Int[Tensor, " m"]
    """Which of this rank's rows of the pair each belongs to."""
    seen_by: Literal["own", "all"] = "own"
    """own: a further column of its own row alone (CompA, Ghosh et al. 2024, https://arxiv.org/abs/2310.08753); stays on
    its rank. all: of every row on every rank (NegCLIP, Yuksekgonul et al. 2023, https://arxiv.org/abs/2210.01936)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Positives:
    """Embeddings that are right for a row beside its main one, such as captions of the parts of its sound."""

    values: Float[Tensor, "m d"]
    """Unit vectors, any number for each row."""
    rows: Int[Tensor, " m"]
    """Which of this rank's rows of the pair each belongs to."""


def exact(*values: Tensor) -> tuple[Tensor, ...]:
    """In fp32 at least."""
    return tuple(value.to(torch.promote_types(value.dtype, torch.float32)) for value in values)


def as_keys(y: Float[Tensor, "n d"] | Gathered, shard: Shard) -> Gathered:
    """`y` of all ranks in fp32 at least. Collective unless someone has gathered it before."""
    return y if isinstance(y, Gathered) else shard.gather(*exact(y))


def dot(a: Float[Tensor, "n d"], b: Float[Tensor, "#n d"]) -> Float[Tensor, " n"]:
    """Row by row."""
    return (a * b).sum(-1)


def log_add(*parts: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log(exp(a) + exp(b) + ...), where minus infinity is an empty sum that has no gradient."""
    stacked = torch.stack(parts)
    largest = stacked.detach().amax(0)
    some = largest > -torch.inf
    total = (stacked - largest.masked_fill(~some, 0.0)).exp().sum(0)
    return torch.where(some, torch.where(some, total, 1.0).log() + largest, -torch.inf)


def log_sum_exp_by_row(logits: Float[Tensor, " m"], rows: Int[Tensor, " m"], n: int) -> Float[Tensor, " n"]:
    """Log-sum-exp of the logits of each of n rows, where minus infinity is a row without any."""
    largest = logits.detach().new_full((n,), -torch.inf).scatter_reduce(0, rows, logits.detach(), "amax")
    some = largest > -torch.inf
    total = torch.zeros_like(largest).index_add(0, rows, (logits - largest.masked_fill(~some, 0.0)[rows]).exp())
    return torch.where(some, torch.where(some, total, 1.0).log() + largest, -torch.inf)


def log_sum_exp_of_negatives(
    queries: Float[Tensor, "n d"], negatives: HardNegatives, shard: Shard
) -> Float[Tensor, " n"]:
    """Of each query over the hard negatives that it sees. Collective if all see them."""
    (values,) = exact(negatives.values)
    if negatives.seen_by == "all":
        return log_sum_exp_of_rows(queries, shard.gather(values))
    return log_sum_exp_by_row(dot(queries[negatives.rows], values), negatives.rows, len(queries))


def sum_with_negatives(
    rows: Float[Tensor, " n"],
    weights: Float[Tensor, " n"],
    queries: Float[Tensor, "n d"],
    negatives: HardNegatives | None,
    shard: Shard,
) -> Float[Tensor, ""]:
    """The weighted sum of log-sum-exps, given those over everything but the hard negatives. Collective if all see them.

    Weights get no gradient.
    """
    if negatives is None:
        return (weights * rows).sum()
    if negatives.seen_by == "all":
        return sum_of_log_sum_exp(rows, weights, queries, shard.gather(*exact(negatives.values)).values)
    return (weights * log_add(rows, log_sum_exp_of_negatives(queries, negatives, shard))).sum()


def log_sum_exp_of_others(
    queries: Float[Tensor, "n d"], keys: Gathered, same: Int[Tensor, "n k"] | None, negatives: HardNegatives | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """By row and by column over all that is wrong there: not the own one, nor one that shares an id of `same`.

    Rows also have their hard negatives; minus infinity is a row without anything. Collective, backward too.
    """
    rows, columns = log_sum_exp(queries, keys, Skip(own=True, same=same))
    if negatives is not None:
        rows = log_add(rows, log_sum_exp_of_negatives(queries, negatives, keys.shard))
    return rows, columns


def log_number_of_others(
    keys: Gathered, same: Int[Tensor, "n k"] | None, negatives: HardNegatives | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The log of how many those are: the log-sum-exp of logits that are all 0. Collective."""
    n = keys.counts[keys.shard.rank]
    queries = keys.values.new_zeros(n, 1)
    if same is None:
        rows = columns = keys.values.new_full((n,), float(sum(keys.counts) - 1)).log()
    else:
        zeros = Gathered(keys.values.new_zeros(len(keys.values), 1), keys.counts, keys.shard)
        rows, columns = log_sum_exp(queries, zeros, Skip(own=True, same=same))
    if negatives is not None:
        nowhere = replace(negatives, values=queries.new_zeros(len(negatives.values), 1))
        rows = log_add(rows, log_sum_exp_of_negatives(queries, nowhere, keys.shard))
    return rows, columns


def share(losses: Float[Tensor, " *n"], counts: tuple[int, ...], shard: Shard) -> Float[Tensor, ""]:
    """This rank's part of the mean over all rows: the mean over ranks is that mean. 0 where there are no rows."""
    return losses.sum() * (shard.world / max(1, sum(counts)))


def relative(weights: Float[Tensor, " n"], counts: tuple[int, ...], shard: Shard) -> Float[Tensor, " n"]:
    """Weights whose mean over the global batch is 1, or all 0. Collective."""
    (weights,) = exact(weights.detach())
    total = shard.sum(weights.sum())
    return weights * (sum(counts) / torch.where(total > 0, total, torch.inf))
