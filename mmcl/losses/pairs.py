"""The objective of a three-modality step: a weighted sum of one loss per pair of modalities."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from mmcl.dist import Shard
from mmcl.losses.infonce import info_nce
from mmcl.types import Embeddings, Pair


def pair_losses(
    embeddings: Embeddings,
    scales: Mapping[Pair, Float[Tensor, ""]],
    weights: Mapping[Pair, float],
    shard: Shard,
) -> dict[Pair, Float[Tensor, ""]]:
    """InfoNCE of every pair, unweighted, in a fixed order so that all ranks meet in the same collectives.

    Rows that lack a side of a pair are left out of that pair. A pair of weight 0 is not computed.
    """
    return {
        pair: info_nce(*embeddings.pair(pair), scales[pair], shard) for pair in sorted(weights) if weights[pair] > 0
    }
