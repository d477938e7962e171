"""Rows decoded side by side: in this thread, in threads, or in processes; in order, and the same whoever does it.

A task says all there is to know about a row, so that workers hold no state that matters. A sample that cannot be used
is replaced by another one of its source that has the same modalities, and which one follows from its seed: positions
never shift. In processes a decoder that crashes or never ends costs its sample and nothing else: the rows that were in
hand are decoded again, one by one, until it is found.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mmcl.errors import DataError, SampleRejected, TooManyBadSamples
from mmcl.types import Batch, InputSpec
from mmcl_data.blobs import Blobs, Reading
from mmcl_data.index import KINDS, Index, open_index
from mmcl_data.order import mix
from mmcl_data.samples import DecodeConfig, Draw, Row, collate, decode_row
from mmcl_data.scan import read_sample

log = logging.getLogger("mmcl.data")

Kind = Literal["processes", "threads"]
ATTEMPTS = 8
"""Samples that are tried for one row."""


class Task(NamedTuple):
    """One row to decode."""

    source: int
    sample: int
    """Of the source."""
    seed: int
    """Of the sample in its epoch."""


class Quarantined(NamedTuple):
    """A sample that could not be used."""

    source: int
    sample: int
    shard: str
    key: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pile:
    """What workers know of one source."""

    name: str
    folder: Path
    """Of its index."""
    captions: Mapping[str, float]
    first: int
    """Of its samples among those of all sources."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What workers know."""

    spec: InputSpec
    decode: DecodeConfig
    reading: Reading
    piles: tuple[Pile, ...]
    blobs: Blobs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blobs", Blobs(self.reading))

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay where they are
        return _recipe, (self.spec, self.decode, self.reading, self.piles)

    @cached_property
    def indices(self) -> list[Index]:
        """Of the sources."""
        return [open_index(pile.folder) for pile in self.piles]


def _recipe(spec: InputSpec, decode: DecodeConfig, reading: Reading, piles: tuple[Pile, ...]) -> Recipe:
    return Recipe(spec=spec, decode=decode, reading=reading, piles=piles)


Outcome = tuple[Batch, list[Quarantined]]
Poison = frozenset[tuple[int, int]]
"""Source and sample of what crashed a decoder."""


def decode_tasks(recipe: Recipe, tasks: Sequence[Task], poison: Poison = frozenset()) -> Outcome:
    """The rows of some tasks, and what could not be used.

    Raises:
        ShardMissing, ShardDamaged, DataError: a shard is gone, was written again or cannot be read.
        TooManyBadSamples: of none of `ATTEMPTS` samples a row could be made.
    """
    rows, rejected = [], []
    for task in tasks:
        rows.append(_decode(recipe, task, poison, rejected))
    return collate(rows, recipe.spec, len(rejected)), rejected


def _decode(recipe: Recipe, task: Task, poison: Poison, rejected: list[Quarantined]) -> Row:
    pile, index = recipe.piles[task.source], recipe.indices[task.source]
    for attempt in range(ATTEMPTS):
        sample = task.sample if attempt == 0 else substitute(index.kinds, task, attempt)
        entry, shard = index.entry(sample), index.shard_of(sample).path
        try:
            if (task.source, sample) in poison:
                raise SampleRejected(shard, entry.key, "its decoder crashed or did not end")
            members = read_sample(recipe.blobs, shard, entry)
            draw = Draw(seed=mix(task.seed, attempt), captions=pile.captions)
            row = decode_row(shard, entry.key, members, recipe.spec, draw=draw, config=recipe.decode)
        except SampleRejected as error:
            rejected.append(Quarantined(task.source, sample, error.shard, error.key, error.cause))
            continue
        row.ids["sample"], row.seed = pile.first + sample, mix(task.seed, attempt) >> 1
        return row
    raise TooManyBadSamples(
        f"source {pile.name}: {ATTEMPTS} samples in a row could not be used, the last {error_of(rejected)}; "
        "`mmcl data check` finds all"
    )


def error_of(rejected: Sequence[Quarantined]) -> str:
    """Of the last of some samples, where and why."""
    return f"{rejected[-1].shard}: sample {rejected[-1].key!r}: {rejected[-1].cause}"


def substitute(kinds: np.ndarray, task: Task, attempt: int) -> int:
    """Another sample with the same members; the sample itself where there is none."""
    size, wanted = len(kinds), int(kinds[task.sample])
    place = mix(task.seed, task.sample, attempt) % size
    for start in range(place, place + size, _STRIDE):
        run = np.arange(start, min(start + _STRIDE, place + size)) % size
        fits = run[(kinds[run] == wanted) & (run != task.sample)]
        if len(fits):
            return int(fits[0])
    return task.sample


_STRIDE = 4096


class Workers:
    """Decodes batches of tasks, several at once, and gives them in their order. Use it as a context.

    Args:
        recipe: what to decode how.
        count: workers; 0 decodes in this thread.
        kind: what they are.
        ahead: batches that are begun before the one that is waited for is taken.
        patience_s: a chunk of rows that takes a process longer than this holds a decoder that does not end.
    """

    def __init__(self, recipe: Recipe, *, count: int, kind: Kind, ahead: int, patience_s: float) -> None:
        self.recipe, self.count, self.kind = recipe, count, kind
        self.ahead, self.patience_s = max(1, ahead), patience_s
        self.pool: Executor | None = None
        self.poison: Poison = frozenset()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they were at is lost."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            _end(self.pool)
            self.pool = None

    def run(self, batches: Iterable[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """For each batch of tasks its rows in chunks, in order."""
        if self.count == 0:
            for tasks in batches:
                yield [decode_tasks(self.recipe, tasks)]
            return
        begun: deque[list[_Chunk]] = deque()
        source = iter(batches)
        while True:
            while len(begun) < self.ahead and (tasks := next(source, None)) is not None:
                begun.append([self._begin(part) for part in self._cut(tasks)])
            if not begun:
                return
            chunks = begun.popleft()
            yield [self._end_chunk(chunk, [chunks, *begun]) for chunk in chunks]

    def _cut(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """Chunks of rows: two for each worker, so that a slow one is not waited for long."""
        size = max(1, -(-len(tasks) // (2 * self.count)))
        return [tasks[start : start + size] for start in range(0, len(tasks), size)]

    def _begin(self, tasks: Sequence[Task]) -> "_Chunk":
        return _Chunk(tasks, self._submit(tasks))

    def _submit(self, tasks: Sequence[Task]) -> Future[Outcome]:
        if self.pool is None:
            self.pool = self._start(self.count)
        if self.kind == "threads":
            return self.pool.submit(decode_tasks, self.recipe, tasks)
        return self.pool.submit(_decode_there, tasks, self.poison)

    def _start(self, count: int) -> Executor:
        if self.kind == "threads":
            return ThreadPoolExecutor(count, thread_name_prefix="decode")
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return ProcessPoolExecutor(count, mp_context=context, initializer=_begin_there, initargs=(self.recipe,))

    def _end_chunk(self, chunk: "_Chunk", begun: Iterable[list["_Chunk"]]) -> Outcome:
        for _ in range(len(chunk.tasks) + 2):
            try:
                return chunk.future.result(self.patience_s if self.kind == "processes" else None)
            except (BrokenProcessPool, TookTooLong) as error:
                log.warning("a decoder %s; looking for its sample", _fate(error))
                assert self.pool is not None
                _end(self.pool)
                self.pool = None
                self.poison |= self._culprits(chunk.tasks)
                for other in (other for chunks in begun for other in chunks):
                    if other is chunk or not _is_done(other.future):
                        other.future = self._submit(other.tasks)
        raise DataError(f"decoders go on crashing at the {len(chunk.tasks)} rows from sample {chunk.tasks[0].sample}")

    def _culprits(self, tasks: Sequence[Task]) -> Poison:
        """Which of some samples crash a decoder that has nothing else to do."""
        found: set[tuple[int, int]] = set()
        pool = self._start(1)
        for task in tasks:
            try:
                pool.submit(_decode_there, [task], self.poison | found).result(self.patience_s)
            except (BrokenProcessPool, TookTooLong):
                found.add((task.source, task.sample))
                _end(pool)
                pool = self._start(1)
            except DataError:
                continue  # will come up again in its place
        _end(pool)
        return frozenset(found)


@dataclass(slots=True)
class _Chunk:
    tasks: Sequence[Task]
    future: Future[Outcome]


def _is_done(future: Future[Outcome]) -> bool:
    """Whether it has a result that was not lost with the pool."""
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


def _fate(error: Exception) -> str:
    return "crashed" if isinstance(error, BrokenProcessPool) else "does not end"


def _end(pool: Executor) -> None:
    """End the processes of a pool at once: one may be in a decoder that never returns."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(5)


_there: list[Recipe] = []
"""In a worker process, its recipe."""


def _begin_there(recipe: Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one hears it too
    torch.set_num_threads(1)
    _there[:] = [recipe]


def _decode_there(tasks: Sequence[Task], poison: Poison) -> Outcome:
    return decode_tasks(_there[0], tasks, poison)


def kind_names(bits: int) -> str:
    """What a sample has, in words."""
    return "+".join(kind for number, kind in enumerate(KINDS) if bits >> number & 1) or "nothing"


Quarantine = Callable[[Quarantined], None]
