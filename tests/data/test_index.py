"""An index knows where every member lies, finds every damage, and is made of what is new only."""

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import png, sample, stream, take, wav, write

import mmcl_data.index
import mmcl_data.sources
from mmcl.errors import ConfigError, DataError, IndexStale, NoIndex, ShardDamaged, ShardMissing
from mmcl_data.blobs import Blobs
from mmcl_data.index import (
    KINDS,
    IndexedShard,
    Progressed,
    build_index,
    index_folder,
    merge_parts,
    open_index,
    part_file,
)
from mmcl_data.scan import SampleEntry, ShardScan, read_sample, scan_shard
from mmcl_data.sources import Chosen


@pytest.fixture
def shards(tmp_path) -> str:
    """23 samples in 3 shards; some lack members."""
    rows = [sample(n, wav=None if n % 3 else wav(n), json=None if n % 2 else b"{}") for n in range(23)]
    return write(tmp_path / "s", rows)


def test_every_sample_of_every_shard_has_a_number_under_which_it_is_found(shards, tmp_path):
    index = build_index(shards, tmp_path / "index")
    assert len(index) == 23
    scans = [scan_shard(f"{shards}/{n:06d}.tar") for n in range(3)]
    expected = [(scan.path, entry) for scan in scans for entry in scan.samples]
    assert [(index.shard_of(n).path, index.entry(n)) for n in range(23)] == expected
    kinds = [{kind for bit, kind in enumerate(KINDS) if int(bits) >> bit & 1} for bits in index.kinds]
    assert kinds[0] == {"image", "text", "audio", "facts"} and kinds[1] == {"image", "text"}
    members = read_sample(Blobs(), index.shard_of(17).path, index.entry(17))
    assert members["txt"] == b"number 17" and members["png"] == png(17)


def test_an_index_is_json_and_npy_and_is_mapped_and_not_read(shards, tmp_path):
    build_index(shards, tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert all(isinstance(array.base, np.memmap) for array in index.arrays.values())
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {"parts", "index.json", *(f"{name}.npy" for name in mmcl_data.index._ARRAYS)}


def test_processes_find_what_one_finds(shards, tmp_path):
    told = []
    one = build_index(shards, tmp_path / "one")
    three = build_index(shards, tmp_path / "three", workers=3, progress=told.append)
    assert one.fingerprint == three.fingerprint
    assert all(np.array_equal(array, three.arrays[name]) for name, array in one.arrays.items())
    assert [(entry.shards, entry.of) for entry in told] == [(1, 3), (2, 3), (3, 3)] and told[-1].samples == 23


def counted(monkeypatch) -> list[str]:
    scanned = []

    def scan(path, *args, **more):
        scanned.append(Path(path).name)
        return scan_shard(path, *args, **more)

    monkeypatch.setattr(mmcl_data.index, "scan_shard", scan)
    return scanned


def test_what_is_known_is_not_read_again(shards, tmp_path, monkeypatch):
    scanned = counted(monkeypatch)
    first = build_index(shards, tmp_path / "index")
    assert scanned == ["000000.tar", "000001.tar", "000002.tar"]
    assert build_index(shards, tmp_path / "index").fingerprint == first.fingerprint and len(scanned) == 3
    write(tmp_path / "more", [sample(n) for n in range(5)])
    (tmp_path / "more" / "000000.tar").rename(tmp_path / "s" / "000003.tar")
    os.utime(tmp_path / "s" / "000001.tar")
    second = build_index(shards, tmp_path / "index")
    assert scanned[3:] == ["000001.tar", "000003.tar"] and len(second) == 28
    assert second.fingerprint != first.fingerprint


def test_hashes_are_of_whole_shards_and_are_added_to_what_is_known(shards, tmp_path):
    assert build_index(shards, tmp_path / "index").shards[0].sha256 is None
    index = build_index(shards, tmp_path / "index", hashes=True)
    for shard in index.shards:
        assert shard.sha256 == hashlib.sha256(Path(shard.path).read_bytes()).hexdigest()


BUILD = """
import sys
import mmcl_data.index as index
scan, done = index.scan_shard, []
def held(*args, **more):
    if done:
        sys.stdin.read()
    done.append(args)
    return scan(*args, **more)
index.scan_shard = held
index.build_index(sys.argv[1], index.Path(sys.argv[2]), progress=lambda p: print(p.shards, flush=True))
"""
"""Indexes one shard and waits at the next."""


def test_a_build_that_was_killed_goes_on_where_it_was(shards, tmp_path, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, shards, str(tmp_path / "index")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGKILL)
    with pytest.raises(NoIndex, match="mmcl data index"):
        open_index(tmp_path / "index")
    scanned = counted(monkeypatch)
    assert len(build_index(shards, tmp_path / "index")) == 23
    assert "000000.tar" not in scanned and len(scanned) == 2


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_places(shards, tmp_path):
    first = build_index(shards, tmp_path / "index").fingerprint
    os.rename(tmp_path / "s", tmp_path / "t")
    assert build_index(str(tmp_path / "t"), tmp_path / "other").fingerprint == first
    rows = [sample(n, wav=None if n % 3 else wav(n), json=None if n % 2 else b"{}") for n in range(23)]
    rows[4]["txt"] = b"number four"
    assert build_index(write(tmp_path / "u", rows), tmp_path / "third").fingerprint != first


def test_the_fingerprint_and_the_arrays_are_those_of_earlier_versions(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(40))
    (tmp_path / "b.tar").write_bytes(tar(6))
    assert build_index(str(tmp_path), tmp_path / "index").fingerprint == "095b94a827a143fb3f1684ea620c3d9e"
    found = hashlib.sha256()
    for file in sorted((tmp_path / "index").glob("*.npy")):
        found.update(file.read_bytes())
    assert found.hexdigest() == "135fc170f8d66aa85539ceba38908ae70f0ef8ba3c960d37ab464e8eea1bb53f"


def test_processes_that_are_killed_cost_nothing_but_time(tmp_path):
    shards = write(tmp_path / "s", [sample(n) for n in range(40)], 1)

    def kill(now: Progressed) -> None:
        if now.shards == 1:
            for child in active_children():
                child.kill()

    index = build_index(shards, tmp_path / "index", workers=2, progress=kill)
    assert len(index.shards) == 40 and len(index) == 40


def made_part(folder: Path, names: list[str], extensions: list[str]) -> list[str]:
    """Parts of the shards that are named, of a sample with each extension and one for an image."""
    entries = [SampleEntry(f"{n:08d}", ("png", name), (512, 1536), (7, 9)) for n, name in enumerate(extensions)]
    paths = [str(folder / name) for name in names]
    for path in paths:
        scan = ShardScan(path, tuple(entries), 1, "1")
        shard = IndexedShard(path, 1, "1", len(entries))
        mmcl_data.index._write_part(part_file(folder, path), shard, scan)
    return paths


def test_parts_are_put_together_one_by_one_in_memory(tmp_path):
    paths = made_part(tmp_path, [f"{n}.tar" for n in range(30)], ["txt"] * 20_000)
    one = part_file(tmp_path, paths[0]).stat().st_size
    tracemalloc.start()
    index = merge_parts(paths, tmp_path, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 600_000 and index.entry(599_999) == index.entry(19_999)
    assert peak < 6 * one
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_while_an_index_is_put_together_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    paths = made_part(tmp_path, ["0.tar"], ["txt"])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mmcl_data.index.Column, "end", full)
    with pytest.raises(ConfigError, match="cannot be written there: No space left"):
        merge_parts(paths, tmp_path, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_more_extensions_than_can_be_numbered_share_one_name_and_none_that_means_something_does(tmp_path):
    names = [f"x{n}" for n in range(66_000)]
    paths = [*made_part(tmp_path, ["0.tar"], names), *made_part(tmp_path, ["1.tar"], ["new", "txt"])]
    index = merge_parts(paths, tmp_path, tmp_path)
    assert len(index) == 66_002
    assert index.entry(66_000).extensions == ("png", "?")
    assert index.entry(66_001).extensions == ("png", "txt")
    assert index.entry(0).extensions == ("png", "x0")


def test_a_stream_does_not_read_on_by_an_index_that_was_made_anew(shards, tmp_path):
    made = stream({"a": shards}, batch=4)
    take(made, 1)
    write(tmp_path / "more", [sample(n) for n in range(5)])
    (tmp_path / "more" / "000000.tar").rename(tmp_path / "s" / "000003.tar")
    build_index(shards, tmp_path / "s" / ".mmcl-index")
    with pytest.raises(IndexStale, match=r"\.mmcl-index: the index of source a was made anew while it was read"):
        take(made, 1)


def test_a_stream_does_not_read_a_shard_that_was_written_again_by_the_old_index(shards, tmp_path):
    made = stream({"a": shards}, batch=4)
    take(made, 1)
    os.utime(tmp_path / "s" / "000001.tar", (1, 1))
    with pytest.raises(IndexStale, match=r"000001\.tar: written again after it was indexed"):
        take(made, 6)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.5, 0.6, 0.99])
def test_of_samples_that_are_taken_or_not_the_fewer_are_held(monkeypatch, share):
    monkeypatch.setattr(mmcl_data.sources, "_BLOCK", 17)
    kinds = (np.random.default_rng(0).random(1000) < share).astype(np.uint8)
    expected = np.flatnonzero(kinds == 1)
    chosen = Chosen(kinds, np.array([False, True]), len(expected))
    assert len(chosen) == len(expected)
    assert np.array_equal(chosen.at(np.arange(len(expected))), expected)
    assert len(chosen.listed) == min(len(expected), 1000 - len(expected))


def test_shards_are_asked_for_size_and_time_before_an_index_is_believed(shards, tmp_path):
    index = build_index(shards, tmp_path / "index")
    index.check_fresh()
    os.utime(tmp_path / "s" / "000002.tar", (1, 1))
    with pytest.raises(IndexStale, match=r"000002.tar: written again.*`mmcl data index`"):
        index.check_fresh()
    (tmp_path / "s" / "000002.tar").unlink()
    with pytest.raises(ShardMissing):
        index.check_fresh()


def test_an_index_lies_beside_its_shards_if_nothing_else_is_said(shards, tmp_path):
    assert index_folder(shards) == tmp_path / "s" / ".mmcl-index"
    assert index_folder(f"{shards}/{{000000,000002}}.tar") == tmp_path / "s" / ".mmcl-index"
    write(tmp_path / "t", [sample(0)])
    assert index_folder(f"{tmp_path}/*/000000.tar") is None
    assert index_folder("https://example.org/{0..3}.tar") is None


def test_a_folder_that_cannot_be_written_is_refused(shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"an index cannot be written there: .*--out"):
        build_index(shards, tmp_path / "file" / "index")


# --- T6: every kind of damage ---------------------------------------------------------------------------------------


def tar(members: int = 40) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for number in range(members):
            info = tarfile.TarInfo(f"{number // 2:03d}.{'jpg' if number % 2 else 'txt'}")
            info.size = 700
            made.addfile(info, io.BytesIO(b"p" * 700))
    return buffer.getvalue()


MIDDLE = 20 * (512 + 1024)
"""Where the header of member 20 begins."""
DAMAGE = {
    "header byte flipped": lambda data: data[: MIDDLE + 5] + b"\xff" + data[MIDDLE + 6 :],
    "truncated inside a header": lambda data: data[: MIDDLE + 100],
    "truncated at a member boundary": lambda data: data[:MIDDLE],
    "zero-filled tail": lambda data: data[:MIDDLE] + bytes(len(data) - MIDDLE),
    "truncated inside a payload": lambda data: data[: MIDDLE + 700],
    "truncated between payload and padding": lambda data: data[: MIDDLE + 512 + 700],
    "a second archive behind the end": lambda data: data + data,
    "empty": lambda data: b"",
    "no tar": lambda data: b"nonsense" * 1000,
    "gzip": lambda data: b"\x1f\x8b" + data[2:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_damage_is_found_with_its_shard_and_byte_and_the_rest_is_kept(tmp_path, monkeypatch, damage, workers):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(tar())
    (tmp_path / "b.tar").write_bytes(damage(tar()))
    with pytest.raises(ShardDamaged, match=r"b\.tar: damaged at byte \d+") as caught:
        build_index(str(tmp_path), tmp_path / "index", workers=workers)
    assert caught.value.shard.endswith("b.tar") and caught.value.cause
    scanned = counted(monkeypatch)
    (tmp_path / "b.tar").write_bytes(tar())
    assert len(build_index(str(tmp_path), tmp_path / "index")) == 60
    assert scanned == ["b.tar"]


def test_a_flipped_bit_in_a_payload_is_seen_by_hashes_alone(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar())
    before = build_index(str(tmp_path), tmp_path / "index", hashes=True)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[MIDDLE + 600] ^= 1
    (tmp_path / "a.tar").write_bytes(bytes(data))
    after = build_index(str(tmp_path), tmp_path / "index", hashes=True)
    assert after.fingerprint == before.fingerprint and after.shards[0].sha256 != before.shards[0].sha256


# --- an index is data, and may be damaged too -----------------------------------------------------------------------


def spoil(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


class Canary:
    """What a pickle could run."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


SPOILT = {
    "no json": ("index.json", b"{broken"),
    "another format": ("index.json", b'{"format": 99}'),
    "a list": ("index.json", b"[]"),
    "an array cut off": ("offsets.npy", b"\x93NUMPY"),
    "an array of another type": ("sizes.npy", None),
    "an array that is a pickle": ("kinds.npy", pickled_array()),
    "a pickle": ("keys.npy", pickle.dumps(Canary())),
    "an array of another length": ("kinds.npy", None),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_index_is_refused_and_runs_nothing(shards, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    build_index(shards, tmp_path / "index")
    file, data = SPOILT[name]
    if data is None:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(7, dtype=np.float64 if file == "sizes.npy" else np.uint8))
        data = buffer.getvalue()
    spoil(tmp_path / "index", file, data)
    with pytest.raises(DataError, match="make it anew"):
        open_index(tmp_path / "index")
    assert not (tmp_path / "canary").exists()
    build_index(shards, tmp_path / "index")
    assert len(open_index(tmp_path / "index")) == 23


def test_a_damaged_part_is_made_anew(shards, tmp_path, monkeypatch):
    build_index(shards, tmp_path / "index")
    part = sorted((tmp_path / "index" / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:100])
    scanned = counted(monkeypatch)
    assert len(build_index(shards, tmp_path / "index")) == 23 and len(scanned) == 1


def test_an_index_of_a_million_samples_opens_at_once(tmp_path):
    """Its arrays made as a build makes them; about the order of it, not the builder."""
    count = 1_000_000
    arrays = {
        "starts": np.arange(count + 1, dtype=np.uint64) * 2,
        "kinds": np.full(count, 3, dtype=np.uint8),
        "offsets": np.arange(2 * count, dtype=np.uint64) * 1536,
        "sizes": np.full(2 * count, 700, dtype=np.uint32),
        "extensions": np.tile(np.arange(2, dtype=np.uint16), count),
        "key_ends": np.arange(1, count + 1, dtype=np.uint64) * 8,
        "keys": np.frombuffer(b"".join(b"%08d" % number for number in range(count)), dtype=np.uint8),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    shards = [{"path": f"{n}.tar", "bytes": 1, "stamp": "1", "samples": 1000, "sha256": None} for n in range(1000)]
    facts = {"format": 1, "fingerprint": "f", "extensions": ["jpg", "txt"], "shards": shards}
    (tmp_path / "index.json").write_text(json.dumps(facts))
    began = time.perf_counter()
    index = open_index(tmp_path)
    entry = index.entry(987_654)
    assert time.perf_counter() - began < 1
    assert entry.key == "00987654" and index.shard_of(987_654).path == "987.tar"
