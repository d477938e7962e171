"""Monitors are the formulas of the papers over the global batch, on any number of ranks, and leave a run as it is."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loss_oracle import pool, unit
from rank_cases import CPU, OPTIM, own_rows
from torch import Tensor

from mmcl import monitors
from mmcl.dist import ONE_PROCESS, Shard
from mmcl.engine import PlainEngine
from mmcl.losses import HardNegatives, tiles
from mmcl.metrics import MetricsFile
from mmcl.monitors import monitor
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.testing import FakeStream, MemoryCheckpoints, tiny_config, tiny_model
from mmcl.train import TrainConfig, train
from mmcl.types import MODALITIES, PAIRS, Embeddings

Masks = dict[str, list[bool]]


def embeddings(values: dict[str, Tensor], masks: Masks, rows: slice = slice(None)) -> Embeddings:
    """A rank's part of a batch that has every modality in every row, without what the masks leave out."""
    present = {name: torch.tensor(masks[name])[rows] for name in MODALITIES}
    return Embeddings(
        values={name: values[name][rows][present[name]] for name in MODALITIES},
        rows={name: present[name].nonzero().flatten() for name in MODALITIES},
    )


def pairs_only(x: list[list[float]], y: list[list[float]]) -> Embeddings:
    """Rows of image and text."""
    rows, nobody = torch.arange(len(x)), torch.arange(0)
    return Embeddings(
        values={
            "image": torch.tensor(x).reshape(len(x), len(x[0]) if x else 2),
            "text": torch.tensor(y).reshape(len(y), len(y[0]) if y else 2),
            "audio": torch.zeros(0, 2),
        },
        rows={"image": rows, "text": rows, "audio": nobody},
    )


def numbers(found: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.shape == () for value in found.values())
    return {name: value.item() for name, value in found.items()}


# --- literals -------------------------------------------------------------------------------------------------------

RIGHT, UP, LEFT, DOWN = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]


def test_a_perfect_pair_of_two_rows():
    found = numbers(monitor(pairs_only([RIGHT, UP], [RIGHT, UP])))
    assert found == pytest.approx(
        {
            "uniformity_image": -4.0,  # |x - y|^2 = 2
            "uniformity_text": -4.0,
            "alignment_image_text": 0.0,
            "gap_image_text": 0.0,
            "r1_image_to_text": 1.0,
            "r1_text_to_image": 1.0,
        }
    )


def test_modalities_that_lie_apart():
    found = numbers(monitor(pairs_only([RIGHT, UP], [LEFT, DOWN])))
    assert found["alignment_image_text"] == pytest.approx(4.0)
    assert found["gap_image_text"] == pytest.approx(math.sqrt(2)), "from (1/2, 1/2) to (-1/2, -1/2)"
    assert found["r1_image_to_text"] == found["r1_text_to_image"] == 0.0


def test_the_two_directions_are_judged_apart():
    # cosines: image 0 is nearest to its caption; image 1 is nearer to caption 0; captions all find their images
    found = numbers(monitor(pairs_only([[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [0.0, 1.0]])))
    assert found["r1_image_to_text"] == pytest.approx(1 / 2)
    assert found["r1_text_to_image"] == pytest.approx(2 / 2)
    assert found["uniformity_image"] == pytest.approx(-2 * (0.2**2 + 0.6**2), rel=1e-5)
    assert found["alignment_image_text"] == pytest.approx((0 + 0.8**2 + 0.4**2) / 2, rel=1e-5)
    assert found["gap_image_text"] == pytest.approx(math.hypot(0.4, -0.2), rel=1e-5)


def test_a_tie_is_wrong_and_a_collapsed_model_has_nothing_right():
    collapsed = torch.nn.functional.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = collapsed.repeat(9, 1).tolist()
    found = numbers(monitor(pairs_only(rows, rows)))
    assert found["r1_image_to_text"] == found["r1_text_to_image"] == 0.0
    assert found["uniformity_image"] == pytest.approx(0.0, abs=1e-5)
    nearly = (collapsed + 1e-8 * torch.randn(9, 16, generator=torch.Generator().manual_seed(1))).tolist()
    assert numbers(monitor(pairs_only(nearly, nearly)))["r1_image_to_text"] == 0.0, "rounding tells nothing apart"


def test_what_nobody_has_rows_for_is_left_out():
    one = numbers(monitor(pairs_only([RIGHT], [UP])))
    assert one.keys() == {"alignment_image_text", "gap_image_text", "r1_image_to_text", "r1_text_to_image"}
    assert one["r1_image_to_text"] == 1.0, "the only one is the nearest"
    assert monitor(pairs_only([], [])) == {}


def test_hard_negatives_above_the_positive_are_counted_and_ties_with_them():
    batch = pairs_only([RIGHT, RIGHT, UP], [[0.6, 0.8], [0.8, 0.6], UP])
    wrong = HardNegatives(
        values=torch.tensor([[0.8, 0.6], [0.8, 0.6], LEFT, [0.0, 1.0], [0.28, 0.96]]),
        rows=torch.tensor([0, 1, 1, 2, 2]),
    )
    found = numbers(monitor(batch, negatives={"text": wrong}))
    assert found["hard_negatives_above_image_text"] == pytest.approx(3 / 5), "above, tied, below, tied, below"
    none = HardNegatives(values=torch.zeros(0, 2), rows=torch.arange(0))
    assert "hard_negatives_above_image_text" not in monitor(batch, negatives={"text": none})


def test_hard_negatives_of_rows_that_lack_the_other_side_do_not_count():
    batch = Embeddings(
        values={"image": torch.tensor([UP]), "text": torch.tensor([RIGHT, UP]), "audio": torch.zeros(0, 2)},
        rows={"image": torch.tensor([1]), "text": torch.tensor([0, 1]), "audio": torch.arange(0)},
    )
    wrong = HardNegatives(values=torch.tensor([UP, RIGHT]), rows=torch.tensor([0, 1]))
    assert numbers(monitor(batch, negatives={"text": wrong}))["hard_negatives_above_image_text"] == 0.0


# --- the formulas, densely, and ranks -------------------------------------------------------------------------------


def dense(values: dict[str, np.ndarray], masks: Masks, wrong: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Everything in float64, with all N^2 numbers at once."""
    found = {}
    has = {name: np.array(mask) for name, mask in masks.items()}
    for name in MODALITIES:
        x = values[name][has[name]]
        squares = ((x[:, None] - x[None]) ** 2).sum(-1)
        if len(x) > 1:
            found[f"uniformity_{name}"] = np.log(np.exp(-2 * squares[np.triu_indices(len(x), 1)]).mean())
    for pair, (a, b) in PAIRS.items():
        both = has[a] & has[b]
        x, y = values[a][both], values[b][both]
        if len(x) == 0:
            continue
        found[f"alignment_{pair}"] = ((x - y) ** 2).sum(-1).mean()
        found[f"gap_{pair}"] = np.linalg.norm(x.mean(0) - y.mean(0))
        cosines = x @ y.T
        others = cosines - 9 * np.eye(len(x))
        found[f"r1_{a}_to_{b}"] = (np.diag(cosines) > others.max(1)).mean()
        found[f"r1_{b}_to_{a}"] = (np.diag(cosines) > others.max(0)).mean()
        if b == "text":
            texts, owners = (part[both[wrong[1]]] for part in wrong)
            of_owner = (values[a][owners] * texts).sum(-1)
            found[f"hard_negatives_above_{pair}"] = (of_owner >= (values[a] * values[b]).sum(-1)[owners]).mean()
    return found


SIZE = 23
LACKING: Masks = {name: [(row + lacking) % 4 != 0 for row in range(SIZE)] for lacking, name in enumerate(MODALITIES)}


def numbers_of_rank(splits: Sequence[int], masks: Masks, sample: int, shard: Shard) -> dict[str, float]:
    """Of a rank with its rows of one batch, walked in small tiles."""
    tiles.CPU_TILE, monitors.SAMPLE = (3, 4), sample
    values = batch_values()
    wrong, owners = negatives()
    rows = own_rows(splits, shard.rank)
    mine = (owners >= rows.start) & (owners < rows.stop)
    hard = HardNegatives(values=wrong[mine].float(), rows=owners[mine] - rows.start)
    single = {name: value.float() for name, value in values.items()}
    return numbers(monitor(embeddings(single, masks, rows), shard, {"text": hard}))


def batch_values() -> dict[str, Tensor]:
    """Captions near images and near sounds, so that a good part of the rows is right."""
    x = unit(SIZE, 6, 0)
    near = {name: x + scale * unit(SIZE, 6, seed) for name, scale, seed in (("text", 0.6, 1), ("audio", 1.0, 2))}
    return {"image": x} | {name: torch.nn.functional.normalize(value, dim=-1) for name, value in near.items()}


def negatives() -> tuple[Tensor, Tensor]:
    """Two for each third row, all near its caption; the first belongs to a row that has an image."""
    owners = torch.arange(1, SIZE, 3).repeat_interleave(2)
    values = batch_values()["text"][owners] + 0.5 * unit(len(owners), 6, 3)
    return torch.nn.functional.normalize(values, dim=-1), owners


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", tiles.CPU_TILE)
    monkeypatch.setattr(monitors, "SAMPLE", monitors.SAMPLE)


@pytest.mark.parametrize("splits", [(23,), (12, 11), (23, 0), (9, 0, 13, 1)])
def test_ranks_see_the_dense_formulas_of_the_global_batch(splits, small_tiles):
    wrong, owners = negatives()
    values = {name: value.numpy() for name, value in batch_values().items()}
    expected = dense(values, LACKING, (wrong.numpy(), owners.numpy()))
    assert {name for name in expected if "hard" in name} == {
        f"hard_negatives_above_{p}_text" for p in ("image", "audio")
    }
    assert all(0 < value < 1 for name, value in expected.items() if name.startswith(("r1", "hard")))
    args = (splits, LACKING, 4096)
    ranks = [numbers_of_rank(*args, ONE_PROCESS)] if len(splits) == 1 else pool(len(splits)).run(numbers_of_rank, *args)
    for found in ranks:
        assert list(found) == list(ranks[0]), "the same names in the same order"
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("splits", [(23,), (9, 0, 13, 1)])
def test_a_modality_that_no_rank_has_is_left_out_on_all(splits, small_tiles):
    masks = LACKING | {"audio": [False] * SIZE}
    args = (splits, masks, 4096)
    ranks = [numbers_of_rank(*args, ONE_PROCESS)] if len(splits) == 1 else pool(len(splits)).run(numbers_of_rank, *args)
    for found in ranks:
        assert {name for name in found if "audio" in name} == set()
        assert "uniformity_image" in found and "hard_negatives_above_image_text" in found


@pytest.mark.parametrize("splits", [(23,), (12, 11), (9, 0, 13, 1)])
def test_uniformity_of_many_rows_is_that_of_rows_at_even_distances(splits, small_tiles):
    everyone: Masks = {name: [True] * SIZE for name in MODALITIES}
    args = (splits, everyone, 5)
    ranks = [numbers_of_rank(*args, ONE_PROCESS)] if len(splits) == 1 else pool(len(splits)).run(numbers_of_rank, *args)
    chosen = batch_values()["image"][[0, 4, 9, 13, 18]]
    expected = torch.pdist(chosen).square().mul(-2).exp().mean().log().item()
    for found in ranks:
        assert found["uniformity_image"] == pytest.approx(expected, rel=1e-5)


def test_it_gives_no_gradient_and_wants_none():
    batch = pairs_only([RIGHT, UP], [RIGHT, UP])
    for value in batch.values.values():
        value.requires_grad_()
    assert not any(value.requires_grad for value in monitor(batch).values())


# --- in a run -------------------------------------------------------------------------------------------------------


def run(folder, **config):
    """Six steps of `train` in this process; the engine, and the lines of metrics."""
    folder.mkdir()
    engine = PlainEngine(tiny_model(), OPTIM, CPU, ONE_PROCESS)
    train(
        TrainConfig(steps=6, batch_size=12, log_every=1, save_every=6, **config),
        OPTIM,
        engine,
        FakeStream(tiny_config()),
        objective=Objective(ObjectiveConfig()),
        checkpoints=MemoryCheckpoints(),
        metrics=MetricsFile(folder / "metrics.jsonl"),
    )
    return engine, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_monitors_are_in_the_lines_that_they_are_due_in_and_leave_the_run_as_it_is(tmp_path):
    watched, lines = run(tmp_path / "a", monitor_every=2)
    bare, plain_lines = run(tmp_path / "b")
    names = {
        *(f"uniformity_{name}" for name in MODALITIES),
        *(f"{what}_{pair}" for pair in PAIRS for what in ("alignment", "gap")),
        *(f"r1_{a}_to_{b}" for x, y in PAIRS.values() for a, b in ((x, y), (y, x))),
        *(f"{kind}_{part}" for kind in ("grad_norm", "update_rms") for part in (*MODALITIES, "scales")),
    }
    for line in lines:
        seen = {name.removeprefix("monitor/") for name in line if name.startswith("monitor/")}
        assert seen == (names if line["step"] % 2 == 0 else set())
        assert all(math.isfinite(line[f"monitor/{name}"]) for name in seen)
        if seen:
            norms = [value for name, value in line.items() if name.startswith("monitor/grad_norm_")]
            assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)
    assert not any(name.startswith("monitor/") for line in plain_lines for name in line)
    expected = bare.state(6)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in watched.state(6).items())
