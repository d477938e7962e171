"""What the benchmarks share: taking turns, fresh processes, time, memory, bytes sent, and the JSON of `make bench`."""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcl.dist import ONE_PROCESS, connect, disconnect, free_port

T = TypeVar("T")
Seconds = Mapping[str, list[float]]
"""By contestant, one figure for each round."""

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A figure and what it should be."""

    value: float
    target: float
    better: Literal["lower", "higher"]

    @property
    def met(self) -> bool:
        """Whether the value is as good as the target."""
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def take_turns(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each gave in each round. Whatever else the machine does meanwhile falls on all of them alike."""
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            results[name].append(run())
    return results


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Time the contestants in turn, `rounds` times after one round that does not count."""
    timed = {name: partial(seconds_of, run) for name, run in contestants.items()}
    return {name: times[1:] for name, times in take_turns(timed, rounds + 1).items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """How long it took."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_fresh_processes(world: int, function: Callable[..., T], *args: Any) -> list[T]:
    """What `function(shard, *args)` returned on each of `world` new gloo processes, in rank order.

    They are forked off a server that has imported modules and computed nothing, which saves importing them each time.
    """
    context, port = get_context("forkserver"), free_port()
    context.set_forkserver_preload(["mmcl.losses", "open_clip.loss"])
    with ProcessPoolExecutor(world, mp_context=context) as processes:
        ranks = [processes.submit(_as_rank, rank, world, port, function, args) for rank in range(world)]
        return [rank.result() for rank in ranks]


def _as_rank(rank: int, world: int, port: int, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    shard = connect(rank, world, "127.0.0.1", port, timeout_s=120) if world > 1 else ONE_PROCESS
    try:
        return function(shard, *args)
    finally:
        disconnect()


def peak_memory(run: Callable[[], Any]) -> int:
    """By how many bytes the resident memory of this process rose while `run` ran, at most; one page at least. Linux.

    From now on blocks of a megabyte have pages of their own, which are gone as soon as they are freed, so that what is
    kept for later use does not count. That costs time: measure it in another process.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    libc.malloc_trim(0)  # else `run` gets what was freed before and not given back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    run()
    return max(4096, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank must send for the collectives within, whoever calls them.

    That is what the best algorithm sends on a ring, on any backend: of W ranks, (W - 1) / W of what is gathered,
    scattered or exchanged, twice that for an all-reduce, and all of a message to one rank.
    """

    PAYLOADS: Mapping[str, tuple[int, int] | None] = {
        "allgather_": (0, 1),
        "_allgather_base_": (0, 1),
        "reduce_scatter_": (1, 1),
        "_reduce_scatter_base_": (1, 1),
        "alltoall_": (1, 1),
        "alltoall_base_": (1, 1),
        "scatter_": (1, 1),  # only its root has any
        "allreduce_": (0, 2),
        "recv_": None,
        "barrier": None,
    }
    """By operator, which argument holds what travels, and how often."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.bytes = world, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.bytes += self._cost(func.name().split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _cost(self, operator: str, args: Sequence[Any]) -> int:
        if operator == "send":
            return _size(args[0])
        assert operator in self.PAYLOADS, f"say in PAYLOADS what {operator} sends"
        payload = self.PAYLOADS[operator]
        return 0 if payload is None else _size(args[payload[0]]) * payload[1] * (self.world - 1) // self.world


def _size(tensors: Tensor | Sequence[Any]) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_size, tensors))


def ratio(seconds: Seconds, over: str, under: str) -> float:
    """The median over rounds of how many times as long `over` took as `under` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def table(seconds: Seconds, floor: str, units: float, unit: str) -> str:
    """One line a contestant: median time, `units` of work by second, and how many times the floor it took."""
    lines = [f"{'':24}{'median ms':>12}{unit + '/s':>14}{'x floor':>10}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"{name:24}{median * 1e3:12.1f}{units / median:14.0f}{ratio(seconds, name, floor):10.2f}")
    return "\n".join(lines)


def parser(doc: str | None, rounds: int = 9) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    return made


def report(results: Mapping[str, Result], file: Path | None) -> None:
    """Print the figures and write them to `file`, as `{name: {"value": v, "target": t, "better": b}}`."""
    for name, result in results.items():
        verdict = "met" if result.met else "MISSED"
        print(f"{name}: {result.value:.3f} (target {result.target:g}, {result.better} is better: {verdict})")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        figures = {n: {"value": r.value, "target": r.target, "better": r.better} for n, r in results.items()}
        file.write_text(json.dumps(figures, indent=1) + "\n")
