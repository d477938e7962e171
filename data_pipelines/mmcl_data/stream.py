"""Shards to training batches: which sample stands where follows from seed, sources and a cursor of a few numbers.

    sources --index--> samples --order--> lanes --quotas--> slots of a step --rank's share--> rows --workers--> Batch

A step has slots: a slot takes one place from each lane of a source. How many slots a source gets is a rounded share of
a running total, so that a mixture is exact in the long run; the global batch is all slots of all lanes, lane by lane,
and rank r of W takes the r-th of W equal parts of it. So a batch is the same for any number of ranks and of workers,
and when the number of lanes is a multiple of W every rank has the same number of rows of every source.

The cursor counts what was taken: slots of each source, and the running total. It is the whole state.
"""

import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from webdataset.pipeline import DataPipeline

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import CheckpointError, ConfigError, TooManyBadSamples
from mmcl.types import Batch, InputSpec
from mmcl_data.blobs import Reading
from mmcl_data.index import Index
from mmcl_data.order import VERSION, Order, Places, mix, mix_many
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

    turn: int
    """Running total that quotas are rounded shares of."""
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
        self.weights = weights / weights.sum()
        self.shares = np.cumsum(self.weights)
        self._check_rows()
        self.lanes = self._lanes()
        self.orders = self._orders(0)
        self.cursor = Cursor(0, (0,) * len(self.sources), 0)
        self.generation = 0
        """How often the order was begun anew by `data.reseed`."""
        self.seen = self.bad = self.told_skipped = self.told_rows = 0
        self.quarantine = _QuarantineFile(quarantine)
        if config.policy == "fixed" and shard.rank == 0:
            told = {name: q / self.slots for name, q in zip(config.sources, self._fixed(), strict=True)}
            log.info("data.policy=fixed: effective weights %s", json.dumps(told))

    def _check_rows(self) -> None:
        smallest = min(zip(self.weights * self.batch_size, self.config.sources, strict=True))
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
        """Everything that the order follows from, but for the cursor. Batch size, ranks and workers are free."""
        whole: dict[str, str | int | float] = {"order": VERSION, "seed": self.seed, "lanes": self.lanes}
        whole |= {"policy": self.config.policy, "slice_size": self.config.slice_size, "window": self.config.window}
        for source in self.sources:
            captions = json.dumps(source.config.captions, sort_keys=True)
            whole[f"source {source.name}"] = f"{source.identity} captions {captions}"
        return whole

    def state_dict(self) -> dict[str, Any]:
        """The cursor behind the batch that was given last, and the identity: about a kilobyte of JSON."""
        taken = {source.name: count for source, count in zip(self.sources, self.cursor.taken, strict=True)}
        return {
            "identity": dict(self.identity),
            "turn": self.cursor.turn,
            "taken": taken,
            "rows": self.cursor.rows,
            "generation": self.generation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch that a state was taken after.

        Raises:
            CheckpointError: the order is not the one of the state; names what changed.
        """
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
        self.generation = int(state["generation"]) + bool(changed)
        self.orders = self._orders(self.generation)
        if changed:
            log.warning("data.reseed: %s changed: a new order begins", ", ".join(changed))
            self.cursor = Cursor(0, (0,) * len(self.sources), int(state["rows"]))
            return
        taken = tuple(int(state["taken"][source.name]) for source in self.sources)
        self.cursor = Cursor(int(state["turn"]), taken, int(state["rows"]))

    def _go_as(self, then: Mapping[str, Any]) -> None:
        """Take sources shard by shard that were before they had an index: what began so stays so."""
        for number, source in enumerate(self.sources):
            was = str(then.get(f"source {source.name}", ""))
            if went_shard_by_shard(was) and isinstance(source.index, Index):
                self.sources[number] = Source(
                    *(source.name, source.config, number, self.config.reading),
                    home=self.indexes,
                    shard_by_shard=True,
                    tell=False,
                )
                self.lanes = self._lanes()

    def quotas(self, turn: int) -> list[int]:
        """Slots of each source in the step that begins at a running total."""
        if self.config.policy == "fixed":
            return self._fixed()
        if self.config.policy == "homogeneous":
            return [self.slots * count for count in self._between(turn, turn + 1)]
        return self._between(turn, turn + self.slots)

    def _between(self, turn: int, end: int) -> list[int]:
        """Rounded shares of a running total: they sum to the difference and are off by less than one each."""
        bounds = [[0, *(math.floor(total * share + 0.5) for share in self.shares[:-1]), total] for total in (turn, end)]
        totals = [[after - before for before, after in itertools.pairwise(b)] for b in bounds]
        return [after - before for before, after in zip(*totals, strict=True)]

    def _fixed(self) -> list[int]:
        wanted = self.weights * self.slots
        quotas = np.maximum(np.floor(wanted).astype(int), 1)
        for number in np.argsort(quotas - wanted)[: max(0, self.slots - quotas.sum())]:
            quotas[number] += 1
        if quotas.sum() != self.slots:
            raise ConfigError(
                f"data.policy=fixed: {len(self.sources)} sources cannot share {self.slots} slots of {self.lanes} rows: "
                "fewer data.lanes, a larger batch or other weights"
            )
        return quotas.tolist()

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor one step on."""
        turn = cursor.turn + (1 if self.config.policy == "homogeneous" else self.slots)
        taken = tuple(a + b for a, b in zip(cursor.taken, self.quotas(cursor.turn), strict=True))
        return Cursor(turn, taken, cursor.rows + self.batch_size)

    def tasks(self, cursor: Cursor) -> list[Task]:
        """This rank's rows of the global batch at a cursor, in order."""
        quotas = self.quotas(cursor.turn)
        own = self.batch_size // self.shard.world
        rows = np.arange(self.shard.rank * own, (self.shard.rank + 1) * own)
        of_slot = _interleaved(quotas)  # source, and number of the slot among those of the source
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
        """This rank's rows of the global batches from the cursor on, without end."""
        return iter(DataPipeline(self._cursors, self._decoded))

    def _cursors(self) -> Iterator[Cursor]:
        cursor = self.cursor
        while True:
            yield cursor
            cursor = self.after(cursor)

    def _decoded(self, cursors: Iterable[Cursor]) -> Iterator[Batch]:
        config = self.config
        with Workers(
            self.recipe(),
            count=config.workers,
            kind=config.worker_kind,
            ahead=config.ahead,
            patience_s=config.worker_timeout_s,
        ) as workers:
            for outcomes in workers.run(self.tasks(cursor) for cursor in cursors):
                self._count([entry for _, rejected in outcomes for entry in rejected])
                self.cursor = self.after(self.cursor)
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


def _interleaved(quotas: Sequence[int]) -> Places:
    """The slots of a step as (source, number), each source evenly spread, so that parts are like the whole."""
    slots = [
        ((2 * number + 1) / (2 * quota), source, number)
        for source, quota in enumerate(quotas)
        for number in range(quota)
    ]
    return np.array([(source, number) for _, source, number in sorted(slots)], dtype=np.int64).reshape(-1, 2)


class _QuarantineFile:
    """Appends each sample that could not be used, once, to `quarantine.jsonl`, and says so in the log."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.written: set[tuple[int, int]] = set()

    def write(self, source: str, entry: Quarantined) -> None:
        if (entry.source, entry.sample) in self.written:
            return
        self.written.add((entry.source, entry.sample))
        log.warning("left out: %s: sample %r: %s", entry.shard, entry.key, entry.cause)
        if self.path is not None:
            line = {
                "source": source,
                "sample": entry.sample,
                "shard": entry.shard,
                "key": entry.key,
                "cause": entry.cause,
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
