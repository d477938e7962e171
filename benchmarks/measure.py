"""What the benchmarks share: taking turns, ratios, a table, and the JSON that `make bench` collects."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Seconds = Mapping[str, list[float]]
"""By contestant, one figure for each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A figure and what it should be."""

    value: float
    target: float
    better: Literal["lower", "higher"]

    @property
    def met(self) -> bool:
        """Whether the value is as good as the target."""
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Time the contestants in turn, `rounds` times after one round that does not count.

    Whatever else the machine does meanwhile falls on all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Seconds, over: str, under: str) -> float:
    """The median over rounds of how many times as long `over` took as `under` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def table(seconds: Seconds, floor: str, units: float, unit: str) -> str:
    """One line a contestant: median time, `units` of work by second, and how many times the floor it took."""
    lines = [f"{'':24}{'median ms':>12}{unit + '/s':>14}{'x floor':>10}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"{name:24}{median * 1e3:12.1f}{units / median:14.0f}{ratio(seconds, name, floor):10.2f}")
    return "\n".join(lines)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    return made


def report(results: Mapping[str, Result], file: Path | None) -> None:
    """Print the figures and write them to `file`, as `{name: {"value": v, "target": t, "better": b}}`."""
    for name, result in results.items():
        verdict = "met" if result.met else "MISSED"
        print(f"{name}: {result.value:.3f} (target {result.target:g}, {result.better} is better: {verdict})")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        figures = {n: {"value": r.value, "target": r.target, "better": r.better} for n, r in results.items()}
        file.write_text(json.dumps(figures, indent=1) + "\n")
