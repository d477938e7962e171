"""The training loop: what happens in a run happens here, in this order.

Everything a step depends on is a function of its number (batch, learning rate, random numbers), so that a run stopped
anywhere and resumed from a checkpoint is the run that was never stopped.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcl.checkpoint import Checkpoints
from mmcl.engine import Engine
from mmcl.errors import CheckpointError, ConfigError, NonFiniteLoss
from mmcl.gradcache import backward_in_chunks
from mmcl.metrics import MetricsFile, Progress
from mmcl.model import split_outputs
from mmcl.monitors import monitor
from mmcl.objective import Objective, negatives_in, positives_in
from mmcl.optim import OptimConfig, learning_rate
from mmcl.types import Batch, Embeddings, Encoder, Evaluator, Learned, Stream

OBJECTIVE = "objective/"
"""Before the names of an objective's tensors in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and how often what."""

    steps: int = 10000
    """Optimizer updates in all; the schedule ends there."""
    batch_size: int = 1024
    """Samples of a step over all ranks; must be a multiple of the number of ranks."""
    accumulate: int = 1
    """Chunks in which a rank's rows go through the towers, so that memory is that of one chunk; the loss stays that of
    the whole batch (GradCache). Above 1 a step costs a second forward pass."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for autocast in the towers; weights, losses and statistics are fp32 either way."""
    seed: int = 0
    """Of weights, sample order and augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics; losses are checked for NaN when they are logged."""
    monitor_every: int = 0
    """Steps between two lines that also have `monitor/` metrics (alignment, uniformity, modality gap, in-batch R@1,
    hard negatives above the positive where there are any, norms of gradients and updates by tower), a multiple of
    `log_every`; 0 is never."""
    save_every: int = 1000
    """Steps between two checkpoints, a multiple of `log_every`."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    init_from: str = ""
    """Directory or .safetensors file of open_clip whose weights the image and text towers start from; they must fit."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"train.precision={self.precision!r}: expected fp32 or bf16")
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every={self.save_every} must be a multiple of log_every={self.log_every}: losses are checked "
                "when they are logged, and a diverged state must not be saved"
            )
        if self.monitor_every < 0 or self.monitor_every % self.log_every:
            raise ConfigError(
                f"monitor_every={self.monitor_every} must be a multiple of log_every={self.log_every}, or 0: monitors "
                "are written into lines of metrics"
            )


@dataclass(slots=True)
class Lap:
    """Counts between two lines of metrics."""

    began: float
    waited: float = 0.0
    samples: int = 0
    skipped: int = 0

    def pause(self, since: float) -> None:
        """Leave out the time since `since`, which was spent on something else than steps."""
        self.began += time.monotonic() - since

    def values(self, steps: int, world: int, device: torch.device) -> dict[str, Tensor]:
        """Rates of this rank; counts of all ranks once averaged over them."""
        seconds = max(1e-9, time.monotonic() - self.began)
        numbers = {
            "step_seconds": seconds / max(1, steps),
            "data_wait": self.waited / seconds,
            "samples_per_second": self.samples * world / seconds,
            "skipped": float(self.skipped * world),
        }
        return {name: torch.tensor(number, device=device) for name, number in numbers.items()}


def train_step(
    engine: Engine, batch: Batch, objective: Objective, lr: float, *, chunks: int = 1, watch: bool = False
) -> dict[str, Tensor]:
    """Forward, loss, backward, update. Returns scalars still on the device: reading one waits for it. Collective.

    The rows go through the towers in so many `chunks`, which changes what the step needs and not what it does. With
    `watch` there are monitors among the scalars.
    """

    def loss_of(outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, learned = split_outputs(outputs, batch)
        negatives, positives = negatives_in(outputs, batch), positives_in(outputs, batch)
        terms = objective.terms(embeddings, learned, batch.ids, engine.shard, negatives, positives)
        loss, values = weigh(terms, embeddings, learned)
        return loss, values | (named_monitors(monitor(embeddings, engine.shard, negatives)) if watch else {})

    if chunks == 1:
        loss, values = loss_of(engine.forward(batch.values))
        engine.backward(loss)
    else:
        loss, values = backward_in_chunks(engine, batch, chunks, loss_of)
    norm = engine.step(lr, watch=watch)
    return {"loss": loss, "grad_norm": norm} | values | named_monitors(engine.monitors() if watch else {})


def named_monitors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As metrics call them."""
    return {f"monitor/{name}": value for name, value in values.items()}


def weigh(
    terms: Mapping[str, tuple[float, Tensor]], embeddings: Embeddings, learned: Learned
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what metrics say of its terms."""
    scalars = {f"scale_{pair}": scale for pair, scale in learned.scales.items()}
    scalars |= {f"bias_{pair}": bias for pair, bias in learned.biases.items()}
    # Touch everything, so that a modality without weight or rows still gives its tower and scale a gradient.
    untouched = sum(value.sum() for value in (*embeddings.values.values(), *scalars.values()))
    loss = sum(weight * value for weight, value in terms.values()) + 0.0 * untouched
    assert isinstance(loss, Tensor)
    return loss, {f"loss_{name}": value for name, (_, value) in terms.items()} | scalars


def evaluate(encoder: Encoder, evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """All scores by name, with chance beside them. Every rank takes part, on the same data."""
    values: dict[str, float] = {}
    for evaluator in evaluators:
        for metric, score in evaluator.run(encoder):
            values[f"eval/{evaluator.name}/{metric}"] = score.value
            values[f"eval_chance/{evaluator.name}/{metric}"] = score.chance
    return values


def resume(engine: Engine, checkpoints: Checkpoints, stream: Stream, objective: Objective) -> int:
    """Load the latest checkpoint, if there is one; returns the step to go on from. Collective."""
    saved = checkpoints.latest()
    steps = engine.shard.counts(saved.step if saved else 0, engine.device)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"ranks see different latest checkpoints: rank by rank they would go on from steps {steps}; a file "
            "system that shows machines different files, or checkpoints that only some of them hold"
        )
    if saved is None:
        agree(stream, engine)
        return 0
    stream.load_state_dict(saved.facts["stream"])
    agree(stream, engine)
    kept = {name: tensor for name, tensor in saved.state.items() if name.startswith(OBJECTIVE)}
    objective.load({name.removeprefix(OBJECTIVE): tensor for name, tensor in kept.items()})
    engine.load({name: tensor for name, tensor in saved.state.items() if name not in kept}, saved.step)
    return saved.step


def agree(stream: Stream, engine: Engine) -> None:
    """See that all ranks stand at the same place of the same data. Collective.

    Raises:
        ConfigError: they do not.
    """
    told = hashlib.sha256(json.dumps(stream.state_dict(), sort_keys=True).encode()).hexdigest()[:15]
    if len(set(found := engine.shard.counts(int(told, 16), engine.device))) > 1:
        raise ConfigError(
            f"ranks see different data: their streams stand at {[f'{number:015x}' for number in found]}, rank by rank. "
            "Do all machines have the same shards, and the same index of them? `mmcl data index` on one file system "
            "that all of them see makes it so"
        )


def train(  # noqa: PLR0913 (the parts of a run, each a seam)
    config: TrainConfig,
    optim: OptimConfig,
    engine: Engine,
    stream: Stream,
    *,
    objective: Objective,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    evaluators: Sequence[Evaluator] = (),
    encoder: Encoder | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train until `config.steps` or until any rank's `should_stop`; returns the step reached. Collective.

    Raises:
        NonFiniteLoss: on all ranks alike, naming the steps since losses were last seen to be finite.
        CheckpointError: the latest checkpoint is damaged or belongs to another order of samples or another model.
        TooManyBadSamples: the stream, told what all ranks skipped, says so.
    """
    device, shard = engine.device, engine.shard
    step = checked = resume(engine, checkpoints, stream, objective)
    metrics.rewind(step)
    progress = Progress("step", config.steps, enabled=shard.rank == 0, start=step)
    batches = stream.batches()
    lap = Lap(time.monotonic())
    stopping = step >= config.steps
    while not stopping:
        # the stream may wait for disks; nothing else happens meanwhile
        waited = time.monotonic()
        batch = change(next(batches).to(device))
        lap.waited += time.monotonic() - waited
        lap.samples += batch.size
        lap.skipped += batch.skipped

        step += 1
        torch.manual_seed(hash((config.seed, step, shard.rank)))
        watch = config.monitor_every > 0 and step % config.monitor_every == 0
        rate = learning_rate(optim, step, config.steps)
        values = train_step(engine, batch, objective, rate, chunks=config.accumulate, watch=watch)
        stopping = shard.any(should_stop(), device) or step == config.steps

        # all ranks meet in the mean, so that all see the same loss and decide alike
        if stopping or step % config.log_every == 0:
            means = shard.mean(values | lap.values(step - checked, shard.world, device))
            if not math.isfinite(means["loss"]) or not math.isfinite(means["grad_norm"]):
                raise NonFiniteLoss(checked + 1, step, means)
            metrics.write(step, means | {"lr": rate})
            progress.update(step, f"loss {means['loss']:.3f}  {means['samples_per_second']:.0f} samples/s")
            stream.judge(round(means["skipped"]), (step - checked) * config.batch_size)
            checked, lap = step, Lap(time.monotonic())

        # collective: every rank gives its part of the state, rank 0 writes
        if stopping or step % config.save_every == 0:
            paused = time.monotonic()
            state = engine.state(step) | {OBJECTIVE + name: tensor for name, tensor in objective.state().items()}
            if shard.rank == 0:
                checkpoints.save(step, state, {"stream": stream.state_dict()})
            shard.wait()
            lap.pause(paused)

        # all ranks take part: partitioned parameters are gathered
        if encoder is not None and evaluators and due(config, step):
            paused = time.monotonic()
            metrics.write(step, evaluate(encoder, evaluators))
            lap.pause(paused)
    progress.close()
    return step


def due(config: TrainConfig, step: int) -> bool:
    """Whether step `step` ends with an evaluation."""
    return step == config.steps or (config.eval_every > 0 and step % config.eval_every == 0)


def split_of(batch_size: int, world: int) -> int:
    """Samples per rank, or `ConfigError` where ranks cannot share a batch."""
    if batch_size % world:
        raise ConfigError(
            f"train.batch_size={batch_size} cannot be shared by {world} ranks: make it a multiple of {world}, "
            f"for example {batch_size // world * world or world}"
        )
    return batch_size // world
