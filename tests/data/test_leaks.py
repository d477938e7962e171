"""A stream does not grow: neither its memory nor its open files, epoch after epoch."""

import gc
import os
import re
from pathlib import Path

import pytest
from data_cases import Mishap, sample, stream, write

from mmcl_data.samples import DecodeConfig

EPOCHS = 24
SAMPLES = 192


def resident() -> int:
    """Bytes of this process that are its own: without files that it maps."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) - int(Path("/proc/self/statm").read_text().split()[2])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("data", [{}, {"workers": 2, "worker_kind": "threads"}], ids=["inline", "threads"])
def test_memory_and_open_files_stay_as_they_are_over_twenty_epochs(tmp_path: Path, data: dict) -> None:
    bad = {7: {"png": b"nothing"}, 100: {"txt": b"\xff"}}
    path = write(tmp_path / "s", [sample(n, **bad.get(n, {})) for n in range(SAMPLES)], 8)  # 24 shards
    made = stream({"a": path}, batch=32, bad=0.1, data=data, quarantine=tmp_path / "quarantine.jsonl")
    batches = made.batches()
    memory, files = [], []
    for _ in range(EPOCHS):
        for _ in range(SAMPLES // 32):
            next(batches)
        gc.collect()
        memory.append(resident())
        files.append(open_files())
    settled = memory[4:]  # allocators and caches have what they want by then
    slope = (sum(settled[-5:]) - sum(settled[:5])) / 5 / (len(settled) - 5)
    assert slope < 2**20, memory
    assert max(files[4:]) == files[4] or max(files[4:]) <= files[4] + 1, files
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2  # once each, though met in every epoch
    batches.close()


def test_a_decoder_that_crashes_now_and_then_leaves_nothing_in_the_process_it_works_for(tmp_path: Path) -> None:
    path = write(tmp_path / "s", [sample(n) for n in range(64)], 8)
    (tmp_path / "met").mkdir()
    words = Mishap(at="number 7", folder=str(tmp_path / "met"))
    data = {"workers": 2, "ahead": 2, "decode": DecodeConfig(words=words)}
    batches = stream({"a": path}, batch=32, data=data, quarantine=tmp_path / "quarantine.jsonl").batches()
    memory, files, shared, names = [], [], [], []
    for _ in range(16):
        for _ in range(2):
            next(batches)
        gc.collect()
        memory.append(resident())
        files.append(open_files())
        shared.append(len(re.findall("/torch_|/dev/shm/", Path("/proc/self/maps").read_text())))
        names.append(len(list(Path("/dev/shm").glob(f"sem.mmcl-*-{os.getpid()}-*"))))
    batches.close()
    assert len(list((tmp_path / "met").iterdir())) >= 15  # once in each epoch, or nearly
    assert not (tmp_path / "quarantine.jsonl").exists()  # none of them crashed again
    for found in (files, shared, names):
        assert max(found[8:]) <= max(found[:8]) + 2, found
    assert (sum(memory[-5:]) - sum(memory[3:8])) / 5 / 8 < 2**20, memory
