"""Shards to training batches: which sample stands where follows from seed, sources and a cursor of a few numbers.

    sources --index--> samples --order--> lanes --quotas--> slots of a step --rank's share--> rows --workers--> Batch

A step has slots: a slot takes one place from each lane of a source. Sources take turns at them, never a whole one from
their share (`mixture`); the global batch is all slots of all lanes, lane by lane, and rank r of W takes the r-th of W
equal parts of it. So a batch is the same for any number of ranks and of workers, and when the number of lanes is a
multiple of W every rank has the same number of rows of every source.

The cursor counts what was taken of each source. It is the whole state.
"""

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from webdataset.pipeline import DataPipeline

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import CheckpointError, ConfigError, TooManyBadSamples
from mmcl.types import Batch, InputSpec
from mmcl_data.blobs import Reading
from mmcl_data.index import Index
from mmcl_data.mixture import fixed_turns, interleaved, next_turns
from mmcl_data.order import VERSION, Order, mix, mix_many
from mmcl_data.quarantine import QuarantineFile
from mmcl_data.samples import DecodeConfig, check_captions, joined
from mmcl_data.sources import Source, SourceConfig, went_shard_by_shard
from mmcl_data.unindexed import ShardOrder
from mmcl_data.workers import Kind as WorkerKind
from mmcl_data.workers import Quarantined, Recipe, Task, Workers

log = logging.getLogger("mmcl.data")

Policy = Literal["stratified", "homogeneous", "fixed"]
FEWEST_JUDGED = 1000
"""Rows; of fewer the share of bad ones says nothing yet."""
AUTO_LANES = 8
"""Lanes at most where none are asked for: what the usual numbers of ranks divide."""
AUTO_SLOTS = 4
"""For each source, at least, where there are several; else one lane, and batches as even as they can be."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, in which order, and how it is read."""

    sources: dict[str, SourceConfig]
    """By name, so that each can be overridden: `--data.sources.NAME.shards PATH`."""
    policy: Policy = "stratified"
    """stratified: every batch has rows of every source. homogeneous: a batch is of one source, for more negatives of a
    kind. fixed: as stratified, with the same number of rows of each in every batch, which rounds the weights."""
    lanes: int = 0
    """Rows that go through the data side by side; divides the batch, and should be a multiple of the ranks. 0 is the
    largest divisor of the batch up to 8, or 1 for a small batch of several sources. A run keeps its lanes, also when
    its batch size changes."""
    slice_size: int = 1
    """Samples that lie together and are read together, and so are near each other in the order. 1 mixes best and is for
    local disks; 64 or more for remote shards."""
    window: int = 4096
    """Places of a lane that are shuffled among each other where slice_size is above 1. What is read and not used yet is
    bounded by lanes x window samples."""
    workers: int = 0
    """That decode, for each rank; 0 decodes between two steps."""
    worker_kind: WorkerKind = "processes"
    """processes outlive a decoder that crashes; threads are lighter."""
    ahead: int = 3
    """Batches that workers are at before they are asked for."""
    worker_timeout_s: float = 120.0
    """A chunk of rows that takes a worker process longer holds a sample that is left out."""
    max_bad_share: float = 0.01
    """The run ends when more of the samples than this cannot be decoded; until then others take their place."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    cache: str = ""
    """Folder that keeps what was read of remote shards; empty keeps nothing."""
    cache_gb: float = 50.0
    """Kept there at most."""
    retries: int = 6
    """Times that a read which failed is tried again, later and later, before the run ends."""
    reseed: bool = False
    """A run may go on with other data, another mixture or seed: it begins a new order where the old one was left."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source")
        for name, source in self.sources.items():
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise ConfigError(f"data.sources.{name}.weight={source.weight} must be a positive number")
            check_captions(f"data.sources.{name}", source.captions)
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share={self.max_bad_share} must lie in [0, 1]")
        self._check_numbers()

    def _check_numbers(self) -> None:
        least = {"slice_size": 1, "window": 1, "ahead": 1, "lanes": 0, "workers": 0, "retries": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least {number}")
        for name in ("worker_timeout_s", "cache_gb"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be positive")
        if self.window < self.slice_size:
            raise ConfigError(f"data.window={self.window} is smaller than data.slice_size={self.slice_size}")

    @property
    def reading(self) -> Reading:
        """How shards are read."""
        return Reading(
            retries=self.retries,
            cache=Path(self.cache) if self.cache else None,
            cache_bytes=int(self.cache_gb * 1e9),
            block_bytes=0 if self.slice_size == 1 else 4 * 2**20,
        )


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a stream has come."""

    turns: tuple[int, ...]
    """That each source had: slots, or whole batches where `data.policy` is homogeneous."""
    taken: tuple[int, ...]
    """Slots of each source."""
    rows: int
    """Of the global batches, in all."""


class ShardStream:
    """A `mmcl.types.Stream` over shards. `state_dict` and `load_state_dict` are those of torch's stateful loaders.

    Raises:
        ShardMissing, ShardDamaged, IndexStale: before the first batch.
        NoUsableSamples: a source holds nothing that can be trained on.
        ConfigError: an index cannot be written, ranks or lanes cannot share the batch, or a source would get less
            than one row of it.
        TooManyBadSamples: while iterating, when too many samples of this rank could not be decoded.

    Args:
        config: what is read.
        spec: what the model reads.
        batch_size: rows of a global batch.
        seed: of the run.
        shard: this rank.
        quarantine: file for samples that could not be used.
        indexes: folder for indexes that have no other place; by default one that is gone with the process.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: InputSpec,
        batch_size: int,
        seed: int,
        shard: Shard = ONE_PROCESS,
        *,
        quarantine: Path | None = None,
        indexes: Path | None = None,
    ) -> None:
        if batch_size % shard.world:
            raise ConfigError(f"a batch of {batch_size} cannot be shared by {shard.world} ranks")
        self.config, self.spec, self.batch_size, self.seed, self.shard = config, spec, batch_size, seed, shard
        self.sources = [
            Source(name, source, number, config.reading, home=indexes, tell=shard.rank == 0)
            for number, (name, source) in enumerate(config.sources.items())
        ]
        self.indexes = indexes
        weights = np.array([source.weight for source in config.sources.values()])
        self.weights: list[float] = (weights / weights.sum()).tolist()
        self._check_rows()
        self.lanes = self._lanes()
        self.orders = self._orders(0)
        self.cursor = self._start(0)
        self.iterators = 0
        """How often batches were asked for, or a state was loaded: what was asked for before is over."""
        self.generation = 0
        """How often the order was begun anew by `data.reseed`."""
        self.seen = self.bad = self.told_skipped = self.told_rows = 0
        self.quarantine = QuarantineFile(quarantine)
        if config.policy == "fixed" and shard.rank == 0:
            turns = fixed_turns(self.weights, self.slots)
            told = {name: count / self.slots for name, count in zip(config.sources, turns, strict=True)}
            log.info("data.policy=fixed: effective weights %s", json.dumps(told))

    def _check_rows(self) -> None:
        smallest = min(zip((weight * self.batch_size for weight in self.weights), self.config.sources, strict=True))
        if smallest[0] < 1:
            raise ConfigError(
                f"data.sources.{smallest[1]} would get {smallest[0]:.2f} rows of a batch of {self.batch_size}: "
                "raise its weight"
            )

    def _lanes(self) -> int:
        fewest = min(source.most_lanes for source in self.sources)
        lanes = self.config.lanes
        if not lanes:
            few = len(self.sources) > 1 and self.batch_size < AUTO_LANES * AUTO_SLOTS * len(self.sources)
            most = 1 if few else min(AUTO_LANES, fewest)
            lanes = max(n for n in range(1, most + 1) if self.batch_size % n == 0)
        if self.batch_size % lanes:
            raise ConfigError(f"data.lanes={lanes} does not divide train.batch_size={self.batch_size}")
        return lanes

    def _orders(self, generation: int) -> list[Order | ShardOrder]:
        seed = mix(self.seed, generation) if generation else self.seed
        size, window = self.config.slice_size, self.config.window
        return [source.order(lanes=self.lanes, seed=seed, slice_size=size, window=window) for source in self.sources]

    @property
    def slots(self) -> int:
        """Of a step."""
        return self.batch_size // self.lanes

    @property
    def identity(self) -> Mapping[str, str | int | float]:
        """Everything that batches follow from, but for the cursor. Batch size, ranks and workers are free."""
        whole: dict[str, str | int | float] = {"order": VERSION, "seed": self.seed, "lanes": self.lanes}
        whole |= {"policy": self.config.policy, "slice_size": self.config.slice_size}
        if self.config.slice_size > 1:
            whole["window"] = self.config.window
        whole |= {"decode": _digest(asdict(self.config.decode)), "input": json.dumps(asdict(self.spec))}
        for source in self.sources:
            captions = json.dumps(source.config.captions, sort_keys=True)
            whole[f"source {source.name}"] = f"{source.identity} captions {captions}"
        return whole

    def state_dict(self) -> dict[str, Any]:
        """The cursor behind the batch that was given last, and the identity: about a kilobyte of JSON."""
        names = [source.name for source in self.sources]
        return {
            "identity": dict(self.identity),
            "turns": dict(zip(names, self.cursor.turns, strict=True)),
            "taken": dict(zip(names, self.cursor.taken, strict=True)),
            "rows": self.cursor.rows,
            "generation": self.generation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch that a state was taken after.

        Raises:
            CheckpointError: the order is not the one of the state; names what changed.
        """
        missing = {"identity", "turns", "taken", "rows", "generation"} - state.keys()
        if missing:
            raise CheckpointError(
                f"the state of a stream lacks {sorted(missing)}: it is of an older version of mmcl, which this one "
                "cannot go on from; start a new run directory, from its weights if you like"
            )
        then = state["identity"]
        self._go_as(then)
        now = dict(self.identity)
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if changed and not self.config.reseed:
            name = changed[0]
            raise CheckpointError(
                f"the order of samples is not the one of the checkpoint: {name} was {then.get(name)!r} and is "
                f"{now.get(name)!r} (changed: {', '.join(changed)}); restore it, start a new run directory, or say "
                "data.reseed=true to begin a new order here"
            )
        self.iterators += 1
        self.generation = int(state["generation"]) + bool(changed)
        self.orders = self._orders(self.generation)
        if changed:
            log.warning("data.reseed: %s changed: a new order begins", ", ".join(changed))
            self.cursor = self._start(int(state["rows"]))
            return
        turns, taken = (tuple(int(state[of][source.name]) for source in self.sources) for of in ("turns", "taken"))
        self.cursor = Cursor(turns, taken, int(state["rows"]))

    def _start(self, rows: int) -> Cursor:
        nothing = (0,) * len(self.sources)
        return Cursor(nothing, nothing, rows)

    def _go_as(self, then: Mapping[str, Any]) -> None:
        """What began in a way that nobody asked for goes on so: lanes, and sources that had no index."""
        for number, source in enumerate(self.sources):
            was = str(then.get(f"source {source.name}", ""))
            if went_shard_by_shard(was) and isinstance(source.index, Index):
                self.sources[number] = Source(
                    *(source.name, source.config, number, self.config.reading),
                    home=self.indexes,
                    shard_by_shard=True,
                    tell=False,
                )
        lanes = then.get("lanes")
        if not self.config.lanes and isinstance(lanes, int) and lanes > 0 and self.batch_size % lanes == 0:
            self.lanes = lanes

    def shared(self, cursor: Cursor) -> tuple[list[int], list[int]]:
        """Turns and slots of each source in the step at a cursor."""
        if self.config.policy == "fixed":
            turns = fixed_turns(self.weights, self.slots)
            return turns, turns
        if self.config.policy == "homogeneous":
            turns = next_turns(self.weights, cursor.turns, 1)
            return turns, [self.slots * count for count in turns]
        turns = next_turns(self.weights, cursor.turns, self.slots)
        return turns, turns

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor one step on."""
        turns, slots = self.shared(cursor)
        return Cursor(
            tuple(a + b for a, b in zip(cursor.turns, turns, strict=True)),
            tuple(a + b for a, b in zip(cursor.taken, slots, strict=True)),
            cursor.rows + self.batch_size,
        )

    def tasks(self, cursor: Cursor) -> list[Task]:
        """This rank's rows of the global batch at a cursor, in order."""
        _, slots_of = self.shared(cursor)
        own = self.batch_size // self.shard.world
        rows = np.arange(self.shard.rank * own, (self.shard.rank + 1) * own)
        of_slot = interleaved(slots_of)  # source, and number of the slot among those of the source
        lanes, slots = np.divmod(rows, self.slots)
        sources, numbers = of_slot[slots].T
        found = np.empty((len(rows), 2), dtype=np.int64)
        for number, (source, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            there = np.flatnonzero(sources == number)
            samples, epochs = order.at(lanes[there], cursor.taken[number] + numbers[there])
            found[there, 0] = source.numbers(samples)
            found[there, 1] = epochs
        run = mix(VERSION, self.seed, self.generation)
        samples, epochs = found.T
        seeds = mix_many(run, sources, epochs, samples)
        return list(map(Task, sources.tolist(), samples.tolist(), seeds.tolist()))

    def batches(self) -> Iterator[Batch]:
        """This rank's rows of the global batches from the cursor on, without end.

        What was asked for earlier is over then, and after `load_state_dict`: a stream stands at one place.
        """
        self.iterators += 1
        return iter(DataPipeline(partial(self._steps, self.cursor), partial(self._decoded, self.iterators)))

    def _steps(self, cursor: Cursor) -> Iterator[tuple[list[Task], Cursor]]:
        """What is to be decoded in each step, and where the stream stands behind it."""
        while True:
            behind = self.after(cursor)
            yield self.tasks(cursor), behind
            cursor = behind

    def _decoded(self, iterator: int, steps: Iterable[tuple[list[Task], Cursor]]) -> Iterator[Batch]:
        config = self.config
        begun: deque[Cursor] = deque()

        def tasks() -> Iterator[list[Task]]:
            for of_step, behind in steps:
                begun.append(behind)
                yield of_step

        with Workers(
            self.recipe(),
            count=config.workers,
            kind=config.worker_kind,
            ahead=config.ahead,
            patience_s=config.worker_timeout_s,
        ) as workers:
            for outcomes in workers.run(tasks()):
                if iterator != self.iterators:
                    raise RuntimeError("this iterator is over: batches were asked for anew, or a state was loaded")
                self._count([entry for _, rejected in outcomes for entry in rejected])
                self.cursor = begun.popleft()
                yield joined([batch for batch, _ in outcomes])

    def recipe(self) -> Recipe:
        """What workers need to know."""
        sizes = [len(source.index) if isinstance(source.index, Index) else 0 for source in self.sources]
        firsts = np.cumsum([0, *sizes])
        piles = tuple(source.pile(int(first)) for source, first in zip(self.sources, firsts, strict=False))
        return Recipe(spec=self.spec, decode=self.config.decode, reading=self.config.reading, piles=piles)

    def _count(self, rejected: Sequence[Quarantined]) -> None:
        self.seen += self.batch_size // self.shard.world
        self.bad += len(rejected)
        for entry in rejected:
            self.quarantine.write(self.sources[entry.source].name, entry)
        self._check(self.bad, self.seen * self.shard.world)  # as if the other ranks had met none

    def judge(self, skipped: int, rows: int) -> None:
        """Take in that all ranks together skipped so many samples for so many rows since the last time.

        Raises:
            TooManyBadSamples: of all since this start that is more than `max_bad_share`.
        """
        self.told_skipped, self.told_rows = self.told_skipped + skipped, self.told_rows + rows
        self._check(self.told_skipped, self.told_rows)

    def _check(self, skipped: int, rows: int) -> None:
        if skipped > self.config.max_bad_share * max(rows, FEWEST_JUDGED):
            raise TooManyBadSamples(
                f"{skipped} samples could not be used for {rows} rows, more than data.max_bad_share="
                f"{self.config.max_bad_share}: the log and quarantine.jsonl name them; `mmcl data check` finds all"
            )


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
