"""An objective on any number of ranks against the formula written out densely in float64, value and every gradient."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from rank_cases import mean_over_ranks, own_rows
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.dist import ONE_PROCESS, Shard, connect, disconnect, free_port
from mmcl.losses import tiles

Leaves = Mapping[str, Tensor]
Ours = Callable[..., Tensor]
"""(leaves of the whole batch, this rank's rows as a slice, shard, **options) -> this rank's loss."""
Dense = Callable[..., Tensor]
"""(leaves of the whole batch, **options) -> the loss, from the formula and nothing of mmcl."""


@dataclass(frozen=True)
class Case:
    """One batch for one objective. Functions must be importable by name."""

    ours: Ours
    dense: Dense
    leaves: Leaves
    """What has a gradient: every rank holds all of it and uses its rows."""
    splits: tuple[int, ...]
    """Rows of each rank."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What has none, for the whole batch too."""
    dtype: torch.dtype = torch.float64
    tile: tuple[int, int] = (3, 4)
    """Small, so that a few rows are several tiles."""

    def as_type(self, value: Any) -> Any:
        """Tensors of numbers in the type of the case."""
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def evaluate(case: Case, shard: Shard) -> dict[str, np.ndarray]:
    """Loss and gradients, averaged over ranks as engines do."""
    tiles.CPU_TILE = case.tile
    tiles.CPU_BLOCK, tiles.MIN_ROWS, tiles.FEW = 8, 2, 5
    leaves = {name: case.as_type(leaf).clone().requires_grad_() for name, leaf in case.leaves.items()}
    options = {name: case.as_type(value) for name, value in case.options.items()}
    loss = case.ours(leaves, own_rows(case.splits, shard.rank), shard, **options)
    loss.backward()
    found = {"loss": loss} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == {"loss", *leaves}, f"without a gradient: {leaves.keys() - found.keys()}"
    return {name: mean_over_ranks(tensor, shard).numpy() for name, tensor in found.items()}


def reference(case: Case) -> dict[str, np.ndarray]:
    """The same of the dense formula."""
    leaves = {name: leaf.double().clone().requires_grad_() for name, leaf in case.leaves.items()}
    options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.options.items()
    }
    loss = case.dense(leaves, **options)
    if loss.requires_grad:
        loss.backward()
    found = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"loss": loss.detach().numpy()} | {name: tensor.numpy() for name, tensor in found.items()}


def check(case: Case) -> None:
    """The case on as many ranks as it has splits is the dense formula: 1e-6 in float64, 2e-5 in float32.

    Of the largest element. In float32, of the terms it is a difference of where those are larger: a logit s has no
    digits below s * 2^-24, and each row pulls at its embedding with s / N before the pulls cancel. In float64 there are
    2^-29 as many of those, which only counts where a loss is next to nothing.
    """
    rtol, left = (1e-6, 1e-7) if case.dtype == torch.float64 else (2e-5, 1.0)
    expected = reference(case)
    scale = left * float(case.leaves["scale"].max())
    terms = {name: scale / max(1, sum(case.splits)) for name in expected} | {"loss": 0.05 * scale}
    ranks = [evaluate(case, ONE_PROCESS)] if len(case.splits) == 1 else pool(len(case.splits)).run(evaluate, case)
    for rank, found in enumerate(ranks):
        for name, value in expected.items():
            size = max(float(np.abs(value).max(initial=0.0)), terms[name])
            error = float(np.abs(found[name] - value).max(initial=0.0))
            assert found[name].shape == value.shape, (rank, name)
            assert error <= rtol * size, f"rank {rank}, {name}: off by {error:.3g} of {size:.3g} in {case}"


def unit(n: int, d: int, seed: int) -> Tensor:
    """Random unit vectors, float64."""
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def pair(n: int, d: int, seed: int, scale: float) -> dict[str, Tensor]:
    """The leaves of most objectives: x, y and the scale; y is near x, as in a model that has learnt something."""
    x = unit(n, d, seed)
    return {
        "x": x,
        "y": normalize(x + 0.7 * unit(n, d, seed + 1), dim=-1),
        "scale": torch.tensor(scale, dtype=torch.float64),
    }


@st.composite
def batches(draw: Any, worlds: Sequence[int] = (1, 2, 4), most: int = 9, least: int = 0) -> dict[str, Any]:
    """Sizes of a batch: rows of each rank (uneven, some empty), d, seed, scale and type."""
    world = draw(st.sampled_from(worlds))
    splits = tuple(draw(st.lists(st.integers(0, most), min_size=world, max_size=world)))
    if sum(splits) < least:
        splits = (*splits[:-1], splits[-1] + least)
    return {
        "splits": splits,
        "n": sum(splits),
        "d": draw(st.integers(1, 17)),
        "seed": draw(st.integers(0, 2**20)),
        "scale": draw(st.sampled_from([1.0, 14.3, 100.0])),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])),
    }


class RankPool:
    """gloo processes that live as long as the tests and run what they are sent, so that hypothesis can draw cases."""

    def __init__(self, world: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.tasks = [context.SimpleQueue() for _ in range(world)]
        self.results = [context.SimpleQueue() for _ in range(world)]
        port = free_port()
        self.processes = [
            context.Process(target=_serve, args=(rank, world, port, self.tasks[rank], self.results[rank]), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args, shard)` on every rank, in rank order; the function must be importable by name."""
        for task in self.tasks:
            task.put((function, args))
        answers = [result.get() for result in self.results]
        if failed := [error for error, _ in answers if error]:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]


def _serve(rank: int, world: int, port: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    shard = connect(rank, world, "127.0.0.1", port, timeout_s=20)
    try:
        while True:
            function, args = tasks.get()
            try:
                results.put(("", function(*args, shard)))
            except Exception:
                results.put((traceback.format_exc(), None))
    finally:
        disconnect()


@cache
def pool(world: int) -> RankPool:
    """The pool of so many ranks; its processes end with this one."""
    return RankPool(world)
