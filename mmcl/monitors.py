"""What to look at while a model learns: numbers about the embeddings of a global batch, the same on every rank.

Alignment and uniformity are of Wang and Isola 2020, https://arxiv.org/abs/2005.10242; the modality gap is of Liang et
al. 2022, https://arxiv.org/abs/2203.02053. A pair of modalities is judged on the rows that have both.

Costs what the forward half of a loss costs, and memory grows with the rows and not with their square.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.losses import HardNegatives, tiles
from mmcl.types import PAIRS, Embeddings, Modality, Pair

SAMPLE = 4096
"""Rows of the global batch, at even distances, that uniformity is measured on at most."""

TIE = 1e-6
"""Cosines nearer than this are equal: fp32 hardly tells them apart, and a collapsed model must not win by rounding."""


@torch.no_grad()
def monitor(
    embeddings: Embeddings,
    shard: Shard = ONE_PROCESS,
    negatives: Mapping[Modality, HardNegatives] | None = None,
    pairs: Iterable[Pair] = tuple(PAIRS),
) -> dict[str, Tensor]:
    """Scalars on the device by name; what no rank has rows for is left out. Collective.

    - `uniformity_image`: log of the mean over two rows i < j of exp(-2 |x_i - x_j|^2), on at most `SAMPLE` rows; 0 is a
      collapse to one point, and -4 about the best that many dimensions allow.
    - `alignment_image_text`: mean of |x_i - y_i|^2.
    - `gap_image_text`: |mean x - mean y|.
    - `r1_image_to_text`: share of x_i that are nearer to y_i than to any other y; a tie is wrong, chance is 1 / N.
    - `hard_negatives_above_image_text`: share of the hard negatives of y that are at least as near to x_i as y_i is.

    Args:
        embeddings: of this rank's rows.
        shard: this rank; ranks may hold different numbers of rows.
        negatives: as the objective gets them, by the modality they are made of; the same modalities on every rank.
        pairs: which to look at.
    """
    negatives = negatives or {}
    found: dict[str, Tensor] = {}
    seen: set[Modality] = set()
    for pair in pairs:
        for modality in PAIRS[pair]:
            if modality not in seen:
                seen.add(modality)
                found |= _of_modality(modality, embeddings, shard)
        found |= _of_pair(pair, embeddings, shard, negatives.get(PAIRS[pair][1]))
    return found


def _of_modality(modality: Modality, embeddings: Embeddings, shard: Shard) -> dict[str, Tensor]:
    every = shard.gather(embeddings.values[modality].float())
    n = len(every.values)
    if n < 2:
        return {}
    size = min(n, SAMPLE)
    chosen = torch.arange(size, device=every.values.device) * n // size
    return {f"uniformity_{modality}": _uniformity(every.values[chosen], shard)}


def _of_pair(pair: Pair, embeddings: Embeddings, shard: Shard, negatives: HardNegatives | None) -> dict[str, Tensor]:
    first, second = PAIRS[pair]
    x, y = (side.float() for side in embeddings.pair(pair))
    x_keys, y_keys = shard.gather(x), shard.gather(y)
    n = sum(x_keys.counts)
    if not n:
        return {}
    found = {
        f"alignment_{pair}": shard.sum((x - y).square().sum()) / n,
        f"gap_{pair}": (x_keys.values.mean(0) - y_keys.values.mean(0)).norm(),
        f"r1_{first}_to_{second}": shard.sum(_right(x, y_keys).sum()) / n,
        f"r1_{second}_to_{first}": shard.sum(_right(y, x_keys).sum()) / n,
    }
    if negatives is not None:
        own = embeddings.rows[first][embeddings.having(pair)[0]]
        above = _above(x, y, own, negatives)
        if total := sum(shard.counts(len(above), above.device)):
            found[f"hard_negatives_above_{pair}"] = shard.sum(above.sum()) / total
    return found


def _uniformity(sample: Float[Tensor, "n d"], shard: Shard) -> Float[Tensor, ""]:
    """Over a sample that every rank has; each rank takes its share of the rows. Collective."""
    own = torch.arange(shard.rank, len(sample), shard.world, device=sample.device)
    total = sample.new_zeros((), dtype=torch.float64)
    for rows in own.split(_tile(sample)[0]):
        distances = (2.0 - 2.0 * sample[rows] @ sample.T).clamp(min=0.0)
        later = torch.arange(len(sample), device=sample.device) > rows[:, None]
        total += (distances.mul(-2.0).exp() * later).sum()
    return (shard.sum(total) * 2 / (len(sample) * (len(sample) - 1))).log().float()


def _right(queries: Float[Tensor, "n d"], keys: Gathered) -> Float[Tensor, " n"]:
    """1 for each query that is nearer to its own key than to all others, 0 for the rest."""
    rows, columns = _tile(queries)
    numbers = torch.arange(len(keys.values), device=queries.device)
    own = numbers[keys.own]
    right = queries.new_zeros(len(queries))
    for start in range(0, len(queries), rows):
        r = slice(start, min(start + rows, len(queries)))
        nearest = (queries[r] * keys.values[own[r]]).sum(1)
        others = torch.full_like(nearest, -torch.inf)
        for first in range(0, len(numbers), columns):
            c = slice(first, first + columns)
            cosines = queries[r] @ keys.values[c].T
            cosines.masked_fill_(own[r, None] == numbers[c], -torch.inf)
            others = torch.maximum(others, cosines.amax(1))
        right[r] = (nearest > others + TIE).float()
    return right


def _above(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], own: Int[Tensor, " n"], negatives: HardNegatives
) -> Float[Tensor, " m"]:
    """1 for each hard negative of the rows `own` that is not further from its x than y is, 0 for the rest."""
    kept = torch.isin(negatives.rows, own)
    place = torch.searchsorted(own, negatives.rows[kept])
    wrong, right = (x[place] * negatives.values[kept].float()).sum(1), (x * y).sum(1)[place]
    return (wrong >= right - TIE).float()


def _tile(values: Tensor) -> tuple[int, int]:
    return tiles.GPU_TILE if values.is_cuda else tiles.CPU_TILE
