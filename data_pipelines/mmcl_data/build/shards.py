"""Write samples as WebDataset shards whose bytes follow from the samples alone.

The library's writer does the tar; what is fixed here is what it leaves to the clock and the user (times, owners), so
that one seed gives one file, and that a folder of shards appears whole or not at all.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tarfile import RECORDSIZE
from typing import Any

from webdataset.writer import TarWriter

from mmcl.errors import ConfigError

_FIXED: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "mmcl", "group": "mmcl"}
_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """One shard as written."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shards(
    samples: Iterable[Mapping[str, bytes | str]], folder: Path, samples_per_shard: int = 1000
) -> list[WrittenShard]:
    """Write `samples` to `folder/000000.tar`, `000001.tar`, ... and return what was written.

    A sample maps `__key__` to its key, the only `str`, and each extension (`jpg`, `flac`, `txt`, `json`) to the bytes
    of that member.
    The folder is staged beside its place and renamed, so that a killed build leaves no half shard behind.

    Raises:
        ConfigError: `folder` exists and is not empty: shards are never overwritten. Or there is no sample.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} exists and is not empty: name a new folder or remove it; shards are not overwritten"
        )
    staged = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    paths = (staged / f"{number:06d}.tar" for number in count())
    written = [shard for _, shard in _cut(samples, paths, lambda number, _: number <= samples_per_shard)]
    if not written:
        shutil.rmtree(staged)
        raise ConfigError(f"{folder}: there is no sample to write")
    if folder.exists():
        folder.rmdir()
    staged.rename(folder)
    return written


def bounded_shards(
    samples: Iterable[Mapping[str, bytes | str]], folder: Path, name: str, max_bytes: int
) -> Iterator[tuple[Path, WrittenShard]]:
    """Write `samples` to `folder/NAME.tar`, and to `NAME_001.tar`, ... what would take that above `max_bytes`.

    One sample above the limit is a shard of its own. A shard is yielded when it is whole, with its place.
    """
    paths = chain([folder / f"{name}.tar"], (folder / f"{name}_{number:03d}.tar" for number in count(1)))
    yield from _cut(samples, paths, lambda _, size: size <= max_bytes)


def _cut(
    samples: Iterable[Mapping[str, bytes | str]], paths: Iterable[Path], fits: Callable[[int, int], bool]
) -> Iterator[tuple[Path, WrittenShard]]:
    """Write `samples` to one of `paths` after the other, as many to each as `fits`, told their number and its bytes."""
    left = iter(samples)
    first = next(left, None)
    for path in paths:
        if first is None:
            return
        with path.open("wb") as file, TarWriter(file, **_FIXED) as writer:
            number, first = _fill(writer, first, left, fits)
        yield path, describe_shard(path, number)


def _fill(
    writer: TarWriter,
    first: Mapping[str, bytes | str],
    left: Iterator[Mapping[str, bytes | str]],
    fits: Callable[[int, int], bool],
) -> tuple[int, Mapping[str, bytes | str] | None]:
    """Write the first sample and as many more as fit; returns how many, and the one that did not."""
    number, held, sample = 0, 2 * _BLOCK, first
    while sample is not None:
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for name, data in sample.items() if name != "__key__")
        if number and not fits(number + 1, -(-(held + size) // RECORDSIZE) * RECORDSIZE):
            return number, sample
        writer.write(dict(sample))
        number, held, sample = number + 1, held + size, next(left, None)
    return number, None


def describe_shard(path: Path, samples: int) -> WrittenShard:
    """Size and hash of the shard at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WrittenShard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=digest)
