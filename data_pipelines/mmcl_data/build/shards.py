"""Write samples as WebDataset shards whose bytes follow from the samples alone.

The library's writer does the tar; what is fixed here is what it leaves to the clock and the user (times, owners), so
that one seed gives one file, and that a folder of shards appears whole or not at all.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import ShardWriter

from mmcl.errors import ConfigError


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
    counts: list[int] = []
    with ShardWriter(
        str(staged / "%06d.tar"),
        maxcount=samples_per_shard,
        verbose=0,
        encoder=False,
        mtime=0,
        user="mmcl",
        group="mmcl",
    ) as writer:
        for sample in samples:
            writer.write(dict(sample))
            counts[writer.shard - 1 :] = [writer.count]
    if not counts:
        shutil.rmtree(staged)
        raise ConfigError(f"{folder}: there is no sample to write")
    if folder.exists():
        folder.rmdir()
    staged.rename(folder)
    return [_describe(path, count) for path, count in zip(sorted(folder.glob("*.tar")), counts, strict=False)]


def _describe(path: Path, samples: int) -> WrittenShard:
    content = path.read_bytes()
    return WrittenShard(name=path.name, samples=samples, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
