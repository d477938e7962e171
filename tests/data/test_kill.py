"""A run that is killed at any moment, and goes on from its last state, reads what it would have read."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_cases import alive, digest, sample, take, write
from kill_cases import BATCH, STEPS, make

KINDS = {
    "inline": (72, {"workers": 0}),
    "a thread": (40, {"workers": 1, "worker_kind": "threads", "ahead": 1}),
    "three threads": (40, {"workers": 3, "worker_kind": "threads", "ahead": 8}),
    "a process": (24, {"workers": 1, "worker_kind": "processes", "ahead": 8}),
    "three processes": (24, {"workers": 3, "worker_kind": "processes", "ahead": 1}),
}
"""Kills, and who decodes: 200 in all."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources in six small shards; some samples cannot be used."""
    folder = tmp_path_factory.mktemp("shards")
    bad = {3: {"png": b"no picture"}, 20: {"wav": b""}, 41: {"txt": b"\xff"}}
    write(folder / "a", [sample(number, **bad.get(number, {})) for number in range(47)], 12)
    titled = [sample(number, json=json.dumps({"title": f"title {number}"}).encode(), wav=None) for number in range(19)]
    write(folder / "b", titled, 10)
    return str(folder)


@pytest.fixture(scope="module")
def uninterrupted(shards: str) -> list[str]:
    return [digest(batch) for batch in take(make(shards, {}), STEPS)]


class Lives:
    """Forks lives of one run and kills them."""

    def __init__(self, home: Path, shards: str, options: dict[str, Any]) -> None:
        program = Path(__file__).with_name("kill_cases.py")
        command = [sys.executable, str(program), str(home), shards, json.dumps(options)]
        self.home = home
        self.warm = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def __enter__(self) -> "Lives":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.warm.stdin and self.warm.stdout
        self.warm.stdin.close()
        self.warm.wait(60)
        self.warm.stdout.close()

    def _line(self) -> str:
        assert self.warm.stdout
        return self.warm.stdout.readline().strip()

    def live(self, kill_at: int | None, after_s: float = 0.0) -> int:
        """One life, killed so long after the log has so many bytes; its exit status."""
        assert self.warm.stdin
        self.warm.stdin.write("live\n")
        self.warm.stdin.flush()
        child = int(self._line())
        if kill_at is not None:
            until = time.monotonic() + 60
            while len(self.log()) < kill_at and time.monotonic() < until and alive(child):
                time.sleep(0.0005)
            time.sleep(after_s)
            for end in (os.kill, os.killpg):  # the run first: its workers may outlive it for a moment
                with contextlib.suppress(ProcessLookupError):
                    end(child, signal.SIGKILL)
        return int(self._line())

    def log(self) -> bytes:
        path = self.home / "log"
        return path.read_bytes() if path.exists() else b""


@pytest.mark.slow
@pytest.mark.parametrize("who", KINDS)
def test_a_run_that_is_killed_at_any_moment_reads_on_as_if_nothing_had_happened(
    shards: str, uninterrupted: list[str], tmp_path: Path, who: str
) -> None:
    kills, options = KINDS[who]
    draw = random.Random(who)
    line = len(f"10 {uninterrupted[0]}\n")
    died = runs = 0
    while died < kills:
        home = tmp_path / str(runs)
        home.mkdir()
        runs += 1
        with Lives(home, shards, options) as lives:
            done = False
            while not done and died < kills:
                # somewhere in what is still to be read: in a step, between two, or while the state is written
                at = len(lives.log()) + draw.randrange(0, 12 * line)
                status = lives.live(at, draw.choice([0.0, 0.001, 0.003]) * draw.random())
                assert status in (0, -signal.SIGKILL)
                died, done = died + (status != 0), status == 0
            if not done:
                assert lives.live(None) == 0
        _check(home, uninterrupted)
    assert died == kills


def _check(home: Path, uninterrupted: list[str]) -> None:
    """Every batch that was ever read is the one of the run that was not killed, and none is missing."""
    whole = (home / "log").read_text().split("\n")[:-1]
    read = [line.split(" ") for line in whole if len(line.split(" ")) == 2 and len(line.split(" ")[1]) == 64]
    assert len(read) > len(whole) - 20
    for step, found in read:
        assert found == uninterrupted[int(step) - 1], step
    assert {int(step) for step, _ in read} == set(range(1, STEPS + 1))
    saved = json.loads((home / "state.json").read_text())
    assert saved["step"] == STEPS
    assert saved["stream"]["rows"] == STEPS * BATCH
