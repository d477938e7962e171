"""Pipelines in processes of their own that stand still while it is not their turn."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Turn:
    """What some rows took."""

    wall: float
    """Seconds for each row."""
    cpu: float
    """Seconds for each row of all processes together."""


class Pipeline:
    """A program of this folder that `serving.serve`s. Use it as a context.

    Args:
        program: its name.
        python: an interpreter that has what it imports; by default this one.
        options: what it is told.
    """

    def __init__(self, program: str, python: str = sys.executable, **options: Any) -> None:
        self.program = program
        self.process = subprocess.Popen(
            [python, str(HERE / f"{program}.py"), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: Any) -> None:
        for signum in (signal.SIGCONT, signal.SIGKILL):
            self._signal(signum)
        self.process.communicate()

    def ask(self, **question: int) -> Any:
        """Let it run until it has answered."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.program} ended with status {self.process.wait()}: its error is above")
        self._signal(signal.SIGSTOP)
        return json.loads(answer)

    def turn(self, idle: int, batches: int) -> Turn:
        """Time some batches after some that were made ahead, which do not count."""
        self.ask(take=idle)
        before = self._cpu()
        answer = self.ask(take=batches)
        cpu = max(1 / _TICKS, self._cpu() - before)  # the clock ticks a hundred times a second
        return Turn(answer["seconds"] / answer["rows"], cpu / answer["rows"])

    def _signal(self, signum: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signum)

    def _cpu(self) -> float:
        """Seconds of the processes that live."""
        total = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text().rpartition(")")[2].split()
            except OSError:  # it ended
                continue
            if int(fields[3]) == self.process.pid:
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS


def race(pipelines: Mapping[str, Pipeline], rounds: int, idle: int, batches: int) -> dict[str, list[Turn]]:
    """Turns of each pipeline, one a round, after one that does not count."""
    turns: dict[str, list[Turn]] = {name: [] for name in pipelines}
    for _ in range(rounds + 1):
        for name, pipeline in pipelines.items():
            turns[name].append(pipeline.turn(idle, batches))
    return {name: each[1:] for name, each in turns.items()}


def times(turns: Sequence[Turn], other: Sequence[Turn], what: str) -> float:
    """The median over rounds of how many times as many seconds `other` took, of `wall` or `cpu`."""
    return statistics.median(getattr(b, what) / getattr(a, what) for a, b in zip(turns, other, strict=True))
