"""Every engine is the plain one: the same losses, norms, scales and states, on one rank and on two."""

from typing import Any

import pytest
import torch
from rank_cases import bf16_runs, clamp_runs, engine_runs, whole_engine_suite
from safetensors.torch import load_file

from mmcl.dist import ONE_PROCESS
from mmcl.engine import PlainEngine, check_names
from mmcl.engine.with_deepspeed import check_settings
from mmcl.errors import CheckpointError, ConfigError
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.testing import fake_batch, run_ranks, tiny_config, tiny_model
from mmcl.train import train_step
from mmcl.types import MODALITIES, PAIRS

ZERO = ["zero0", "zero1", "zero2", "zero3"]
OTHERS = ["accelerate", *ZERO]
KINDS = ["plain", *OTHERS]
each_other = pytest.mark.parametrize("kind", OTHERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    """The plain engine in this process."""
    folder = tmp_path_factory.mktemp("one")
    return {
        "runs": engine_runs(ONE_PROCESS, ["plain"], folder),
        "state": load_file(folder / "plain.safetensors"),
        "clamp": clamp_runs(ONE_PROCESS, ["plain"]),
        "bf16": bf16_runs(ONE_PROCESS, ["plain"]),
    }


@pytest.fixture(scope="module")
def two(folder) -> dict[str, Any]:
    """Every engine on two ranks."""
    first, second = run_ranks(2, whole_engine_suite, KINDS, folder)
    assert first == second, "means over ranks are the same on all"
    return first


def assert_same_steps(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False), 1):
        assert ours == pytest.approx(theirs, rel=rel), f"step {number}"


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == tensor.shape, name
        # elements of tiny gradients move by their rounding; updates so far are up to 1e-2
        allowed = 1e-4 * tensor.abs().max().item() if name.startswith("exp_avg") else 3e-5
        assert (found[name] - tensor).abs().max() <= max(allowed, 1e-12), name


def test_two_ranks_take_the_steps_of_one_process(one, two, folder):
    assert_same_steps(two["runs"]["plain"], one["runs"]["plain"])
    assert_same_state(load_file(folder / "plain.safetensors"), one["state"])


def test_the_ten_steps_are_steps(one):
    losses = [values["loss"] for values in one["runs"]["plain"]]
    assert losses == sorted(losses, reverse=True) or len(set(losses)) == 10
    assert all(values["grad_norm"] > 1 for values in one["runs"]["plain"]), "the norm is clipped, and told before that"
    assert all(f"scale_{pair}" in values for values in one["runs"]["plain"] for pair in PAIRS)


@each_other
def test_ten_steps_have_the_losses_norms_and_scales_of_the_plain_engine(two, kind):
    assert_same_steps(two["runs"][kind], two["runs"]["plain"])


@each_other
def test_the_saved_state_is_that_of_the_plain_engine(two, folder, kind):
    assert_same_state(load_file(folder / f"{kind}.safetensors"), load_file(folder / "plain.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_zero_1_saved_after_three_steps_every_engine_continues(two, folder, kind):
    assert_same_steps(two["runs"][f"{kind} resumed"], two["runs"]["zero1"][3:6])
    assert_same_state(
        load_file(folder / f"{kind}-resumed.safetensors"), load_file(folder / "plain-resumed.safetensors")
    )


def test_a_logit_scale_stops_at_100_and_at_1_and_comes_back_at_once(one):
    scales = one["clamp"]["plain"]
    assert scales[0] == pytest.approx(99.9, rel=1e-5)
    assert scales[1:5] == pytest.approx([100.0] * 4, rel=1e-5)
    assert max(scales) <= 100 * (1 + 1e-6)
    assert scales[15] < 90, "and it comes back from 100, not from where the optimizer would have taken it"
    assert scales[16:] == pytest.approx([1.0] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_engines_clamp_alike(one, two, kind):
    assert two["clamp"][kind] == pytest.approx(one["clamp"]["plain"], rel=1e-5)


@each_other
def test_ranks_that_lack_a_modality_do_not_hang_and_agree(two, kind):
    assert_same_steps(two["lacking"][kind], two["lacking"]["plain"])


def test_ranks_that_lack_a_modality_equal_one_process(two):
    def joined(masks: dict[str, list[bool]], seed: int) -> dict[str, float]:
        values = train_step(engine, fake_batch(tiny_config(), masks, seed), OBJECTIVE, 1e-3)
        return ONE_PROCESS.mean(values)

    from rank_cases import OBJECTIVE, OPTIM

    engine = PlainEngine(tiny_model(), OPTIM, torch.device("cpu"), ONE_PROCESS)
    lacking = [("audio", range(4)), ("image", range(4, 8)), ("text", range(8))]
    expected = [
        joined({m: [not (m == name and row in rows) for row in range(8)] for m in MODALITIES}, seed)
        for seed, (name, rows) in enumerate(lacking)
    ]
    assert_same_steps(two["lacking"]["plain"], expected)
    assert (
        expected[2]["loss_info_nce_image_text"]
        == expected[2]["loss_info_nce_audio_text"]
        == 0
        < expected[2]["loss_info_nce_image_audio"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_runs_and_is_close_to_fp32(one, two, kind):
    for low, exact in zip(two["bf16"][kind], one["runs"]["plain"], strict=False):
        assert low["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert two["bf16"][kind][0]["loss"] != pytest.approx(one["runs"]["plain"][0]["loss"], rel=1e-6)


def test_deepspeed_compiles_nothing(two):
    assert two["compiled"] == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_batch_size": 8}, "train_batch_size.*train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"gradient_accumulation_steps": 2}, "GradCache"),
        ({"fp16": {"enabled": True}}, "train.precision"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
    ],
)
def test_deepspeed_settings_that_a_run_has_itself_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        check_settings(settings)


def test_other_deepspeed_settings_are_the_users():
    check_settings({})
    check_settings({"zero_optimization": {"stage": 2, "overlap_comm": False}, "fp16": {"enabled": False}})


def plain(seed: int = 0, **optim: Any) -> PlainEngine:
    return PlainEngine(tiny_model(seed), OptimConfig(**optim), torch.device("cpu"), ONE_PROCESS)


def test_a_state_goes_through_an_engine_unchanged():
    first, second = plain(), plain(seed=1)
    batch = fake_batch(tiny_config(), {name: [True] * 4 for name in MODALITIES})
    for _ in range(2):
        train_step(first, batch, Objective(ObjectiveConfig()), 1e-3)
    saved = first.state(2)
    second.load(saved, 2)
    again = second.state(2)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert any(tensor.any() for name, tensor in saved.items() if name.startswith("exp_avg_sq/"))
    train_step(first, batch, Objective(ObjectiveConfig()), 1e-3)
    assert all(torch.equal(saved[name], again[name]) for name in saved), "a state is a copy"


def test_the_norm_is_clipped_only_where_that_is_asked_for():
    batch = fake_batch(tiny_config(), {name: [True] * 4 for name in MODALITIES})
    norms, moments = [], []
    for clip_norm in (0.5, 0.0):
        engine = plain(clip_norm=clip_norm, beta1=0.5)
        norms.append(train_step(engine, batch, Objective(ObjectiveConfig()), 0.0)["grad_norm"].item())
        state = engine.state(1)
        moments.append(2 * sum(t.square().sum() for name, t in state.items() if name.startswith("exp_avg/")).sqrt())
    assert norms[0] == norms[1] > 0.5
    assert moments[0].item() == pytest.approx(0.5, rel=1e-4)
    assert moments[1].item() == pytest.approx(norms[1], rel=1e-4)


def test_the_state_of_another_model_is_refused_naming_the_tensor():
    state = plain().state(0)
    narrow = tiny_model()
    check_names(state, narrow)
    with pytest.raises(
        CheckpointError, match=r"1 tensors differ, first model/extra: expected shape None, found \(1,\)"
    ):
        check_names(state | {"model/extra": torch.zeros(1)}, narrow)
    name = "exp_avg/towers.audio.head.1.weight"
    with pytest.raises(CheckpointError, match=rf"first {name}: expected shape \(16, 32\), found None"):
        plain().load({k: v for k, v in state.items() if k != name}, 0)
    with pytest.raises(CheckpointError, match=rf"first {name}: expected shape \(16, 32\), found \(2, 2\)"):
        plain().load(state | {name: torch.zeros(2, 2)}, 0)
