"""A batch in chunks has the loss, gradients and training of the batch in one piece, and the memory of a chunk."""

from typing import Any

import pytest
import torch
from gradcache_cases import (
    CHUNKS,
    MASKS,
    REDUCING,
    Saved,
    alone,
    dropout_errors,
    every_loss,
    functions,
    loss_errors,
    objectives,
    of_objective,
    off,
    ragged_batch,
    rank_suite,
    trained,
    whole_gradients,
    whole_or_chunks,
)
from rank_cases import CPU, empty_batch
from torch import nn

from mmcl import losses
from mmcl.dist import ONE_PROCESS
from mmcl.engine import PlainEngine
from mmcl.errors import ConfigError
from mmcl.gradcache import backward_in_chunks, check_chunks, cut
from mmcl.metrics import MetricsFile
from mmcl.model import ThreeTowers
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.testing import FakeStream, MemoryCheckpoints, fake_batch, run_ranks, tiny_config, tiny_model
from mmcl.train import TrainConfig, train, train_step
from mmcl.types import MODALITIES

KINDS = ["plain", "accelerate", "zero0", "zero1", "zero2", "zero3"]
OTHERS = ["accelerate", "zero0", "zero2", "zero3"]
EXACT = 2e-5
NAMES = list(every_loss(ragged_batch(ONE_PROCESS), ONE_PROCESS))
each_loss = pytest.mark.parametrize("loss", NAMES)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """One process."""
    return {"losses": loss_errors(ONE_PROCESS), "dropout": dropout_errors(ONE_PROCESS)}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Gradients that one process has of the batch in one piece."""
    return whole_gradients(ONE_PROCESS)


@pytest.fixture(scope="module")
def single(whole) -> dict[tuple[str, int | None], Any]:
    """Those engines on one rank that are not the plain one there."""
    return run_ranks(1, alone, OTHERS, whole)[0]


@pytest.fixture(scope="module")
def two(whole) -> list[dict[str, Any]]:
    """Every engine on two ranks; what each rank saw."""
    return run_ranks(2, rank_suite, KINDS, whole)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_all_losses_of_a_pair_are_among_these():
    assert {"info_nce", "dcl", "hn_nce", "multi_positive", "modular", "mixup"} <= set(functions())
    assert {name for name, _ in ObjectiveConfig().terms()} <= {*objectives(), "global_contrast"}
    assert all(hasattr(losses, name) for name in functions())


@each_loss
@pytest.mark.parametrize("world", [1, 2])
def test_in_chunks_it_has_the_value_and_the_gradients_of_the_batch_in_one_piece(one, two, loss, world):
    ranks = [one["losses"]] if world == 1 else [rank["losses"] for rank in two]
    for found in ranks:
        for chunks in CHUNKS:
            error, where = found[loss, chunks]
            assert error <= EXACT, f"{where}: off by {error:.3g} in {chunks} chunks"


@pytest.mark.parametrize(("world", "kind"), [*((1, kind) for kind in OTHERS), *((2, kind) for kind in KINDS)])
def test_every_engine_has_the_gradients_of_one_process_without_chunks(single, two, kind, world):
    for errors in [single] if world == 1 else [rank["engines"] for rank in two]:
        for chunks in (None, *CHUNKS):
            error, where = errors[kind, chunks]
            assert error <= EXACT, f"{where}: off by {error:.3g} in {chunks} chunks"


def test_a_batch_of_fewer_rows_than_chunks_or_of_nothing_at_all_has_a_step():
    engine = PlainEngine(tiny_model(), OptimConfig(), CPU, ONE_PROCESS)
    objective = Objective(ObjectiveConfig())
    for batch in (fake_batch(tiny_config(), {name: [True] * 2 for name in MODALITIES}), empty_batch(3)):
        expected = ONE_PROCESS.mean(train_step(engine, batch, objective, 0.0))
        assert ONE_PROCESS.mean(train_step(engine, batch, objective, 0.0, chunks=5)) == pytest.approx(
            expected, rel=1e-5
        )


def test_towers_that_do_not_learn_stay_out_of_it():
    engine = PlainEngine(tiny_model(), OptimConfig(), CPU, ONE_PROCESS)
    engine.model.towers["image"].requires_grad_(False)
    batch = ragged_batch(ONE_PROCESS)
    found = {}
    for chunks in (None, 4):
        loss_of = of_objective(batch, ONE_PROCESS, Objective(ObjectiveConfig()))
        if chunks is None:
            engine.backward(loss_of(engine.forward(batch.values))[0])
        else:
            backward_in_chunks(engine, batch, chunks, loss_of)
        found[chunks] = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
        engine.optimizer.zero_grad()
    assert not any(name.startswith("towers.image.") for name in found[4])
    assert off(found[4], found[None])[0] <= EXACT


# --- training -------------------------------------------------------------------------------------------------------


@each_kind
def test_training_in_chunks_has_the_metrics_of_training_without(two, kind):
    expected = two[0]["trained"]["plain", 1]
    assert len({values["loss"] for values in expected}) == 4, "the steps are steps"
    for rank in two:
        for found, values in zip(rank["trained"][kind, 4], expected, strict=True):
            assert found == pytest.approx(values, rel=2e-5, abs=2e-6)


def test_two_ranks_in_chunks_train_as_one_process_without(two):
    assert [values["loss"] for values in two[0]["trained"]["zero3", 4]] == pytest.approx(
        [values["loss"] for values in trained(ONE_PROCESS, "plain", 1)], rel=1e-5
    )


@pytest.mark.parametrize("kind", ["plain", "zero2"])
def test_bf16_in_chunks_is_bf16_without(two, kind):
    whole, parts = (
        trained(ONE_PROCESS, kind, chunks, bf16=True) if kind == "plain" else two[0]["bf16"][kind, chunks]
        for chunks in (1, 4)
    )
    for found, values in zip(parts, whole, strict=True):
        assert found["loss"] == pytest.approx(values["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(values["grad_norm"], rel=2e-2)
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5), "before any step has been taken"


def test_a_run_in_chunks_writes_the_metrics_of_a_run_without(tmp_path):
    lines: dict[int, list[dict[str, float]]] = {}

    class Lines(MetricsFile):
        def write(self, step, values):
            lines.setdefault(accumulate, []).append(dict(values))

    for accumulate in (1, 5):
        train(
            TrainConfig(steps=3, batch_size=12, log_every=1, save_every=1, accumulate=accumulate, monitor_every=2),
            OptimConfig(warmup_steps=0),
            PlainEngine(tiny_model(), OptimConfig(), CPU, ONE_PROCESS),
            FakeStream(tiny_config()),
            objective=Objective(ObjectiveConfig()),
            checkpoints=MemoryCheckpoints(),
            metrics=Lines(tmp_path / "metrics.jsonl"),
        )
    times = {"step_seconds", "data_wait", "samples_per_second"}
    for found, expected in zip(lines[5], lines[1], strict=True):
        assert found.keys() == expected.keys()
        values = {name: value for name, value in expected.items() if name not in times}
        assert {name: found[name] for name in values} == pytest.approx(values, rel=2e-5, abs=2e-6)
    assert any(name.startswith("monitor/") for name in lines[5][1])


# --- one loss, one mean over ranks, one graph at a time -------------------------------------------------------------


@pytest.mark.parametrize("kind", REDUCING)
def test_gradients_are_averaged_over_ranks_once_however_many_the_chunks(two, kind):
    for rank in two:
        assert max(rank["reduced"][kind, 1]) > 1_000_000, "the word embedding is among them"
        assert rank["reduced"][kind, 2] == rank["reduced"][kind, 1]


def test_the_loss_is_evaluated_once():
    engine, batch = PlainEngine(tiny_model(), OptimConfig(), CPU, ONE_PROCESS), ragged_batch(ONE_PROCESS)
    inner = of_objective(batch, ONE_PROCESS, Objective(ObjectiveConfig()))
    sizes = []

    def loss_of(outputs):
        sizes.append(len(outputs["image"]))
        return inner(outputs)

    backward_in_chunks(engine, batch, 4, loss_of)
    assert sizes == [sum(MASKS["image"])]


def test_no_more_than_the_graph_of_one_chunk_is_kept():
    model = tiny_model()
    engine = PlainEngine(model, OptimConfig(), CPU, ONE_PROCESS)
    batch = fake_batch(tiny_config(), {name: [True] * 32 for name in MODALITIES})
    most = {}
    for chunks in (None, 1, 8):
        with Saved(model) as saved:
            whole_or_chunks(engine, batch, chunks, of_objective(batch, ONE_PROCESS, Objective(ObjectiveConfig())))
        assert saved.now == 0, "and nothing of it stays"
        most[chunks] = saved.most
    assert most[1] <= most[None]
    assert most[8] < 0.2 * most[None], most


# --- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_is_replayed(one, two, world):
    for found in [one["dropout"]] if world == 1 else [rank["dropout"] for rank in two]:
        error, where, loss = found["replayed"]
        assert error <= EXACT and loss <= 1e-6, (error, where, loss)
        assert found["of another seed"][0] > 0.1, "what is dropped matters"
        assert found["random numbers go on"], "as after the first pass"


# --- statistics of a chunk ------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A tower with a norm behind it."""

    def __init__(self, tower: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.tower, self.norm = tower, norm

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tower(values))


def with_norm(norm: nn.Module) -> ThreeTowers:
    model = tiny_model()
    model.towers["audio"] = Normed(model.towers["audio"], norm)
    return model


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(16),
        nn.SyncBatchNorm(16),
        nn.BatchNorm1d(16, track_running_stats=False).eval(),
        nn.InstanceNorm1d(16, track_running_stats=True),
    ],
)
def test_a_norm_over_rows_is_refused_by_name_before_anything_moves(norm):
    engine = PlainEngine(with_norm(norm), OptimConfig(), CPU, ONE_PROCESS)
    before = engine.state(0)
    says = rf"train.accumulate=4: towers\.audio\.norm \({type(norm).__name__}\).*accumulate=1.*freeze it.*eval mode"
    with pytest.raises(ConfigError, match=says):
        train_step(engine, ragged_batch(ONE_PROCESS), Objective(ObjectiveConfig()), 1e-3, chunks=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state(0).items())


def test_the_resnets_of_open_clip_are_refused():
    clip = tiny_config().clip
    assert isinstance(clip, dict)
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    model = tiny_model(clip=clip | {"vision_cfg": resnet})
    with pytest.raises(ConfigError, match=r"towers\.image\.visual\.bn1 \(BatchNorm2d\)"):
        check_chunks(model, 2)
    model.towers["image"].eval()
    check_chunks(model, 2)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.InstanceNorm1d(16), nn.LayerNorm(16), nn.GroupNorm(4, 16)])
def test_a_frozen_norm_and_one_over_a_row_alone_are_exact(norm):
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean, norm.running_var = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
        norm.eval()
    check_chunks(with_norm(norm), 4)
    if isinstance(norm, nn.InstanceNorm1d):
        return  # it wants an axis that these towers do not have
    engine, batch = PlainEngine(with_norm(norm), OptimConfig(), CPU, ONE_PROCESS), ragged_batch(ONE_PROCESS)
    loss_of = of_objective(batch, ONE_PROCESS, Objective(ObjectiveConfig()))
    before = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    (_, expected), (_, found) = (whole_or_chunks(engine, batch, chunks, loss_of) for chunks in (None, 4))
    assert off(found, expected)[0] <= EXACT
    assert all(torch.equal(buffer, before[name]) for name, buffer in engine.model.named_buffers())


# --- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 4, 7, 13, 20])
def test_chunks_are_rows_in_their_order_with_the_values_of_these_rows(chunks):
    batch = ragged_batch(ONE_PROCESS)
    parts = cut(batch, chunks)
    assert len(parts) == chunks
    for name in MODALITIES:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch.values[name])
    # which row of the batch a value is of
    numbered = fake_batch(tiny_config(), MASKS, 0)
    object.__setattr__(numbered, "values", numbered.rows)
    edges = [chunk * 13 // chunks for chunk in range(chunks + 1)]
    for number, part in enumerate(cut(numbered, chunks)):
        for name in MODALITIES:
            rows = [row for row in range(edges[number], edges[number + 1]) if MASKS[name][row]]
            assert part[name].tolist() == rows
