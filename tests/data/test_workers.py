"""Whoever decodes, batches are the same; what kills or stops a decoder costs its sample and nothing else."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import Trap, digest, sample, stream, take, write

from mmcl import errors
from mmcl.errors import DataError, ShardDamaged, TooManyBadSamples
from mmcl.types import MODALITIES, Batch
from mmcl_data.augment import Crop, Words
from mmcl_data.index import build_index, open_index
from mmcl_data.samples import DecodeConfig
from mmcl_data.stream import ShardStream
from mmcl_data.workers import ATTEMPTS, Task, substitute

CHANGED = DecodeConfig(crop=Crop(scale=(0.3, 1.0)), words=Words(drop=0.3, swap=0.5), clean=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("shards") / "s", [sample(n) for n in range(32)])


def numbers(batches: list[Batch]) -> list[int]:
    return [int(key.split("#")[1]) for batch in batches for key in batch.keys]


def processes_of(parent: int) -> set[int]:
    """Worker processes of forkservers that a process started."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            owner = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            above = int(Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[1]) if owner > 1 else 0
        except (OSError, ValueError):
            continue
        if b"forkserver" in words and above == parent:
            found.add(int(entry.name))
    return found


def gone(pids: set[int], seconds: float = 15.0) -> bool:
    """Whether processes end within some seconds."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "workers",
    [
        {"workers": 1, "worker_kind": "threads"},
        {"workers": 3, "worker_kind": "threads", "ahead": 6},
        {"workers": 1, "ahead": 1},
        {"workers": 3, "ahead": 4},
    ],
    ids=["1 thread", "3 threads", "1 process", "3 processes"],
)
def test_crops_and_words_are_the_same_whoever_decodes(shards, workers):
    expected = [digest(batch) for batch in take(stream({"a": shards}, data={"decode": CHANGED}), 8)]
    assert len(set(expected)) == 8
    assert [digest(b) for b in take(stream({"a": shards}, data={"decode": CHANGED, **workers}), 8)] == expected


def trapped(shards: str, tmp_path: Path, *, patience: float = 60.0, workers: int = 2, **traps: Any) -> ShardStream:
    data = {"workers": workers, "worker_timeout_s": patience, "decode": DecodeConfig(words=Trap(**traps))}
    return stream({"a": shards}, bad=1.0, data=data, quarantine=tmp_path / "quarantine.jsonl")


def costs_only(found: list[Batch], whole: list[Batch], lost: set[int], tmp_path: Path) -> None:
    """Check that some samples were left out, and that nothing else is changed."""
    for after, before in zip(found, whole, strict=True):
        hit = [row for row, number in enumerate(numbers([before])) if number in lost]
        assert after.skipped >= len(hit) and after.size == before.size
        assert [row for row in range(8) if after.keys[row] != before.keys[row]] == hit
        for row in set(range(8)) - set(hit):
            assert all((after.values[name][row] == before.values[name][row]).all() for name in MODALITIES)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {int(line["key"]) for line in lines} == lost
    assert all(line["cause"] == "its decoder crashed or did not end" for line in lines)


@pytest.mark.parametrize("lost", [{11}, {3, 4, 29}], ids=["one", "three"])
def test_a_decoder_that_crashes_costs_its_sample_and_nothing_else(shards, tmp_path, lost):
    whole = take(stream({"a": shards}), 6)
    found = take(trapped(shards, tmp_path, crash=tuple(f"number {n}" for n in lost)), 6)
    costs_only(found, whole, lost, tmp_path)


def test_a_decoder_that_never_ends_costs_its_sample_and_nothing_else(shards, tmp_path):
    whole = take(stream({"a": shards}), 4)
    take(stream({"a": shards}, data={"workers": 1}), 1)  # so that a worker is there within the patience
    found = take(trapped(shards, tmp_path, hang=("number 11",), patience=2.5), 4)
    costs_only(found, whole, {11}, tmp_path)


def test_a_crash_between_two_batches_is_mended_when_the_next_one_is_begun(shards, tmp_path):
    whole = take(stream({"a": shards}), 4)
    late = numbers(whole[2:3])[0]
    assert late not in numbers(whole[:2])
    batches = trapped(shards, tmp_path, crash=(f"number {late}",)).batches()
    found = [next(batches)]
    time.sleep(1.5)  # a training step, in which the third batch breaks the pool
    found += [next(batches) for _ in range(3)]
    batches.close()
    costs_only(found, whole, {late}, tmp_path)


def test_a_sample_that_takes_the_place_of_another_may_crash_as_well(tmp_path):
    rows = [sample(n, **({"png": b"no png"} if n == 3 else {})) for n in range(8)]
    path = write(tmp_path / "s", rows)
    (clean,) = take(stream({"a": path}, bad=1.0), 1)
    good = write(tmp_path / "good", [sample(n) for n in range(8)])
    place = numbers(take(stream({"a": good}), 1)).index(3)
    instead = numbers([clean])[place]
    found = take(trapped(path, tmp_path, workers=1, crash=(f"number {instead}",)), 1)
    assert {3, instead}.isdisjoint(numbers(found)) and found[0].size == 8
    keys = [int(json.loads(line)["key"]) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert set(keys) == {3, instead}


def test_a_worker_that_is_killed_from_outside_costs_nothing(shards, tmp_path):
    expected = [digest(batch) for batch in take(stream({"a": shards}), 12)]
    batches, found = trapped(shards, tmp_path).batches(), []
    for number in range(12):
        found.append(digest(next(batches)))
        if number in (2, 7):
            os.kill(min(processes_of(os.getpid())), signal.SIGKILL)
    batches.close()
    assert found == expected
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("hang", [(), ("number 20", "number 21")], ids=["idle", "busy for ever"])
def test_workers_end_with_the_iterator(shards, tmp_path, hang):
    before = processes_of(os.getpid())
    made = trapped(shards, tmp_path, hang=hang)
    batches = made.batches()
    next(batches)
    pids = processes_of(os.getpid()) - before
    assert len(pids) == 2
    batches.close()
    assert gone(pids)


LEFT_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from data_cases import Trap, stream
from mmcl_data.samples import DecodeConfig

if __name__ == "__main__":
    decode = DecodeConfig(words=Trap(hang=("number 1",)))
    batches = stream({"a": sys.argv[2]}, bad=1.0, data={"workers": 2, "lanes": 1, "decode": decode}).batches()
    print("begun", flush=True)
    next(batches)
"""


def test_workers_do_not_outlive_a_process_that_was_killed(shards, tmp_path):
    script = tmp_path / "left_alone.py"
    script.write_text(LEFT_ALONE)
    command = [sys.executable, str(script), str(Path(__file__).parent), shards]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n"
        ends = time.monotonic() + 60
        while len(pids := processes_of(parent.pid)) < 2 and time.monotonic() < ends:
            time.sleep(0.1)
        assert len(pids) == 2
        time.sleep(0.5)
        parent.kill()
    assert gone(pids)


def test_without_processes_a_sample_that_is_rejected_is_counted(shards, tmp_path):
    path = write(tmp_path / "s", [sample(n, **({"txt": b"\xff"} if n in (4, 9) else {})) for n in range(16)])
    assert sum(batch.skipped for batch in take(stream({"a": path}, bad=1.0), 2)) >= 2


@pytest.mark.parametrize("workers", [{}, {"workers": 2}], ids=["here", "processes"])
def test_a_stream_with_some_samples_of_every_kind_corrupt_goes_on_up_to_its_limit(tmp_path, workers):
    corrupt = [{"png": b"\x89PNG nonsense"}, {"wav": b"RIFF nonsense"}, {"txt": b"\xff"}]
    rows = [sample(n, **(corrupt[n // 20 % 3] if n % 20 == 7 else {})) for n in range(400)]
    path = write(tmp_path / "s", rows, per_shard=100)
    batches = take(stream({"a": path}, batch=40, bad=0.1, data=workers), 40)
    assert 60 <= sum(batch.skipped for batch in batches) <= 110
    with pytest.raises(TooManyBadSamples, match=r"more than data.max_bad_share=0.01"):
        take(stream({"a": path}, batch=40, bad=0.01, data=workers), 40)


# --- what takes a place ---------------------------------------------------------------------------------------------


def test_what_takes_a_place_has_the_same_members_and_follows_from_seed_and_attempt():
    kinds = np.array([7, 3, 7, 1, 7, 3, 7, 7] * 50, dtype=np.uint8)
    for number in (0, 1, 5, 399):
        for attempt in range(1, ATTEMPTS):
            found = substitute(kinds, Task(0, number, 99), attempt)
            assert found != number and kinds[found] == kinds[number]
            assert found == substitute(kinds, Task(0, number, 99), attempt)
    assert len({substitute(kinds, Task(0, 0, seed), 1) for seed in range(50)}) > 20


def test_where_nothing_has_the_same_members_a_sample_takes_its_own_place():
    assert substitute(np.array([7, 3, 3], dtype=np.uint8), Task(0, 0, 1), 1) == 0
    assert substitute(np.array([7] + [3] * 10_000 + [7], dtype=np.uint8), Task(0, 0, 1), 1) == 10_001


# --- errors across processes ----------------------------------------------------------------------------------------

ERRORS: list[errors.MmclError] = [
    errors.MissingExtra("aiohttp", "remote", "reading http://"),
    errors.ShardDamaged("a.tar", 512, "cut off"),
    errors.SampleRejected("a.tar", "k", "no image"),
    errors.NonFiniteLoss(3, 7, {"loss": float("inf")}),
]
PLAIN = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MmclError) and kind not in {type(e) for e in ERRORS}
]


@pytest.mark.parametrize(
    "error", [*ERRORS, *(kind("what and where") for kind in PLAIN)], ids=lambda e: type(e).__name__
)
def test_an_error_comes_back_whole_from_another_process(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


@pytest.fixture
def moved(tmp_path) -> Iterator[tuple[str, Path]]:
    """Shards that were indexed, and the first of them."""
    path = write(tmp_path / "s", [sample(n) for n in range(8)])
    build_index(path, tmp_path / "index")
    yield path, Path(path) / "000000.tar"


def test_a_shard_that_shrinks_while_workers_read_it_is_named(moved):
    path, file = moved
    batches = stream({"a": path}, batch=2, data={"workers": 1, "ahead": 1}).batches()
    next(batches)
    size = file.stat().st_size
    os.truncate(file, 1024)
    with pytest.raises(ShardDamaged) as caught:
        for _ in range(4):
            next(batches)
    assert caught.value.shard == str(file) and 0 < caught.value.offset < size
    assert "shorter than it was" in caught.value.cause


def test_an_index_of_other_workers_names_what_is_damaged(moved, tmp_path):
    index = open_index(tmp_path / "index")
    index.extensions[:] = []
    with pytest.raises(DataError, match="the index is damaged at sample 0"):
        index.entry(0)
