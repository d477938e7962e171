"""StableAdamW is its formula, tensor by tensor wherever an engine keeps the pieces; rates go by tower and by depth."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import ADAMW, MIDDLE, PUSHES, STABLE, adamw_runs, pull, stable_runs, watched, whole_optim_suite
from rank_cases import CPU
from safetensors.torch import load_file
from test_engines import KINDS, OTHERS, assert_same_state, assert_same_steps
from torch import nn

from mmcl.dist import ONE_PROCESS
from mmcl.engine import MOMENTS, PlainEngine
from mmcl.engine.watch import PARTS, Watch
from mmcl.engine.with_deepspeed import check_settings
from mmcl.errors import ConfigError
from mmcl.layout import Held, Layout, whole_tensors
from mmcl.model import ModelConfig, clip_config
from mmcl.optim import OptimConfig, depths_of, lr_scales, make_optimizer, param_groups
from mmcl.stable_adamw import StableAdamW
from mmcl.testing import FakeStream, run_ranks, tiny_config, tiny_model
from mmcl.towers import ImageTower, TextTower

LR, BETAS, EPS = 0.01, (0.9, 0.8), 1e-6


def stable(tensors: dict[str, np.ndarray], decay: float = 0.0) -> tuple[nn.ParameterDict, StableAdamW]:
    """Tensors under StableAdamW in double precision, so that a formula can be compared digit by digit."""
    model = nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in tensors.items()})
    groups = [{"params": list(model.parameters()), "weight_decay": decay}]
    return model, StableAdamW(groups, whole_tensors(model), lr=LR, betas=BETAS, eps=EPS)


def step(model: nn.ParameterDict, optimizer: torch.optim.Optimizer, gradients: dict[str, Any]) -> None:
    for name, parameter in model.items():
        parameter.grad = torch.as_tensor(gradients[name]).to(parameter.dtype)
    optimizer.step()


def reference(weights: np.ndarray, gradients: list[np.ndarray], decay: float) -> tuple[np.ndarray, list[float]]:
    """One tensor as the authors' paper has it, with debiased betas: weights after the steps, and the RMS of each."""
    theta, v, u, seen = weights.copy(), np.zeros_like(weights), np.zeros_like(weights), []
    for t, g in enumerate(gradients, 1):
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETAS)
        v = beta1 * v + (1 - beta1) * g
        u = beta2 * u + (1 - beta2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(u, EPS**2)))
        lr = LR / max(1.0, rms / 1.0)
        theta = (1 - LR * decay) * theta - lr * v / (np.sqrt(u) + EPS)
        seen.append(float(rms))
    return theta, seen


def test_stable_adamw_is_its_formula_in_every_digit():
    generator = np.random.default_rng(0)
    tensors = {"a": generator.normal(size=(3, 4)), "b": generator.normal(size=5), "c": generator.normal(size=(1,))}
    pushes = {"a": (1, 1, 8, 1, 0.1), "b": (1, 0.5, 0.2, 0.1, 0.05), "c": (1, 0, 1, 5, 1e-9)}
    gradients = [
        {name: generator.normal(size=value.shape) * pushes[name][t] for name, value in tensors.items()}
        for t in range(5)
    ]
    model, optimizer = stable(tensors, decay=0.3)
    rms = []
    for now in gradients:
        step(model, optimizer, now)
        rms.append({name: value.item() for name, value in optimizer.rms.items()})
    for name, value in tensors.items():
        expected, expected_rms = reference(value, [now[name] for now in gradients], 0.3)
        np.testing.assert_allclose(model[name].detach().numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose([now[name] for now in rms], expected_rms, rtol=1e-9)
    assert rms[2]["a"] > 1.4 and rms[3]["c"] > 1.5, "held back"
    assert all(now["b"] < 1 + 1e-9 for now in rms) and rms[4]["a"] < 0.5, "and not"


@settings(max_examples=30, deadline=None)
@given(size=st.floats(1e-3, 1e6), number=st.integers(1, 6), sign=st.sampled_from([-1.0, 1.0]))
def test_a_constant_gradient_has_an_update_of_rms_1(size, number, sign):
    model, optimizer = stable({"a": np.zeros((4, 3))})
    for _ in range(number):
        step(model, optimizer, {"a": np.full((4, 3), sign * size)})
        assert optimizer.rms["a"].item() == pytest.approx(1.0, rel=1e-9)
    assert model["a"].detach().numpy() == pytest.approx(-sign * LR * number, rel=1e-2), "a step is as long as its rate"


def test_where_nothing_is_held_back_it_is_adamw_and_goes_on_from_its_state():
    """Of falling gradients no update is too large."""
    generator = np.random.default_rng(1)
    start = {"a": generator.normal(size=(6, 5)), "b": generator.normal(size=7)}
    signs = [{name: np.sign(generator.normal(size=value.shape)) for name, value in start.items()} for _ in range(6)]
    ours, optimizer = stable(start, decay=0.1)
    torchs, _ = stable(start)
    adamw = torch.optim.AdamW(torchs.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
    for t in range(3):
        for model, each in ((ours, optimizer), (torchs, adamw)):
            step(model, each, {name: sign * 0.8**t for name, sign in signs[t].items()})
        assert all(rms <= 1 + 1e-9 for rms in optimizer.rms.values())
    swapped, taking_over = stable({name: value.detach().numpy() for name, value in torchs.items()}, decay=0.1)
    for name, parameter in swapped.items():
        taking_over.state[parameter] = adamw.state[torchs[name]]
    for t in range(3, 6):
        for model, each in ((ours, optimizer), (swapped, taking_over)):
            step(model, each, {name: sign * 0.8**t for name, sign in signs[t].items()})
    for name in start:
        torch.testing.assert_close(ours[name], swapped[name], rtol=1e-12, atol=1e-12)
    assert set(optimizer.state[ours["a"]]) == {"step", *MOMENTS}


def test_no_gradient_and_a_zero_gradient_change_nothing_but_by_decay():
    model, optimizer = stable({"a": np.ones(3), "b": np.ones(2)}, decay=0.5)
    model["a"].grad = torch.zeros(3, dtype=torch.float64)
    optimizer.step()
    assert model["a"].tolist() == pytest.approx([1 - LR * 0.5] * 3) and model["b"].tolist() == [1.0, 1.0]
    assert optimizer.rms["a"].item() == 0 and "b" not in optimizer.rms


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tensors_in_one_flat_buffer_are_updated_as_if_they_were_apart(data):
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    apart, each = stable({f"t{i}": generator.normal(size=size) for i, size in enumerate(sizes)}, decay=0.1)
    starts = [sum(sizes[:i]) + sum(gaps[: i + 1]) for i in range(len(sizes))]

    def joined(values: list[np.ndarray]) -> torch.Tensor:
        whole = torch.zeros(sum(sizes) + sum(gaps) + 2, dtype=torch.float64)
        for start, value in zip(starts, values, strict=True):
            whole[start : start + len(value)] = torch.as_tensor(value)
        return whole

    flat = nn.Parameter(joined([value.detach().numpy() for value in apart.values()]))
    names = list(apart)
    held = Held(dict(zip(names, sizes, strict=True)), list(zip(names, starts, sizes, strict=True)))
    together = StableAdamW([{"params": [flat], "weight_decay": 0.1}], Layout({flat: held}), lr=LR, betas=BETAS, eps=EPS)
    for _ in range(4):
        gradients = {
            name: generator.normal(size=size) * 10.0 ** generator.integers(-2, 3) for name, size in held.sizes.items()
        }
        step(apart, each, gradients)
        flat.grad = joined(list(gradients.values()))
        together.step()
        assert {name: value.item() for name, value in together.rms.items()} == pytest.approx(
            {name: value.item() for name, value in each.rms.items()}, rel=1e-12
        )
    torch.testing.assert_close(flat.data, joined([value.detach().numpy() for value in apart.values()]))


def test_a_rank_that_holds_only_padding_takes_its_step():
    flat = nn.Parameter(torch.zeros(4))
    optimizer = StableAdamW([{"params": [flat]}], Layout({flat: Held({"a": 3}, [])}), lr=LR, betas=BETAS, eps=EPS)
    flat.grad = torch.zeros(4)
    optimizer.step()
    assert flat.tolist() == [0.0] * 4 and optimizer.rms["a"].item() == 0


# rates


RATES = OptimConfig(layer_decay=0.5, tower_rates={"text": 3.0, "audio": 0.1}, weight_decay=0.2)
TINY = {
    r"towers\.image\.visual\.(proj|ln_post\..*)": 1.0,
    r"towers\.image\.visual\.transformer\.resblocks\.0\..*": 0.5,
    r"towers\.image\.visual\.(class_embedding|positional_embedding|conv1\.weight|ln_pre\..*)": 0.25,
    r"towers\.text\.text\.(text_projection|ln_final\..*)": 3.0,
    r"towers\.text\.text\.transformer\.resblocks\.0\..*": 1.5,
    r"towers\.text\.text\.(token_embedding\.weight|positional_embedding)": 0.75,
    r"towers\.audio\.(head\..*|vit\.norm\..*)": 0.1,
    r"towers\.audio\.vit\.blocks\.0\..*": 0.05,
    r"towers\.audio\.vit\.(cls_token|dist_token|pos_embed|patch_embed\..*)": 0.025,
    r"log_scales\..*": 1.0,
}
VIT = r"visual\.transformer\.resblocks\.{}\..*"


def rates_of(table: dict[str, Any], names: Any) -> dict[str, Any]:
    """What a table says of each name; every name must match exactly one line, and every line some name."""
    found = {name: [value for pattern, value in table.items() if re.fullmatch(pattern, name)] for name in names}
    assert all(len(values) == 1 for values in found.values()), found
    assert all(any(re.fullmatch(pattern, name) for name in found) for pattern in table)
    return {name: values[0] for name, values in found.items()}


def test_the_rates_of_the_tiny_model_are_these():
    model = tiny_model()
    expected = rates_of(TINY, dict(model.named_parameters()))
    assert lr_scales(model, RATES) == pytest.approx(expected)
    groups = param_groups(model, RATES)
    grouped = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert grouped == pytest.approx(expected) and sum(len(group["params"]) for group in groups) == len(expected)
    kinds = [(group["weight_decay"], group["lr_scale"]) for group in groups]
    assert len(set(kinds)) == len(kinds) and kinds == sorted(kinds, reverse=True)
    assert all(group["params"] for group in groups)


def test_without_rates_there_are_two_groups_as_ever():
    groups = param_groups(tiny_model(), OptimConfig())
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.2, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("clip", "tower", "table"),
    [
        (
            "ViT-B-32",
            "image",
            {r"visual\.(proj|ln_post\..*)": 0, VIT.format("11"): 1, VIT.format("5"): 7, VIT.format("0"): 12}
            | {r"visual\.(class_embedding|positional_embedding|conv1\.weight|ln_pre\..*)": 13},
        ),
        (
            "ViT-B-32",
            "text",
            {r"text\.(text_projection|ln_final\..*)": 0, VIT.replace("visual", "text").format("11"): 1}
            | {VIT.replace("visual", "text").format("0"): 12}
            | {r"text\.(token_embedding\.weight|positional_embedding)": 13},
        ),
        (  # timm, one stack of blocks
            "EVA02-B-16",
            "image",
            {r"visual\.trunk\.(head|norm)\..*": 0, r"visual\.trunk\.blocks\.11\..*": 1}
            | {r"visual\.trunk\.blocks\.0\..*": 12, r"visual\.trunk\.(cls_token|pos_embed|patch_embed\..*)": 13},
        ),
        (  # timm, stages of blocks
            "convnext_base",
            "image",
            {r"visual\.(head|trunk\.head)\..*": 0, r"visual\.trunk\.stages\.3\.blocks\.2\..*": 1}
            | {r"visual\.trunk\.stages\.3\.(blocks\.0|downsample)\..*": 3}
            | {r"visual\.trunk\.stages\.2\.blocks\.26\..*": 4, r"visual\.trunk\.stages\.0\.blocks\.0\..*": 36}
            | {r"visual\.trunk\.stem\..*": 37},
        ),
        (
            "RN50",
            "image",
            {r"visual\.attnpool\..*": 0, r"visual\.layer4\.2\..*": 1, r"visual\.layer1\.0\..*": 16}
            | {r"visual\.(conv|bn)\d\..*": 17},
        ),
    ],
)
def test_the_depths_of_open_clips_towers_are_these(clip, tower, table):
    fields = {name: value for name, value in clip_config(ModelConfig(clip=clip)).items() if name != "custom_text"}
    with torch.device("meta"):
        whole = open_clip.CustomTextCLIP(**fields)
        towers = {"image": ImageTower(whole.visual, (0.0,) * 3, (1.0,) * 3), "text": TextTower(whole.text)}
    depths = depths_of(towers[tower])
    assert depths.keys() == {name for name, _ in towers[tower].named_parameters()}
    told = [name for name in depths if any(re.fullmatch(pattern, name) for pattern in table)]
    assert {name: depths[name] for name in told} == rates_of(table, told)
    middle = {depth for name, depth in depths.items() if name not in told}
    assert middle.isdisjoint({0, max(depths.values())}), "the ends are in the table"
    assert set(depths.values()) == set(range(max(depths.values()) + 1)), "no layer is left out"


def test_a_tower_without_blocks_has_one_rate_only():
    model = nn.Module()
    towers = {name: nn.Sequential(nn.Linear(2, 2)) for name in ("image", "text", "audio")}
    model.towers = nn.ModuleDict(towers)
    assert set(lr_scales(model, OptimConfig(tower_rates={"text": 2.0})).values()) == {1.0, 2.0}
    with pytest.raises(ConfigError, match=r"expected numbered blocks in the Sequential, found none.*layer_decay=1"):
        lr_scales(model, OptimConfig(layer_decay=0.9))


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_the_first_update_of_each_parameter_is_as_long_as_its_rate(name):
    """Of Adam in its first step every element moves by its rate, whatever its gradient."""
    optim = OptimConfig(
        name=name, layer_decay=0.5, tower_rates={"text": 3.0}, weight_decay=0.0, clip_norm=0.0, eps=1e-12
    )
    model = tiny_model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    engine = PlainEngine(model, optim, CPU, ONE_PROCESS)
    pull(engine, FakeStream(tiny_config()), 0, 1.0)
    engine.step(1e-3)
    moved = {key: (p - before[key]).abs().max().item() for key, p in model.named_parameters()}
    expected = {key: 1e-3 * scale for key, scale in lr_scales(model, optim).items()}
    assert moved == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "sgd"}, r"optim.name='sgd': expected one of \['adamw', 'stable_adamw'\]"),
        ({"layer_decay": 0.0}, "optim.layer_decay=0.0: expected a number above 0 and up to 1, which is off"),
        ({"layer_decay": 1.5}, "optim.layer_decay=1.5"),
        ({"tower_rates": {"video": 1.0}}, "optim.tower_rates: no tower 'video', expected some of .*'image'"),
        ({"tower_rates": {"text": 0.0}}, "optim.tower_rates.text=0.0 must be positive.*frozen"),
        ({"tower_rates": {"text": -1.0}}, "must be positive"),
        ({"tower_rates": {"text": math.nan}}, "must be positive"),
    ],
)
def test_rates_that_cannot_be_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        OptimConfig(**fields)


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio=0.5: expected 1"),
        ({"round_robin_gradients": True}, "round_robin_gradients=true: expected false"),
    ],
)
def test_deepspeed_settings_under_which_an_update_would_be_another_are_refused(zero, says):
    with pytest.raises(ConfigError, match=says):
        check_settings({"zero_optimization": {"stage": 2} | zero})
    check_settings({"zero_optimization": {"offload_optimizer": {"ratio": 1.0}, "round_robin_gradients": False}})


# engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optim")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    """The plain engine in this process."""
    folder = tmp_path_factory.mktemp("one")
    runs = stable_runs(ONE_PROCESS, ["plain"], folder)
    return {
        "stable": runs,
        "adamw": adamw_runs(ONE_PROCESS, ["plain"]),
        "state": load_file(folder / "plain.safetensors"),
    }


@pytest.fixture(scope="module")
def two(folder) -> dict[str, Any]:
    """Every engine on two ranks."""
    first, second = run_ranks(2, whole_optim_suite, KINDS, folder)
    assert first == second, "monitors are the same on all ranks"
    return first


def test_the_runs_do_hold_tensors_back(one):
    surges = [values for values, push in zip(one["stable"]["plain"], PUSHES, strict=True) if push > 1e-2]
    assert len(surges) == 2 and all(values[f"update_rms_{part}"] > 1.2 for values in surges for part in PARTS)
    groups = param_groups(tiny_model(), STABLE)
    assert len(groups) > 10 and any(
        {name.split(".")[0] for name, _ in group["params"]} == {"log_scales"} for group in groups
    ), "a group smaller than what ranks share out"


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_on_two_ranks_is_the_plain_one_under_stable_adamw(one, two, folder, kind):
    assert_same_steps(two["stable"][kind], one["stable"]["plain"])
    assert_same_state(load_file(folder / f"{kind}.safetensors"), one["state"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_goes_on_where_another_stopped(two, folder, kind):
    assert_same_steps(two["stable"][f"{kind} resumed"], two["stable"]["plain"][MIDDLE:])
    assert_same_state(load_file(folder / f"{kind}-resumed.safetensors"), load_file(folder / "plain.safetensors"))


def test_scales_are_clamped_under_stable_adamw_too(one, folder):
    for state in (one["state"], load_file(folder / "zero2.safetensors"), load_file(folder / "zero3.safetensors")):
        scales = torch.cat([value for name, value in state.items() if name.startswith("model/log_scales")]).exp()
        assert scales.tolist() == pytest.approx([100.0] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_gradient_norms_by_tower_are_the_same_under_adamw(one, two, kind):
    assert_same_steps(two["adamw"][kind], one["adamw"]["plain"])


def test_the_norms_of_the_towers_are_together_that_of_all_before_clipping(one):
    for values in one["adamw"]["plain"]:
        norms = [values[f"grad_norm_{part}"] for part in PARTS]
        assert all(norm > 0 for norm in norms) and math.hypot(*norms) == pytest.approx(values["norm"], rel=1e-5)
        assert values["norm"] > ADAMW.clip_norm


def test_adamw_shows_the_updates_that_stable_adamw_would_hold_back():
    """In steps in which it would not, the two are one optimizer, and so are their second moments."""
    seen = []
    for config in (STABLE, replace(STABLE, name="adamw")):
        engine = PlainEngine(tiny_model(), config, CPU, ONE_PROCESS)
        seen.append(watched(engine, FakeStream(tiny_config()), 0, 3))  # the third is the first large one
    for stable, plain in zip(*seen, strict=True):
        names = [f"update_rms_{part}" for part in PARTS]
        assert [plain[name] for name in names] == pytest.approx([stable[name] for name in names], rel=0.02)
    assert all(seen[1][2][f"update_rms_{part}"] > 1.2 for part in PARTS)


def test_gradient_norms_and_updates_of_towers_are_those_of_their_tensors():
    model = tiny_model()
    engine = PlainEngine(model, STABLE, CPU, ONE_PROCESS)
    pull(engine, FakeStream(tiny_config()), 0, 1.0)
    squares = dict.fromkeys(PARTS, 0.0)
    for name, p in model.named_parameters():
        squares[name.split(".")[1] if name.startswith("towers") else "scales"] += p.grad.double().square().sum().item()
    engine.step(1e-3, watch=True)
    found = {name: value.item() for name, value in engine.monitors().items()}
    expected = {f"grad_norm_{part}": square**0.5 for part, square in squares.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert [found[f"update_rms_{part}"] for part in PARTS] == pytest.approx([1.0] * 4, rel=1e-5), "as in any first step"


def test_a_step_that_is_not_watched_shows_nothing(two):
    assert all(two["adamw"][f"{kind} unwatched"] == {} for kind in KINDS)


def test_a_step_that_an_engine_left_out_shows_nan():
    """DeepSpeed does not step where a gradient is not finite."""
    optimizer = make_optimizer(model := tiny_model(), STABLE)
    watch = Watch(optimizer, whole_tensors(model))
    watch.begin(True)
    watch.end(torch.tensor(math.inf))
    assert len(watch.seen) == 2 * len(PARTS) and all(value.isnan() for value in watch.seen.values())
