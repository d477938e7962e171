"""The loop: resuming is not noticeable, divergence is named and not saved, and all ranks stop together."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from rank_cases import (
    CPU,
    OPTIM,
    PoisonedStream,
    skip_on_rank_1,
    stand_elsewhere_on_rank_1,
    stop_on_rank_1,
    with_and_without_compiling,
)

from mmcl.checkpoint import DirectoryCheckpoints
from mmcl.dist import ONE_PROCESS
from mmcl.engine import PlainEngine
from mmcl.errors import CheckpointError, ConfigError, NonFiniteLoss
from mmcl.losses import HardNegatives, Positives
from mmcl.metrics import MetricsFile
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.optim import OptimConfig, learning_rate, make_optimizer
from mmcl.terms import InfoNCEConfig, ModularConfig
from mmcl.testing import FakeStream, MemoryCheckpoints, run_ranks, tiny_config, tiny_model
from mmcl.train import TrainConfig, due, split_of, train, train_step
from mmcl.types import OWN, PAIRS, RIGHT, WRONG, Embeddings, Learned, Score

TERMS = {"info_nce": InfoNCEConfig, "modular": ModularConfig}
WEIGHTS = {"image_text": 1.0, "audio_text": 0.5}
TIMES = {"step_seconds", "data_wait", "samples_per_second"}


def lines(path) -> list[dict]:
    """Strict JSON, one object a line."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without_times(path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(path)]


class Counted:
    """Asks to stop after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def run(
    folder,
    config: TrainConfig,
    *,
    seed: int = 0,
    stream=None,
    optim: OptimConfig = OPTIM,
    checkpoints=None,
    **more,
):
    """`train` in this process; returns the engine and the step reached."""
    folder.mkdir(exist_ok=True)
    engine = PlainEngine(tiny_model(seed), optim, CPU, ONE_PROCESS)
    reached = train(
        config,
        optim,
        engine,
        stream or FakeStream(tiny_config()),
        objective=Objective(ObjectiveConfig()),
        checkpoints=DirectoryCheckpoints(folder / "checkpoints") if checkpoints is None else checkpoints,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        **more,
    )
    return engine, reached


TWELVE = TrainConfig(steps=12, batch_size=12, log_every=1, save_every=5)


def test_a_resumed_run_is_bitwise_the_run_never_stopped(tmp_path):
    whole, reached = run(tmp_path / "whole", TWELVE)
    assert reached == 12
    _, reached = run(tmp_path / "parts", TWELVE, should_stop=Counted(7))
    assert reached == 7
    parts, reached = run(tmp_path / "parts", TWELVE, seed=5)  # other weights, which the checkpoint must replace
    assert reached == 12
    expected, found = whole.state(12), parts.state(12)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert without_times(tmp_path / "whole" / "metrics.jsonl") == without_times(tmp_path / "parts" / "metrics.jsonl")
    saved = (tmp_path / name / "checkpoints" / "step-000000012" / "state.safetensors" for name in ("whole", "parts"))
    assert len({path.read_bytes() for path in saved}) == 1


def test_what_a_killed_run_wrote_after_its_last_checkpoint_is_written_again(tmp_path):
    run(tmp_path / "whole", TWELVE)

    class Killed(Exception):
        pass

    class Dying(FakeStream):
        def batches(self) -> Iterator:
            for number, batch in enumerate(super().batches(), self.number):
                if number == 8:
                    raise Killed
                yield batch

    with pytest.raises(Killed):
        run(tmp_path / "killed", TWELVE, stream=Dying(tiny_config()))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.')  # cut off by the crash
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 9
    run(tmp_path / "killed", TWELVE)
    assert without_times(tmp_path / "whole" / "metrics.jsonl") == without_times(tmp_path / "killed" / "metrics.jsonl")


@pytest.mark.slow
def test_compiled_towers_train_like_others():
    ((whole, compiled),) = run_ranks(1, with_and_without_compiling)  # the checks of shapes here cannot be compiled
    for found, expected in zip(compiled, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    first, _ = run(tmp_path, TrainConfig(steps=2, batch_size=12, log_every=1, save_every=1))
    before = (tmp_path / "metrics.jsonl").read_text()
    again, reached = run(tmp_path, TrainConfig(steps=2, batch_size=12, log_every=1, save_every=1), seed=1)
    assert reached == 2
    assert torch.equal(first.state(2)["model/log_scales.image_text"], again.state(2)["model/log_scales.image_text"])
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("bad", "first", "last"), [(0, 1, 3), (4, 4, 6), (7, 7, 8)])
def test_a_run_that_diverges_says_within_which_steps_and_saves_nothing_of_it(tmp_path, bad, first, last):
    saved = MemoryCheckpoints()
    config = TrainConfig(steps=8, batch_size=12, log_every=3, save_every=3)
    stream = PoisonedStream(ONE_PROCESS, number=bad, rank=0)
    with pytest.raises(NonFiniteLoss, match=rf"within steps \[{first}, {last}\].*not saved") as caught:
        run(tmp_path, config, stream=stream, checkpoints=saved)
    assert (caught.value.first, caught.value.last) == (first, last)
    assert first <= bad + 1 <= last, "the step that met it is among them"
    assert [entry.step for entry in saved.saved] == [step for step in (3, 6) if step < first]
    assert all(tensor.isfinite().all() for entry in saved.saved for tensor in entry.state.values())
    if (tmp_path / "metrics.jsonl").exists():
        assert all(line["step"] < first for line in lines(tmp_path / "metrics.jsonl"))


def test_a_rate_that_blows_the_weights_up_is_found_in_the_next_step(tmp_path):
    config = TrainConfig(steps=8, batch_size=12, log_every=1, save_every=1)
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, config, optim=OptimConfig(lr=1e30, warmup_steps=0), checkpoints=MemoryCheckpoints())
    assert caught.value.last <= 2


def test_another_order_of_samples_is_refused_naming_the_field(tmp_path):
    config = TrainConfig(steps=4, batch_size=12, log_every=1, save_every=1)
    run(tmp_path, config, should_stop=Counted(2))
    with pytest.raises(CheckpointError, match="batch_size was 12 and is 15"):
        run(tmp_path, config, stream=FakeStream(tiny_config(), batch_size=15))


def test_another_model_is_refused_naming_a_tensor(tmp_path):
    config = TrainConfig(steps=4, batch_size=12, log_every=1, save_every=1)
    run(tmp_path, config, should_stop=Counted(1))
    other = tiny_config()
    other.clip["embed_dim"] = 8
    engine = PlainEngine(tiny_model(clip=other.clip), OPTIM, CPU, ONE_PROCESS)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*found"):
        train(
            config,
            OPTIM,
            engine,
            FakeStream(tiny_config()),
            objective=Objective(ObjectiveConfig()),
            checkpoints=DirectoryCheckpoints(tmp_path / "checkpoints"),
            metrics=MetricsFile(tmp_path / "metrics.jsonl"),
        )


def test_losses_are_logged_and_states_saved_when_due_and_at_the_end(tmp_path):
    saved = MemoryCheckpoints()
    run(tmp_path, TrainConfig(steps=8, batch_size=12, log_every=2, save_every=4), checkpoints=saved)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8]
    assert [entry.step for entry in saved.saved] == [4, 8]
    run(
        tmp_path / "odd",
        TrainConfig(steps=5, batch_size=12, log_every=3, save_every=3),
        checkpoints=(saved := MemoryCheckpoints()),
    )
    assert [line["step"] for line in lines(tmp_path / "odd" / "metrics.jsonl")] == [3, 5]
    assert [entry.step for entry in saved.saved] == [3, 5]


def test_a_line_of_metrics_has_losses_scales_norm_rate_and_speed(tmp_path):
    run(tmp_path, TrainConfig(steps=2, batch_size=12, log_every=2, save_every=2))
    (line,) = lines(tmp_path / "metrics.jsonl")
    pairs = {
        f"{what}_{pair}" for what in ("loss_info_nce", "scale") for pair in ("image_text", "audio_text", "image_audio")
    }
    assert line.keys() == {"step", "loss", "grad_norm", "lr", "skipped", *pairs, *TIMES}
    assert line["lr"] == learning_rate(OPTIM, 2, 2)
    assert line["loss"] == pytest.approx(sum(line[name] for name in pairs if name.startswith("loss")), rel=1e-6)
    assert line["skipped"] == 0


@pytest.mark.parametrize(
    ("other", "becomes"), [(5, "reached 4"), (6, "TooManyBadSamples: 26 of 24")], ids=["as many as rows", "more"]
)
def test_skipped_samples_of_all_ranks_are_judged_together_and_end_the_run_on_all_of_them(other, becomes):
    assert run_ranks(2, skip_on_rank_1, other) == [becomes, becomes]


def test_ranks_that_read_different_data_do_not_begin():
    for becomes in run_ranks(2, stand_elsewhere_on_rank_1):
        assert becomes.startswith("ConfigError: ranks see different data")


class Probe:
    """An evaluator that notes when it ran, and on which model."""

    name = "probe"

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def run(self, encoder):
        self.seen.append(encoder == "encoder")
        yield "accuracy", Score(value=len(self.seen) / 10, n=3, chance=0.5, low=0.0, high=1.0)


def test_evaluators_run_when_due_and_their_scores_are_in_the_metrics(tmp_path):
    probe = Probe()
    config = TrainConfig(steps=5, batch_size=12, log_every=5, save_every=5, eval_every=2)
    run(tmp_path, config, evaluators=[probe], encoder="encoder", checkpoints=MemoryCheckpoints())
    scores = [line for line in lines(tmp_path / "metrics.jsonl") if "eval/probe/accuracy" in line]
    assert probe.seen == [True] * 3
    assert scores == [
        {"step": step, "eval/probe/accuracy": value, "eval_chance/probe/accuracy": 0.5}
        for step, value in ((2, 0.1), (4, 0.2), (5, 0.3))
    ]


def test_evaluations_leave_the_run_bitwise_as_it_was(tmp_path):
    class Disturbing(Probe):
        def run(self, encoder):
            torch.randn(17)
            yield from super().run(encoder)

    config = TrainConfig(steps=4, batch_size=12, log_every=1, save_every=4, eval_every=1)
    with_them, _ = run(tmp_path / "a", config, evaluators=[Disturbing()], encoder="encoder")
    without, _ = run(tmp_path / "b", config)
    assert all(torch.equal(tensor, without.state(4)[name]) for name, tensor in with_them.state(4).items())


@pytest.mark.parametrize(("every", "steps"), [(0, [10]), (3, [3, 6, 9, 10]), (5, [5, 10])])
def test_evaluations_are_due_every_so_often_and_at_the_end(every, steps):
    config = TrainConfig(steps=10, eval_every=every)
    assert [step for step in range(1, 11) if due(config, step)] == steps


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"accumulate": 0}, "train.accumulate=0 must be at least 1"),
        ({"monitor_every": 15, "log_every": 10}, "monitor_every=15 must be a multiple of log_every=10, or 0"),
        ({"monitor_every": -10}, "monitor_every=-10"),
        ({"save_every": 15, "log_every": 10}, "save_every=15 must be a multiple of log_every=10.*diverged"),
        ({"precision": "fp16"}, "expected fp32 or bf16"),
        ({"steps": 0}, "train.steps=0 must be at least 1"),
        ({"batch_size": 0}, "train.batch_size=0"),
        ({"keep": 0}, "train.keep=0"),
    ],
)
def test_what_cannot_be_trained_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**fields)


@pytest.mark.parametrize(("batch_size", "world", "advice"), [(10, 4, "for example 8"), (3, 4, "for example 4")])
def test_a_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can(batch_size, world, advice):
    with pytest.raises(ConfigError, match=f"multiple of {world}, {advice}"):
        split_of(batch_size, world)
    assert split_of(12, 4) == 3


def test_a_stop_or_a_nan_on_one_rank_stops_all_alike(tmp_path):
    first, second = run_ranks(2, stop_on_rank_1, tmp_path)
    assert first["stopped"] == (1, [1]) and second["stopped"] == (1, []), "only rank 0 saves"
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]
    assert first["error"] == second["error"]
    assert "NonFiniteLoss" in first["error"] and "within steps [4, 6]" in first["error"]
    assert first["saved"] == [3] and second["saved"] == []


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    config = OptimConfig(lr=0.8, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(1, 13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[7] == pytest.approx(0.4), "half way down"
    assert rates[4] == pytest.approx(0.4 * (1 + math.cos(math.pi / 8)))
    assert rates[11] == pytest.approx(0.0, abs=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_without_warm_up_the_first_step_is_near_the_peak():
    config = OptimConfig(lr=1.0, warmup_steps=0)
    assert learning_rate(config, 1, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 100)))
    assert learning_rate(config, 100, 100) == pytest.approx(0.0, abs=1e-12)


def test_a_warm_up_longer_than_the_run_never_peaks():
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=100), 10, 10) == pytest.approx(0.1)


def test_norms_biases_tokens_and_scales_do_not_decay():
    model = tiny_model()
    decayed, kept = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)] for p in decayed["params"]}
    keeps = {names[id(p)] for p in kept["params"]}
    assert decays | keeps == set(names.values()) and not decays & keeps
    kinds = ("bias", "ln_", "norm", "cls_token", "dist_token", "class_embedding", "log_scales", "audio.head.0")
    assert keeps == {name for name in names.values() if any(kind in name for kind in kinds)}
    assert "towers.text.text.token_embedding.weight" in decays and "towers.image.visual.proj" in decays


@pytest.mark.parametrize(
    "fields",
    [
        *({"lr": 0.0}, {"eps": 0.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}, {"clip_norm": -1.0}),
        *({"beta1": 1.0}, {"beta2": -0.1}),
    ],
)
def test_what_cannot_be_optimised_is_refused(fields):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(fields))}="):
        OptimConfig(**fields)


# --- the file of metrics --------------------------------------------------------------------------------------------


def test_metrics_are_strict_json_whatever_the_values(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"loss": float("nan"), "norm": float("inf"), "lr": 0.1})
    assert lines(file.path) == [{"step": 1, "loss": None, "norm": None, "lr": 0.1}]


def test_rewinding_drops_later_lines_and_a_torn_one(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(0)
    assert not file.path.exists()
    for step in range(1, 6):
        file.write(step, {"loss": 1.0})
    with file.path.open("a") as torn:
        torn.write('{"step": 2, "lo')
    file.rewind(3)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3]


def test_ranks_above_0_write_no_metrics(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", enabled=False)
    file.write(1, {"loss": 1.0})
    file.rewind(0)
    assert not file.path.exists()


class CaptionedStream(FakeStream):
    """Some rows have wrong captions, some further right ones, some both, some none."""

    def batches(self):
        for batch in super().batches():
            texts, rows, roles = [], [], []
            for value, row in zip(batch.values["text"], batch.rows["text"].tolist(), strict=True):
                number = int(batch.ids[row, 0])
                beside = [WRONG] * (number % 3) + [RIGHT] * (number % 2)
                texts += [value, *(value.roll(1 + place) for place in range(len(beside)))]
                rows += [row] * (1 + len(beside))
                roles += [OWN, *beside]
            yield replace(
                batch,
                values={**batch.values, "text": torch.stack(texts)},
                rows={**batch.rows, "text": torch.tensor(rows)},
                roles={"text": torch.tensor(roles)},
            )


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("term", ["info_nce", "modular"])
def test_hard_negatives_and_further_positives_of_a_batch_reach_the_loss(term, chunks):
    config = ObjectiveConfig(**{"info_nce": InfoNCEConfig(weights={})} | {term: TERMS[term](weights=WEIGHTS)})
    batch = next(CaptionedStream(tiny_config()).batches())
    model = tiny_model()
    outputs = model(batch.values)
    text, rows, roles = outputs["text"], batch.rows["text"], batch.roles["text"]
    own = Embeddings(
        values={"image": outputs["image"], "text": text[roles == OWN], "audio": outputs["audio"]},
        rows={**batch.rows, "text": rows[roles == OWN]},
    )
    wrong = HardNegatives(values=text[roles == WRONG], rows=rows[roles == WRONG], seen_by="all")
    right = Positives(values=text[roles == RIGHT], rows=rows[roles == RIGHT])
    learned = Learned(scales={pair: outputs[pair] for pair in PAIRS})
    terms = Objective(config).terms(own, learned, batch.ids, ONE_PROCESS, {"text": wrong}, {"text": right})
    expected = sum(weight * value for weight, value in terms.values())
    expected.backward()
    engine = PlainEngine(tiny_model(), OPTIM, CPU, ONE_PROCESS)
    values = train_step(engine, batch, Objective(config), 0.0, chunks=chunks)
    torch.testing.assert_close(values["loss"], expected.detach(), rtol=1e-6, atol=1e-6)
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(values["grad_norm"], norm, rtol=1e-4, atol=1e-6)
    alone = Objective(config).terms(own, learned, batch.ids, ONE_PROCESS, {})
    assert (
        abs(float(sum(weight * value.detach() for weight, value in alone.values())) - float(expected.detach())) > 1e-3
    )


def captioned_ranks(shard, chunks):
    """Losses of a few steps with hard negatives."""
    metrics = []
    engine = PlainEngine(tiny_model(), OPTIM, CPU, shard)
    config = ObjectiveConfig(own_negatives=["audio_text"], modular=ModularConfig(weights={"audio_text": 0.5}))
    objective = Objective(config)
    for batch in islice(CaptionedStream(tiny_config(), shard=shard).batches(), 3):
        metrics.append(shard.mean(train_step(engine, batch, objective, 1e-3, chunks=chunks)))
    return metrics


@pytest.mark.parametrize("chunks", [1, 2])
def test_two_ranks_train_with_hard_negatives_as_one_process_does(chunks):
    (alone,) = run_ranks(1, captioned_ranks, 1)
    for found in run_ranks(2, captioned_ranks, chunks):
        for step, expected in zip(found, alone, strict=True):
            assert step == pytest.approx(expected, rel=2e-4, abs=1e-5)
