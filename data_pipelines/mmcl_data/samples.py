"""One sample of a shard to the tensors of one row, or a `SampleRejected` that says where and why."""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcl.errors import DataError, SampleRejected, ShardMissing
from mmcl.types import ID_KINDS, MODALITIES, PAIRS, Batch, IdKind, InputSpec, Modality
from mmcl_data.decode import KIND_OF_EXTENSION
from mmcl_data.decode.audio import decode_audio
from mmcl_data.decode.image import decode_image
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts, tokenize
from mmcl_data.scan import SampleEntry, read_sample

MAX_OPEN_FILES = 64


@dataclass(slots=True)
class Row:
    """One decoded sample. Captions become tokens only when a batch is put together."""

    key: str
    image: Tensor | None = None
    audio: Tensor | None = None
    caption: str | None = None
    ids: dict[IdKind, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def has(self, modality: Modality) -> bool:
        """Whether the row has a value of that modality."""
        return (self.caption if modality == "text" else getattr(self, modality)) is not None


class ShardFiles:
    """Open descriptors of the shards read last, so that a sample costs its reads only."""

    def __init__(self) -> None:
        self.open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, sample: SampleEntry) -> dict[str, bytes]:
        """The members of one sample by extension."""
        if path not in self.open:
            if len(self.open) >= MAX_OPEN_FILES:
                os.close(self.open.popitem(last=False)[1])
            try:
                self.open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardMissing(f"{path}: cannot be opened any more: {error}") from error
        self.open.move_to_end(path)
        try:
            return read_sample(self.open[path], path, sample)
        except OSError as error:
            raise DataError(f"{path}: sample {sample.key!r} cannot be read: {error}") from error


def modalities_of(sample: SampleEntry) -> set[str]:
    """Modalities that the extensions of a sample promise."""
    return {KIND_OF_EXTENSION.get(extension, "") for extension in sample.extensions} & set(MODALITIES)


def is_usable(modalities: set[str]) -> bool:
    """Whether some pair of modalities can be trained on."""
    return any(modalities.issuperset(pair) for pair in PAIRS.values())


def decode_row(
    path: Path, key: str, members: dict[str, bytes], spec: InputSpec, *, start: float, with_facts: bool = False
) -> Row:
    """Decode what a model reads of one sample; sounds longer than a clip begin at `start` in [0, 1].

    Members of unknown extensions are not touched. The first member of a kind counts.

    Raises:
        SampleRejected: any member that is used cannot be.
    """
    row = Row(key=f"{path.name}#{key}")
    try:
        for extension, data in members.items():
            kind = KIND_OF_EXTENSION.get(extension)
            if kind == "image" and row.image is None:
                row.image, row.ids["image"] = decode_image(data, spec), hash_of(data)
            elif kind == "audio" and row.audio is None:
                row.audio = decode_audio(data, spec, start)
            elif kind == "text" and row.caption is None:
                row.caption = decode_caption(data)
                row.ids["caption"] = hash_of(" ".join(row.caption.casefold().split()).encode())
            elif with_facts:
                row.facts |= _facts(kind, data)
    except DataError as error:
        raise SampleRejected(path, key, str(error)) from error
    return row


def hash_of(data: bytes) -> int:
    """63 bits, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def _facts(kind: str | None, data: bytes) -> dict[str, Any]:
    if kind == "facts":
        return decode_facts(data)
    if kind == "class":
        return {"label": decode_class(data)}
    return {}


def collate(rows: list[Row], spec: InputSpec, skipped: int = 0) -> Batch:
    """Rows to a batch. Rejected samples are rows without values, so that the size of a batch never changes."""
    values: dict[Modality, Tensor] = spec.nothing()
    indices: dict[Modality, Tensor] = {}
    for modality in MODALITIES:
        having = [number for number, row in enumerate(rows) if row.has(modality)]
        indices[modality] = torch.tensor(having, dtype=torch.long)
        if having and modality == "text":
            values["text"] = tokenize([rows[number].caption or "" for number in having], spec)
        elif having:
            values[modality] = torch.stack([getattr(rows[number], modality) for number in having])
    return Batch(
        size=len(rows),
        values=values,
        rows=indices,
        ids=torch.tensor([[row.ids.get(kind, -1) for kind in ID_KINDS] for row in rows], dtype=torch.long).reshape(
            -1, len(ID_KINDS)
        ),
        keys=tuple(row.key for row in rows),
        facts=tuple(row.facts for row in rows),
        skipped=skipped,
    )
