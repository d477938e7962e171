"""Shards to training batches: which sample stands where is a function of seed, sources and batch number alone.

    sources --scan--> samples --epoch permutation--> positions --quota per batch--> rows --rank's share--> Batch

Each source is an endless sequence of epochs, each a permutation of all its samples. Batch `k` takes a fixed number of
positions from every source, so that the mixture is exact in the long run, and rank r of W takes every W-th row, so
that all ranks see the same mixture and the global batch does not depend on W. Stages are plain generators joined in a
webdataset `DataPipeline`; members are read by offset and not by iterating over the tar, because that is what makes a
position addressable, and because tar iteration ends without a word where a shard is damaged.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.pipeline import DataPipeline

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import ConfigError, NoUsableSamples, SampleRejected, TooManyBadSamples
from mmcl.types import Batch, InputSpec
from mmcl_data.samples import Row, ShardFiles, collate, decode_row, is_usable, modalities_of
from mmcl_data.scan import SampleEntry, expand_shards, scan_shard

log = logging.getLogger("mmcl.data")

ORDER_VERSION = 1
"""Of the order function: a run resumes only under the version it started with."""

NAMED = 20
"""Samples of a source without two modalities that the log names; the others it counts."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of shards."""

    shards: str
    """A tar, a directory, a glob or a brace pattern."""
    weight: float = 1.0
    """Share of every batch, relative to the other sources."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    sources: dict[str, SourceConfig]
    """By name, so that each can be overridden: `--data.sources.NAME.shards PATH`."""
    max_bad_share: float = 0.01
    """The run ends when more of the samples than this cannot be decoded; until then they are left out and logged."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source")
        for name, source in self.sources.items():
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise ConfigError(f"data.sources.{name}.weight={source.weight} must be a positive number")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share={self.max_bad_share} must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Position:
    """The sample at one place of the order."""

    path: Path
    sample: SampleEntry
    seeds: tuple[int, ...]
    """What the sample's own random choices follow from."""
    number: int
    """Of the sample among all samples of all sources, the same in every epoch."""


class Source:
    """All usable samples of some shards, and their order in any epoch."""

    def __init__(self, name: str, config: SourceConfig, number: int, seed: int, tell: bool = True) -> None:
        self.name, self.number, self.seed = name, number, seed
        scans = [scan_shard(path) for path in expand_shards(config.shards)]
        found = [(scan.path, sample) for scan in scans for sample in scan.samples]
        self.samples = [entry for entry in found if is_usable(modalities_of(entry[1]))]
        dropped = [entry for entry in found if not is_usable(modalities_of(entry[1]))]
        for path, sample in dropped[:NAMED] if tell else ():
            members = ", ".join(sample.extensions)
            log.warning("left out: %s: sample %r: no two of image, text and audio, only %s", path, sample.key, members)
        if dropped and tell:
            log.warning("source %s: %d of %d samples are left out for that reason", name, len(dropped), len(found))
        if not self.samples:
            raise NoUsableSamples(
                f"source {name!r} ({config.shards}): none of its {len(found)} samples has two of image (jpg, png, "
                "webp), text (txt) and audio (flac, wav, ogg, mp3)"
            )
        self.first = 0  # where these stand among the samples of all sources
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def fingerprint(self) -> str:
        """Of names and sizes of all members: it changes when the samples or their order in the shards do."""
        digest = hashlib.sha256()
        for path, sample in self.samples:
            digest.update(repr((path.name, sample.key, sample.extensions, sample.sizes)).encode())
        return digest.hexdigest()[:16]

    def at(self, position: int) -> Position:
        """The sample at `position` of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self.samples))
        if epoch != self.epoch:
            bits = np.random.Philox(np.random.SeedSequence([ORDER_VERSION, self.seed, self.number, epoch]))
            self.epoch, self.order = epoch, np.random.Generator(bits).permutation(len(self.samples))
        index = int(self.order[place])
        path, sample = self.samples[index]
        return Position(path, sample, (ORDER_VERSION, self.seed, self.number, epoch, index), self.first + index)


class ShardStream:
    """A `mmcl.types.Stream` over local shards.

    Raises:
        ShardMissing, ShardDamaged: before the first batch, since all headers are read here.
        NoUsableSamples: a source holds nothing that can be trained on.
        ConfigError: ranks cannot share the batch, or a source would get less than one row of a batch.
        TooManyBadSamples: while iterating, when too many samples of this rank could not be decoded.
    """

    def __init__(
        self, config: DataConfig, spec: InputSpec, batch_size: int, seed: int, shard: Shard = ONE_PROCESS
    ) -> None:
        if batch_size % shard.world:
            raise ConfigError(f"a batch of {batch_size} cannot be shared by {shard.world} ranks")
        self.config, self.spec, self.batch_size, self.seed, self.shard = config, spec, batch_size, seed, shard
        self.sources = [
            Source(name, source, number, seed, tell=shard.rank == 0)
            for number, (name, source) in enumerate(config.sources.items())
        ]
        for before, after in itertools.pairwise(self.sources):
            after.first = before.first + len(before.samples)
        weights = np.array([source.weight for source in config.sources.values()])
        self.shares = np.cumsum(weights / weights.sum())
        smallest = min(zip(weights / weights.sum() * batch_size, config.sources, strict=True))
        if smallest[0] < 1:
            raise ConfigError(
                f"data.sources.{smallest[1]} would get {smallest[0]:.2f} rows of a batch of {batch_size}: "
                "raise its weight"
            )
        self.files = ShardFiles()
        self.seen = self.bad = 0

    @property
    def identity(self) -> Mapping[str, str | int | float]:
        whole: dict[str, str | int | float] = {"order_version": ORDER_VERSION, "seed": self.seed}
        whole["batch_size"] = self.batch_size
        for source, config in zip(self.sources, self.config.sources.values(), strict=True):
            whole[f"source {source.name}"] = (
                f"number {source.number} weight {config.weight} fingerprint {source.fingerprint()}"
            )
        return whole

    def counts(self, batch: int) -> list[int]:
        """How many positions of each source lie before `batch`.

        Rounded shares of a running total: they sum to `batch * batch_size` and are off by less than one row each.
        """
        bounds = [math.floor(batch * self.batch_size * share + 0.5) for share in self.shares[:-1]]
        bounds = [0, *bounds, batch * self.batch_size]
        return [after - before for before, after in itertools.pairwise(bounds)]

    def positions(self, batch: int) -> list[Position]:
        """This rank's rows of a batch, in order."""
        before, after = self.counts(batch), self.counts(batch + 1)
        rows = [
            (source, position)
            for source, first, end in zip(self.sources, before, after, strict=True)
            for position in range(first, end)
        ]
        return [source.at(position) for source, position in rows[self.shard.rank :: self.shard.world]]

    def batches(self, start: int) -> Iterator[Batch]:
        return iter(DataPipeline(lambda: iter(range(start, 2**62)), self._place, self._decode))

    def _place(self, numbers: Iterable[int]) -> Iterator[list[Position]]:
        for number in numbers:
            yield self.positions(number)

    def _decode(self, batches: Iterable[list[Position]]) -> Iterator[Batch]:
        for positions in batches:
            rows = [self._row(position) for position in positions]
            skipped = sum(row.key == "" for row in rows)
            self.seen, self.bad = self.seen + len(rows), self.bad + skipped
            if self.bad > self.config.max_bad_share * max(self.seen, 1000):
                raise TooManyBadSamples(
                    f"{self.bad} of {self.seen} samples could not be used, more than data.max_bad_share="
                    f"{self.config.max_bad_share}: the log names them; `mmcl data check` finds all"
                )
            yield collate(rows, self.spec, skipped)

    def _row(self, position: Position) -> Row:
        crop = np.random.Generator(np.random.Philox(np.random.SeedSequence(position.seeds))).random()
        try:
            members = self.files.read(position.path, position.sample)
            row = decode_row(position.path, position.sample.key, members, self.spec, start=float(crop))
            row.ids["sample"] = position.number
            return row
        except SampleRejected as error:
            log.warning("left out: %s", error)
            return Row(key="")
