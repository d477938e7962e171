"""Embed what a benchmark needs of its data, and nothing else, in an order that does not depend on the batch size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmcl.errors import ConfigError, NoUsableSamples
from mmcl.types import Batch, Embeddings, Encoder, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """The rows that have all of some modalities: everything below is in the same order and of the same length."""

    values: Mapping[Modality, Float[Tensor, "n d"]]
    inputs: Mapping[Modality, Sequence[Tensor]]
    """What was embedded, for the modalities that were asked to be kept."""
    facts: Sequence[Mapping[str, Any]]
    keys: Sequence[str]


def check_batches(name: str, batches: Iterable[Batch]) -> None:
    """Refuse an iterator: a benchmark runs many times, and the second time there would be nothing left.

    Raises:
        ConfigError: `batches` can be read only once.
    """
    if isinstance(batches, Iterator):
        raise ConfigError(
            f"{name}: batches is a {type(batches).__name__}, which can be read only once; "
            "give a list, or an object whose __iter__ starts anew"
        )


def collect(
    name: str,
    encoder: Encoder,
    batches: Iterable[Batch],
    modalities: Sequence[Modality],
    keep: Sequence[Modality] = (),
) -> Collected:
    """Embed `modalities` of the rows that have all of them.

    Raises:
        NoUsableSamples: no row has.
    """
    values: dict[Modality, list[Tensor]] = {modality: [] for modality in modalities}
    inputs: dict[Modality, list[Tensor]] = {modality: [] for modality in keep}
    facts: list[Mapping[str, Any]] = []
    keys: list[str] = []
    seen = 0
    for batch in batches:
        seen += batch.size
        rows = rows_with(batch, modalities)
        if not rows:
            continue
        embedded = encoder.embed(only(batch, modalities))
        for modality in modalities:
            values[modality].append(_select(embedded, modality, rows))
        for modality in keep:
            inputs[modality] += batch.values[modality][torch.isin(batch.rows[modality].cpu(), torch.tensor(rows))].cpu()
        facts += [batch.facts[row] if batch.facts else {} for row in rows]
        keys += [batch.keys[row] if batch.keys else f"row {row}" for row in rows]
    if not facts:
        raise NoUsableSamples(
            f"{name}: of {seen} rows none has {' and '.join(modalities)}: check the path and the members"
        )
    return Collected(
        values={modality: torch.cat(parts) for modality, parts in values.items()}, inputs=inputs, facts=facts, keys=keys
    )


def rows_with(batch: Batch, modalities: Sequence[Modality]) -> list[int]:
    """The rows of `batch` that have all of `modalities`, ascending."""
    return sorted(set.intersection(*(set(batch.rows[modality].tolist()) for modality in modalities)))


def only(batch: Batch, modalities: Sequence[Modality]) -> Batch:
    """The same rows with `modalities` and nothing else, so that no tower runs in vain."""
    return replace(
        batch,
        values={name: value if name in modalities else value[:0] for name, value in batch.values.items()},
        rows={name: rows if name in modalities else rows[:0] for name, rows in batch.rows.items()},
    )


def _select(embedded: Embeddings, modality: Modality, rows: Sequence[int]) -> Float[Tensor, "n d"]:
    return embedded.values[modality][torch.isin(embedded.rows[modality], torch.tensor(rows))]
