"""The index of a data set: where every member of every sample lies, so that a sample is a number.

    DIR/index.json      format, fingerprint, extensions, and of every shard: path, bytes, stamp, samples
        starts.npy      u64, samples + 1: first member of each sample
        kinds.npy       u8, samples: what it has, a bit for each of KINDS
        offsets.npy     u64, members: first byte of the payload in its shard
        sizes.npy       u32, members
        extensions.npy  u16, members: number of the extension
        key_ends.npy    u64, samples: where the key ends in
        keys.npy        u8, all keys one after another, UTF-8

The arrays are mapped and not read, so that opening an index of a million samples takes no time and its pages are shared
by all processes of a machine. It is JSON and npy: nothing in it can run. Of remote shards it holds the addresses
without user, password and query, which may be secrets and change: whoever opens it says where they are read now.

Making it reads every header (`scan`), shards side by side in processes. What is known of a shard is kept in `parts/` as
soon as it is known, so that a build that was killed, or one after some shards were added, reads only the others.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np

from mmcl.errors import ConfigError, DataError, NoIndex
from mmcl_data.blobs import Reading, Version, check_version, open_blob, scheme_of, shown, versions
from mmcl_data.decode import KIND_OF_EXTENSION, Kind
from mmcl_data.scan import SampleEntry, ShardScan, expand_shards, scan_shard
from mmcl_data.sweep import over_shards

FORMAT = 1
FOLDER = ".mmcl-index"
"""Of an index beside its shards."""
KINDS: tuple[Kind, ...] = ("image", "text", "audio", "facts", "class")
"""What the bits of a sample stand for, lowest first."""
_ARRAYS = {
    "starts": np.uint64,
    "kinds": np.uint8,
    "offsets": np.uint64,
    "sizes": np.uint32,
    "extensions": np.uint16,
    "key_ends": np.uint64,
    "keys": np.uint8,
}
_COLUMNS = ("counts", "kinds", "offsets", "sizes", "extensions", "key_sizes", "keys", "facts")
"""Of the part of a shard."""
_MOST_EXTENSIONS = 65_000
"""That are told apart; their numbers have 16 bits."""
_OTHERS = "?"
"""Stands for all extensions beyond that; those that mean something are never among them."""


def bits_of(extensions: Sequence[str]) -> int:
    """What members with these extensions promise, a bit for each of KINDS."""
    found = {KIND_OF_EXTENSION.get(extension) for extension in extensions}
    return sum(1 << number for number, kind in enumerate(KINDS) if kind in found)


class IndexedShard(NamedTuple):
    """A shard as the index knows it."""

    path: str
    bytes: int
    stamp: str
    samples: int
    sha256: str | None = None

    @property
    def version(self) -> Version:
        """That was indexed."""
        return self.bytes, self.stamp


PartFile = tuple[IndexedShard, list[str], dict[str, np.ndarray]]
"""What is known of one shard: the shard, its extensions, and the columns."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a build has come."""

    shards: int
    of: int
    samples: int


class Index:
    """All samples of some shards, by number."""

    def __init__(self, folder: Path | None, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.folder, self.facts, self.arrays = folder, facts, arrays
        self.shards = [IndexedShard(**shard) for shard in facts["shards"]]
        self.firsts = np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)
        self.extensions: list[str] = facts["extensions"]

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def fingerprint(self) -> str:
        """Of names and sizes of all members, in their order, and of nothing else: not of where the shards lie."""
        return self.facts["fingerprint"]

    @cached_property
    def kinds(self) -> np.ndarray:
        """u8, a bit for each of KINDS, for every sample."""
        return self.arrays["kinds"]

    def shard_of(self, sample: int) -> IndexedShard:
        """Where it lies."""
        return self.shards[int(np.searchsorted(self.firsts, sample, side="right")) - 1]

    def key(self, sample: int) -> str:
        """Of a sample in its shard."""
        ends = self.arrays["key_ends"]
        start = int(ends[sample - 1]) if sample else 0
        return self.arrays["keys"][start : int(ends[sample])].tobytes().decode()

    def entry(self, sample: int) -> SampleEntry:
        """Its members."""
        first, end = (int(bound) for bound in self.arrays["starts"][sample : sample + 2])
        try:
            return SampleEntry(
                self.key(sample),
                tuple(self.extensions[number] for number in self.arrays["extensions"][first:end]),
                tuple(self.arrays["offsets"][first:end].tolist()),
                tuple(self.arrays["sizes"][first:end].tolist()),
            )
        except (IndexError, UnicodeDecodeError) as error:
            raise DataError(f"{self.folder}: the index is damaged at sample {sample}: {error}; make it anew") from error

    def around(self, sample: int) -> tuple[np.ndarray, int]:
        """What the samples have that may take the place of one, and the number of the first of them."""
        return self.kinds, 0

    @property
    def paths(self) -> list[str]:
        """Where its shards are read."""
        return [shard.path for shard in self.shards]

    def read_at(self, paths: Sequence[str]) -> "Index":
        """The same, of shards that are read at these addresses, in their order."""
        index = Index(self.folder, self.facts, self.arrays)
        index.shards = [shard._replace(path=path) for shard, path in zip(self.shards, paths, strict=True)]
        return index

    def check_fresh(self, reading: Reading | None = None) -> None:
        """Raise `IndexStale` for the first shard that is not the one that was indexed; asks for size and stamp only."""
        now = versions(self.paths, reading)
        for shard, found in zip(self.shards, now, strict=True):
            check_version(shard.path, shard.version, found)


def open_index(folder: Path) -> Index:
    """The index in `folder`, its arrays mapped.

    Raises:
        NoIndex: there is none.
        DataError: it is damaged or of another format.
    """
    try:
        facts = json.loads((folder / "index.json").read_text())
    except FileNotFoundError as error:
        raise NoIndex(f"{folder}: no index there; `mmcl data index` makes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: the index cannot be read: {error}; make it anew") from error
    try:
        if facts["format"] != FORMAT:
            raise DataError(f"{folder}: an index of format {facts['format']}, this mmcl reads {FORMAT}: make it anew")
        mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        arrays = {name: array.view(np.ndarray) for name, array in mapped.items()}  # memmap's own slicing takes longer
        _check(facts, arrays)
        return Index(folder, facts, arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the index is damaged: {type(error).__name__}: {error}; make it anew") from error


def _check(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    if not all(isinstance(name, str) for name in [*facts["extensions"], *(shard["path"] for shard in facts["shards"])]):
        raise TypeError("names that are no text")
    samples = sum(shard["samples"] for shard in facts["shards"])
    members = len(arrays["offsets"])
    lengths = {"starts": samples + 1, "kinds": samples, "key_ends": samples, "sizes": members, "extensions": members}
    for name, dtype in _ARRAYS.items():
        if (
            arrays[name].dtype != dtype
            or arrays[name].ndim != 1
            or len(arrays[name]) != lengths.get(name, len(arrays[name]))
        ):
            raise ValueError(f"{name}.npy is {arrays[name].dtype} of shape {arrays[name].shape}")
    if samples and (int(arrays["starts"][-1]) != members or int(arrays["key_ends"][-1]) != len(arrays["keys"])):
        raise ValueError("arrays of different builds")


def index_folder(spec: str) -> Path | None:
    """Where the index of `spec` lies if nothing else is said: beside local shards that share a folder."""
    if scheme_of(spec):
        return None
    folders = {os.path.dirname(os.path.abspath(path)) for path in expand_shards(spec)}
    return Path(folders.pop()) / FOLDER if len(folders) == 1 else None


def build_index(
    spec: str,
    folder: Path,
    *,
    workers: int = 1,
    hashes: bool = False,
    reading: Reading | None = None,
    progress: Callable[[Progressed], None] = lambda progressed: None,
) -> Index:
    """Index the shards of `spec` in `folder`; what is known of unchanged shards already is not read again.

    Args:
        spec: as a source names shards.
        folder: made where it is missing.
        workers: processes.
        hashes: also the sha256 of every shard, which reads all of it.
        reading: how to read.
        progress: is told after every shard.

    Raises:
        ShardMissing, ShardDamaged, DataError: for the first such shard in order; what is known of others is kept.
        ConfigError: `folder` cannot be written.
    """
    reading = reading or Reading()
    paths = absolute(expand_shards(spec, reading))
    parts = folder / "parts"
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: an index cannot be written there: {error.strerror}; name another with --out"
        ) from error
    done = samples = 0
    failed: dict[str, Exception] = {}
    scan = partial(scan_into, parts=parts, hashes=hashes, reading=reading)
    for path, found in zip(paths, over_shards(scan, paths, workers), strict=True):
        error, count = (found, 0) if isinstance(found, DataError) else found
        done, samples = done + 1, samples + count
        if error is not None:
            failed[path] = error
        progress(Progressed(done, len(paths), samples))
    for path in paths:
        if path in failed:
            raise failed[path]
    return merge_parts(paths, parts, folder)


def fresh_index(spec: str, folder: Path, reading: Reading | None = None) -> Index:
    """The index of `spec` in `folder`, made where it is missing or not that of the shards as they are.

    Raises:
        as `build_index`.
    """
    reading = reading or Reading()
    try:
        index, paths = open_index(folder), absolute(expand_shards(spec, reading))
        if index.paths == [shown(path) for path in paths]:
            index = index.read_at(paths)
            index.check_fresh(reading)
            return index
    except DataError:  # none, damaged or stale: whatever it is of the shards comes up when they are read
        pass
    return build_index(spec, folder, reading=reading)


def absolute(paths: Sequence[str]) -> list[str]:
    """Local paths from the root on, remote ones as they are.

    Raises:
        ConfigError: two remote ones have one name.
    """
    if len({shown(path) for path in paths}) < len(paths):
        raise ConfigError(
            f"shards {shown(paths[0])!r}: some differ in user, query or fragment alone; these may change, so that "
            "shards must have names without them"
        )
    return [path if scheme_of(path) else os.path.abspath(path) for path in paths]


def scan_into(path: str, parts: Path, hashes: bool, reading: Reading) -> tuple[Exception | None, int]:
    """Make the part of a shard, unless there is one of the shard as it is."""
    try:
        blob = open_blob(path, reading)
        now = IndexedShard(shown(path), blob.size, blob.stamp, 0)
        blob.close()
        known = read_part(part_file(parts, path))
        if known is not None and _same(known[0], now, hashes):
            return None, known[0].samples
        scan = scan_shard(path, reading)
        digest = _sha256(path, reading) if hashes else None
        shard = IndexedShard(shown(path), scan.bytes, scan.stamp, len(scan.samples), digest)
        _write_part(part_file(parts, path), shard, scan)
        return None, shard.samples
    except DataError as error:
        return error, 0


def _same(known: IndexedShard, now: IndexedShard, hashes: bool) -> bool:
    unchanged = (known.bytes, known.stamp) == (now.bytes, now.stamp) and now.stamp != ""
    return unchanged and (known.sha256 is not None or not hashes)


def part_file(parts: Path, path: str) -> Path:
    """Where the part of the shard at `path` lies."""
    return parts / f"{hashlib.sha256(shown(path).encode()).hexdigest()[:32]}.npz"


def _write_part(file: Path, shard: IndexedShard, scan: ShardScan) -> None:
    distinct = sorted({extension for sample in scan.samples for extension in sample.extensions})
    names: dict[str, int] = {}
    number = dict(zip(distinct, _numbers(names, distinct).tolist(), strict=True))
    keys = [sample.key.encode() for sample in scan.samples]
    arrays = {
        "counts": np.array([len(sample.sizes) for sample in scan.samples], dtype=np.uint64),
        "kinds": np.array([bits_of(sample.extensions) for sample in scan.samples], dtype=np.uint8),
        "offsets": np.array([offset for sample in scan.samples for offset in sample.offsets], dtype=np.uint64),
        "sizes": np.array([size for sample in scan.samples for size in sample.sizes], dtype=np.uint32),
        "extensions": np.array([number[e] for sample in scan.samples for e in sample.extensions], dtype=np.uint16),
        "key_sizes": np.array([len(key) for key in keys], dtype=np.uint64),
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "facts": np.frombuffer(json.dumps({**shard._asdict(), "extensions": list(names)}).encode(), dtype=np.uint8),
    }
    staged = file.with_name(f".{file.stem}.{os.getpid()}.{time.monotonic_ns()}.npz")
    with staged.open("wb") as out:
        np.savez(out, **arrays)
        out.flush()
        os.fsync(out.fileno())
    staged.replace(file)


def _numbers(names: dict[str, int], extensions: Sequence[str]) -> np.ndarray:
    """u16, of extensions in `names`, where those that are new are added."""

    def number(name: str) -> int:
        if name not in names and len(names) >= _MOST_EXTENSIONS and name not in KIND_OF_EXTENSION:
            name = _OTHERS
        return names.setdefault(name, len(names))

    return np.array([number(name) for name in extensions], dtype=np.uint16)


def read_part(file: Path, columns: Sequence[str] = _COLUMNS) -> PartFile | None:
    """The part in a file, with `columns`, `facts` among them.

    None where there is none, or a damaged one, which is then made anew.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as held:
            if any(packed.compress_type for packed in held.zip.infolist()):  # what we write is not, and a bomb is
                return None
            arrays = {name: held[name] for name in columns}
        facts = json.loads(arrays.pop("facts").tobytes())
        names = facts.pop("extensions")
        return IndexedShard(**facts), names, arrays
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        BadZipFile,
        MemoryError,
        RecursionError,
    ):
        return None


def merge_parts(paths: Sequence[str], parts: Path, folder: Path) -> Index:
    """One index of all parts, staged and renamed file by file; the manifest comes last. One part is held at a time.

    Raises:
        DataError: a part is gone or becomes another one meanwhile.
        ConfigError: `folder` cannot be written.
    """
    facts, names = _surveyed(paths, parts, folder)
    token = f"{os.getpid()}.{time.monotonic_ns()}"
    staged = {name: folder / f".{name}.{token}.npy" for name in _ARRAYS}
    manifest = folder / f".index.{token}.json"
    try:
        with ExitStack() as files:
            columns = {name: Column(files.enter_context(staged[name].open("wb")), _ARRAYS[name]) for name in _ARRAYS}
            _write_columns(columns, _parts(paths, parts, folder, facts["shards"]), names)
        for name, file in staged.items():
            file.replace(folder / f"{name}.npy")
        manifest.write_text(json.dumps(facts))
        manifest.replace(folder / "index.json")
    except OSError as error:
        raise ConfigError(f"{folder}: an index cannot be written there: {error.strerror}") from error
    finally:
        for file in (*staged.values(), manifest):
            file.unlink(missing_ok=True)
    return open_index(folder).read_at(paths)


def _surveyed(paths: Sequence[str], parts: Path, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The manifest of an index of these parts, and the number of each extension."""
    names: dict[str, int] = {}
    shards: list[dict[str, Any]] = []
    fingerprint = hashlib.sha256()
    for path, (shard, extensions, arrays) in zip(paths, _parts(paths, parts, folder), strict=True):
        shards.append(shard._replace(path=shown(path))._asdict())
        fingerprint.update(json.dumps([os.path.basename(shown(path)), extensions]).encode())
        for name, array in arrays.items():
            if name not in ("offsets", "extensions"):
                fingerprint.update(np.ascontiguousarray(array).tobytes())
        fingerprint.update(_numbers(names, extensions).tobytes())
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest()[:32],
        "extensions": list(names),
        "shards": shards,
    }, names


def _parts(
    paths: Sequence[str], parts: Path, folder: Path, expected: Sequence[dict[str, Any]] | None = None
) -> Iterator[PartFile]:
    for number, path in enumerate(paths):
        found = read_part(part_file(parts, path))
        if found is None or (expected and found[0]._replace(path=shown(path))._asdict() != expected[number]):
            raise DataError(
                f"{folder}: what was just noted of {shown(path)} is gone: is another process at work there?"
            )
        yield found


def _write_columns(columns: "dict[str, Column]", found: Iterable[PartFile], names: dict[str, int]) -> None:
    members = key_bytes = 0
    columns["starts"].add(np.zeros(1, dtype=np.uint64))
    for _, extensions, arrays in found:
        columns["starts"].add(np.cumsum(arrays["counts"], dtype=np.uint64) + np.uint64(members))
        columns["key_ends"].add(np.cumsum(arrays["key_sizes"], dtype=np.uint64) + np.uint64(key_bytes))
        columns["extensions"].add(_numbers(names, extensions)[arrays["extensions"]])
        for name in ("kinds", "offsets", "sizes", "keys"):
            columns[name].add(arrays[name])
        members, key_bytes = members + len(arrays["sizes"]), key_bytes + len(arrays["keys"])
    for column in columns.values():
        column.end()


class Column:
    """An npy file of one dimension that is written bit by bit.

    Not a mapped file: where the disk is full a write fails, and a page of a map ends the process.
    """

    def __init__(self, out: BinaryIO, dtype: Any) -> None:
        self.out, self.dtype, self.length = out, np.dtype(dtype), 0
        self._head()

    def add(self, array: np.ndarray) -> None:
        """Write more of it."""
        self.out.write(np.ascontiguousarray(array, dtype=self.dtype).tobytes())
        self.length += len(array)

    def end(self) -> None:
        """Say at the front how long it is."""
        self.out.seek(0)
        self._head()

    def _head(self) -> None:
        """numpy leaves room in it for a first axis that grows."""
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(
            self.out, {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        )


def _sha256(path: str, reading: Reading) -> str:
    blob, digest = open_blob(path, reading), hashlib.sha256()
    for start in range(0, blob.size, 1 << 23):
        digest.update(blob.read(start, min(1 << 23, blob.size - start)))
    blob.close()
    return digest.hexdigest()
