"""Fakes and helpers that we ship, so that users test their objective or benchmark as we test ours."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from mmcl.checkpoint import Saved
from mmcl.dist import ONE_PROCESS, Shard, connect, disconnect, free_port
from mmcl.errors import CheckpointError, TooManyBadSamples
from mmcl.model import ModelConfig, ThreeTowers, input_spec
from mmcl.towers import AudioConfig
from mmcl.types import ID_KINDS, MODALITIES, Batch


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters beside its word embedding: 32 px, 12 tokens, a quarter of a second."""
    tower = {"width": 32, "layers": 1, "heads": 2}
    clip = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, **tower},
    }
    audio = AudioConfig(clip_seconds=0.32, mels=32, hop_ms=10.0, **tower)
    return ModelConfig(**({"clip": clip, "audio": audio} | changes))


def tiny_model(seed: int = 0, **changes: Any) -> ThreeTowers:
    """`tiny_config` built with a seed."""
    torch.manual_seed(seed)
    return ThreeTowers(tiny_config(**changes))


def fake_batch(
    config: ModelConfig, masks: Mapping[str, Sequence[bool]], seed: int = 0, rows: slice = slice(None)
) -> Batch:
    """Random values for the rows whose mask is set; `rows` selects a rank's part of the same global batch."""
    spec, generator = input_spec(config), torch.Generator().manual_seed(seed)
    size = len(next(iter(masks.values())))
    everything = {
        "image": torch.randint(0, 256, (size, 3, spec.image_size, spec.image_size), generator=generator).byte(),
        "text": torch.randint(1, 49408, (size, spec.context_length), generator=generator),
        "audio": torch.randn(size, spec.clip_samples, generator=generator) * 0.1,
    }
    present = {name: torch.tensor(list(masks[name]))[rows] for name in MODALITIES}
    return Batch(
        size=len(present["image"]),
        values={name: everything[name][rows][present[name]] for name in MODALITIES},
        rows={name: present[name].nonzero().flatten() for name in MODALITIES},
        ids=fake_ids(seed, size)[rows],
        seeds=fake_ids(seed, size)[rows, 0],
    )


def fake_ids(seed: int, size: int) -> Tensor:
    """Rows of a batch of 100 samples at most are samples of their own, with captions and images of their own."""
    return (seed * 100 + torch.arange(size))[:, None].expand(size, len(ID_KINDS)).clone()


class FakeStream:
    """Batch `k` is random from seed `k`; each rank gets its slice; of every five rows, three lack one modality each."""

    def __init__(self, config: ModelConfig, batch_size: int = 12, shard: Shard = ONE_PROCESS) -> None:
        self.config, self.batch_size, self.shard = config, batch_size, shard

        self.number = 0

    def at(self, number: int) -> "FakeStream":
        """Itself, where batch `number` is the next one."""
        self.number = number
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["batch_size"] != self.batch_size:
            raise CheckpointError(f"batch_size was {state['batch_size']} and is {self.batch_size}")
        self.number = state["number"]

    def judge(self, skipped: int, rows: int) -> None:
        if skipped > rows:
            raise TooManyBadSamples(f"{skipped} of {rows}")

    def batches(self) -> Iterator[Batch]:
        own = self.batch_size // self.shard.world
        rows = slice(self.shard.rank * own, (self.shard.rank + 1) * own)
        masks = {
            name: [(row + lacking) % 5 != 0 for row in range(self.batch_size)]
            for lacking, name in enumerate(MODALITIES)
        }
        while True:
            self.number += 1
            yield fake_batch(self.config, masks, seed=self.number - 1, rows=rows)


class MemoryCheckpoints:
    """Checkpoints in a list."""

    def __init__(self) -> None:
        self.saved: list[Saved] = []

    def save(self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        copies = {name: tensor.clone() for name, tensor in state.items()}
        self.saved.append(Saved(step=step, state=copies, facts=dict(facts)))

    def latest(self) -> Saved | None:
        return self.saved[-1] if self.saved else None


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(shard, *args)` returned on each of `world` gloo processes on this machine, in rank order.

    `function` must be importable by name. An exception on any rank ends all of them and is raised here.
    """
    context = torch.multiprocessing.get_context("spawn")
    results, received = context.SimpleQueue(), context.Event()
    port = free_port()
    ranks = spawn(_one_rank, args=(world, port, results, received, function, args), nprocs=world, join=False)
    assert ranks is not None
    by_rank: dict[int, Any] = {}
    # A pipe holds 64 KiB, and tensors are handed over by the process that made them: read while the ranks live.
    while len(by_rank) < world and not ranks.join(timeout=0.02):
        while not results.empty():
            by_rank |= [results.get()]
    received.set()
    while not ranks.join():
        pass
    return [by_rank[rank] for rank in range(world)]


def _one_rank(
    rank: int, world: int, port: int, results: Any, received: Any, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    # What a launcher sets; accelerate and DeepSpeed look for it.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    shard = connect(rank, world, "127.0.0.1", port, timeout_s=120) if world > 1 else ONE_PROCESS
    try:
        results.put((rank, function(shard, *args)))
        received.wait()
    finally:
        disconnect()
