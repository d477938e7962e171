"""Samples per second of our stream beside other pipelines on the same shards; what order, state and resuming cost.

Every pipeline runs in a process of its own with as many workers as ours, is first shown to give what the shards hold,
and stands still while it is not its turn. The floor is native decoding and resizing of bytes that lie in memory.
Processor time is that of all processes of a pipeline, which a busy machine changes less than their rate.
"""

import argparse
import contextlib
import itertools
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Result, alternate, parser, ratio, report, seconds_of
from pipelines import shards
from pipelines.agreement import Reference
from pipelines.bare import decoder_of, members
from pipelines.turns import Pipeline, Turn, race, times

from mmcl.types import InputSpec
from mmcl_data.index import build_index
from mmcl_data.order import Order
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig

OURS, NORMALISED, PLAIN, FLOOR = "mmcl ShardStream", "mmcl, normalised here", "plain webdataset", "floor: decoding"
OPEN_CLIP, ENERGON = "open_clip 3.3.0", "Megatron-Energon"
MISSING = {
    OPEN_CLIP: "--open-clip PYTHON (pip install open_clip_torch==3.3.0 webdataset==0.2.86 pandas braceexpand)",
    ENERGON: "--energon PYTHON (pip install megatron-energon==7.4.1 open_clip_torch==3.3.0)",
}
Turns = Mapping[str, list[Turn]]
MANY = 2 * 10**9
"""Samples of an order that nothing was indexed for."""
SHARDS = 100
"""Of what is resumed."""


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    arguments.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="of each pipeline (default: 1 2)")
    arguments.add_argument("--batches", type=int, default=16, help="timed in a turn (default: 16)")
    arguments.add_argument("--batch-size", type=int, default=64, help="of images; of sounds a quarter (default: 64)")
    arguments.add_argument("--images", type=int, default=2000, help="JPEGs with captions (default: 2000)")
    arguments.add_argument("--side", type=int, default=512, help="of a JPEG, in pixels (default: 512)")
    arguments.add_argument("--sounds", type=int, default=500, help="flacs as long as a clip (default: 500)")
    arguments.add_argument("--long-sounds", type=int, default=24, help="flacs 30 times as long (default: 24)")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of a clip (default: 10)")
    arguments.add_argument("--index-samples", type=int, default=10**6, help="to resume in (default: 1000000)")
    arguments.add_argument("--open-clip", metavar="PYTHON", help="an interpreter that has open_clip's own pipeline")
    arguments.add_argument("--energon", metavar="PYTHON", help="an interpreter that has Megatron-Energon")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the pipelines, which may stand still, as well
    results: dict[str, Result] = {}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            results |= PARTS[part](args, Path(folder))
    report(results, args.json)


def spec_of(args: argparse.Namespace) -> InputSpec:
    """What a model reads."""
    return InputSpec(
        image_size=min(224, args.side // 2),
        resize_mode="shortest",
        sample_rate=48_000,
        clip_samples=round(args.seconds * 48_000),
        context_length=77,
    )


# Pipelines that take turns


class Track:
    """The shards in a folder.

    Args:
        args: of the program.
        folder: that holds them.
        batch_size: of all pipelines.
        shuffle: samples in the buffers of pipelines that have one.
        batches: timed in a turn; by default as the program was told.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, batch_size: int, *, shuffle: int = 200, batches: int = 0
    ) -> None:
        self.args, self.folder = args, folder
        self.batches = batches or args.batches
        self.options: dict[str, Any] = {
            "shards": str(folder),
            "tars": [str(path) for path in sorted(folder.glob("*.tar"))],
            "spec": asdict(spec_of(args)),
            "batch_size": batch_size,
            "shuffle": shuffle,
        }

    def start(self, program: str, workers: int, **more: Any) -> Pipeline:
        """A pipeline on them."""
        return Pipeline(program, **self.options, workers=workers, **more)

    def race(self, pipelines: Mapping[str, Pipeline], workers: int) -> Turns:
        """See that pipelines give what the shards hold, let them take turns, print a table; then they end."""
        with contextlib.ExitStack() as stack:
            for pipeline in pipelines.values():
                stack.enter_context(pipeline)
            reference = Reference(self.folder, self.options["spec"])
            for name, pipeline in pipelines.items():
                if name != FLOOR:
                    reference.check(name, pipeline)
            turns = race(pipelines, self.args.rounds, ahead(workers), self.batches)
        print(f"\n{self.folder.name}, {workers} worker(s) each, batches of {self.options['batch_size']}")
        print(f"{'':24}{'rows/s':>10}{'x floor':>10}{'ours is x':>12}{'cpu ms/row':>14}{'ours is x':>12}")
        for name, each in turns.items():
            wall, cpu = (statistics.median(getattr(turn, what) for turn in each) for what in ("wall", "cpu"))
            of_floor = times(turns[FLOOR], each, "wall") * (1 if name == FLOOR else workers)
            of_wall, of_cpu = (times(turns[OURS], each, what) for what in ("wall", "cpu"))
            print(
                f"{name:24}{1 / wall:10.0f}{of_floor:10.2f}{of_wall:12.2f}{cpu * 1e3:14.3f}{of_cpu:12.2f}", flush=True
            )
        return turns


def ahead(workers: int) -> int:
    """Batches at least as many as a pipeline has ready: torch's loaders two for each worker, ours three."""
    return 2 * workers + 4


def over(turns: Turns, rival: str, target: float) -> Result:
    """How many times as many rows a second as the rival's ours gave."""
    return Result(value=times(turns[OURS], turns[rival], "wall"), target=target, better="higher")


def images(args: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """JPEGs with captions."""
    track = Track(args, shards.images(folder / "images", args.images, args.side), args.batch_size)
    interpreters = {OPEN_CLIP: args.open_clip, ENERGON: args.energon}
    for name, python in interpreters.items():
        if python is None:
            print(f"{name} is left out; to have it: {MISSING[name]}")
    results: dict[str, Result] = {}
    for workers in args.workers:
        start = partial(track.start, workers=workers)
        pipelines = {OURS: start("ours"), NORMALISED: start("ours", normalised=True), PLAIN: start("plain")}
        if args.open_clip:
            pipelines[OPEN_CLIP] = start("openclip", python=args.open_clip)
        if args.energon:
            pipelines[ENERGON] = start("energon", python=args.energon, folder=str(folder / f"energon-{workers}"))
        turns = track.race({**pipelines, FLOOR: start("bare")}, workers)
        targets = {PLAIN: ("webdataset", 2.0), OPEN_CLIP: ("open_clip", 3.0), ENERGON: ("energon", 1.0)}
        for rival, (label, target) in targets.items():
            if rival in turns:
                results[f"images_{workers}_workers_rate_over_{label}"] = over(turns, rival, target)
    return results


def sounds(args: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """Flacs as long as a clip at the model's rate, and long ones in stereo at another rate."""
    short = shards.sounds(folder / "sounds", args.sounds, args.seconds)
    long = shards.sounds(folder / "long sounds", args.long_sounds, 30 * args.seconds, rate=44_100, channels=2)
    size = max(1, args.batch_size // 4)
    few = {"batch_size": max(1, size // 4), "batches": max(1, args.batches // 4)}  # a rival takes seconds for a batch
    tracks = {"sounds": (Track(args, short, size), 1.0), "long_sounds": (Track(args, long, **few, shuffle=0), 1.5)}
    results: dict[str, Result] = {}
    for label, (track, target) in tracks.items():
        for workers in args.workers:
            start = partial(track.start, workers=workers)
            turns = track.race({OURS: start("ours"), PLAIN: start("plain"), FLOOR: start("bare")}, workers)
            results[f"{label}_{workers}_workers_rate_over_webdataset"] = over(turns, PLAIN, target)
    return results


def corrupt(args: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """One JPEG of twenty is damaged: cut off, or without a header."""
    clean = Track(args, shards.images(folder / "clean", args.images, args.side), args.batch_size)
    damaged = Track(args, shards.images(folder / "damaged", args.images, args.side, damaged=0.05), args.batch_size)
    workers = args.workers[0]
    with clean.start("ours", workers) as of_clean, damaged.start("ours", workers) as of_damaged:
        turns = race({"clean": of_clean, "damaged": of_damaged}, args.rounds, ahead(workers), args.batches)
    rate = times(turns["damaged"], turns["clean"], "wall")
    of_cpu = times(turns["damaged"], turns["clean"], "cpu")
    print(f"\n5 % of the images damaged: {rate:.3f} of the rate of clean ones, by processor time {of_cpu:.3f}")
    return {"corrupt_rate_over_clean": Result(value=rate, target=0.94, better="higher")}


# Order, state and resuming


def order(args: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """Two billion samples, and what the order of a small stream costs beside its decoding."""
    slowest_start, slowest_look = 0.0, 0.0
    rng = np.random.default_rng(0)
    for slice_size in (1, 64):
        lanes = np.arange(8)

        def begin(slice_size: int = slice_size, lanes: np.ndarray = lanes) -> None:
            made = Order(samples=MANY, lanes=8, seed=1, source=0, slice_size=slice_size)
            made.at(lanes, np.zeros(8, dtype=np.int64))

        slowest_start = max(slowest_start, seconds_of(begin))
        there = Order(samples=MANY, lanes=8, seed=1, source=0, slice_size=slice_size)
        places = [np.array([place]) for place in rng.integers(0, 10 * there.lane_length, 1000)]
        looks = [seconds_of(partial(there.at, lanes[:1], place)) for place in places]
        slowest_look = max(slowest_look, statistics.median(looks))
    track = Track(args, shards.images(folder / "images", 300, args.side), args.batch_size)
    return {
        "order_of_2e9_ready_s": Result(value=slowest_start, target=2.0, better="lower"),
        "order_of_2e9_lookup_us": Result(value=slowest_look * 1e6, target=100.0, better="lower"),
        "order_and_state_over_decoding": Result(value=_overhead(args, track), target=0.01, better="lower"),
    }


def _overhead(args: argparse.Namespace, track: Track) -> float:
    config = DataConfig(sources={"data": SourceConfig(shards=str(track.folder))})
    stream = ShardStream(config, spec_of(args), args.batch_size, seed=0)
    decode = decoder_of(track.options["spec"])
    held = list(itertools.islice(members(track.options["tars"]), args.batch_size))
    repeats = 50

    def order_and_state() -> None:
        for _ in range(repeats):
            stream.tasks(stream.cursor)
            stream.cursor = stream.after(stream.cursor)
            stream.state_dict()

    def decoding() -> None:
        for extension, data in held:
            decode(extension, data)

    seconds = alternate({"order": order_and_state, "floor: decoding": decoding}, args.rounds)
    return ratio(seconds, "order", "floor: decoding") / repeats * len(held) / args.batch_size


def resume(args: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """From an index on disk to the first batch, in a process that has had one before."""
    linked = shards.linked(folder, args.index_samples, SHARDS)
    config = DataConfig(sources={"data": SourceConfig(shards=str(linked))})
    print(
        f"\n{args.index_samples} samples indexed in {seconds_of(partial(build_index, str(linked), folder / 'i')):.1f} s"
    )
    config = DataConfig(sources={"data": SourceConfig(shards=str(linked), index=str(folder / "i"))})
    stream = ShardStream(config, spec_of(args), args.batch_size, seed=0)
    next(stream.batches())
    epoch = args.index_samples // args.batch_size

    def first_batch(batches: int) -> None:
        state = _moved(stream, batches)
        resumed = ShardStream(config, spec_of(args), args.batch_size, seed=0)
        resumed.load_state_dict(state)
        next(resumed.batches())

    slowest = 0.0
    for name, batches in {"at 0": 0, "in the middle": epoch // 2, "in epoch 7": 7 * epoch + epoch // 3}.items():
        seconds = statistics.median(seconds_of(partial(first_batch, batches)) for _ in range(args.rounds))
        print(f"first batch {name}: {seconds:.3f} s")
        slowest = max(slowest, seconds)
    return {"resume_first_batch_s": Result(value=slowest, target=1.0, better="lower")}


def _moved(stream: ShardStream, batches: int) -> dict[str, Any]:
    """The state of a stream after so many batches."""
    slots = batches * stream.slots
    return {**stream.state_dict(), "turn": slots, "taken": {"data": slots}, "rows": batches * stream.batch_size}


PARTS: Mapping[str, Callable[[argparse.Namespace, Path], dict[str, Result]]] = {
    part.__name__: part for part in (images, sounds, corrupt, order, resume)
}


if __name__ == "__main__":
    main()
