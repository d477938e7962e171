"""The bytes of shards by range, wherever they lie: local files, and objects behind http(s), s3 or hf.

Nothing is run by a shell and no other scheme is known, whatever a configuration says. What fails for a moment (a server
that is busy, a network file system that lost its handle, fewer bytes than asked for) is tried again, a little later
each time; what is missing or forbidden is not.

Remote ranges are kept on disk, if there is a folder for it, up to a number of bytes: the least recently used go first.
All processes of a machine share the folder.

An address may hold a user, a password or a signed query. They are for asking only: what is kept or compared goes by the
address without them (`shown`), as they change while the shard stays.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from urllib.parse import urlsplit

from mmcl.errors import ConfigError, DataError, IndexStale, MissingExtra, ShardDamaged, ShardMissing

log = logging.getLogger("mmcl.data")

REMOTE = ("http", "https", "s3", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_EXTRAS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "hf": "huggingface_hub"}
_BUSY = {408, 425, 429}
"""Of the answers from 400 to 499 those that may be others in a moment."""
_STALLED_S = 10.0
_ASKED_AT_ONCE = 32
"""Remote shards, at a start that asks for all."""
_FOR_A_MOMENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EBUSY}


def scheme_of(path: str) -> str:
    """The scheme of a path that may be read: one of `REMOTE`, or none for a local one.

    Raises:
        ConfigError: any other scheme, a pipe among them.
    """
    match = _SCHEME.match(path.strip())
    if match is None:
        return ""
    scheme = match[1].lower()
    if scheme in REMOTE and path.strip()[match.end() :].startswith("//"):
        return scheme
    if scheme == "file":
        raise ConfigError(f"shards {shown(path)!r}: give a local path as it is, without file:")
    known = ", ".join(f"{name}://" for name in REMOTE)
    raise ConfigError(f"shards {shown(path)!r}: only local paths and {known} are read, and no shell command")


def shown(path: str) -> str:
    """A path for messages, logs and names: without user, password and query, which may hold secrets and change."""
    if not _SCHEME.match(path):
        return path
    try:
        parts = urlsplit(path)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        return "(a malformed address)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How hard to try, and what to keep."""

    retries: int = 6
    """Times that a read is tried again before it has failed."""
    pause_s: float = 0.1
    """Before the first of them; twice as long before each further one, 30 s at most."""
    cache: Path | None = None
    """Folder for remote ranges; None keeps nothing."""
    cache_bytes: int = 50 * 10**9
    """Kept there at most, but for what is being written."""
    block_bytes: int = 0
    """Remote ranges are read in blocks of this size, for neighbours that are read soon; 0 reads what is asked for."""
    reads: int = 16
    """Remote samples that are read at once for a chunk of rows."""


class Blob(Protocol):
    """Something that can be read by range."""

    path: str
    size: int
    stamp: str
    """Changes when the content does: time of modification, or what a server says."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            ShardMissing, ShardDamaged, DataError: it is gone, shorter than that, or cannot be read.
        """
        ...

    def close(self) -> None: ...


def open_blob(path: str, reading: Reading | None = None) -> Blob:
    """The blob at `path`.

    Raises:
        ConfigError: a scheme that is not read.
        ShardMissing: there is nothing.
        ShardDamaged: it is no regular file.
        DataError: it cannot be read.
        MissingExtra: the scheme needs a package that is not installed.
    """
    reading = reading or Reading()
    return RemoteBlob(path, reading) if scheme_of(path) else LocalBlob(path, reading)


Version = tuple[int, str]
"""Size and stamp of a blob."""


def versions(paths: Sequence[str], reading: Reading | None = None) -> list[Version]:
    """Of each blob, as it is now; remote ones are asked for many at once.

    Raises:
        as `open_blob`.
    """
    ask = partial(_version, reading=reading)
    if not any(map(scheme_of, paths)):
        return [ask(path) for path in paths]
    with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="ask") as threads:
        return list(threads.map(ask, paths))


def _version(path: str, reading: Reading | None) -> Version:
    blob = open_blob(path, reading)
    blob.close()
    return blob.size, blob.stamp


def check_version(path: str, known: Version, now: Version, remedy: str = "`mmcl data index` reads it anew") -> None:
    """Raise `IndexStale` for a shard that is not the one that was indexed; says what to do about it."""
    if now != known:
        raise IndexStale(
            f"{shown(path)}: written again after it was indexed: {known[0]} bytes at {known[1]} then, {now[0]} at "
            f"{now[1]} now; {remedy}"
        )


class LocalBlob:
    """A file."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.file = -1
        found = patient(self._stat, path, reading)
        # asked before opening, which would wait for ever on a FIFO
        if not stat.S_ISREG(found.st_mode):
            raise ShardDamaged(path, 0, "not a regular file")
        self.size, self.stamp = found.st_size, str(found.st_mtime_ns)
        self._open()

    def read(self, offset: int, size: int) -> bytes:
        return patient(lambda: self._read(offset, size), self.path, self.reading)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        self.close()

    def _stat(self) -> os.stat_result:
        return os.stat(self.path)

    def _open(self) -> None:
        self.file = patient(lambda: os.open(self.path, os.O_RDONLY), self.path, self.reading)

    def _open_again(self) -> None:
        """In place, as other threads are reading."""
        fresh = os.open(self.path, os.O_RDONLY)
        try:
            found = os.fstat(fresh)
            if (found.st_size, str(found.st_mtime_ns)) != (self.size, self.stamp):
                raise ShardDamaged(self.path, 0, "the file was written again while it was read")
            os.dup2(fresh, self.file, inheritable=False)
        finally:
            os.close(fresh)

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = pread(self.file, size - len(data), offset + len(data))
            except OSError as error:
                if error.errno == errno.ESTALE:  # another file has the name now, or the server forgot this one
                    self._open_again()
                raise
            if not more and os.fstat(self.file).st_size < offset + size:
                raise ShardDamaged(self.path, offset + len(data), "the file is shorter than it was")
            if not more:
                raise OSError(errno.EIO, "nothing is given where the file goes on")
            data += more  # network file systems may return less than was asked for
        return data


pread = os.pread
"""Where tests put a file system that fails."""


class RemoteBlob:
    """An object that fsspec reads."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.files = filesystem(scheme_of(path))
        info: dict[str, Any] = patient(lambda: self.files.info(path), shown(path), reading)
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise DataError(
                f"{shown(path)}: the server does not say how large it is, so that it cannot be read by range"
            )
        self.size = int(info["size"])
        named = ("ETag", "etag", "LastModified", "last_modified", "Last-Modified", "blob_id")
        self.stamp = next((str(info[name]) for name in named if info.get(name)), "")
        self.cache = disk_cache(reading.cache, reading.cache_bytes) if reading.cache else None

    def read(self, offset: int, size: int) -> bytes:
        block = self.reading.block_bytes
        if offset + size > self.size:
            raise ShardDamaged(shown(self.path), self.size, "the object is shorter than it was")
        if not block:
            return self._range(offset, offset + size)
        first, last = offset // block, -(-(offset + size) // block)
        parts = [self._range(n * block, min((n + 1) * block, self.size)) for n in range(first, last)]
        return b"".join(parts)[offset - first * block :][:size]

    def close(self) -> None:
        pass

    def _range(self, start: int, end: int) -> bytes:
        if self.cache is None:
            return self._fetch(start, end)
        name = f"{shown(self.path)}\n{self.size} {self.stamp}\n{start} {end}"
        return self.cache.get(name, end - start, lambda: self._fetch(start, end))

    def _fetch(self, start: int, end: int) -> bytes:
        def fetch() -> bytes:
            data = self.files.cat_file(self.path, start=start, end=end)
            if len(data) > end - start:
                raise DataError(f"{shown(self.path)}: the server gives the whole object where a range is asked for")
            if len(data) < end - start:
                raise TimeoutError(f"{len(data)} of {end - start} bytes")
            return data

        return patient(fetch, shown(self.path), self.reading) if end > start else b""


def patient(act: Callable[[], Any], path: str, reading: Reading) -> Any:
    """What `act` gives, tried again where it fails for a moment."""
    for left in range(reading.retries, -1, -1):
        started = time.monotonic()
        try:
            return act()
        except (DataError, MissingExtra):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardMissing(f"{path}: there is no such shard") from error
        except Exception as error:  # client libraries raise anything
            if not left or not _may_pass(error, path):
                raise DataError(f"{path}: cannot be read: {_cause(error)}") from error
            if left < reading.retries:
                log.warning("%s: tried again, %d times more at most: %s", path, left, _cause(error))
        finally:
            if (took := time.monotonic() - started) > _STALLED_S:
                log.warning("%s: a read took %.0f s", path, took)
        time.sleep(min(30.0, reading.pause_s * 2 ** (reading.retries - left)))
    raise AssertionError("unreachable")


def _may_pass(error: Exception, path: str) -> bool:
    """Whether it may go better in a moment."""
    if isinstance(error, PermissionError):
        return False
    answers = getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)
    if any(isinstance(answer, int) and 400 <= answer < 500 and answer not in _BUSY for answer in answers):
        return False
    if isinstance(error, OSError) and _SCHEME.match(path) is None:
        return error.errno in _FOR_A_MOMENT
    return True


def _cause(error: Exception) -> str:
    """Without addresses, which may hold secrets."""
    return re.sub(r"\S*://\S+", "(address)", f"{type(error).__name__}: {error}")


_filesystems: dict[str, Any] = {}


def filesystem(scheme: str) -> Any:
    """fsspec's client for a scheme, one in each process.

    Raises:
        MissingExtra: its package is not installed.
    """
    import fsspec

    key = f"{os.getpid()} {scheme}"  # a client does not survive a fork
    if key not in _filesystems:
        try:
            _filesystems[key] = fsspec.filesystem(scheme, **_settings(scheme))
        except ImportError as error:
            raise MissingExtra(_EXTRAS[scheme], "s3" if scheme == "s3" else "remote", f"reading {scheme}://") from error
    return _filesystems[key]


def _settings(scheme: str) -> dict[str, Any]:
    """A server that falls silent is given up, to be asked again; a slow one is not."""
    if scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


_caches: dict[tuple[int, Path, int], "DiskCache"] = {}


def disk_cache(folder: Path, max_bytes: int) -> "DiskCache":
    """The cache of a folder, one in each process, as it counts what it wrote."""
    return _caches.setdefault((os.getpid(), folder, max_bytes), DiskCache(folder, max_bytes))


class DiskCache:
    """Byte strings by name in a folder; the least recently used go when it has too many bytes.

    Any number of processes and threads may use it. Each process looks at the whole folder after it has written a
    thirty-second part of the limit, so that a machine with P of them holds P / 32 more at most.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.written = max_bytes  # look at once
        self.lock = Lock()

    def get(self, name: str, size: int, make: Callable[[], bytes]) -> bytes:
        """The string called `name`, which has `size` bytes; made and kept where it is not there."""
        digest = hashlib.sha256(name.encode()).hexdigest()
        path = self.folder / digest[:2] / digest[2:]
        try:
            data = path.read_bytes()
            if len(data) == size:
                os.utime(path)
                return data
        except OSError:
            pass
        data = make()
        with contextlib.suppress(OSError):  # a full disk costs speed only
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        if len(data) > self.max_bytes:
            return
        with self.lock:
            self.written += len(data)
            is_due = self.written >= self.max_bytes // 32
            self.written = len(data) if is_due else self.written
        if is_due:
            self._make_room(len(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        staged.write_bytes(data)
        staged.replace(path)

    def _make_room(self, more: int) -> None:
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                seen = path.stat()
                found.append((seen.st_mtime_ns, seen.st_size, path))
        total = sum(size for _, size, _ in found) + more
        for _, size, path in sorted(found):
            if total <= self.max_bytes - self.max_bytes // 32:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


@dataclass(slots=True)
class Blobs:
    """Blobs that were read last, kept open. Threads may share it."""

    reading: Reading = field(default_factory=Reading)
    most: int = 64
    open: OrderedDict[str, Blob] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=Lock)

    def read(self, path: str, offset: int, size: int, known: Version | None = None) -> bytes:
        """As `Blob.read`, of a blob that is the one that was `known`.

        Raises:
            IndexStale: it was another one already when it was opened.
        """
        with self.lock:
            blob = self.open.get(path)
            if blob is not None:
                self.open.move_to_end(path)
        if blob is None:
            blob = open_blob(path, self.reading)
            with self.lock:
                self.open[path] = blob
                # closed when its last reader lets go of it
                while len(self.open) > self.most:
                    self.open.popitem(last=False)
        if known is not None:
            check_version(path, known, (blob.size, blob.stamp))
        return blob.read(offset, size)
