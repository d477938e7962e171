"""Every benchmark runs, and says what `make bench` collects. How fast is not asked here: machines are shared."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "compose": ["--sounds", "4", "--rate", "8000", "--seconds", "1"],
    "data": [
        *("--images", "32", "--side", "64", "--batch-size", "8", "--batches", "2", "--workers", "1"),
        *("--sounds", "16", "--long-sounds", "4", "--seconds", "0.5", "--index-samples", "1000"),
    ],
    "negatives": ["--captions", "40"],
    "loss": ["--rows", "32", "--dim", "8", "--memory-rows", "512", "2048", "8192"],
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


ROWS = 1 << 10
WHOLE = 2 * 4 * ROWS
"""Bytes of all rows of two ranks, one fp32 number each."""


def exchange(own: Tensor, whole: Tensor, rank: int) -> None:
    ends = dist.P2POp(dist.isend, own, 1 - rank), dist.P2POp(dist.irecv, whole[:ROWS], 1 - rank)
    for request in dist.batch_isend_irecv(list(ends)):
        request.wait()


CALLS = {
    "all_gather": (lambda own, whole, _: dist.all_gather(list(whole.split(ROWS)), own), WHOLE / 2),
    "all_gather_into_tensor": (lambda own, whole, _: dist.all_gather_into_tensor(whole, own), WHOLE / 2),
    "reduce_scatter": (lambda own, whole, _: dist.reduce_scatter(own, list(whole.split(ROWS))), WHOLE / 2),
    "reduce_scatter_tensor": (lambda own, whole, _: dist.reduce_scatter_tensor(own, whole), WHOLE / 2),
    "all_to_all": (lambda _, w, rank: dist.all_to_all(list(w.clone().split(ROWS)), list(w.split(ROWS))), WHOLE / 2),
    "all_to_all_single": (lambda _, whole, rank: dist.all_to_all_single(whole.clone(), whole), WHOLE / 2),
    "all_reduce": (lambda _, whole, rank: dist.all_reduce(whole), WHOLE),
    "send and receive": (exchange, WHOLE / 2),
    "barrier": (lambda *_: dist.barrier(), 0),
    "scatter": (lambda own, w, rank: dist.scatter(own, list(w.split(ROWS)) if rank == 0 else None), [WHOLE / 2, 0]),
}
"""By name, a call and what each of two ranks must send for it."""


def sent(shard: Shard, name: str) -> int:
    from measure import Sent

    call = CALLS[name][0] if name in CALLS else (lambda own, *_: dist.broadcast(own, 0))
    with Sent(shard.world) as counted:
        call(torch.zeros(ROWS), torch.zeros(2 * ROWS), shard.rank)
    return counted.bytes


@pytest.mark.parametrize("name", CALLS)
def test_bytes_are_counted_as_the_best_algorithm_on_a_ring_sends_them(measure, name):
    expected = CALLS[name][1]
    assert measure.in_fresh_processes(2, sent, name) == (expected if isinstance(expected, list) else [expected] * 2)


def test_a_collective_whose_cost_is_not_known_is_no_free_one(measure):
    with pytest.raises(AssertionError, match="broadcast"):
        measure.in_fresh_processes(2, sent, "broadcast")


def sent_by_clip_loss(shard: Shard) -> int:
    from loss import CLIP_LOSS, Setting, weigh_one

    return weigh_one(shard, CLIP_LOSS, Setting(rows=64, dim=8, scale=10.0, threads=1, world=2)).sent


def test_what_clip_loss_sends_is_both_sides_there_and_their_gradients_back(measure):
    assert measure.in_fresh_processes(2, sent_by_clip_loss) == [4 * (64 * 8 * 4) / 2] * 2


def peak_of_tensors(_: Shard) -> int:
    from measure import peak_memory

    torch.ones(1 << 24).sum()  # 64 MiB that the process has already given back
    kept: list[Tensor] = []

    def run() -> None:
        kept.append(torch.ones(1 << 22))  # 16 MiB
        for _ in range(3):
            torch.ones(1 << 23)  # 32 MiB, one after another

    return peak_memory(run)


def test_peak_memory_is_what_lives_at_one_moment(measure):
    (peak,) = measure.in_fresh_processes(1, peak_of_tensors)
    assert 47 << 20 < peak < 52 << 20


def processes(_: Shard) -> int:
    return os.getpid()


def test_each_measurement_has_processes_of_its_own(measure):
    ids = [measure.in_fresh_processes(2, processes) for _ in range(2)]
    assert len({*ids[0], *ids[1]}) == 4


@pytest.fixture
def loss(measure):
    import loss

    return loss


@pytest.mark.parametrize("bf16", [False, True])
def test_a_contestant_that_computes_another_loss_is_not_timed(loss, monkeypatch, bf16):
    setting = loss.Setting(rows=64, dim=8, scale=10.0, threads=1, bf16=bf16)
    names = [loss.OURS, loss.CLIP_LOSS]
    loss.check_agreement(ONE_PROCESS, names, setting)
    monkeypatch.setitem(loss.LOSSES, loss.CLIP_LOSS, lambda inputs, shard: 1.1 * loss.ours(inputs, shard))
    with pytest.raises(AssertionError, match="ClipLoss and mmcl info_nce: output 0 is"):
        loss.check_agreement(ONE_PROCESS, names, setting)


def test_the_floor_multiplies_the_rows_of_a_rank_by_all_columns(loss):
    setting = loss.Setting(rows=6, dim=2, scale=10.0, threads=1)
    to_x, to_y = loss.four_products(torch.ones(3, 2), setting)()
    assert to_x.shape == (3, 2)
    assert to_y.shape == (6, 2)


def test_a_pipeline_that_gives_other_pixels_than_the_shards_hold_is_not_timed(measure, tmp_path):
    from pipelines import shards
    from pipelines.agreement import Reference
    from pipelines.turns import Pipeline

    held, others = (shards.images(tmp_path / str(side), 8, side) for side in (64, 48))  # with the same captions
    spec = {"image_size": 32, "resize_mode": "shortest", "sample_rate": 8000, "clip_samples": 80, "context_length": 77}
    with Pipeline("ours", shards=str(held), spec=spec, batch_size=8, workers=0) as pipeline:
        Reference(held, spec).check("ours", pipeline)
        with pytest.raises(AssertionError, match=r"ours: 00000\d.jpg is 0.\d+ apart"):
            Reference(others, spec).check("ours", pipeline)


def test_a_pipeline_stands_still_while_it_is_not_its_turn(measure, tmp_path):
    from pipelines import shards
    from pipelines.turns import Pipeline

    held = shards.images(tmp_path / "held", 8, 64)
    spec = {"image_size": 32, "resize_mode": "shortest", "sample_rate": 8000, "clip_samples": 80, "context_length": 77}
    with Pipeline("bare", tars=[str(path) for path in held.glob("*.tar")], spec=spec, batch_size=8) as pipeline:
        turn = pipeline.turn(1, 3)
        stopped = os.WIFSTOPPED(os.waitpid(pipeline.process.pid, os.WUNTRACED)[1])
    assert turn.wall > 0 and turn.cpu > 0
    assert stopped
    assert pipeline.process.returncode != 0  # ended with its workers, whatever it was at
