"""Tiny shards and streams for the tests of the data engine, importable by name: spawned processes import it again."""

import hashlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.types import MODALITIES, Batch, InputSpec
from mmcl_data import blobs
from mmcl_data.augment import Words
from mmcl_data.build.shards import write_shards
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig

SPEC = InputSpec(image_size=8, resize_mode="squash", sample_rate=8000, clip_samples=80, context_length=12)


def png(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(number: int, samples: int = 80) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(0.1, 0.9, samples) * (1 + number % 5) / 5, 8000, format="WAV")
    return buffer.getvalue()


def sample(number: int, *, prefix: str = "", **changes: bytes | None) -> dict[str, bytes | str]:
    """Number `number` in all three modalities; `None` leaves a member out."""
    members = {
        "png": png(number),
        "wav": wav(number),
        "txt": f"number {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
    } | changes
    return {"__key__": f"{prefix}{number:05d}", **{name: data for name, data in members.items() if data is not None}}


def write(folder: Path, samples: Any, per_shard: int = 10) -> str:
    write_shards(samples, folder, per_shard)
    return str(folder)


def stream(
    sources: dict[str, str],
    *,
    batch: int = 8,
    seed: int = 0,
    shard: Shard = ONE_PROCESS,
    bad: float = 0.01,
    data: dict[str, Any] | None = None,
    quarantine: Path | None = None,
    **weights: float,
) -> ShardStream:
    named = {name: SourceConfig(shards=path, weight=weights.get(name, 1.0)) for name, path in sources.items()}
    config = DataConfig(sources=named, max_bad_share=bad, **(data or {}))
    return ShardStream(config, SPEC, batch, seed, shard, quarantine=quarantine)


def take(made: ShardStream, count: int) -> list[Batch]:
    return list(islice(made.batches(), count))


def digest(batch: Batch) -> str:
    """Of everything in a batch."""
    found = hashlib.sha256(json.dumps([batch.keys, batch.size, batch.skipped]).encode())
    tensors = [batch.ids, batch.seeds, *(part[name] for name in MODALITIES for part in (batch.values, batch.rows))]
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def until(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something comes to hold within some seconds."""
    ends = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < ends:
        time.sleep(0.02)
    return held


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(processes: Iterable[int], seconds: float = 20.0) -> bool:
    """Whether processes end within some seconds."""
    return until(lambda: not any(map(alive, processes)), seconds)


def same(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(
        torch.equal(one.values[name], other.values[name]) and torch.equal(one.rows[name], other.rows[name])
        for name in MODALITIES
    )


@dataclass(frozen=True, kw_only=True)
class Trap(Words):
    """Stands in for native decoders: captions at which a process dies, or works for ever."""

    crash: tuple[str, ...] = ()
    hang: tuple[str, ...] = ()
    begun: str = ""
    """File that is there when one works for ever."""
    when: str = ""
    """File that has to be there before one dies."""

    def changed(self, caption: str, seed: int) -> str:
        if caption in self.crash:
            assert not self.when or until(Path(self.when).exists)
            os.kill(os.getpid(), signal.SIGSEGV)
        if caption in self.hang and self.begun:
            Path(self.begun).touch()
        while caption in self.hang:
            time.sleep(0.05)
        return caption


@dataclass(frozen=True, kw_only=True)
class Mishap(Words):
    """Kills its process at a caption, once for each seed: met again it passes."""

    at: str
    folder: str
    """Has a file for each time."""

    def changed(self, caption: str, seed: int) -> str:
        met = Path(self.folder) / str(seed)
        if caption == self.at and not met.exists():
            met.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return caption


@dataclass(frozen=True, kw_only=True)
class Greedy(Words):
    """Takes so many bytes at a caption, and does not touch them."""

    at: str
    size: int

    def changed(self, caption: str, seed: int) -> str:
        if caption == self.at:
            np.empty(self.size, dtype=np.uint8)
        return caption


@dataclass(frozen=True, kw_only=True)
class Stillborn(Words):
    """Ends worker processes, which get it pickled, before they are at anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


@dataclass(frozen=True, kw_only=True)
class Stalled(Words):
    """In worker processes, which get it pickled, the first read of a sample takes so long."""

    seconds: float

    def __reduce__(self) -> tuple[Any, ...]:
        return _stalled, (self.seconds,)


def _stalled(seconds: float) -> Stalled:
    read, read_before = blobs.pread, set[int]()

    def pread(file: int, size: int, offset: int) -> bytes:
        if offset not in read_before:
            read_before.add(offset)
            time.sleep(seconds)
        return read(file, size, offset)

    blobs.pread = pread
    return Stalled(seconds=seconds)
