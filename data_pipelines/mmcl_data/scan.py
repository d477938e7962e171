"""Which samples a shard holds, read from its tar headers alone, and whether the shard is whole.

`tarfile`, and with it every WebDataset reader, takes a broken header, a file that was cut off between two members and
a tail of zeros all for the end of the archive: the rest of the shard is gone without a word. The walk below therefore
reads the headers itself, seeking over the payloads, and accepts a shard only if every byte of it is accounted for:
each header matches its checksum, each payload lies within the file, and after the last member come two blocks of
zeros, at most the padding to the next 10,240-byte record, and nothing else.

Two things cannot be seen from headers: a bit flipped inside a payload (the decoders see most of those, the sha256 in a
manifest sees all), and zeros over members that lay wholly in the last 10,240-byte record of the file. That record size
is what tarfile, webdataset, img2dataset and GNU tar write by default; a bigger blocking factor (`tar -b 2048`) ends in
as many zeros as a file that was allocated and never filled, so it is refused with the remedy.

Members that could make a reader do more than read (links, devices, sparse files, names that leave the archive) are
refused, as are members above a size limit, before anything is read from them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mmcl.errors import ConfigError, ShardDamaged, ShardMissing
from mmcl_data.blobs import Blob, Blobs, Reading, Version, filesystem, open_blob, patient, scheme_of, shown

MAX_MEMBER_BYTES = 256 * 2**20
MAX_SHARDS = 1_000_000
"""Of one brace pattern: more is a typo, and would fill the memory."""

_AHEAD = 8 * 2**20
"""Bytes that are read at once of a remote shard, of which a scan wants a few here and there."""

_GAP = 2**16
"""Bytes between two members of a sample that are rather read along than left out by a second read."""

_LARGE = 2**23
"""Bytes from which a member is read by itself, so that it is never held twice."""

_BLOCK = 512
_RECORD = 20 * _BLOCK
_MAX_NAME_BYTES = 64 * 2**10  # of a PAX header or GNU long name, which is read whole
_CHECKSUM = re.compile(rb" {0,6}[0-7]{1,7}(?:\0 | \0|\0| )")  # as written by any known tar, so that a flip is seen
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # webdataset's rule: split at the first dot of the basename
_META = re.compile(r"__[^/]*__(?:$|/)")  # webdataset's own members, which are part of no sample
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PAX_RECORD = re.compile(rb"(\d{1,9}) ")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class SampleEntry(NamedTuple):
    """One sample of a shard: its members, in the order in which they lie there."""

    key: str
    extensions: tuple[str, ...]
    """Of the members, in lower case; what follows the first dot of the basename."""
    offsets: tuple[int, ...]
    """Of the first payload byte of each member in the file."""
    sizes: tuple[int, ...]
    """Of the payloads in bytes."""


@dataclass(frozen=True, slots=True)
class ShardScan:
    """A whole shard, as its headers describe it."""

    path: str
    samples: tuple[SampleEntry, ...]
    bytes: int
    stamp: str
    """As `Blob.stamp`: another one means that the shard was written again."""
    ignored: tuple[str, ...] = ()
    """Names of members that belong to no sample: without an extension, hidden, or webdataset's `__meta__`."""


class _Member(NamedTuple):
    name: str
    header: int
    offset: int
    size: int


def scan_shard(
    path: str | Path, reading: Reading | None = None, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> ShardScan:
    """Read the headers of the tar at `path`; about 20 us a header where it is local, all of it where it is not.

    Raises:
        ShardMissing: there is no such shard.
        ShardDamaged: it is not a whole, plain, uncompressed tar with at least one sample, each sample's members side by
            side and none twice, no member above `max_member_bytes`; names the byte and the cause.
        DataError: it cannot be read.
    """
    blob = open_blob(str(path), reading)
    try:
        return _samples(blob, _Walk(blob if scheme_of(blob.path) == "" else _Buffered(blob), max_member_bytes))
    finally:
        blob.close()


def read_sample(blobs: Blobs, path: str, sample: SampleEntry, known: Version | None = None) -> dict[str, bytes]:
    """The payloads of `sample` by extension, from the shard at `path`, in one read where its members are neighbours.

    Raises:
        IndexStale: the shard is not the one that was `known`.
        ShardMissing, ShardDamaged, DataError: the shard is gone, shorter than when it was scanned, or cannot be read.
    """
    payloads: dict[str, bytes] = {}
    for extensions, start, offsets, sizes in _runs(sample):
        data = blobs.read(path, start, offsets[-1] + sizes[-1] - start, known)
        if len(sizes) == 1:
            payloads[extensions[0]] = data
            continue
        for extension, offset, size in zip(extensions, offsets, sizes, strict=True):
            payloads[extension] = data[offset - start : offset - start + size]
    return payloads


def _runs(sample: SampleEntry) -> Iterator[tuple[Sequence[str], int, Sequence[int], Sequence[int]]]:
    """Members that are read together: extensions, first byte, offsets, sizes."""
    if not sample.sizes:
        return
    ends = [offset + size for offset, size in zip(sample.offsets, sample.sizes, strict=True)]
    large = [size >= _LARGE for size in sample.sizes]
    breaks = [n for n in range(1, len(ends)) if sample.offsets[n] - ends[n - 1] > _GAP or large[n] or large[n - 1]]
    for first, last in zip([0, *breaks], [*breaks, len(ends)], strict=True):
        yield sample.extensions[first:last], sample.offsets[first], sample.offsets[first:last], sample.sizes[first:last]


def expand_shards(spec: str, reading: Reading | None = None) -> list[str]:
    """The shards that `spec` names: a file, a directory (its `*.tar`), a glob, or a brace pattern `{000000..000009}`.

    Local, or behind http(s), s3 or hf; a web server has no directories and no globs. Sorted within a directory or glob,
    in the order of the pattern for braces. Remote shards of a brace pattern are not asked for yet.

    Raises:
        ConfigError: `spec` names another transport (`pipe:`), is empty, malformed or lists a shard twice.
        ShardMissing: nothing is found, or a local shard of a brace pattern is missing.
    """
    if not spec.strip():
        raise ConfigError("shards: the pattern is empty; name a tar, a directory, a glob or a brace pattern")
    if scheme := scheme_of(spec):
        paths = [path for pattern in _unbrace(spec) for path in _match_remote(pattern, scheme, reading or Reading())]
    elif os.path.isdir(spec):
        if not (paths := [str(path) for path in sorted(Path(spec).glob("*.tar"))]):
            raise ShardMissing(f"{spec}: the directory holds no *.tar")
    elif os.path.exists(spec):  # first, so that a file whose name looks like a pattern is still found
        return [spec]
    else:
        paths = [path for pattern in _unbrace(spec) for path in _match(pattern, spec)]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"shards {shown(spec)!r}: a shard is named twice and would be seen twice per epoch")
    return paths


def _match_remote(pattern: str, scheme: str, reading: Reading) -> list[str]:
    is_web = scheme in ("http", "https")
    plain = shown(pattern) if is_web else pattern  # a query may hold signs of a glob
    if plain.endswith(".tar") and not has_magic(plain):
        return [pattern]
    if is_web:
        raise ConfigError(
            f"shards {shown(pattern)!r}: a web server cannot be asked what it has: name the shards, {{000..999}}.tar"
        )
    found = pattern if has_magic(pattern) else f"{pattern.rstrip('/')}/*.tar"
    files = filesystem(scheme)
    paths = sorted(str(path) for path in patient(lambda: files.glob(found), shown(found), reading))
    if not paths:
        raise ShardMissing(f"{shown(pattern)}: there is no such shard")
    return [path if path.startswith(f"{scheme}://") else f"{scheme}://{path}" for path in paths]


def _unbrace(spec: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

    # braceexpand writes out each range before it yields anything: look at the ends first
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", spec)
    if any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges):
        raise ConfigError(f"shards {shown(spec)!r}: more than {MAX_SHARDS} shards")
    try:
        patterns = list(islice(braceexpand(spec), MAX_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise ConfigError(f"shards {shown(spec)!r}: unbalanced braces") from error
    if len(patterns) > MAX_SHARDS:
        raise ConfigError(f"shards {shown(spec)!r}: more than {MAX_SHARDS} shards")
    return patterns


def _match(pattern: str, spec: str) -> list[str]:
    # ignored gaps would change the data silently, so every single alternative must exist
    if os.path.exists(pattern):
        return [pattern]
    found = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else []
    if not found:
        of = "" if pattern == spec else f" (of {spec})"
        raise ShardMissing(f"{pattern}{of}: there is no such shard")
    return found


def _samples(blob: Blob, members: "_Walk") -> ShardScan:
    path = shown(blob.path)
    samples: list[SampleEntry] = []
    ignored: list[str] = []
    seen: set[str] = set()
    current: list[tuple[str, int, int]] = []
    key = None
    for member in members:
        match = _KEY.fullmatch(member.name)
        if match is None or _META.match(member.name):
            ignored.append(member.name)
            continue
        extension = match[2].lower()
        if match[1] != key:
            if key is not None:
                samples.append(SampleEntry(key, *zip(*current, strict=True)))
            key, current = match[1], []
            if key in seen:
                cause = f"members of sample {key!r} do not lie side by side: write them sorted by key"
                raise ShardDamaged(path, member.header, cause)
            seen.add(key)
        elif any(extension == other for other, _, _ in current):
            raise ShardDamaged(path, member.header, f"member {member.name!r} appears twice")
        current.append((extension, member.offset, member.size))
    if key is None:
        raise ShardDamaged(path, 0, "holds no sample: no member is named KEY.EXTENSION")
    samples.append(SampleEntry(key, *zip(*current, strict=True)))
    return ShardScan(blob.path, tuple(samples), blob.size, blob.stamp, tuple(ignored))


class _Buffered:
    """A remote blob that is read from front to back."""

    def __init__(self, blob: Blob) -> None:
        self.blob, self.path, self.size, self.stamp = blob, blob.path, blob.size, blob.stamp
        self.start, self.data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if not self.start <= offset <= offset + size <= self.start + len(self.data):
            self.start = offset
            self.data = self.blob.read(offset, min(max(size, _AHEAD), self.size - offset))
        return self.data[offset - self.start :][:size]

    def close(self) -> None:
        self.blob.close()


class _Walk:
    """Iterates over the regular members of one tar; raises ShardDamaged at the first byte that does not belong."""

    def __init__(self, blob: Blob, max_member_bytes: int) -> None:
        self.path, self.blob, self.limit = shown(blob.path), blob, max_member_bytes
        self.end = blob.size
        if self.end == 0:
            raise self.damaged(0, "the file is empty")
        self.long: dict[str, str] = {}  # what PAX headers and GNU long names say of the next member

    def damaged(self, offset: int, cause: str) -> ShardDamaged:
        return ShardDamaged(self.path, offset, cause)

    def __iter__(self) -> Iterator[_Member]:
        at = 0
        while any(block := self.block(at)):
            kind, size = block[156:157], self.size(block, at)
            start, after = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if after > self.end:
                raise self.damaged(self.end, f"cut off inside the payload of {self.name(block, at)!r}")
            if kind in b"0\x007":  # regular, also in old and contiguous spelling
                yield self.member(block, at, size)
            elif kind in b"LKxXg":
                self.describe(kind, self.payload(start, size, at), at)
            elif kind != b"5" or size:
                what = _REFUSED.get(kind, f"of type {kind!r}")
                raise self.damaged(at, f"member {self.name(block, at)!r} is {what}, not a plain file")
            else:
                self.long.clear()
            at = after
        if self.long:
            raise self.damaged(at, "a long name without its member")
        self.check_tail(at)

    def block(self, at: int) -> bytes:
        block = self.blob.read(at, max(0, min(_BLOCK, self.end - at)))
        if len(block) == _BLOCK:
            return block
        if at == 0:
            raise self.damaged(0, self.not_a_header(block, 0))
        cause = "cut off inside a header" if block else "cut off: the two end-of-archive blocks are missing"
        raise self.damaged(self.end, cause)

    def size(self, block: bytes, at: int) -> int:
        """Payload bytes of a header whose checksum holds."""
        field = block[148:156]
        if not _CHECKSUM.fullmatch(field) or int(field.rstrip(b"\0 "), 8) != sum(block) - sum(field) + 8 * 32:
            raise self.damaged(at, self.not_a_header(block, at))
        digits = block[124:136].split(b"\0", 1)[0].strip()
        if block[124] == 0x80:  # GNU's binary notation
            size = int.from_bytes(block[125:136], "big")
        elif re.fullmatch(rb"[0-7]*", digits):
            size = int(digits or b"0", 8)
        else:
            raise self.damaged(at, f"the size {block[124:136]!r} is no number")
        if size > self.limit:
            raise self.damaged(at, f"member {self.name(block, at)!r} of {size} bytes is over the limit of {self.limit}")
        return size

    def not_a_header(self, block: bytes, at: int) -> str:
        if at:
            return "no header where one should be: its checksum does not hold"
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic):
                return f"compressed ({name}): shards are plain tar files, decompress it"
        return "no tar: the first header is cut off or does not match its checksum"

    def name(self, block: bytes, at: int) -> str:
        if "path" in self.long:
            return self.long["path"]
        name = block[:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0", 1)[0] + b"/" + name
        return self.text(name, at)

    def text(self, name: bytes, at: int) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(at, f"the member name {name!r} is not UTF-8") from error

    def member(self, block: bytes, at: int, size: int) -> _Member:
        name = self.name(block, at)
        if _CONTROL.search(name) or name.startswith("/") or ".." in name.split("/"):
            raise self.damaged(at, f"the member name {name!r} leaves the archive or holds control characters")
        if self.long:
            if self.long.get("size", str(size)) != str(size):
                raise self.damaged(at, f"member {name!r}: the PAX header overrides its size")
            self.long.clear()
        return _Member(name, at, at + _BLOCK, size)

    def payload(self, start: int, size: int, at: int) -> bytes:
        if size > _MAX_NAME_BYTES:
            raise self.damaged(at, f"a PAX header or long name of {size} bytes")
        return self.blob.read(start, size)

    def describe(self, kind: bytes, data: bytes, at: int) -> None:
        """Take in what a PAX header or a GNU long name says of the member that follows."""
        if kind == b"L":
            self.long["path"] = self.text(data.split(b"\0", 1)[0], at)
            return
        if kind == b"K":  # the target of a link, which is refused when it comes
            return
        records = dict(self.pax(data, at))
        if any(key.startswith("GNU.sparse") for key in records):
            raise self.damaged(at, "a sparse file, not a plain one")
        if kind == b"g" and records.keys() & {"path", "size"}:
            raise self.damaged(at, "a global PAX header that renames or resizes every member")
        if kind != b"g":
            self.long.update(records)

    def pax(self, data: bytes, at: int) -> Iterator[tuple[str, str]]:
        """The `LENGTH KEY=VALUE` lines of a PAX header; only a path has to be UTF-8."""
        start, data = 0, data.rstrip(b"\0")
        while start < len(data):
            match = _PAX_RECORD.match(data, start)
            end = start + int(match[1]) if match else 0
            key, equals, value = data[match.end() if match else 0 : end].partition(b"=")
            if match is None or end > len(data) or not equals or not value.endswith(b"\n"):
                raise self.damaged(at, "a malformed PAX header")
            text = self.text(value[:-1], at) if key == b"path" else value[:-1].decode(errors="replace")
            yield key.decode(errors="replace"), text
            start = end

    def check_tail(self, at: int) -> None:
        """From `at`, the first block of zeros, there must be two of them, record padding and nothing else."""
        allowed = -(-(at + 2 * _BLOCK) // _RECORD) * _RECORD
        tail = self.blob.read(at, min(self.end, allowed) - at)
        if any(tail):
            raise self.damaged(at, "zeros where a header should be, with data behind them")
        if self.end > allowed:
            cause = (
                f"{self.end - at} bytes after the last member, more than the padding to a 10,240-byte record: zeros "
                "over lost members, data appended, or a large blocking factor (rewrite it with `tar -b 20`)"
            )
            raise self.damaged(at, cause)
        if len(tail) < 2 * _BLOCK or self.end % _BLOCK:
            raise self.damaged(self.end, "cut off inside the end-of-archive blocks")
