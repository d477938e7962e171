"""Every benchmark runs, and says what `make bench` collects. How fast is not asked here: machines are shared."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "data": ["--samples", "16", "--batch-size", "8"],
    "loss": ["--rows", "32", "--dim", "8"],
}
"""Arguments that make a benchmark quick."""


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{program}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


def test_every_program_in_the_folder_is_tried_here():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - {"measure"} == set(TINY)


@pytest.mark.parametrize("program", sorted(TINY))
def test_a_benchmark_writes_figures_with_targets_and_prints_the_floor(program, tmp_path):
    file = tmp_path / "new" / "out.json"
    done = run(program, "--rounds", "2", "--json", str(file), *TINY[program])
    assert done.returncode == 0, done.stderr
    assert "floor" in done.stdout
    results = json.loads(file.read_text())
    assert results
    for name, result in results.items():
        assert result.keys() == {"value", "target", "better"}
        assert result["better"] in ("lower", "higher")
        assert math.isfinite(result["value"])
        assert result["value"] > 0
        assert math.isfinite(result["target"])
        assert name in done.stdout


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    return measure


def test_contestants_take_turns_and_the_first_round_does_not_count(measure):
    turns = []
    seconds = measure.alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=3)
    assert turns == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_round_in_which_the_machine_was_busy_does_not_change_the_ratio(measure):
    assert measure.ratio({"a": [2.0, 200.0, 2.2], "b": [1.0, 100.0, 1.0]}, "a", "b") == 2.0


@pytest.mark.parametrize(
    ("value", "better", "met"), [(1.0, "lower", True), (1.1, "lower", False), (0.9, "higher", False)]
)
def test_a_target_is_met_on_its_own_side_only(measure, value, better, met):
    assert measure.Result(value=value, target=1.0, better=better).met is met
