"""The composition root: a `RunConfig` and this process's place among the ranks become parts, and the parts a run."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import signal
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mmcl import __version__
from mmcl.augment import augment
from mmcl.checkpoint import DirectoryCheckpoints
from mmcl.dist import ONE_PROCESS, Shard, connect, disconnect
from mmcl.encoder import TowersEncoder
from mmcl.engine import Engine, PlainEngine
from mmcl.engine.with_deepspeed import DeepSpeedEngine, check_settings
from mmcl.errors import CheckpointError, ConfigError, MissingExtra
from mmcl.export import load_export
from mmcl.metrics import MetricsFile
from mmcl.model import ThreeTowers, input_spec, load_open_clip
from mmcl.objective import Objective
from mmcl.train import split_of, train
from mmcl.types import PAIRS, Batch, InputSpec, Score
from mmcl_data.decode.text import tokenize
from mmcl_data.evalsets import EvalBatches, read_classes
from mmcl_data.stream import ShardStream
from mmcl_evals import Benchmark, Compositional, Retrieval, TaskResult, ZeroShot, run_suite
from mmcl_launch.config import (
    DEEPSPEED,
    EngineConfig,
    EvalsConfig,
    RunConfig,
    changed_fields,
    dump_config,
    parse_config,
)
from mmcl_launch.ranks import Place

log = logging.getLogger("mmcl")


def deepspeed_settings(config: EngineConfig) -> dict[str, Any]:
    """The DeepSpeed JSON that a run names."""
    path = DEEPSPEED / f"{config.deepspeed}.json"
    path = path if path.exists() else Path(config.deepspeed)
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in DEEPSPEED.glob("*.json")))
        raise ConfigError(
            f"engine.deepspeed={config.deepspeed!r}: neither {shipped} nor a JSON file: {error}"
        ) from error


def make_engine(config: RunConfig, model: ThreeTowers, device: torch.device, shard: Shard) -> Engine:
    """The engine that the config names, around `model`."""
    if config.engine.name == "accelerate":
        from mmcl.engine.with_accelerate import AccelerateEngine

        return AccelerateEngine(model, config.optim, device, shard)
    if config.engine.name == "deepspeed":
        return DeepSpeedEngine(model, config.optim, device, shard, deepspeed_settings(config.engine))
    return PlainEngine(model, config.optim, device, shard)


def make_evaluators(config: EvalsConfig, spec: InputSpec, limit: int) -> list[Benchmark]:
    """The benchmarks that a config names, over at most `limit` samples each."""
    batches = partial(EvalBatches, spec=spec, limit=limit)
    found: list[Benchmark] = []
    for name, entry in config.classes.items():
        held = read_classes(Path(entry.folder), spec, limit=limit)
        found.append(
            ZeroShot(
                name=name,
                modality=entry.modality,
                batches=held.batches,
                classnames=held.classnames,
                templates=held.templates,
            )
        )
    for name, entry in config.retrieval.items():
        found.append(Retrieval(name=name, pair=entry.pair, batches=batches(entry.shards, needs=PAIRS[entry.pair])))
    for name, entry in config.compositional.items():
        found.append(Compositional(name=name, modality=entry.modality, batches=batches(entry.shards)))
    return found


def make_encoder(model: ThreeTowers, device: torch.device, forward: Any = None) -> TowersEncoder:
    """`model` with open_clip's tokenizer in front."""
    return TowersEncoder(model, model.spec, partial(tokenize, spec=model.spec), device=device, forward=forward)


def check_engine(config: EngineConfig) -> None:
    """Raise `MissingExtra` or `ConfigError` where the engine cannot be started here."""
    if config.name != "plain" and importlib.util.find_spec(config.name) is None:
        raise MissingExtra(config.name, config.name, f"engine.name={config.name}")
    if config.name == "deepspeed":
        check_settings(deepspeed_settings(config))


def preflight(config: RunConfig, world: int) -> dict[str, Any]:
    """Find what would fail before any rank exists, and say what the run would do.

    Raises:
        MmclError: a batch that ranks cannot share, a missing package, missing or damaged shards, a missing test set.
    """
    split_of(config.train.batch_size, world)
    check_engine(config.engine)
    spec = input_spec(config.model)
    stream = ShardStream(config.data, spec, config.train.batch_size, config.train.seed)
    evaluators = make_evaluators(config.evals, spec, limit=1)
    if config.train.init_from:
        load_open_clip(ThreeTowers(config.model), Path(config.train.init_from))
    rows = config.train.steps * config.train.batch_size
    sizes = [len(source) for source in stream.sources]
    return {
        "ranks": world,
        "engine": config.engine.name,
        "samples": {source.name: len(source) or "not counted: no index" for source in stream.sources},
        "batch": f"{config.train.batch_size} = {world} x {config.train.batch_size // world}",
        "epochs": round(rows / sum(sizes), 2) if all(sizes) else None,
        "evaluations": [evaluator.name for evaluator in evaluators],
    }


def open_run(folder: Path, config: RunConfig) -> None:
    """Make the run directory, or check that the run in it is this one, which is then resumed.

    A run that never saved anything may still change its config.

    Raises:
        ConfigError: the directory holds another run, or something else, or another process trains in it.
    """
    saved = folder / "config.yaml"
    if saved.exists():
        started = any((folder / "checkpoints").glob("step-*"))
        if started and (changed := _bound(changed_fields(saved_config(folder), config), config)):
            raise ConfigError(
                f"{folder} holds a run with another config; name a new --out, or undo: " + "; ".join(changed[:5])
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run: name a new --out")
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):  # a run that is going on keeps its config
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
        staged = folder / ".config.yaml.tmp"
        staged.write_text(dump_config(config))
        staged.replace(saved)


FREE = re.compile(
    r"data\.(workers|worker_kind|worker_timeout_s|ahead|cache|cache_gb|retries|reseed|max_bad_share)"
    r"|data\.sources\.[^.]+\.(index|shards)|train\.(batch_size|keep|log_every|save_every|eval_every|monitor_every|accumulate)"
    r"|engine\..*|evals\..*"
)
"""Fields that a run may change when it goes on: how it is computed, read, watched and kept, and the rows of a step.

Where shards lie is free; whether they are the same ones, the stream finds out."""


def _bound(changed: list[str], config: RunConfig) -> list[str]:
    """Of the changes of a config those that make another run of it."""
    free = [re.compile(r"data\..*|train\.seed")] if config.data.reseed else []
    return [line for line in changed if not any(field.fullmatch(line.split(":")[0]) for field in (FREE, *free))]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the run directory, so that a second start of the same run does not write into it.

    Raises:
        ConfigError: another process of this machine trains in it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is training in this directory: wait for it or stop it"
            ) from error
        yield


def saved_config(folder: Path) -> RunConfig:
    """The config of a run directory."""
    try:
        return parse_config(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{folder} is no run directory: {error}") from error


def environment() -> dict[str, str]:
    """What a result depends on beside model and data; evaluations run in fp32."""
    return {
        "mmcl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "fp32",
    }


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGUSR1 and SIGINT put their number into, for a run that ends after the step it is in."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _: received.append(got))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_rank(config: RunConfig, folder: Path, place: Place) -> int:
    """Train on this rank; returns the step reached. Every rank of the run calls this."""
    device = place_device(place)
    torch.set_num_threads(threads(place))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    shard = ONE_PROCESS
    if place.world > 1 or config.engine.name != "plain":  # DeepSpeed and accelerate want a group even for one
        shard = connect(place.rank, place.world, place.address, place.port, config.engine.timeout_s)
    try:
        # Only now: where a launcher started the ranks, rank 0 has made the directory before it came to meet the others.
        handler = logging.FileHandler(folder / "log.txt")  # all append: a sample is decoded on one of them
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {place.rank} %(levelname)s %(message)s"))
        log.addHandler(handler)
        torch.manual_seed(config.train.seed)
        model = ThreeTowers(config.model, bf16=config.train.precision == "bf16")
        if config.train.init_from:
            load_open_clip(model, Path(config.train.init_from))
        engine = make_engine(config, model, device, shard)
        spec = input_spec(config.model)
        stream = ShardStream(
            config.data,
            spec,
            config.train.batch_size,
            config.train.seed,
            shard,
            quarantine=folder / "quarantine.jsonl",
            indexes=folder / "indexes",
        )
        with stop_signals() as received, only_one(folder) if shard.rank == 0 else contextlib.nullcontext():
            reached = train(
                config.train,
                config.optim,
                engine,
                stream,
                checkpoints=DirectoryCheckpoints(folder / "checkpoints", config.train.keep),
                objective=Objective(config.objective),
                change=partial(augment, config=config.augment, sample_rate=spec.sample_rate),
                metrics=MetricsFile(folder / "metrics.jsonl", enabled=shard.rank == 0),
                evaluators=make_evaluators(config.evals, spec, config.evals.limit_in_training),
                encoder=make_encoder(engine.model, device, engine.forward),
                should_stop=lambda: bool(received),
            )
        if reached < config.train.steps and shard.rank == 0:
            log.info("stopped at step %d of %d; the same command goes on from there", reached, config.train.steps)
        return reached
    finally:
        disconnect()


def threads(place: Place) -> int:
    """CPU threads of this rank: all cores it may use, shared with those ranks of the machine that may use the same."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = allowed < (os.cpu_count() or 1) and place.launcher == "slurm"  # srun gave each task its own
    return max(1, allowed if bound else allowed // place.local_world)


def place_device(place: Place) -> torch.device:
    """The GPU of this rank where there is one. With one visible GPU per process that is device 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    present = torch.cuda.device_count()
    if 1 < present < place.local_world:
        raise ConfigError(f"{place.local_world} ranks on a machine with {present} GPUs: start one rank for each GPU")
    device = torch.device("cuda", place.local_rank % present)
    torch.cuda.set_device(device)
    return device


def load_model(folder: Path) -> tuple[ThreeTowers, dict[str, Any]]:
    """The model of an export, or of the last checkpoint of a run, and what is known of it.

    Raises:
        ConfigError: the directory is neither.
    """
    if (folder / "mmcl.json").exists():
        model, manifest = load_export(folder)
        weights = manifest["sha256"]["mmcl_model.safetensors"]
        known = {name: manifest.get(name) for name in ("step", "samples_seen")}
        return model, {**known, "weights_sha256": weights, "format": "mmcl export"}
    config = saved_config(folder)
    saved = DirectoryCheckpoints(folder / "checkpoints").latest()
    if saved is None:
        raise CheckpointError(f"{folder}: the run has no checkpoint yet (train.save_every={config.train.save_every})")
    model = ThreeTowers(config.model)
    prefix = "model/"
    try:
        model.load_state_dict({k.removeprefix(prefix): v for k, v in saved.state.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the checkpoint is not of the model in config.yaml: {error}") from error
    seen = saved.step * config.train.batch_size
    return model.eval(), {
        "step": saved.step,
        "samples_seen": seen,
        "weights_sha256": saved.digest,
        "format": "mmcl run",
    }


def evaluate_model(model: ThreeTowers, config: EvalsConfig) -> list[TaskResult]:
    """All benchmarks of a config on `model`, in this process; each result says what data it was measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluators = make_evaluators(config, model.spec, config.limit)
    encoder = make_encoder(model.to(device), device)

    def say(task: str, metric: str, score: Score) -> None:
        log.info("%s %s %.3f", task, metric, score.value)

    results = run_suite(evaluators, encoder, say)
    return [_with_data(result, evaluator.batches) for result, evaluator in zip(results, evaluators, strict=True)]


def _with_data(result: TaskResult, batches: Iterable[Batch]) -> TaskResult:
    assert isinstance(batches, EvalBatches)  # make_evaluators gave it
    data = {"sha256": batches.sha256, "skipped": {"decode_error": batches.skipped}}
    return dataclasses.replace(result, details={**result.details, "data": data})


def input_digest(model: ThreeTowers) -> str:
    """Of everything that decides what a file looks like to the model."""
    seen = {"spec": dataclasses.asdict(model.spec), "mean": model.config.mean, "std": model.config.std}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()
