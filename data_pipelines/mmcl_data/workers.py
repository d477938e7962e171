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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmcl.errors import DataError, SampleRejected, TooManyBadSamples
from mmcl.types import Batch, InputSpec
from mmcl_data.blobs import Blobs, Reading, scheme_of, shown
from mmcl_data.index import KINDS, Index, open_index
from mmcl_data.order import mix
from mmcl_data.processes import process_pool
from mmcl_data.samples import DecodeConfig, Draw, Row, collate, decode_row, wanted
from mmcl_data.scan import read_sample
from mmcl_data.transit import Packer, Packet, Unpacker
from mmcl_data.unindexed import GrowingIndex

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
    growing: tuple[str, ...] | None = None
    """Its shards, if there is no index yet; its samples have no number among all."""


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
    def readers(self) -> ThreadPoolExecutor:
        """Threads that read remote samples ahead of the decoder."""
        return ThreadPoolExecutor(self.reading.reads, thread_name_prefix="read")

    @cached_property
    def indices(self) -> list[Index | GrowingIndex]:
        """Of the sources."""
        return [
            open_index(pile.folder) if pile.growing is None else GrowingIndex(pile.folder, pile.growing, self.reading)
            for pile in self.piles
        ]


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
    for task, early in zip(tasks, _read_early(recipe, tasks), strict=True):
        rows.append(_decode(recipe, task, poison, rejected, early))
    return collate(rows, recipe.spec, len(rejected)), rejected


Members = dict[str, bytes]


def _read_early(recipe: Recipe, tasks: Sequence[Task]) -> list[Future[Members] | None]:
    """The members of samples behind a slow line, many at once; local ones are read when their turn comes."""
    remote = [scheme_of(recipe.indices[task.source].shard_of(task.sample).path) for task in tasks]
    if len(tasks) == 1 or not any(remote):
        return [None] * len(tasks)
    return [
        recipe.readers.submit(_members, recipe, task.source, task.sample) if there else None
        for task, there in zip(tasks, remote, strict=True)
    ]


def _members(recipe: Recipe, source: int, sample: int) -> Members:
    index = recipe.indices[source]
    entry, shard = index.entry(sample), index.shard_of(sample).path
    return read_sample(recipe.blobs, shard, wanted(shard, entry, facts=bool(recipe.piles[source].captions)))


def _decode(
    recipe: Recipe, task: Task, poison: Poison, rejected: list[Quarantined], early: Future[Members] | None = None
) -> Row:
    pile, index = recipe.piles[task.source], recipe.indices[task.source]
    for attempt in range(ATTEMPTS):
        sample = sample_of(recipe, task, attempt)
        entry, shard = index.entry(sample), index.shard_of(sample).path
        try:
            if (task.source, sample) in poison:
                raise SampleRejected(shown(shard), entry.key, "its decoder crashed or did not end")
            members = early.result() if early and attempt == 0 else _members(recipe, task.source, sample)
            draw = Draw(seed=mix(task.seed, attempt), captions=pile.captions)
            row = decode_row(shard, entry.key, members, recipe.spec, draw=draw, config=recipe.decode)
        except SampleRejected as error:
            rejected.append(Quarantined(task.source, sample, error.shard, error.key, error.cause))
            continue
        row.seed = mix(task.seed, attempt) >> 1
        if pile.growing is None:
            row.ids["sample"] = pile.first + sample
        return row
    raise TooManyBadSamples(
        f"source {pile.name}: {ATTEMPTS} samples in a row could not be used, the last {error_of(rejected)}; "
        "`mmcl data check` finds all"
    )


def error_of(rejected: Sequence[Quarantined]) -> str:
    """Of the last of some samples, where and why."""
    return f"{rejected[-1].shard}: sample {rejected[-1].key!r}: {rejected[-1].cause}"


def sample_of(recipe: Recipe, task: Task, attempt: int) -> int:
    """The sample that is tried for a task: its own first, then others that take its place."""
    if attempt == 0:
        return task.sample
    kinds, first = recipe.indices[task.source].around(task.sample)
    return first + substitute(kinds, task._replace(sample=task.sample - first), attempt)


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
        self.unpacker = Unpacker()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they were at is lost."""
        if self.pool is not None:
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

    def _submit(self, tasks: Sequence[Task]) -> Future[Any]:
        if self.pool is None:
            self.pool = self.start(self.count)
        if self.kind == "threads":
            return self.pool.submit(decode_tasks, self.recipe, tasks)
        try:
            return self.pool.submit(_decode_there, tasks, self.poison)
        except BrokenProcessPool as error:  # by an earlier chunk, which is mended when its turn comes
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def start(self, count: int) -> Executor:
        """So many workers."""
        if self.kind == "threads":
            return ThreadPoolExecutor(count, thread_name_prefix="decode")
        return process_pool(count, [__name__, *_LATE], _begin_there, self.recipe)

    def _end_chunk(self, chunk: "_Chunk", begun: Iterable[list["_Chunk"]]) -> Outcome:
        for _ in range(ATTEMPTS):
            try:
                found = chunk.future.result(self.patience_s if self.kind == "processes" else None)
                return self.unpacker.unpack(found) if isinstance(found, Packet) else found
            except (BrokenProcessPool, TookTooLong) as error:
                log.warning("a decoder %s; looking for its sample", _fate(error))
                undone = [other for chunks in begun for other in chunks if not _is_done(other.future)]
                self.close()
                # one that does not end is waited for; of what crashed nothing is known but that it was undone
                self._find(undone if isinstance(error, BrokenProcessPool) else [chunk])
                for other in undone:
                    if not _is_done(other.future):
                        other.future = self._submit(other.tasks)
        raise DataError(f"decoders go on crashing at the {len(chunk.tasks)} rows from sample {chunk.tasks[0].sample}")

    def _find(self, suspects: Sequence["_Chunk"]) -> None:
        """Note the samples of the first chunk that crashes a decoder which has nothing else to do.

        Chunks before it are done then. There need not be one: a worker may have been killed from outside.
        """
        with _Alone(self) as decoder:
            for chunk in suspects:
                if (done := decoder.decode(chunk.tasks, self.poison)) is not None:
                    chunk.future = done
                    continue
                for task in chunk.tasks:
                    for attempt in range(ATTEMPTS):  # it may be one that takes the place of another
                        if decoder.decode([task], self.poison) is not None:
                            break
                        self.poison |= {(task.source, sample_of(self.recipe, task, attempt))}
                return


class _Alone:
    """One worker process, begun anew whenever it crashed."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.pool: Executor | None = None

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.pool is not None:
            _end(self.pool)

    def decode(self, tasks: Sequence[Task], poison: Poison) -> Future[Any] | None:
        """What became of some tasks; None where the process did not live through them."""
        self.pool = self.pool or self.workers.start(1)
        future = self.pool.submit(_decode_there, tasks, poison)
        try:
            error = future.exception(self.workers.patience_s)
        except TookTooLong as late:
            error = late
        if not isinstance(error, BrokenProcessPool | TookTooLong):
            return future
        _end(self.pool)
        self.pool = None
        return None


@dataclass(slots=True)
class _Chunk:
    tasks: Sequence[Task]
    future: Future[Any]
    """Of an `Outcome`, or of a `Packet` with one."""


def _is_done(future: Future[Any]) -> bool:
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


_LATE = ("mmcl_data.decode.tokens", "torchvision.transforms.v2")
"""What workers import only when they decode."""

_there: list[Recipe] = []
"""In a worker process, its recipe."""
_packer = Packer()
"""There too."""


def _begin_there(recipe: Recipe) -> None:
    _there[:] = [recipe]


def _decode_there(tasks: Sequence[Task], poison: Poison) -> Packet:
    return _packer.pack(*decode_tasks(_there[0], tasks, poison))


def kind_names(bits: int) -> str:
    """What a sample has, in words."""
    return "+".join(kind for number, kind in enumerate(KINDS) if bits >> number & 1) or "nothing"


Quarantine = Callable[[Quarantined], None]
