"""Whoever decodes, batches are the same; what kills or stops a decoder costs its sample and nothing else."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import Greedy, Stalled, Stillborn, Trap, digest, gone, sample, stream, take, until, write

from mmcl import errors
from mmcl.errors import DataError, ShardDamaged, TooManyBadSamples
from mmcl.types import MODALITIES, Batch
from mmcl_data.augment import Crop, Words
from mmcl_data.index import build_index, open_index
from mmcl_data.samples import DecodeConfig
from mmcl_data.stream import ShardStream
from mmcl_data.workers import ATTEMPTS, SAMPLE_BYTES, Task, substitute, trained_on

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


def costs_only(
    found: list[Batch],
    whole: list[Batch],
    lost: set[int],
    tmp_path: Path,
    cause: str = "its decoder crashed or did not end",
) -> None:
    """Check that some samples were left out, and that nothing else is changed."""
    for after, before in zip(found, whole, strict=True):
        hit = [row for row, number in enumerate(numbers([before])) if number in lost]
        assert after.skipped >= len(hit) and after.size == before.size
        assert [row for row in range(8) if after.keys[row] != before.keys[row]] == hit
        for row in set(range(8)) - set(hit):
            assert all((after.values[name][row] == before.values[name][row]).all() for name in MODALITIES)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {int(line["key"]) for line in lines} == lost
    assert all(line["cause"] == cause for line in lines)


@pytest.mark.parametrize("lost", [{11}, {3, 4, 29}], ids=["one", "three"])
def test_a_decoder_that_crashes_costs_its_sample_and_nothing_else(shards, tmp_path, lost):
    whole = take(stream({"a": shards}), 6)
    found = take(trapped(shards, tmp_path, crash=tuple(f"number {n}" for n in lost)), 6)
    costs_only(found, whole, lost, tmp_path)


def test_a_decoder_that_never_ends_costs_its_sample_and_nothing_else(shards, tmp_path):
    whole = take(stream({"a": shards}), 4)
    found = take(trapped(shards, tmp_path, hang=("number 11",), patience=1.0), 4)
    costs_only(found, whole, {11}, tmp_path)


def test_reads_that_take_longer_than_a_decoder_may_are_waited_for(shards, tmp_path):
    whole = [digest(batch) for batch in take(stream({"a": shards}), 2)]
    data = {"workers": 2, "ahead": 1, "worker_timeout_s": 0.5, "decode": DecodeConfig(words=Stalled(seconds=1.0))}
    made = stream({"a": shards}, bad=1.0, data=data, quarantine=tmp_path / "quarantine.jsonl")
    assert [digest(batch) for batch in take(made, 2)] == whole
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_decoder_that_takes_all_memory_costs_its_sample_and_nothing_else(shards, tmp_path):
    whole = take(stream({"a": shards}), 4)
    decode = DecodeConfig(words=Greedy(at="number 11", size=SAMPLE_BYTES + 2**24))
    data = {"workers": 2, "decode": decode}
    found = take(stream({"a": shards}, bad=1.0, data=data, quarantine=tmp_path / "quarantine.jsonl"), 4)
    costs_only(found, whole, {11}, tmp_path, cause="decoding it takes more memory than there is")


def test_processes_that_end_before_they_decode_end_the_run_and_blame_no_sample(shards, tmp_path):
    data = {"workers": 1, "decode": DecodeConfig(words=Stillborn())}
    made = stream({"a": shards}, bad=1.0, data=data, quarantine=tmp_path / "quarantine.jsonl")
    with pytest.raises(DataError, match="worker processes end before they decode anything"):
        take(made, 1)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_crash_between_two_batches_is_mended_when_the_next_one_is_begun(shards, tmp_path):
    whole = take(stream({"a": shards}), 4)
    late = numbers(whole[2:3])[0]
    assert late not in numbers(whole[:2])
    before = processes_of(os.getpid())
    batches = trapped(shards, tmp_path, crash=(f"number {late}",), when=str(tmp_path / "now")).batches()
    found = [next(batches)]
    (tmp_path / "now").touch()
    assert until(lambda: processes_of(os.getpid()) <= before)  # the third batch broke the pool meanwhile
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
    before = processes_of(os.getpid())
    batches, found, due = trapped(shards, tmp_path).batches(), [], [2, 7]
    for number in range(12):
        found.append(digest(next(batches)))
        workers = processes_of(os.getpid()) - before  # there are none right after one was killed
        if workers and due and number >= due[0]:
            os.kill(min(workers), signal.SIGKILL)
            due.pop(0)
    batches.close()
    assert not due
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
    decode = DecodeConfig(words=Trap(hang=tuple(f"number {n}" for n in range(32)), begun=sys.argv[3]))
    batches = stream({"a": sys.argv[2]}, bad=1.0, data={"workers": 2, "decode": decode}).batches()
    print("begun", flush=True)
    next(batches)
"""


def test_workers_do_not_outlive_a_process_that_was_killed(shards, tmp_path):
    script = tmp_path / "left_alone.py"
    script.write_text(LEFT_ALONE)
    busy = tmp_path / "busy"
    command = [sys.executable, str(script), str(Path(__file__).parent), shards, str(busy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n"
        assert until(busy.exists)
        assert until(lambda: len(processes_of(parent.pid)) == 2)
        pids = processes_of(parent.pid)
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


IMAGE, TEXT, AUDIO, FACTS, CLASS = 1, 2, 4, 8, 16


def places(kinds: list[int], place: int, seed: int = 1, *, facts_tell: bool = False) -> list[int]:
    """Samples that are tried for a place, one after another."""
    tried = [place]
    while len(tried) < ATTEMPTS:
        have = np.array(kinds, dtype=np.uint8)
        tried.append(substitute(have, Task(0, place, seed), tried, trained_on(facts_tell)))
    return tried


def test_what_takes_a_place_has_the_same_modalities_and_follows_from_seed_and_attempt():
    kinds = [7, 3, 7, 6, 7, 3, 7, 7] * 50
    for place in (0, 1, 5, 399):
        tried = places(kinds, place)
        assert len(set(tried)) == ATTEMPTS and {kinds[found] for found in tried} == {kinds[place]}
        assert tried == places(kinds, place)
    assert len({places(kinds, 0, seed)[1] for seed in range(50)}) > 20


def test_members_that_are_not_trained_on_do_not_matter_for_a_place():
    pair = IMAGE | TEXT
    assert set(places([pair | FACTS, pair, pair | CLASS, 7, pair], 0)[:4]) == {0, 1, 2, 4}


def test_a_json_that_holds_captions_counts_as_a_text():
    kinds = [IMAGE | FACTS, IMAGE | AUDIO, IMAGE | TEXT, IMAGE]
    assert places(kinds, 0, facts_tell=True)[1] == 2
    assert places(kinds, 2, facts_tell=True)[1] == 0


def test_where_nothing_has_the_same_modalities_one_with_more_takes_a_place_and_then_any():
    kinds = [IMAGE | TEXT, IMAGE, TEXT | AUDIO, 7, FACTS, 7] + [TEXT] * 10_000
    tried = places(kinds, 0)
    assert set(tried[1:3]) == {3, 5} and tried[3] == 2
    assert tried[4:] == [0] * (ATTEMPTS - 4)  # there is nothing else
    assert places([7] + [3] * 10_000 + [7], 0)[1] == 10_001


def test_the_only_sample_with_a_json_may_be_bad(tmp_path):
    rows = [sample(n, json=None) for n in range(8)]
    rows[3] = sample(3, png=b"no png")
    (batch,) = take(stream({"a": write(tmp_path / "s", rows)}, bad=1.0), 1)
    assert batch.skipped == 1 and 3 not in numbers([batch])


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
