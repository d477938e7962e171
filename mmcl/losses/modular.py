"""CompA's modular contrast: a sound has several right captions and several wrong ones of its own.

    C_i = captions y_j of all rows, and of row i alone its further positives and its negatives
    a_i = 1/(P_i + 1) sum_{p = 0..P_i} [ -s x_i.t_ip + log sum_{c in C_i} exp(s x_i.c) ],      t_i0 = y_i
    b_ip = -s t_ip.x_i + log sum_j exp(s t_ip.x_j)
    L = 1/2 [ mean of a over all i + mean of b over all (i, p) ]

CompA, Ghosh et al. 2024, https://arxiv.org/abs/2310.08753, modular contrastive learning: captions of the parts of a
synthetic sound are its positives, and the same with an order or an overlay turned round are its negatives. A row's
other positives stay in its denominator. Negatives never ask.

What belongs to other rows is never seen, rather than masked: the released code multiplies such logits by -1e5, which
turns a negative cosine into a logit of many thousands.

A rank holds n of the N rows, as many positives and negatives for each as it happens to have, possibly none of any, and
returns its share such that the mean over ranks is L: the mean of b is over the rows of all ranks, not of each.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.losses.rows import (
    HardNegatives,
    Positives,
    as_keys,
    dot,
    exact,
    log_add,
    log_sum_exp_by_row,
    share,
    sum_with_negatives,
)
from mmcl.losses.tiles import log_sum_exp_and_own, log_sum_exp_of_rows


def modular(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"] | Gathered,
    scale: Float[Tensor, ""],
    shard: Shard = ONE_PROCESS,
    *,
    positives: Positives,
    negatives: HardNegatives | None = None,
) -> Float[Tensor, ""]:
    """How badly each x picks its own captions, and each of these its x. Collective when `shard` has several ranks.

    Costs InfoNCE, and one more gather and walk for the captions that `positives` adds. Without any of those it is
    InfoNCE with hard negatives.

    Args:
        x: unit vectors of this rank's rows, such as sounds.
        y: unit vectors of the main caption of the same rows, or what `shard.gather` made of them.
        scale: the logit scale s = 1 / temperature.
        shard: this rank; ranks may hold different numbers of rows.
        positives: further captions of rows, any number for each.
        negatives: wrong captions of rows, any number for each. CompA's are `seen_by="own"`.

    Returns:
        A share whose mean over ranks is the loss of the global batch.
    """
    x, scale = exact(x, scale)
    (captions,) = exact(positives.values)
    keys = as_keys(y, shard)
    queries = scale * x
    rows, columns, own = log_sum_exp_and_own(queries, keys)
    owned = dot(queries[positives.rows], captions)
    rows = log_add(rows, log_sum_exp_by_row(owned, positives.rows, len(x)))
    pulls = own.index_add(0, positives.rows, owned)
    number = torch.ones_like(own).index_add(0, positives.rows, torch.ones_like(owned))
    total = sum_with_negatives(rows, torch.ones_like(rows), queries, negatives, shard)
    to_captions = share(total - (pulls / number).sum(), keys.counts, shard)

    asked = log_sum_exp_of_rows(scale * captions, shard.gather(x))
    counts = (*keys.counts, *shard.counts(len(captions), captions.device))
    to_x = share(torch.cat([columns - own, asked - owned]), counts, shard)
    return (to_captions + to_x) / 2
