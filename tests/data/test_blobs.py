"""Shards behind a server are read like local ones, whatever the server and the disk do for a moment."""

import errno
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_cases import SPEC, digest, sample, stream, take, write

from mmcl.errors import ConfigError, DataError, IndexStale, MissingExtra, ShardDamaged, ShardMissing
from mmcl_data import blobs
from mmcl_data.blobs import Blobs, DiskCache, LocalBlob, Reading, open_blob, scheme_of, shown
from mmcl_data.index import build_index
from mmcl_data.processes import process_pool
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig
from mmcl_data.unindexed import GrowingIndex

QUICK = Reading(retries=6, pause_s=0.001)


@dataclass
class Behaviour:
    """How a server treats its clients."""

    folder: Path
    failing: list[int] = field(default_factory=list)
    """Answers of the next requests for bytes: a status, 0 a connection that is reset, -1 half of the bytes."""
    ranges: bool = True
    length: bool = True
    etag: str = "one"
    pause_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    behaviour: Behaviour

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        with self.busy():
            self.answer(head=True)

    def do_GET(self) -> None:
        with self.behaviour.lock:
            self.behaviour.asked.append(f"{self.path.partition('?')[0]} {self.headers.get('Range')}")
        with self.busy():
            self.answer(head=False)

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self.behaviour.lock:
            self.behaviour.at_once += 1
            self.behaviour.most_at_once = max(self.behaviour.most_at_once, self.behaviour.at_once)
        time.sleep(self.behaviour.pause_s)
        try:
            yield
        finally:
            with self.behaviour.lock:
                self.behaviour.at_once -= 1

    def answer(self, *, head: bool) -> None:
        file = self.behaviour.folder / self.path.partition("?")[0].lstrip("/")
        fault = self.behaviour.failing.pop(0) if self.behaviour.failing and not head else 200
        if not file.is_file() or fault >= 400:
            self.send_response(fault if file.is_file() else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == 0:
            self.close_connection = True
            return
        data, asked = file.read_bytes(), self.headers.get("Range")
        if asked and self.behaviour.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else len(data)]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("ETag", self.behaviour.etag)
        if self.behaviour.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.behaviour.length:
            self.send_header("Content-Length", str(len(part)))
        else:
            self.close_connection = True
        self.end_headers()
        if not head:
            self.wfile.write(part[: len(part) // 2] if fault == -1 else part)
            self.close_connection |= fault == -1


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[str, Behaviour]]:
    """The address of a server of `tmp_path`, and how it behaves."""
    behaviour = Behaviour(tmp_path)
    handler = type("Handler", (Server,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as held:
        held.daemon_threads = True
        thread = threading.Thread(target=held.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{held.server_address[1]}", behaviour
        held.shutdown()
        thread.join()


def remote(address: str, tmp_path: Path, **data: Any) -> ShardStream:
    """A stream of two shards of ten behind an address, and an index here."""
    index = tmp_path / "index"
    shards = f"{address}/s/{{000000..000001}}.tar"
    if not index.exists():
        build_index(shards, index)
    source = SourceConfig(shards=shards, index=str(index))
    return ShardStream(DataConfig(sources={"a": source}, **data), SPEC, 4, 0)


def local(tmp_path: Path) -> list[str]:
    path = write(tmp_path / "s", [sample(n) for n in range(20)])
    return [digest(batch) for batch in take(stream({"a": path}, batch=4), 8)]


def digests(made: ShardStream) -> list[str]:
    return [digest(batch) for batch in take(made, 8)]


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [{}, {"slice_size": 4, "window": 8}, {"workers": 2, "worker_kind": "threads"}, {"workers": 2}]
)
def test_a_stream_over_http_is_the_stream_of_the_same_files(server, tmp_path, data):
    write(tmp_path / "s", [sample(n) for n in range(20)])
    order = {name: value for name, value in data.items() if name in ("slice_size", "window")}
    expected = [digest(batch) for batch in take(stream({"a": str(tmp_path / "s")}, batch=4, data=order), 8)]
    assert digests(remote(server[0], tmp_path, **data)) == expected


def test_the_cache_gives_the_same_and_then_asks_for_nothing(server, tmp_path):
    address, behaviour = server
    expected = local(tmp_path)
    cache = {"cache": str(tmp_path / "cache")}
    assert digests(remote(address, tmp_path, **cache)) == expected
    behaviour.asked.clear()
    assert digests(remote(address, tmp_path, **cache)) == expected
    assert [asked for asked in behaviour.asked if "bytes=" in asked] == []
    assert digests(remote(address, tmp_path)) == expected
    assert any("bytes=" in asked for asked in behaviour.asked)


@pytest.mark.parametrize("fault", [503, 429, 0, -1], ids=["busy", "too many requests", "reset", "half an answer"])
def test_what_a_server_fails_at_for_a_moment_is_asked_again(server, tmp_path, fault):
    address, behaviour = server
    (tmp_path / "x.tar").write_bytes(b"0123456789" * 100)
    blob = open_blob(f"{address}/x.tar", QUICK)
    behaviour.failing[:] = [fault] * 3
    assert blob.read(10, 20) == b"0123456789" * 2
    assert behaviour.failing == []


def test_a_server_that_goes_on_failing_is_named_after_so_many_tries(server, tmp_path):
    address, behaviour = server
    (tmp_path / "x.tar").write_bytes(b"0" * 100)
    blob = open_blob(f"{address}/x.tar", Reading(retries=3, pause_s=0.001))
    behaviour.asked.clear()
    behaviour.failing[:] = [503] * 50
    with pytest.raises(DataError, match=r"x\.tar: cannot be read: .*503"):
        blob.read(0, 10)
    assert len(behaviour.asked) == 4


def test_what_is_forbidden_is_not_asked_for_again(server, tmp_path):
    address, behaviour = server
    (tmp_path / "x.tar").write_bytes(b"0" * 100)
    blob = open_blob(f"{address}/x.tar", QUICK)
    behaviour.asked.clear()
    behaviour.failing[:] = [403] * 9
    with pytest.raises(DataError, match=r"x\.tar: cannot be read: .*403"):
        blob.read(0, 10)
    assert len(behaviour.asked) == 1


def test_what_is_not_there_is_missing(server):
    with pytest.raises(ShardMissing, match=r"nowhere\.tar"):
        open_blob(f"{server[0]}/nowhere.tar", QUICK)


def test_a_server_that_ignores_ranges_is_found_out(server, tmp_path):
    address, behaviour = server
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    behaviour.ranges = False
    with pytest.raises(DataError, match="the whole object where a range is asked for"):
        open_blob(f"{address}/x.tar", QUICK).read(2, 3)


def test_a_server_that_does_not_say_how_large_an_object_is_cannot_be_read_by_range(server, tmp_path):
    address, behaviour = server
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    behaviour.length = behaviour.ranges = False
    with pytest.raises(DataError, match="does not say how large it is"):
        open_blob(f"{address}/x.tar", QUICK)


def test_an_object_with_another_etag_is_another_one(server, tmp_path):
    address, behaviour = server
    local(tmp_path)
    take(remote(address, tmp_path), 1)
    behaviour.etag = "two"
    with pytest.raises(IndexStale, match=r"000000\.tar: written again after it was indexed"):
        remote(address, tmp_path)


def test_the_reads_of_a_chunk_go_out_together(server, tmp_path):
    address, behaviour = server
    expected = local(tmp_path)
    made = remote(address, tmp_path)
    behaviour.pause_s, behaviour.most_at_once = 0.02, 0
    assert digests(made) == expected
    assert behaviour.most_at_once >= 4


def test_all_shards_are_asked_for_size_and_stamp_together(server, tmp_path):
    address, behaviour = server
    write(tmp_path / "s", [sample(n) for n in range(20)], 1)
    index = build_index(f"{address}/s/{{000000..000019}}.tar", tmp_path / "index")
    behaviour.pause_s, behaviour.most_at_once = 0.05, 0
    index.check_fresh()
    assert behaviour.most_at_once >= 10
    growing = GrowingIndex(tmp_path / "index", index.paths, Reading())
    behaviour.most_at_once = 0
    growing.check_fresh()
    assert behaviour.most_at_once >= 10


class HubSays:
    """What a Hugging Face client raises holds the answer of the hub, and no status of its own."""

    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request = status, {}, None


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (404, 1), (429, 3), (503, 3)])
def test_what_the_hub_refuses_is_not_asked_for_again(status, tries):
    from huggingface_hub.errors import HfHubHTTPError

    asked = []

    def ask() -> None:
        asked.append(status)
        raise HfHubHTTPError(f"{status} of the hub", response=HubSays(status))  # pyright: ignore[reportArgumentType]

    with pytest.raises(DataError, match=f"{status} of the hub"):
        blobs.patient(ask, "hf://datasets/me/x/0.tar", Reading(retries=2, pause_s=0))
    assert len(asked) == tries


# --- secrets and schemes --------------------------------------------------------------------------------------------

SECRET = "hunter2"


def test_passwords_and_tokens_are_not_shown():
    for path in (f"http://me:{SECRET}@h:80/a/{{0..9}}.tar?token={SECRET}#x{SECRET}", f"s3://k:{SECRET}@b/x.tar"):
        assert SECRET not in shown(path)
    assert shown(f"http://me:{SECRET}@h:80/a/x.tar?t={SECRET}") == "http://h:80/a/x.tar"
    assert shown("/a/x.tar?token=1") == "/a/x.tar?token=1"
    assert SECRET not in shown(f"http://[{SECRET}/x.tar")


@pytest.mark.parametrize("fault", [404, 403, 503])
def test_no_error_of_a_server_shows_a_token(server, tmp_path, fault, caplog):
    address, behaviour = server
    if fault != 404:
        (tmp_path / "x.tar").write_bytes(b"0" * 100)
    with caplog.at_level(logging.DEBUG, "mmcl"), pytest.raises(DataError) as caught:
        blob = open_blob(f"{address}/x.tar?token={SECRET}", Reading(retries=3, pause_s=0.001))
        behaviour.failing[:] = [fault] * 9
        blob.read(0, 10)
    assert SECRET not in str(caught.value) + caplog.text
    assert "x.tar" in str(caught.value)


@pytest.mark.parametrize(
    "spec", [f"ftp://me:{SECRET}@h/x.tar", f"https://me:{SECRET}@h/x", f"http://h/{{0,0}}.tar?t={SECRET}"]
)
def test_no_refusal_shows_a_password(spec):
    with pytest.raises(ConfigError) as caught:
        stream({"a": spec})
    assert SECRET not in str(caught.value)


def test_keys_of_rows_hold_no_token(server, tmp_path):
    address, _ = server
    expected = local(tmp_path)
    shards = f"{address}/s/{{000000..000001}}.tar?token={SECRET}"
    build_index(shards, tmp_path / "index")
    source = SourceConfig(shards=shards, index=str(tmp_path / "index"))
    made = ShardStream(DataConfig(sources={"a": source}), SPEC, 4, 0)
    assert [digest(batch) for batch in take(made, 8)] == expected


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "shard by shard"])
def test_a_run_goes_on_when_the_addresses_are_signed_anew_and_no_file_holds_a_signature(server, tmp_path, indexed):
    address, behaviour = server
    write(tmp_path / "s", [sample(n) for n in range(20)])

    def signed(user: str, token: str) -> ShardStream:
        spec = f"{address.replace('//', f'//{user}@')}/s/{{000000..000001}}.tar?token={token}"
        if indexed and not (tmp_path / "home" / "a" / "index.json").exists():
            build_index(spec, tmp_path / "home" / "a")
        config = DataConfig(sources={"a": SourceConfig(shards=spec)}, cache=str(tmp_path / "cache"))
        return ShardStream(config, SPEC, 4, 0, indexes=tmp_path / "home")

    begun = signed(f"me:{SECRET}", f"{SECRET}1")
    take(begun, 3)
    state = begun.state_dict()
    rest = digests(begun)
    behaviour.asked.clear()
    again = signed(f"you:{SECRET}", f"{SECRET}2")
    again.load_state_dict(state)
    assert digests(again) == rest
    assert [asked for asked in behaviour.asked if "bytes=" in asked] == []  # the cache is still that of the shards
    held = [path for name in ("home", "cache") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert any(path.name == "index.json" for path in held) and any(path.suffix == ".npz" for path in held)
    assert not [path for path in held if SECRET.encode() in path.read_bytes() or SECRET in str(path)]


def test_shards_that_differ_in_their_query_alone_are_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"x\.tar'.*differ in user, query or fragment alone"):
        build_index(f"{server[0]}/x.tar?part={{0..3}}", tmp_path / "index")


@pytest.mark.parametrize("path", ["pipe:ls", "ftp://h/x", "file:///x", "gs://b/x", "s3:b", "http:/h", "data:,x", "x:y"])
def test_other_schemes_are_refused(path):
    with pytest.raises(ConfigError):
        scheme_of(path)


@pytest.mark.parametrize(
    ("path", "module", "says"),
    [
        ("http://h/x.tar", "aiohttp", r"'aiohttp': pip install 'mmcl\[remote\]'"),
        ("s3://b/x.tar", "s3fs", r"'s3fs': pip install 'mmcl\[s3\]'"),
    ],
)
def test_a_client_that_is_not_installed_is_named_with_its_extra(monkeypatch, path, module, says):
    monkeypatch.setitem(sys.modules, module, None)
    for held in [name for name in sys.modules if name.startswith("fsspec.implementations.http")]:
        monkeypatch.delitem(sys.modules, held)
    monkeypatch.setattr(blobs, "_filesystems", {})
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(MissingExtra, match=says):
        open_blob(path)


def test_hf_paths_go_to_the_hub_and_errors_hold_no_token(monkeypatch):
    from huggingface_hub import HfFileSystem

    files = blobs.filesystem("hf")
    assert isinstance(files, HfFileSystem)
    asked = []

    def info(path: str) -> Any:
        asked.append(path)
        raise OSError(f"cannot reach https://hub/datasets/x?token={SECRET}")

    monkeypatch.setattr(files, "info", info)
    with pytest.raises(DataError) as caught:
        open_blob("hf://datasets/me/x/0.tar", Reading(retries=1, pause_s=0.001))
    assert asked == ["hf://datasets/me/x/0.tar"] * 2
    assert SECRET not in str(caught.value)


# --- the cache ------------------------------------------------------------------------------------------------------


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_keeps_what_was_used_last_and_no_more_than_it_may(tmp_path):
    cache = DiskCache(tmp_path, 100_000)
    made = []

    def get(name: str) -> bytes:
        return cache.get(name, 1000, lambda: made.append(name) or name.encode().ljust(1000))

    for number in range(300):
        assert get(f"n{number}") == f"n{number}".encode().ljust(1000)
        get("favourite")
        assert held_bytes(tmp_path) <= 104_000
    assert made.count("favourite") == 1
    assert held_bytes(tmp_path) > 80_000
    made.clear()
    get("n299")
    get("n0")
    assert made == ["n0"]


def test_the_blobs_of_a_process_keep_one_limit_and_rarely_look_at_the_folder(server, tmp_path, monkeypatch):
    address, _ = server
    reading, looks = Reading(cache=tmp_path / "cache", cache_bytes=64_000), []
    make_room = DiskCache._make_room

    def looking(cache: DiskCache, more: int) -> None:
        looks.append(more)
        make_room(cache, more)

    monkeypatch.setattr(DiskCache, "_make_room", looking)
    for number in range(64):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 1900)
        blob = open_blob(f"{address}/{number}.tar", reading)
        assert blob.read(0, 100) + blob.read(100, 1800) == bytes([number]) * 1900
    assert held_bytes(tmp_path / "cache") <= 64_000 + 2000
    looks.clear()
    for number in range(64):
        assert open_blob(f"{address}/{number}.tar", reading).read(3, 10) == bytes([number]) * 10
    assert len(looks) <= 1


def test_a_kept_string_that_was_cut_off_is_made_again(tmp_path):
    cache = DiskCache(tmp_path, 10_000)
    cache.get("a", 100, lambda: b"x" * 100)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(b"x" * 50)
    assert cache.get("a", 100, lambda: b"y" * 100) == b"y" * 100
    assert cache.get("a", 100, lambda: b"z" * 100) == b"y" * 100


def test_a_string_larger_than_the_cache_is_given_and_not_kept(tmp_path):
    assert DiskCache(tmp_path, 10).get("a", 100, lambda: b"x" * 100) == b"x" * 100
    assert held_bytes(tmp_path) == 0


def _fill(folder: str, number: int) -> int:
    cache = DiskCache(Path(folder), 200_000)
    for turn in range(200):
        name = f"{(turn * 7 + number) % 150}"
        assert cache.get(name, 2000, lambda name=name: name.encode().ljust(2000)) == name.encode().ljust(2000)
    return number


def test_processes_share_a_cache_and_its_limit(tmp_path):
    with process_pool(3, ["mmcl_data.blobs"]) as pool:
        assert list(pool.map(_fill, [str(tmp_path)] * 3, range(3))) == [0, 1, 2]
    assert held_bytes(tmp_path) <= 200_000 * (1 + 3 / 32) + 3 * 2000
    assert not list(tmp_path.rglob(".*")), "nothing half written is left"


# --- a file system that fails ---------------------------------------------------------------------------------------


def flaky(share: float, seed: int = 0) -> Any:
    """`os.pread` of a file system that fails, or gives less than was asked for or nothing, at a share of the reads."""
    draw = random.Random(seed)

    def pread(file: int, size: int, offset: int) -> bytes:
        if draw.random() < share:
            fault = draw.choice([errno.EIO, errno.ESTALE, errno.EAGAIN, 0, -1])
            if fault < 0:
                return b""
            if fault:
                raise OSError(fault, os.strerror(fault))
            return os.pread(file, max(1, size // 3), offset)
        return os.pread(file, size, offset)

    return pread


@pytest.mark.parametrize("data", [{}, {"workers": 3, "worker_kind": "threads"}], ids=["here", "threads"])
def test_a_file_system_that_fails_for_a_moment_changes_nothing(tmp_path, monkeypatch, data):
    path = write(tmp_path / "s", [sample(n) for n in range(64)])
    expected = [digest(batch) for batch in take(stream({"a": path}), 40)]
    monkeypatch.setattr(blobs, "pread", flaky(0.01))
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: None)
    assert [digest(batch) for batch in take(stream({"a": path}, data=data), 40)] == expected


def test_short_and_failing_reads_of_half_of_all_are_put_together(tmp_path, monkeypatch):
    data = os.urandom(5000)
    (tmp_path / "x").write_bytes(data)
    blob = LocalBlob(str(tmp_path / "x"), Reading(retries=60, pause_s=0))
    monkeypatch.setattr(blobs, "pread", flaky(0.5))
    with ThreadPoolExecutor(4) as threads:
        ranges = [(start, size) for start in range(0, 4000, 97) for size in (0, 1, 700)]
        found = list(threads.map(lambda bounds: blob.read(*bounds), ranges))
    assert found == [data[start : start + size] for start, size in ranges]


def test_a_stall_is_waited_for_and_told(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "s", [sample(n) for n in range(8)])
    (expected,) = (digest(batch) for batch in take(stream({"a": path}), 1))
    monkeypatch.setattr(blobs, "_STALLED_S", 0.2)
    reads = []

    def pread(file: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) == 3:
            time.sleep(0.5)
        return os.pread(file, size, offset)

    monkeypatch.setattr(blobs, "pread", pread)
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        assert [digest(batch) for batch in take(stream({"a": path}), 1)] == [expected]
    assert "000000.tar: a read took" in caplog.text


def test_a_read_that_fails_for_good_names_the_shard_within_its_tries(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "s", [sample(n) for n in range(8)])
    made, tries = stream({"a": path}, data={"retries": 3}), []

    def pread(*_: int) -> bytes:
        tries.append(1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(blobs, "pread", pread)
    with caplog.at_level(logging.WARNING, "mmcl.data"), pytest.raises(DataError) as caught:
        take(made, 1)
    assert "000000.tar: cannot be read: OSError: [Errno 5]" in str(caught.value)
    assert len(tries) == 4
    assert "tried again, 2 times more at most" in caplog.text


def test_a_file_system_that_gives_nothing_inside_a_file_is_given_up_in_time(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x" * 100)
    blob, tries = LocalBlob(str(tmp_path / "x"), Reading(retries=3, pause_s=0.001)), []

    def pread(*_: int) -> bytes:
        tries.append(1)
        if len(tries) > 100:
            raise PermissionError("it is read in a loop")
        return b""

    monkeypatch.setattr(blobs, "pread", pread)
    with pytest.raises(DataError, match="nothing is given where the file goes on"):
        blob.read(0, 50)
    assert len(tries) == 4


def test_a_file_that_is_not_the_one_that_was_known_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"0123")
    held = Blobs(most=1)
    blob = open_blob(str(tmp_path / "x"))
    known = blob.size, blob.stamp
    assert held.read(str(tmp_path / "x"), 1, 2, known) == b"12"
    (tmp_path / "y").write_bytes(b"abcd")
    os.utime(tmp_path / "y", (1, 1))
    (tmp_path / "y").replace(tmp_path / "x")
    assert held.read(str(tmp_path / "x"), 1, 2, known) == b"12"  # it is open, and still what it was
    (tmp_path / "z").touch()
    held.read(str(tmp_path / "z"), 0, 0)
    with pytest.raises(IndexStale, match=r"x: written again after it was indexed: 4 bytes at"):
        held.read(str(tmp_path / "x"), 1, 2, known)


def test_a_read_that_is_forbidden_is_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    blob, tries = LocalBlob(str(tmp_path / "x"), QUICK), []

    def pread(*_: int) -> bytes:
        tries.append(1)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(blobs, "pread", pread)
    with pytest.raises(DataError, match="Permission denied"):
        blob.read(0, 1)
    assert len(tries) == 1


def test_a_file_that_was_replaced_under_a_stale_handle_is_not_read_on(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old old old")
    blob, stale = LocalBlob(str(tmp_path / "x"), QUICK), [OSError(errno.ESTALE, "Stale file handle")]

    def pread(file: int, size: int, offset: int) -> bytes:
        if stale:
            raise stale.pop()
        return os.pread(file, size, offset)

    monkeypatch.setattr(blobs, "pread", pread)
    (tmp_path / "y").write_bytes(b"new new")
    (tmp_path / "y").replace(tmp_path / "x")
    with pytest.raises(ShardDamaged, match="written again while it was read"):
        blob.read(0, 3)


def test_files_stay_open_up_to_a_number(tmp_path):
    held = Blobs(most=4)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(b"%02d" % number)
        assert held.read(str(tmp_path / f"{number}"), 0, 2) == b"%02d" % number
    assert len(os.listdir("/proc/self/fd")) <= before + 4
