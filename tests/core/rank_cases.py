"""What the ranks of these tests run, importable by name: spawned processes import it again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmcl.dist import Shard
from mmcl.engine import Engine, PlainEngine
from mmcl.errors import MmclError
from mmcl.metrics import MetricsFile
from mmcl.objective import InfoNCEConfig, Objective, ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.testing import FakeStream, MemoryCheckpoints, fake_batch, tiny_config, tiny_model
from mmcl.train import TrainConfig, train, train_step
from mmcl.types import ID_KINDS, MODALITIES, PAIRS, Batch, Embeddings, Learned, Pair

CPU = torch.device("cpu")
WEIGHTS: dict[Pair, float] = {"image_text": 1.0, "audio_text": 0.7, "image_audio": 0.4}
OBJECTIVE = Objective(ObjectiveConfig(info_nce=InfoNCEConfig(weights=WEIGHTS)))
Masks = Mapping[str, Sequence[bool]]


def own_rows(splits: Sequence[int], rank: int) -> slice:
    """The rows of a rank, given how many each rank has."""
    first = sum(splits[:rank])
    return slice(first, first + splits[rank])


def mean_over_ranks(tensor: Tensor, shard: Shard) -> Tensor:
    total = tensor.detach().clone()
    if shard.world > 1:
        dist.all_reduce(total)
    return total / shard.world


def linear_case(shard: Shard, masks: Masks, splits: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Losses and gradients, averaged over ranks, of one linear map per modality and one scale per pair."""
    generator = torch.Generator().manual_seed(seed)
    size, rows = len(masks["image"]), own_rows(splits, shard.rank)
    features = {name: torch.randn(size, 6, generator=generator) for name in MODALITIES}
    maps = {name: torch.randn(6, 5, generator=generator).requires_grad_() for name in MODALITIES}
    scales = {
        pair: torch.tensor(scale, requires_grad=True) for pair, scale in zip(PAIRS, (14.0, 3.0, 30.0), strict=False)
    }
    present = {name: torch.tensor(list(masks[name]))[rows] for name in MODALITIES}
    embeddings = Embeddings(
        values={name: normalize(features[name][rows][present[name]] @ maps[name], dim=-1) for name in MODALITIES},
        rows={name: present[name].nonzero().flatten() for name in MODALITIES},
    )
    ids = torch.full((size, len(ID_KINDS)), -1)[rows]
    terms = OBJECTIVE.terms(embeddings, Learned(scales=scales), ids, shard, {})
    torch.stack([weight * loss for weight, loss in terms.values()]).sum().backward()
    found = {f"loss {name.removeprefix('info_nce_')}": loss for name, (_, loss) in terms.items()}
    for name, tensor in (*maps.items(), *scales.items()):
        assert tensor.grad is not None, name
        found[f"gradient {name}"] = tensor.grad
    return {name: mean_over_ranks(tensor, shard) for name, tensor in found.items()}


class GradientsOnly(PlainEngine):
    """Keeps the gradients of a step and does not take it."""

    def step(self, lr: float, *, watch: bool = False) -> Tensor:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())


def tiny_case(shard: Shard, masks: Masks, splits: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Losses and every gradient of `tiny_model` as a training step leaves them on this rank."""
    engine = GradientsOnly(tiny_model(seed), OptimConfig(), CPU, shard)
    batch = fake_batch(tiny_config(), masks, seed, own_rows(splits, shard.rank))
    values = train_step(engine, batch, OBJECTIVE, 0.0)
    losses = {name: mean_over_ranks(value, shard) for name, value in values.items() if name.startswith("loss")}
    # gradients as DistributedDataParallel left them: a second mean over ranks would hide that they differ
    words = engine.gradients.pop("towers.text.text.token_embedding.weight")
    seen = words.abs().sum(1).nonzero().flatten()
    found = engine.gradients | {"words": words[seen], "which words": seen}
    return losses | {f"gradient {name}": gradient for name, gradient in found.items()}


def all_cases(shard: Shard, cases: Sequence[tuple[str, Masks, Sequence[int], int]]) -> list[dict[str, Any]]:
    """Each case on this rank; as numpy arrays, which outlive the process."""
    run = {"linear": linear_case, "tiny": tiny_case}
    return [
        {name: tensor.numpy() for name, tensor in run[kind](shard, masks, splits, seed).items()}
        for kind, masks, splits, seed in cases
    ]


def make_engine(kind: str, shard: Shard, optim: OptimConfig, **model: Any) -> Engine:
    bf16 = model.pop("bf16", False)
    built = tiny_model(**model)
    built.bf16 = bf16
    if kind == "plain":
        return PlainEngine(built, optim, CPU, shard)
    if kind == "accelerate":
        from mmcl.engine.with_accelerate import AccelerateEngine

        return AccelerateEngine(built, optim, CPU, shard)
    from mmcl.engine.with_deepspeed import DeepSpeedEngine

    settings = {"zero_optimization": {"stage": int(kind.removeprefix("zero"))}}
    return DeepSpeedEngine(built, optim, CPU, shard, settings)


OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, clip_norm=1.0, weight_decay=0.2)


def steps(engine: Engine, stream: FakeStream, start: int, end: int, lr: float = 1e-3) -> list[dict[str, float]]:
    """Means over ranks of what `train_step` says of the steps after `start` until `end`."""
    batches = stream.at(start).batches()
    return [engine.shard.mean(train_step(engine, next(batches), OBJECTIVE, lr)) for _ in range(start, end)]


def with_and_without_compiling(shard: Shard) -> list[list[dict[str, float]]]:
    """Means of three steps with towers as they are, and with towers that `torch.compile` made."""
    found = []
    for names in ((), ("image", "text")):
        engine = make_engine("plain", shard, OPTIM)
        for name in names:
            engine.model.towers[name].compile()
        found.append(steps(engine, FakeStream(tiny_config()), 0, 3))
    return found


def save(engine: Engine, step: int, path: Path) -> None:
    state = engine.state(step)
    if engine.shard.rank == 0:
        save_file(state, path)
    engine.shard.wait()


def engine_runs(shard: Shard, kinds: Sequence[str], folder: Path) -> dict[str, Any]:
    """Ten steps on every engine, a state saved on the way by ZeRO-1 and continued by others, and a clamped scale."""
    found: dict[str, Any] = {}
    stream = FakeStream(tiny_config(), shard=shard)
    for kind in kinds:
        engine = make_engine(kind, shard, OPTIM)
        found[kind] = steps(engine, stream, 0, 3)
        if kind == "zero1":
            save(engine, 3, folder / "step3.safetensors")
        found[kind] += steps(engine, stream, 3, 10)
        save(engine, 10, folder / f"{kind}.safetensors")
    for kind in kinds:
        if (folder / "step3.safetensors").exists():
            engine = make_engine(kind, shard, OPTIM, seed=1)
            engine.load(load_file(folder / "step3.safetensors"), 3)
            found[f"{kind} resumed"] = steps(engine, stream, 3, 6)
            save(engine, 6, folder / f"{kind}-resumed.safetensors")
    return found


def clamp_runs(shard: Shard, kinds: Sequence[str]) -> dict[str, list[float]]:
    """A logit scale pushed up from 99.9 for 4 steps and down for 12, then one pushed down from 1 for 3."""
    found = {}
    batch = fake_batch(tiny_config(), {name: [True] * 2 for name in MODALITIES})
    optim = OptimConfig(weight_decay=0.0, clip_norm=0.0)

    def pushed(engine: Engine, direction: float) -> float:
        outputs = engine.forward(batch.values)
        scale = outputs["image_text"].item()
        engine.backward(direction * outputs["image_text"] + 0.0 * sum(value.sum() for value in outputs.values()))
        engine.step(0.1)
        return scale

    for kind in kinds:
        high, low = (make_engine(kind, shard, optim, init_scale=scale) for scale in (99.9, 1.0))
        found[kind] = [pushed(high, direction) for direction in [-1.0] * 4 + [1.0] * 12]
        found[kind] += [pushed(low, 1.0) for _ in range(3)]
    return found


def lacking_runs(shard: Shard, kinds: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Steps in which rank 0 has no sound, then the last rank no image, then nobody a caption."""
    found = {}
    own = 4
    size = own * shard.world
    first, last = range(own), range(size - own, size)
    lacking = [("audio", first), ("image", last), ("text", range(size))]
    for kind in kinds:
        engine = make_engine(kind, shard, OPTIM)
        found[kind] = []
        for seed, (name, rows) in enumerate(lacking):
            masks = {m: [not (m == name and row in rows) for row in range(size)] for m in MODALITIES}
            batch = fake_batch(tiny_config(), masks, seed, slice(shard.rank * own, (shard.rank + 1) * own))
            found[kind].append(shard.mean(train_step(engine, batch, OBJECTIVE, 1e-3)))
    return found


def bf16_runs(shard: Shard, kinds: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    stream = FakeStream(tiny_config(), shard=shard)
    return {kind: steps(make_engine(kind, shard, OPTIM, bf16=True), stream, 0, 5) for kind in kinds}


def whole_engine_suite(shard: Shard, kinds: Sequence[str], folder: Path) -> dict[str, Any]:
    """All of the above, in one life of the processes."""
    return {
        "runs": engine_runs(shard, kinds, folder),
        "clamp": clamp_runs(shard, kinds),
        "lacking": lacking_runs(shard, kinds),
        "bf16": bf16_runs(shard, kinds),
        "compiled": compiled_ops(),
    }


def compiled_ops() -> list[str]:
    """Names of DeepSpeed's C++ ops that this process has loaded, which it would have had to compile."""
    try:
        from deepspeed.ops.op_builder.builder import OpBuilder
    except ImportError:
        return []
    return sorted(OpBuilder._loaded_ops)


def run_train(
    shard: Shard,
    folder: Path,
    *,
    steps: int = 6,
    stop: Callable[[int], bool] = lambda rank: False,
) -> tuple[int, list[int]]:
    """`train` with checkpoints in memory; returns the step reached and the steps saved on this rank."""
    checkpoints = MemoryCheckpoints()
    reached = train(
        TrainConfig(steps=steps, batch_size=12, log_every=1, save_every=1, seed=3),
        OPTIM,
        make_engine("plain", shard, OPTIM),
        FakeStream(tiny_config(), shard=shard),
        objective=OBJECTIVE,
        checkpoints=checkpoints,
        metrics=MetricsFile(folder / "metrics.jsonl", enabled=shard.rank == 0),
        should_stop=lambda: stop(shard.rank),
    )
    return reached, [saved.step for saved in checkpoints.saved]


class PoisonedStream(FakeStream):
    """NaN in the sounds of one rank in one batch."""

    def __init__(self, shard: Shard, *, number: int, rank: int) -> None:
        super().__init__(tiny_config(), shard=shard)
        self.poisoned, self.rank = number, rank

    def batches(self):
        for number, batch in enumerate(super().batches(), self.number):
            if number == self.poisoned and self.shard.rank == self.rank:
                batch.values["audio"][0, 0] = float("nan")
            yield batch


class ElsewhereStream(FakeStream):
    """Stands somewhere else on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"index": self.shard.rank}


def stand_elsewhere_on_rank_1(shard: Shard) -> str:
    """What becomes of a run whose ranks read different data."""
    return becomes_of(shard, ElsewhereStream(tiny_config(), shard=shard))


class SkippingStream(FakeStream):
    """One rank skips more samples than it has rows, and not more than both have together."""

    def batches(self):
        for batch in super().batches():
            yield replace(batch, skipped=7 if self.shard.rank == 1 else self.other)

    def __init__(self, shard: Shard, *, other: int) -> None:
        super().__init__(tiny_config(), shard=shard)
        self.other = other


def skip_on_rank_1(shard: Shard, other: int) -> str:
    """What becomes of a run in which rank 1 skips 7 samples a step for its 6 rows, and rank 0 `other`."""
    return becomes_of(shard, SkippingStream(shard, other=other))


def becomes_of(shard: Shard, stream: FakeStream) -> str:
    try:
        reached = train(
            TrainConfig(steps=4, batch_size=12, log_every=2, save_every=4),
            OPTIM,
            make_engine("plain", shard, OPTIM),
            stream,
            objective=OBJECTIVE,
            checkpoints=MemoryCheckpoints(),
            metrics=MetricsFile(Path("nowhere"), enabled=False),
        )
    except MmclError as error:
        return f"{type(error).__name__}: {error}"
    return f"reached {reached}"


def stop_on_rank_1(shard: Shard, folder: Path) -> dict[str, Any]:
    """A stop asked of one rank, and a NaN met by one rank."""
    found: dict[str, Any] = {"stopped": run_train(shard, folder, stop=lambda rank: rank == 1)}
    saved = MemoryCheckpoints()
    try:
        train(
            TrainConfig(steps=9, batch_size=12, log_every=3, save_every=3),
            OPTIM,
            make_engine("plain", shard, OPTIM),
            PoisonedStream(shard, number=4, rank=1),
            objective=OBJECTIVE,
            checkpoints=saved,
            metrics=MetricsFile(folder / "nan.jsonl", enabled=False),
        )
    except MmclError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["saved"] = [entry.step for entry in saved.saved]
    return found


def says(shard: Shard, size: int) -> Tensor:
    return torch.full((size,), float(shard.rank))


def fails_on_rank_1(shard: Shard) -> None:
    if shard.rank == 1:
        raise ValueError("rank 1 has had enough")
    shard.wait()


def parameters_without_gradient(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is None]


def empty_batch(size: int = 3) -> Batch:
    return fake_batch(tiny_config(), {name: [False] * size for name in MODALITIES})
