"""Losses over all modalities of a row at once, in place of one loss for each pair.

    e_il,jm = exp(s u_il.u_jm),      u_il is row i in modality l, of those L_i that it has

    MV-InfoNCE:   L = -1/n sum_i log( sum_{l != m in L_i} e_il,im / sum_{l in L_i} sum_{(j,m) != (i,l)} e_il,jm )
    MV-DHEL:      L = -1/n sum_i [ log sum_{l < m in L_i} e_il,im - sum_{l in L_i} log sum_{j != i} e_il,jl ]

over the n rows that have two modalities at least. Koromilas et al. 2025, https://arxiv.org/abs/2507.06979, as their
code has it: the formulas in its README lack the minus sign, let j = i into the denominator of DHEL and leave the
negatives of the same modality out of MV-InfoNCE. The code multiplies the V denominators of DHEL, which overflows; here
their logarithms are added.

A row that lacks a modality is a row of fewer terms; one that has a single modality asks nothing and is still a negative
of others. There is one temperature, since rows are compared within a modality too.

A rank holds some of the rows, possibly none, and returns its share such that the mean over ranks is L.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses.rows import dot, exact, log_sum_exp_by_row, share
from mmcl.losses.tiles import Skip, log_sum_exp_of_rows
from mmcl.types import MODALITIES, PAIRS, Embeddings

OTHERS = Skip(own=True)


def mv_info_nce(embeddings: Embeddings, scale: Float[Tensor, ""], shard: Shard = ONE_PROCESS) -> Float[Tensor, ""]:
    """How badly embeddings of a row find each other among all embeddings of all modalities. Collective.

    Costs one walk over V n by V N logits for V modalities, where three pairs of InfoNCE cost three over n by N.

    Args:
        embeddings: of this rank's rows.
        scale: the logit scale s = 1 / temperature of all pairs.
        shard: this rank; ranks may hold different numbers of rows.

    Returns:
        A share whose mean over ranks is the loss of the global batch; 0 where no row has two modalities.
    """
    (scale,) = exact(scale)
    owners, asks = _owners(embeddings)
    (every,) = exact(torch.cat([embeddings.values[name] for name in MODALITIES]))
    others = log_sum_exp_of_rows(scale * every, shard.gather(every), OTHERS)
    denominators = log_sum_exp_by_row(others, torch.cat(owners), len(asks))
    losses = denominators - _log_positives(embeddings, scale, owners, len(asks)) - math.log(2)
    return _share(losses, asks, shard)


def mv_dhel(embeddings: Embeddings, scale: Float[Tensor, ""], shard: Shard = ONE_PROCESS) -> Float[Tensor, ""]:
    """How badly embeddings of a row meet, and those of a modality spread out. Collective when `shard` has ranks.

    Negatives are of the same modality only. So nothing pushes a caption away from a wrong image, other than that
    captions keep apart and the right one is near: not a loss for retrieval by itself. Costs V walks over n by N.

    Args:
        embeddings: of this rank's rows.
        scale: the logit scale s = 1 / temperature of all pairs.
        shard: this rank; ranks may hold different numbers of rows.

    Returns:
        A share whose mean over ranks is the loss of the global batch; 0 where no row has two modalities. A row that
        is the only one of a modality has nothing to keep apart from there: it adds 0, without a gradient.
    """
    (scale,) = exact(scale)
    owners, asks = _owners(embeddings)
    spread = scale.new_zeros(len(asks))
    for name, owner in zip(MODALITIES, owners, strict=True):
        (values,) = exact(embeddings.values[name])
        others = log_sum_exp_of_rows(scale * values, shard.gather(values), OTHERS)
        spread = spread.index_add(0, owner, torch.where(others > -torch.inf, others, 0.0))
    return _share(spread - _log_positives(embeddings, scale, owners, len(asks)), asks, shard)


def _owners(embeddings: Embeddings) -> tuple[list[Int[Tensor, " _"]], Tensor]:
    """Of each modality the number of the row that each embedding is of, and which of those rows have two at least."""
    rows = [embeddings.rows[name] for name in MODALITIES]
    _, owners, counts = torch.cat(rows).unique(return_inverse=True, return_counts=True)
    return list(owners.split([len(part) for part in rows])), counts >= 2


def _log_positives(
    embeddings: Embeddings, scale: Float[Tensor, ""], owners: list[Int[Tensor, " _"]], n: int
) -> Float[Tensor, " n"]:
    """Log-sum-exp of the logits of each row's own pairs, each pair once."""
    logits, rows = [], []
    for pair, (first, _) in PAIRS.items():
        x, y = exact(*embeddings.pair(pair))
        logits.append(scale * dot(x, y))
        rows.append(owners[MODALITIES.index(first)][embeddings.having(pair)[0]])
    return log_sum_exp_by_row(torch.cat(logits), torch.cat(rows), n)


def _share(losses: Float[Tensor, " n"], asks: Tensor, shard: Shard) -> Float[Tensor, ""]:
    losses = losses[asks]
    return share(losses, tuple(shard.counts(len(losses), losses.device)), shard)
