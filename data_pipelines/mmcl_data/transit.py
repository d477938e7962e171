"""How decoded rows get out of a worker process: through blocks of shared memory that are used again and again.

A fresh block costs a page fault for every four kilobytes, which is more than it takes to tokenize its captions; so a
worker keeps its blocks, and the first byte of each says whether it may be written: the worker sets it, the process that
has copied the rows out clears it. Where there is no shared memory left (containers have 64 MB unless told otherwise)
the bytes go through the pipe.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmcl.types import Batch

_ALIGNED = 64
"""Bytes; the first so many of a block hold its mark."""
_FREE, _TAKEN = 0, 1


class _Place(NamedTuple):
    """Of one tensor in a block."""

    field: str
    """Of the batch."""
    key: str | None
    """In that field, if it holds several."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int

    def of(self, block: Tensor) -> Tensor:
        """The tensor there."""
        end = self.first + prod(self.shape) * self.dtype.itemsize
        return block[self.first : end].view(self.dtype).view(self.shape)


class Packet(NamedTuple):
    """A batch on its way."""

    worker: int
    number: int
    """Of the block among those of the worker."""
    block: Tensor | np.ndarray | None
    """The block itself the first time; an array is no shared one."""
    places: list[_Place]
    plain: dict[str, Any]
    """Fields of the batch that are no tensors."""
    beside: Any


class Packer:
    """A worker's end."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def pack(self, batch: Batch, beside: Any) -> Packet:
        """A batch and what goes with it, ready to be pickled."""
        plain = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        tensors, places, end = [], [], _ALIGNED
        for name, key, tensor in _tensors(plain):
            tensors.append(tensor)
            places.append(_Place(name, key, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        for name in {place.field for place in places}:
            del plain[name]
        number, known = self._block(end)
        block = self.blocks[number] if number >= 0 else torch.empty(end, dtype=torch.uint8)
        for tensor, place in zip(tensors, places, strict=True):
            place.of(block).copy_(tensor)
        block[0] = _TAKEN
        travels = None if known else block if number >= 0 else block.numpy()
        return Packet(os.getpid(), number, travels, places, plain, beside)

    def _block(self, size: int) -> tuple[int, bool]:
        """Number of a free block, and whether it is known at the other end; -1 where there is no room for one."""
        for number, block in enumerate(self.blocks):
            if len(block) >= size and block[0] == _FREE:
                return number, True
        try:
            storage = torch.UntypedStorage._new_shared(size)  # as torch's own DataLoader does
        except RuntimeError:
            return -1, False
        self.blocks.append(torch.empty(0, dtype=torch.uint8).set_(storage))
        return len(self.blocks) - 1, False


class Unpacker:
    """The other end, of all workers."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], Tensor] = {}

    def unpack(self, packet: Packet) -> tuple[Batch, Any]:
        """What was packed; the block is free again."""
        block = self._block(packet)
        held = dict(packet.plain)
        for place in packet.places:
            tensor = place.of(block).clone()
            if place.key is None:
                held[place.field] = tensor
            else:
                held.setdefault(place.field, {})[place.key] = tensor
        block[0] = _FREE
        return Batch(**held), packet.beside

    def _block(self, packet: Packet) -> Tensor:
        if isinstance(packet.block, np.ndarray):
            return torch.from_numpy(packet.block)
        if packet.block is not None:
            self.known[packet.worker, packet.number] = packet.block
        return self.known[packet.worker, packet.number]


def _tensors(held: Mapping[str, Any]) -> Iterator[tuple[str, str | None, Tensor]]:
    """All tensors among fields, and in those that are mappings of tensors."""
    for name, value in held.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                yield name, key, each
