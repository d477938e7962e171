"""Rows decoded side by side: in this thread, in threads, or in processes; in order, and the same whoever does it.

A task says all there is to know about a row, so that workers hold no state that matters. A sample that cannot be used
is replaced by another one of its source that has the same modalities, and which one follows from its seed: positions
never shift. In processes a decoder that crashes or never ends costs its sample and nothing else: the rows that were in
hand are decoded again, one by one, until it is found. Each process shows what it is at, so that a server that is slow
is waited for and a decoder is not.
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from multiprocessing import RawArray
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmcl.errors import DataError, IndexStale, SampleRejected, TooManyBadSamples
from mmcl.types import MODALITIES, Batch, InputSpec
from mmcl_data.blobs import Blobs, Reading, scheme_of, shown
from mmcl_data.index import KINDS, Index, open_index
from mmcl_data.order import mix
from mmcl_data.processes import end_pool, process_pool, spare_memory
from mmcl_data.samples import DecodeConfig, Draw, Row, collate, decode_row, is_usable, wanted
from mmcl_data.scan import read_sample
from mmcl_data.transit import Packer, Packet, Unpacker
from mmcl_data.unindexed import GrowingIndex

log = logging.getLogger("mmcl.data")

Kind = Literal["processes", "threads"]
ATTEMPTS = 8
"""Samples that are tried for one row."""
SAMPLE_BYTES = 8 * 2**30
"""That decoding one sample may take of memory in a worker process."""


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
    fingerprint: str
    """Of the index by which its samples are numbered."""
    paths: tuple[str, ...]
    """Where its shards are read, which an index does not say of remote ones."""
    growing: bool = False
    """Whether there is no index yet; its samples have no number among all."""

    def opened(self, reading: Reading) -> Index | GrowingIndex:
        """Its index.

        Raises:
            IndexStale: it was made anew since samples were numbered by it.
        """
        if self.growing:
            return GrowingIndex(self.folder, self.paths, reading)
        index = open_index(self.folder)
        if index.fingerprint != self.fingerprint:
            raise IndexStale(
                f"{self.folder}: the index of source {self.name} was made anew while it was read: its fingerprint was "
                f"{self.fingerprint} and is {index.fingerprint}; start again, with the shards as they are"
            )
        return index.read_at(self.paths)


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
        return [pile.opened(self.reading) for pile in self.piles]


def _recipe(spec: InputSpec, decode: DecodeConfig, reading: Reading, piles: tuple[Pile, ...]) -> Recipe:
    return Recipe(spec=spec, decode=decode, reading=reading, piles=piles)


Outcome = tuple[Batch, list[Quarantined]]
Poison = frozenset[tuple[int, int]]
"""Source and sample of what crashed a decoder."""


class Watch:
    """Where a worker process shows what it is at.

    Args:
        board: a number for each chunk that is in hand: 0 while it waits or is read, and another one for each sample
            while that is decoded.
        slot: of the chunk.
    """

    def __init__(self, board: Any, slot: int) -> None:
        self.board, self.slot = board, slot
        self.count = 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While something is made that does not wait for others."""
        self.count += 1
        self.board[self.slot] = self.count
        try:
            yield
        finally:
            self.board[self.slot] = 0

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While a sample is decoded, which also has its share of memory."""
        with self.busy(), spare_memory(SAMPLE_BYTES):
            yield


def decode_tasks(
    recipe: Recipe, tasks: Sequence[Task], poison: Poison = frozenset(), watch: Watch | None = None
) -> Outcome:
    """The rows of some tasks, and what could not be used.

    Raises:
        ShardMissing, ShardDamaged, DataError: a shard is gone, was written again or cannot be read.
        TooManyBadSamples: of none of `ATTEMPTS` samples a row could be made.
    """
    rows, rejected = [], []
    for task, early in zip(tasks, _read_early(recipe, tasks), strict=True):
        rows.append(_decode(recipe, task, poison, rejected, early, watch))
    with watch.busy() if watch else nullcontext():
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
    entry, shard = index.entry(sample), index.shard_of(sample)
    members = wanted(shard.path, entry, facts=bool(recipe.piles[source].captions))
    return read_sample(recipe.blobs, shard.path, members, shard.version)


def _decode(
    recipe: Recipe,
    task: Task,
    poison: Poison,
    rejected: list[Quarantined],
    early: Future[Members] | None,
    watch: Watch | None,
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
            with watch.decoding() if watch else nullcontext():
                row = _decode_row(shard, entry.key, members, recipe, draw)
        except SampleRejected as error:
            rejected.append(Quarantined(task.source, sample, error.shard, error.key, error.cause))
            continue
        row.seed = mix(task.seed, attempt) >> 1
        if not pile.growing:
            row.ids["sample"] = pile.first + sample
        return row
    raise TooManyBadSamples(
        f"source {pile.name}: {ATTEMPTS} samples in a row could not be used, the last {error_of(rejected)}; "
        "`mmcl data check` finds all"
    )


def _decode_row(shard: str, key: str, members: Members, recipe: Recipe, draw: Draw) -> Row:
    try:
        return decode_row(shard, key, members, recipe.spec, draw=draw, config=recipe.decode)
    except MemoryError as error:
        raise SampleRejected(shown(shard), key, "decoding it takes more memory than there is") from error


def error_of(rejected: Sequence[Quarantined]) -> str:
    """Of the last of some samples, where and why."""
    return f"{rejected[-1].shard}: sample {rejected[-1].key!r}: {rejected[-1].cause}"


def sample_of(recipe: Recipe, task: Task, attempt: int) -> int:
    """The sample that is tried for a task: its own first, then others that take its place."""
    if attempt == 0:
        return task.sample
    kinds, first = recipe.indices[task.source].around(task.sample)
    own = task._replace(sample=task.sample - first)
    trained = trained_on(any(name != "txt" for name in recipe.piles[task.source].captions))
    tried = [own.sample]
    for _ in range(attempt):
        tried.append(substitute(kinds, own, tried, trained))
    return first + tried[attempt]


@cache
def trained_on(facts_tell: bool) -> np.ndarray:
    """For each value of `Index.kinds` those of its bits that are trained on; none where that is no pair.

    Args:
        facts_tell: whether the json of a sample promises a text.
    """
    found = np.zeros(256, dtype=np.uint8)
    for kinds in range(1 << len(KINDS)):
        has = {kind for number, kind in enumerate(KINDS) if kinds >> number & 1}
        has |= {"text"} if facts_tell and "facts" in has else set()
        if is_usable({*has}):
            found[kinds] = sum(1 << KINDS.index(kind) for kind in has & set(MODALITIES))
    return found


def substitute(kinds: np.ndarray, task: Task, tried: Collection[int], trained: np.ndarray) -> int:
    """Another sample for the place of one: with the same modalities, or at least these, or any that can be used.

    Args:
        kinds: as `Index.kinds`.
        task: the place.
        tried: samples that could not be used, its own among them, which is taken again where there is no other.
        trained: as `trained_on`.
    """
    size, own = len(kinds), trained[kinds[task.sample]]
    place = mix(task.seed, task.sample, len(tried)) % size
    best: dict[int, int] = {}
    for start in range(place, place + size, _STRIDE):
        run = np.arange(start, min(start + _STRIDE, place + size)) % size
        run = run[~np.isin(run, list(tried))]
        has = trained[kinds[run]]
        for rank, fits in enumerate((has == own, (has & own == own) & (has > 0), has > 0)):
            if len(found := run[fits]):
                best.setdefault(rank, int(found[0]))
        if 0 in best:
            break
    return best[min(best)] if best else task.sample


_STRIDE = 4096


class Workers:
    """Decodes batches of tasks, several at once, and gives them in their order. Use it as a context.

    Args:
        recipe: what to decode how.
        count: workers; 0 decodes in this thread.
        kind: what they are.
        ahead: batches that are begun before the one that is waited for is taken.
        patience_s: a decoder in a process that is at one sample for longer does not end.
    """

    def __init__(self, recipe: Recipe, *, count: int, kind: Kind, ahead: int, patience_s: float) -> None:
        self.recipe, self.count, self.kind = recipe, count, kind
        self.ahead, self.patience_s = max(1, ahead), patience_s
        self.slots = self.ahead * 2 * count
        """Chunks at most that are in hand at once."""
        self.chunks = 0
        """That were begun, ever."""
        self.crew: _Crew | None = None
        self.poison: Poison = frozenset()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they were at is lost."""
        if self.crew is not None:
            end_pool(self.crew.pool)
            self.crew = None

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
        self.chunks += 1
        slot = self.chunks % self.slots
        return _Chunk(tasks, slot, self._submit(tasks, slot))

    def _submit(self, tasks: Sequence[Task], slot: int) -> Future[Any]:
        crew = self._at_work()
        if self.kind == "threads":
            return crew.pool.submit(decode_tasks, self.recipe, tasks)
        return crew.submit(tasks, self.poison, slot)

    def _at_work(self) -> "_Crew":
        if self.crew is None:
            self.crew = self.start(self.count)
        return self.crew

    def start(self, count: int) -> "_Crew":
        """So many workers."""
        if self.kind == "threads":
            return _Crew(ThreadPoolExecutor(count, thread_name_prefix="decode"), [0] * self.slots)
        board = RawArray("q", self.slots)
        return _Crew(process_pool(count, WORKERS_NEED, _begin_there, self.recipe, board), board)

    def _end_chunk(self, chunk: "_Chunk", begun: Sequence[list["_Chunk"]]) -> Outcome:
        for _ in range(ATTEMPTS):
            crew = self._at_work()
            ends = crew.waited(chunk, self.patience_s)
            if ends and _is_done(chunk.future):
                return crew.unpacked(chunk.future).result()
            log.warning("a decoder %s; looking for its sample", "crashed" if ends else "does not end")
            undone = self._saved(begun)
            self.close()
            # one that does not end is waited for; of what crashed nothing is known but that it was undone
            self._find(undone if ends else [chunk])
            for other in undone:
                if not _is_done(other.future):
                    other.future = self._submit(other.tasks, other.slot)
        raise DataError(f"decoders go on crashing at the {len(chunk.tasks)} rows from sample {chunk.tasks[0].sample}")

    def _saved(self, begun: Sequence[list["_Chunk"]]) -> list["_Chunk"]:
        """Take what is done out of the memory of workers that are about to end, and give what is not."""
        crew, undone = self._at_work(), []
        for chunk in (chunk for chunks in begun for chunk in chunks):
            if _is_done(chunk.future):
                chunk.future = crew.unpacked(chunk.future)
            else:
                undone.append(chunk)
        return undone

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


@dataclass(slots=True)
class _Chunk:
    tasks: Sequence[Task]
    slot: int
    """Where its worker shows what it is at."""
    future: Future[Any]
    """Of an `Outcome`, or of a `Packet` with one."""


@dataclass(slots=True)
class _Crew:
    """Workers, and what is shared with them, which goes when they go."""

    pool: Executor
    board: Any
    """As in `Watch`."""
    unpacker: Unpacker = field(default_factory=Unpacker)

    def submit(self, tasks: Sequence[Task], poison: Poison, slot: int) -> Future[Any]:
        """Let a process decode some tasks."""
        try:
            return self.pool.submit(_decode_there, tasks, poison, slot)
        except BrokenProcessPool as error:  # by an earlier chunk, which is mended when its turn comes
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def waited(self, chunk: _Chunk, patience_s: float) -> bool:
        """Wait for a chunk; whether it ended, or a sample of it is decoded for too long.

        It is looked at now and then instead of at a clock, so that a machine that slept finds no decoder late.
        """
        seen = looks = 0
        while not wait([chunk.future], patience_s / _LOOKS).done:
            now = self.board[chunk.slot]
            looks = looks + 1 if now == seen else 0
            seen = now
            if looks >= _LOOKS and now:
                return False
            if looks and looks % _LOOKS == 0:
                log.warning("rows from sample %d on are still being read", chunk.tasks[0].sample)
        return True

    def unpacked(self, done: Future[Any]) -> Future[Any]:
        """The same without a packet in the memory of a worker."""
        if done.exception() is not None or not isinstance(packet := done.result(), Packet):
            return done
        plain: Future[Any] = Future()
        plain.set_result(self.unpacker.unpack(packet))
        return plain


class _Alone:
    """One worker process, begun anew whenever it crashed."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.crew: _Crew | None = None

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.crew is not None:
            end_pool(self.crew.pool)

    def decode(self, tasks: Sequence[Task], poison: Poison) -> Future[Any] | None:
        """What became of some tasks; None where the process did not live through decoding them.

        Raises:
            DataError: processes end before they decode.
        """
        for _ in range(ATTEMPTS):
            crew = self.crew = self.crew or self.workers.start(1)
            chunk = _Chunk(tasks, 0, crew.submit(tasks, poison, 0))
            if crew.waited(chunk, self.workers.patience_s) and _is_done(chunk.future):
                return crew.unpacked(chunk.future)
            end_pool(crew.pool)
            self.crew = None
            if crew.board[0]:
                return None
        raise DataError("worker processes end before they decode anything: what they printed says why")


_LOOKS = 8
"""At a worker, before patience with it is over."""


def _is_done(future: Future[Any]) -> bool:
    """Whether it has a result that was not lost with the pool."""
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


WORKERS_NEED = (__name__, "mmcl_data.decode.tokens", "torchvision.transforms.v2")
"""Modules, with those that are imported only to decode."""

_there: list[tuple[Recipe, Any]] = []
"""In a worker process, its recipe and where it shows what it is at."""
_packer = Packer()
"""There too."""


def _begin_there(recipe: Recipe, board: Any) -> None:
    _there[:] = [(recipe, board)]


def _decode_there(tasks: Sequence[Task], poison: Poison, slot: int) -> Packet:
    recipe, board = _there[0]
    return _packer.pack(*decode_tasks(recipe, tasks, poison, Watch(board, slot)))


def kind_names(bits: int) -> str:
    """What a sample has, in words."""
    return "+".join(kind for number, kind in enumerate(KINDS) if bits >> number & 1) or "nothing"
