"""Retrieval: given one side of a pair, is its other side among the first k of all?

Recall at k, "any relevant item among the first k", both ways, as CLIP (Radford et al. 2021,
https://arxiv.org/abs/2103.00020) and papers on Flickr30k, COCO, AudioCaps and Clotho report it.

Relevant is a row's own partner and, where one side is text, every row whose caption is the same: a caption equal to
the right one is right, and so is an image that has the asked caption. The caption is `facts[row]["caption"]`, or the
tokens where that is absent. Of equal scores the worst order is assumed. Chance is that of a random order, exact for
the number of relevant items of each query. A k that is not below the number of items would be met by all: left out.

To add one: batches whose rows have both sides.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmcl.errors import NoUsableSamples
from mmcl.types import PAIRS, Batch, Encoder, Modality, Pair, Score

from .collect import Collected, check_batches, collect
from .metrics import cosines, recall_chance, recall_hits, score

RANKS = (1, 5, 10)
QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """Recall of one side of a pair by the other, both ways."""

    name: str
    pair: Pair
    batches: Iterable[Batch]
    """Read anew in every run; rows without both sides are left out."""

    def __post_init__(self) -> None:
        check_batches(self.name, self.batches)

    @property
    def task(self) -> str:
        """The kind of task."""
        return "zeroshot_retrieval"

    @property
    def details(self) -> Mapping[str, Any]:
        """Nothing beyond the figures."""
        return {}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What this compares."""
        return PAIRS[self.pair]

    @property
    def main_metric(self) -> str:
        """From the first side to the second, at one."""
        x, y = PAIRS[self.pair]
        return f"{x}_to_{y}_r1"

    def run(self, encoder: Encoder) -> Iterator[tuple[str, Score]]:
        """Embed all rows that have both sides, and rank each side by the other.

        Raises:
            NoUsableSamples: fewer than two rows have both sides.
        """
        x, y = PAIRS[self.pair]
        found = collect(self.name, encoder, self.batches, [x, y], keep=["text"] if "text" in (x, y) else [])
        if len(found.facts) < 2:
            raise NoUsableSamples(
                f"{self.name}: one row with {x} and {y} leaves nothing to choose from: two are needed"
            )
        captions = caption_groups(found) if "text" in (x, y) else torch.arange(len(found.facts))
        yield from recalls(f"{x}_to_{y}", found.values[x], found.values[y], captions)
        yield from recalls(f"{y}_to_{x}", found.values[y], found.values[x], captions)


def caption_groups(found: Collected) -> Int[Tensor, " n"]:
    """For each row a number that it shares with the rows of the same caption."""
    groups: dict[Hashable, int] = {}
    identities = (
        facts["caption"] if "caption" in facts else tuple(tokens.tolist())
        for facts, tokens in zip(found.facts, found.inputs["text"], strict=True)
    )
    return torch.tensor([groups.setdefault(identity, len(groups)) for identity in identities])


def recalls(
    direction: str, queries: Float[Tensor, "n d"], items: Float[Tensor, "n d"], groups: Int[Tensor, " n"]
) -> Iterator[tuple[str, Score]]:
    """Recall at every rank below the number of items; query and item are relevant to each other within a group."""
    num_relevant = torch.bincount(groups)[groups]
    ranks = [k for k in RANKS if k < len(items)]
    for k, hits in zip(ranks, _hits_at(ranks, queries, items, groups), strict=True):
        yield f"{direction}_r{k}", score(hits, recall_chance(k, num_relevant, len(items)))


def _hits_at(
    ranks: list[int], queries: Float[Tensor, "n d"], items: Float[Tensor, "n d"], groups: Int[Tensor, " n"]
) -> list[Bool[Tensor, " n"]]:
    """A part of the queries at a time: the matrix of all of them would be large."""
    parts: list[list[Tensor]] = [[] for _ in ranks]
    for some, group in zip(queries.split(QUERIES_AT_ONCE), groups.split(QUERIES_AT_ONCE), strict=True):
        scores, relevant = cosines(some, items), group[:, None] == groups
        for part, k in zip(parts, ranks, strict=True):
            part.append(recall_hits(k, scores, relevant))
    return [torch.cat(part) for part in parts]
