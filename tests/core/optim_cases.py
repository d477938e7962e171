"""What the ranks of `test_optim.py` run, importable by name: spawned processes import it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rank_cases import make_engine, save
from safetensors.torch import load_file

from mmcl.dist import Shard
from mmcl.engine import Engine
from mmcl.optim import OptimConfig
from mmcl.testing import FakeStream, tiny_config
from mmcl.types import MODALITIES, PAIRS

STABLE = OptimConfig(
    name="stable_adamw",
    beta2=0.9,
    clip_norm=0.0,
    weight_decay=0.2,
    layer_decay=0.7,
    tower_rates={"image": 0.5, "text": 2.0, "audio": 1.5},  # no tower has 1: the scales are a group of three numbers
)
LR = 1e-3
ADAMW = OptimConfig(clip_norm=1e-3, layer_decay=0.7)
NEAR_100 = 99.95
"""Where logit scales begin that are pulled up, so that every step but the first is clamped."""
PUSHES = (1e-3, 1e-3, 3e-2, 1e-3, 1e-3, 2e-2)
"""How hard each step pulls: 30 times as hard makes an update too large, which has to be held back. All are small, so
that gradients which are 0 but for rounding (of biases of keys) stay below the optimizer's eps."""
MIDDLE = 2
"""Steps before the states are saved that others continue."""


def pull(engine: Engine, stream: FakeStream, start: int, push: float) -> torch.Tensor:
    """Forward and backward of batch `start`: towards fixed directions, and logit scales up. Returns the loss."""
    outputs = engine.forward(next(stream.at(start).batches()).values)
    loss = torch.zeros(())
    for number, modality in enumerate(MODALITIES):
        wanted = torch.randn(outputs[modality].shape[1], generator=torch.Generator().manual_seed(number))
        # engines average over ranks: the mean of these is the loss of the batch of all
        loss = loss - push * engine.shard.world * (outputs[modality] @ wanted).sum() / stream.batch_size
    loss = loss - push * sum(outputs[pair] * weight for pair, weight in zip(PAIRS, (0.01, 0.02, 0.03), strict=True))
    engine.backward(loss)
    return loss


def watched(engine: Engine, stream: FakeStream, start: int, end: int) -> list[dict[str, float]]:
    """Loss, norm, scale and monitors of steps `start + 1` to `end`."""
    found = []
    for step in range(start, end):
        loss = pull(engine, stream, step, PUSHES[step])
        norm = engine.step(LR, watch=True)
        found.append(engine.shard.mean({"loss": loss, "norm": norm} | engine.monitors()))
    return found


def stable_runs(shard: Shard, kinds: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every engine for as many steps as there are pushes, and every engine from where another was in the middle."""
    found: dict[str, Any] = {}
    stream = FakeStream(tiny_config(), shard=shard)
    for kind in kinds:
        engine = make_engine(kind, shard, STABLE, init_scale=NEAR_100)
        found[kind] = watched(engine, stream, 0, MIDDLE)
        save(engine, MIDDLE, folder / f"{kind}-middle.safetensors")
        found[kind] += watched(engine, stream, MIDDLE, len(PUSHES))
        save(engine, len(PUSHES), folder / f"{kind}.safetensors")
    for number, kind in enumerate(kinds):
        engine = make_engine(kind, shard, STABLE, seed=1)
        engine.load(load_file(folder / f"{kinds[number - 1]}-middle.safetensors"), MIDDLE)
        found[f"{kind} resumed"] = watched(engine, stream, MIDDLE, len(PUSHES))
        save(engine, len(PUSHES), folder / f"{kind}-resumed.safetensors")
    return found


def adamw_runs(shard: Shard, kinds: Sequence[str]) -> dict[str, Any]:
    """Two steps of AdamW, whose gradients are clipped, and what is known of one that is not watched."""
    found = {}
    stream = FakeStream(tiny_config(), shard=shard)
    for kind in kinds:
        engine = make_engine(kind, shard, ADAMW)
        found[kind] = watched(engine, stream, 0, 2)
        pull(engine, stream, 2, 1.0)
        engine.step(LR)
        found[f"{kind} unwatched"] = engine.monitors()
    return found


def whole_optim_suite(shard: Shard, kinds: Sequence[str], folder: Path) -> dict[str, Any]:
    """All of the above, in one life of the processes."""
    return {"stable": stable_runs(shard, kinds, folder), "adamw": adamw_runs(shard, kinds)}
