"""The world on disk: training and test shards of three sources, two zero-shot sets, and world.json over all.

    out/{train,test}/{image_text,audio_text,image_audio_text}/NNNNNN.tar
    out/classes/{image,audio}/   classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt, test/0.tar
    out/world.json               written last: a world without it is not whole

The zero-shot sets have CLIP_benchmark's WebDataset layout, https://github.com/LAION-AI/CLIP_benchmark.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError
from mmcl_data.build.world.config import WorldConfig
from mmcl_data.build.world.grammar import SINGLE_IMAGE, SINGLE_SOUND
from mmcl_data.build.world.pairs import SOURCES, Source, World, make_world
from mmcl_data.build.world.samples import SAMPLES_PER_CLASS, Job, class_pairs, job_meaning, make_samples
from mmcl_data.processes import process_pool

FORMAT = 1
"""Of world.json and the json members. A change of the bytes that a seed gives raises it, too."""
SHARES: dict[Source, float] = {"image_text": 0.4, "audio_text": 0.3, "image_audio_text": 0.3}
"""Of the training samples; what rounding leaves goes to the first."""
CLASS_SETS: dict[str, tuple[Source, tuple[str, ...]]] = {
    "image": ("image_text", SINGLE_IMAGE),
    "audio": ("audio_text", SINGLE_SOUND),
}
"""Folder under `classes`: what its samples are, and the templates."""

_CHUNK = 64  # samples a worker makes at once
_ATTEMPTS = 50  # to find a test description not used before; a small vocabulary runs out

_Sample = dict[str, bytes | str]
_Run = Callable[[Iterable[Job]], Iterator[_Sample]]


def build_world(
    config: WorldConfig,
    out: Path,
    *,
    samples: int,
    seed: int,
    test_samples: int = 512,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a world to `out` and return the content of its world.json.

    Args:
        samples: Training samples over all sources.
        test_samples: Test samples of each source.
        workers: Processes that make samples; their number does not change a byte.
        progress: Called with (samples made, samples in all) from this process.

    Raises:
        ConfigError: a number out of range, an `out` that is not empty, or a vocabulary too small for `held_out`.
    """
    _check(out, {"samples": (samples, len(SOURCES) + 1), "test_samples": (test_samples, 1), "workers": (workers, 1)})
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative: choose 0 or more")
    world = make_world(config, seed)
    train = _shares(samples)
    classes = {name: len(class_pairs(world, source)) * SAMPLES_PER_CLASS for name, (source, _) in CLASS_SETS.items()}
    counts = {f"train/{source}": n for source, n in train.items()}
    counts |= {f"test/{source}": test_samples for source in SOURCES}
    counts |= {f"classes/{name}/test": n for name, n in classes.items()}
    shards: dict[str, str] = {}
    with _runner(world, workers, sum(counts.values()), progress) as run:
        for source in SOURCES:
            jobs = (Job("train", source, index) for index in range(train[source]))
            shards |= _write(run(jobs), out, f"train/{source}", config.samples_per_shard)
        for source in SOURCES:
            shards |= _write(
                run(_test_jobs(world, source, test_samples)), out, f"test/{source}", config.samples_per_shard
            )
        for name, n in classes.items():
            shards |= _write_classes(run, world, out, name, n)
    summary = {
        "format": FORMAT,
        "seed": seed,
        "config": asdict(config),
        "held_out": {
            "image": [list(pair) for pair in world.held_out_image],
            "audio": [list(pair) for pair in world.held_out_audio],
        },
        "counts": counts,
        "shards": shards,
    }
    staged = out / ".world.json.tmp"
    staged.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    staged.replace(out / "world.json")
    return summary


def _check(out: Path, numbers: dict[str, tuple[int, int]]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"{name}={value} is too few: at least {least}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not an empty folder: name a new folder or remove it")


def _shares(samples: int) -> dict[Source, int]:
    counts: dict[Source, int] = {source: max(1, int(samples * share)) for source, share in SHARES.items()}
    counts[SOURCES[0]] = samples - sum(counts[source] for source in SOURCES[1:])
    return counts


def _test_jobs(world: World, source: Source, count: int) -> Iterator[Job]:
    """Jobs whose descriptions differ as far as the vocabulary allows, so that retrieval has one right answer."""
    used = set()
    for index in range(count):
        attempts = (Job("test", source, index, attempt) for attempt in range(_ATTEMPTS))
        meant = ((job, job_meaning(world, job)) for job in attempts)
        fresh = next(((job, what) for job, what in meant if what not in used), None)
        if fresh is not None:
            used.add(fresh[1])
        yield fresh[0] if fresh is not None else Job("test", source, index)


def _write(samples: Iterator[_Sample], out: Path, part: str, samples_per_shard: int) -> dict[str, str]:
    from mmcl_data.build.shards import (
        write_shards,
    )  # its library imports torch, which workers and the CLI can do without

    written = write_shards(samples, out / part, samples_per_shard)
    return {f"{part}/{shard.name}": shard.sha256 for shard in written}


def _write_classes(run: _Run, world: World, out: Path, name: str, count: int) -> dict[str, str]:
    source, templates = CLASS_SETS[name]
    folder = out / "classes" / name
    jobs = (Job("classes", source, index) for index in range(count))
    (digest,) = _write(run(jobs), out, f"classes/{name}/test", count).values()
    (folder / "test" / "000000.tar").rename(folder / "test" / "0.tar")
    (folder / "test" / "nshards.txt").write_text("1\n", encoding="utf-8")
    names = [f"{attribute} {noun}" for attribute, noun in class_pairs(world, source)]
    _write_lines(folder / "classnames.txt", names)
    _write_lines(folder / "zeroshot_classification_templates.txt", [t.format(bare="{c}") for t in templates])
    return {f"classes/{name}/test/0.tar": digest}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def _runner(world: World, workers: int, total: int, progress: Callable[[int, int], None] | None) -> Iterator[_Run]:
    """What turns jobs into samples, in order, in this process or in `workers` others."""
    done = 0

    def count(made: list[_Sample]) -> list[_Sample]:
        nonlocal done
        done += len(made)
        if progress is not None:
            progress(done, total)
        return made

    if workers == 1:
        yield lambda jobs: chain.from_iterable(count(make_samples(world, c)) for c in _chunks(jobs))
        return
    with process_pool(workers, [make_samples.__module__]) as pool:
        yield lambda jobs: chain.from_iterable(map(count, _in_order(pool, world, jobs, ahead=3 * workers)))


def _in_order(pool: ProcessPoolExecutor, world: World, jobs: Iterable[Job], ahead: int) -> Iterator[list[_Sample]]:
    """Results in the order of `jobs`, at most `ahead` chunks of them waiting in memory."""
    waiting: deque[Future[list[_Sample]]] = deque()
    for jobs_of_chunk in _chunks(jobs):
        waiting.append(pool.submit(make_samples, world, jobs_of_chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    iterator = iter(jobs)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
