"""Terms by name: what each calls, what can be combined, what is kept from step to step and comes back on resume."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from loss_oracle import pool, unit
from rank_cases import CPU, OPTIM, WEIGHTS, own_rows
from torch import Tensor

from mmcl import losses
from mmcl.dist import ONE_PROCESS, Shard
from mmcl.engine import PlainEngine
from mmcl.errors import CheckpointError, ConfigError
from mmcl.losses import Estimates, HardNegatives
from mmcl.metrics import MetricsFile
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.terms import GlobalContrastConfig, InfoNCEConfig, Method, MixupConfig, PairTerm
from mmcl.testing import FakeStream, MemoryCheckpoints, tiny_config, tiny_model
from mmcl.train import TrainConfig, train
from mmcl.types import MODALITIES, PAIRS, Embeddings, Learned

OFF = {"info_nce": InfoNCEConfig(weights={})}
IMAGE_TEXT = {"image_text": 1.0}
N = 8


def only(**config: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**(OFF | config))


def named(name: str, weights: Any = IMAGE_TEXT, **fields: Any) -> ObjectiveConfig:
    """One term, whose other fields are the default ones."""
    kind = type(getattr(ObjectiveConfig(), name))
    return only(**{name: kind(weights=weights, **fields)})


def embeddings(seed: int = 0, rows: slice = slice(None)) -> Embeddings:
    x = unit(N, 6, 1)
    values = {
        name: torch.nn.functional.normalize(x + 0.7 * unit(N, 6, seed + number), dim=-1).float()[rows]
        for number, name in enumerate(MODALITIES)
    }
    return Embeddings(values=values, rows=dict.fromkeys(MODALITIES, torch.arange(len(values["image"]))))


def learned() -> Learned:
    return Learned(
        scales={pair: torch.tensor(scale) for pair, scale in zip(PAIRS, (14.0, 5.0, 20.0), strict=True)},
        biases={pair: torch.tensor(-5.0) for pair in PAIRS},
    )


IDS = torch.stack([torch.arange(N) * 3, torch.arange(N) % 5, torch.arange(N) % 4], 1)
"""Sample, caption, image."""


def values(
    objective: Objective, shard: Shard = ONE_PROCESS, seed: int = 0, rows: slice = slice(None), negatives: Any = None
) -> dict[str, Tensor]:
    found = objective.terms(embeddings(seed, rows), learned(), IDS[rows], shard, negatives or {})
    return {name: value for name, (_, value) in found.items()}


X, Y = embeddings().values["image"], embeddings().values["text"]
S, B = torch.tensor(14.0), torch.tensor(-5.0)
MEAN_SCALE = torch.tensor((14.0 * 5.0 * 20.0) ** (1 / 3))
NOTHING = Estimates(log_u=torch.full((N, 2), -math.inf))
CALLS: dict[str, tuple[ObjectiveConfig, Any]] = {
    "info_nce": (named("info_nce", smoothing=0.1), lambda: losses.info_nce(X, Y, S, smoothing=0.1)),
    "soft targets": (named("info_nce", soft_targets=True), lambda: losses.info_nce(X, Y, S, teacher=X)),
    "dcl": (named("dcl", sigma=0.5), lambda: losses.dcl(X, Y, S, sigma=0.5)),
    "hn_nce": (named("hn_nce", alpha=0.5, beta=0.5), lambda: losses.hn_nce(X, Y, S, alpha=0.5, beta=0.5)),
    "sigmoid": (named("sigmoid"), lambda: losses.sigmoid(X, Y, S, B)),
    "multi_positive": (
        named("multi_positive", groups="caption"),
        lambda: losses.multi_positive(X, Y, S, groups=IDS[:, 1]),
    ),
    "sogclr": (
        named("global_contrast", method="sogclr", gamma=0.5),
        lambda: losses.global_contrast(X, Y, S, past=NOTHING, gamma=0.5)[0],
    ),
    "fastclip_v0": (
        named("global_contrast", method="fastclip_v0", gamma_steps=4),
        lambda: losses.global_contrast(X, Y, S, past=NOTHING, gamma=1.0, times_tau=False)[0],
    ),
    "fastclip_v3": (
        named("global_contrast", method="fastclip_v3", gamma_steps=4, rho=3.0),
        lambda: losses.global_contrast(X, Y, S, past=NOTHING, gamma=1.0, rho=3.0)[0],
    ),
    "isogclr": (
        named("global_contrast", method="isogclr", rho=3.0),
        lambda: losses.individual_contrast(
            X, Y, past=replace(NOTHING, tau=torch.full((N, 2), 1 / 14)), gamma=0.2, rho=3.0
        )[0],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_term_is_its_loss_on_a_pair(name):
    config, call = CALLS[name]
    (found,) = values(Objective(config)).values()
    torch.testing.assert_close(found, call(), rtol=1e-6, atol=1e-9)
    assert found != 0


@pytest.mark.parametrize("name", ["mv_info_nce", "mv_dhel"])
def test_a_term_of_all_modalities_has_the_geometric_mean_of_the_scales(name):
    kind = type(getattr(ObjectiveConfig(), name))
    found = Objective(only(**{name: kind(weight=2.0)})).terms(embeddings(), learned(), IDS, ONE_PROCESS, {})
    ((weight, value),) = found.values()
    assert list(found) == [name] and weight == 2.0
    torch.testing.assert_close(value, getattr(losses, name)(embeddings(), MEAN_SCALE), rtol=1e-5, atol=1e-6)


def test_mixtures_are_drawn_anew_for_each_step_and_follow_from_the_seed():
    objective = Objective(named("mixup", rows=1.0))
    torch.manual_seed(0)
    first, second = values(objective), values(objective)
    torch.manual_seed(0)
    again = values(objective)
    assert first != second and first == again
    none = values(Objective(named("mixup", rows=0.0)))
    torch.testing.assert_close(none["mixup_image_text"], losses.info_nce(X, Y, S))


def test_terms_add_up_with_their_weights():
    config = ObjectiveConfig(
        info_nce=InfoNCEConfig(weights=WEIGHTS), dcl=replace(ObjectiveConfig().dcl, weights={"audio_text": 0.25})
    )
    found = Objective(config).terms(embeddings(), learned(), IDS, ONE_PROCESS, {})
    assert {name: weight for name, (weight, _) in found.items()} == {
        "info_nce_image_text": 1.0,
        "info_nce_audio_text": 0.7,
        "info_nce_image_audio": 0.4,
        "dcl_audio_text": 0.25,
    }


def test_hard_negatives_go_to_the_pair_whose_second_side_they_are_made_of():
    wrong = HardNegatives(values=unit(3, 6, 9).float(), rows=torch.tensor([0, 0, 5]), seen_by="own")
    for name, loss in (("info_nce", losses.info_nce), ("dcl", losses.dcl), ("hn_nce", losses.hn_nce)):
        found = values(Objective(named(name, weights=WEIGHTS)), negatives={"text": wrong})
        torch.testing.assert_close(found[f"{name}_image_text"], loss(X, Y, S, negatives=wrong), rtol=1e-6, atol=1e-9)
        plain = values(Objective(named(name, weights=WEIGHTS)))
        assert found[f"{name}_image_audio"] == plain[f"{name}_image_audio"]
        assert found[f"{name}_audio_text"] != plain[f"{name}_audio_text"]
    with pytest.raises(ConfigError, match="isogclr does not take hard negatives"):
        values(Objective(named("global_contrast", method="isogclr")), negatives={"text": wrong})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: named("info_nce", smoothing=1.5), "smoothing=1.5"),
        (lambda: named("info_nce", smoothing=0.1, soft_targets=True), "soft targets"),
        (
            lambda: ObjectiveConfig(info_nce=InfoNCEConfig(soft_targets=True), false_negatives=["caption"]),
            "soft targets.*false negatives",
        ),
        (lambda: named("dcl", sigma=-1.0), "sigma=-1"),
        (lambda: named("hn_nce", alpha=3.0), "alpha=3"),
        (lambda: named("hn_nce", beta=-0.5), "beta=-0.5"),
        (lambda: named("mixup", alpha=0.0), "alpha=0"),
        (lambda: named("mixup", rows=1.5), "rows=1.5"),
        (lambda: named("global_contrast", method="fastclip"), "expected one of .*isogclr"),
        (lambda: named("global_contrast", method="sogclr", gamma_steps=9), r"stays in SogCLR \(fastclip_v1\)"),
        (lambda: named("global_contrast", method="fastclip_v3"), "needs gamma_steps"),
        (lambda: named("global_contrast", method="sogclr", gamma=0.0), "0 < gamma <= 1"),
        (lambda: named("global_contrast", method="isogclr", tau_range=(0.5, 0.1)), "tau_range"),
        (lambda: named("sigmoid", weights={"text_image": 1.0}), "text_image"),
        (lambda: only(mv_dhel=replace(ObjectiveConfig().mv_dhel, weight=-1.0)), r"mv_dhel.*-1\.0"),
        (only, "no term has a positive weight"),
        (
            lambda: ObjectiveConfig(mixup=MixupConfig(weights=IMAGE_TEXT), false_negatives=["caption"]),
            "no meaning for .*mixup",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_sigmoid_loss_without_biases_is_refused_with_the_field_to_set():
    without = replace(learned(), biases={})
    with pytest.raises(ConfigError, match=r"set model\.init_bias"):
        Objective(named("sigmoid")).terms(embeddings(), without, IDS, ONE_PROCESS, {})


# --- what is kept ---------------------------------------------------------------------------------------------------


def of_method(method: Method, weights: Any = IMAGE_TEXT, **fields: Any) -> ObjectiveConfig:
    steps = {"gamma_steps": 3} if method.startswith("fastclip") else {}
    return only(global_contrast=GlobalContrastConfig(method=method, weights=weights, **steps, **fields))


def after_steps(method: Method, splits: tuple[int, ...], shard: Shard) -> tuple[dict, dict]:
    """State and losses, averaged over ranks, of three steps."""
    objective, found = Objective(of_method(method, weights=WEIGHTS)), {}
    for step in range(3):
        for name, value in values(objective, shard, seed=step, rows=own_rows(splits, shard.rank)).items():
            found[f"{name} {step}"] = shard.sum(value) / shard.world
    return objective.state(), found


@pytest.mark.parametrize("method", get_args(Method))
def test_what_is_kept_is_the_same_on_every_rank_and_for_any_number_of_them(method):
    expected, losses_of_one = after_steps(method, (N,), ONE_PROCESS)
    assert len(expected) == 4
    for splits in ((5, 3), (8, 0), (2, 0, 5, 1)):
        for state, found in pool(len(splits)).run(after_steps, method, splits):
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=2e-5, equal_nan=True)
            for name, value in losses_of_one.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_estimates_are_kept_by_the_number_of_the_sample():
    objective = Objective(of_method("sogclr"))
    values(objective)
    table = objective.state()["global_contrast_image_text"]
    known = (table > -math.inf).all(1).nonzero().flatten()
    assert known.tolist() == IDS[:, 0].tolist()


@pytest.mark.parametrize("method", ["isogclr", "fastclip_v2"])
def test_temperatures_of_samples_start_at_the_models_and_go_down_their_gradient(method):
    objective = Objective(of_method(method, tau_lr=0.001, rho=50.0))  # a large rho wants small temperatures
    before = 1 / 14.0
    seen = []
    for step in range(3):
        values(objective, seed=step)
        table = objective.state()["global_contrast_image_text"][IDS[:, 0]]
        seen.append(table[:, 2:4])
        assert (table[:, 8] == step + 1).all()
    assert (seen[0] < before).all() and (seen[1] < seen[0]).all() and (seen[2] < seen[1]).all()
    # iSogCLR moves by 0.9 of a clipped gradient, Adam by one rate
    step = 0.001 * (0.9 * 5 if method == "isogclr" else 1.0)
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], before - step), rtol=0, atol=1e-6)
    kept = Objective(of_method(method, tau_lr=10.0, rho=50.0, tau_range=(0.05, 0.06)))
    values(kept)
    assert (kept.state()["global_contrast_image_text"][IDS[:, 0], 2:4] == 0.05).all()


def test_gamma_falls_along_a_cosine_and_then_stays():
    term = GlobalContrastConfig(method="fastclip_v1", gamma=0.2, gamma_steps=4)
    assert [round(term.gamma_at(step), 6) for step in range(7)] == [1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2, 0.2]
    assert GlobalContrastConfig(method="sogclr", gamma=0.8).gamma_at(0) == 0.8


def test_a_state_comes_back_and_that_of_another_objective_does_not():
    first = Objective(of_method("fastclip_v2"))
    for step in range(2):
        values(first, seed=step)
    second = Objective(of_method("fastclip_v2"))
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert values(first, seed=5) == values(second, seed=5)
    for other in (ObjectiveConfig(), of_method("fastclip_v2", weights={"audio_text": 1.0})):
        with pytest.raises(CheckpointError, match="resume with the objective that was saved"):
            Objective(other).load(first.state())
    with pytest.raises(CheckpointError, match="2 numbers"):
        Objective(of_method("sogclr")).load(first.state())
    with pytest.raises(CheckpointError, match=r"keeps \['global"):
        Objective(of_method("sogclr")).load({})


def run(folder, checkpoints: MemoryCheckpoints, method: Method, stop: int, steps: int = 6) -> list[dict]:
    """A run with an objective that keeps something, until `stop`."""
    lines: list[dict] = []

    class Lines(MetricsFile):
        def write(self, step, values):
            lines.append({"step": step, "loss": values["loss"], "grad_norm": values["grad_norm"]})

    seen = iter(range(1, 100))
    train(
        TrainConfig(steps=steps, batch_size=12, log_every=1, save_every=1),
        OPTIM,
        PlainEngine(tiny_model(), OPTIM, CPU, ONE_PROCESS),
        FakeStream(tiny_config()),
        objective=Objective(of_method(method, weights=WEIGHTS)),
        checkpoints=checkpoints,
        metrics=Lines(folder / "metrics.jsonl"),
        should_stop=lambda: next(seen) >= stop,
    )
    return lines


@pytest.mark.parametrize("method", ["fastclip_v3", "isogclr"])
def test_a_run_that_was_stopped_and_resumed_is_bitwise_the_run_never_stopped(tmp_path, method):
    whole = MemoryCheckpoints()
    expected = run(tmp_path, whole, method, stop=99)
    parts = MemoryCheckpoints()
    found = run(tmp_path, parts, method, stop=2) + run(tmp_path, parts, method, stop=99)
    assert found == expected and len(found) == 6
    first, second = whole.saved[-1].state, parts.saved[-1].state
    assert any(name.startswith("objective/global_contrast") for name in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor.nan_to_num(), second[name].nan_to_num()) for name, tensor in first.items())


def test_every_term_has_a_name_a_default_that_is_off_and_a_docstring():
    terms = dict(ObjectiveConfig().terms())
    assert len(terms) == 10
    assert [name for name, *_ in ObjectiveConfig().active()] == ["info_nce"] * 3
    assert all(type(term).__doc__ for term in terms.values())
    assert all(isinstance(term, PairTerm) or term.weight == 0 for term in terms.values())
