"""Shards without an index: their order, and an index that grows while they are read.

An index needs every header of every shard, and behind a slow line that is all of the data. So a source of remote shards
that has no index yet goes shard by shard:

    shards, shuffled each epoch, one epoch after another = a row that is dealt to the lanes in turn
    a lane = its shards one after another, each shuffled

A shard is scanned when a lane comes to it, and the next one meanwhile; what is found is kept as a part of
the index. When the last shard was seen the index is there, and new runs use it; a run that began without goes on
without, so that it stays the same run.

It is weaker than an order of samples: what is near is of one shard, there are no more lanes than shards, a damaged
shard ends the run when its turn comes, and samples have no numbers for objectives that keep something of each. A run
goes on as exactly, for any ranks and workers; where the parts are lost, what came before is read again to count it.
"""

import bisect
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from mmcl.errors import ConfigError, DataError, NoUsableSamples
from mmcl_data.blobs import Reading, check_version, shown, versions
from mmcl_data.index import IndexedShard, absolute, merge_parts, part_file, read_part, scan_into
from mmcl_data.order import VERSION, Places, mix, mix_many, permuted
from mmcl_data.scan import SampleEntry, expand_shards

log = logging.getLogger("mmcl.data")

ROW_BITS = 32
"""A sample is numbered by its shard, and its row in these lowest bits."""
_KEPT = 64
"""Shards whose parts stay in memory."""
_EPOCHS_KEPT = 4
"""Orders of shards that stay in memory."""


class Part(NamedTuple):
    """What is known of one shard."""

    shard: IndexedShard
    extensions: list[str]
    arrays: dict[str, np.ndarray]
    starts: np.ndarray
    """First member of each sample, and one more."""
    key_ends: np.ndarray


class GrowingIndex:
    """Samples of shards that are scanned when they are first asked for. Threads and processes may share its folder.

    Args:
        folder: of the index, made where it is missing.
        shards: their paths, absolute.
        reading: how to read them.
    """

    def __init__(self, folder: Path, shards: Sequence[str], reading: Reading) -> None:
        self.folder, self.paths, self.reading = folder, list(shards), reading
        self.parts = folder / "parts"
        self.held: OrderedDict[int, Part] = OrderedDict()
        self.lock = Lock()
        self.turns: dict[int, Lock] = {}
        """Of each shard that was asked for."""
        self.tallies: dict[int, np.ndarray] = {}
        """How many samples of a shard have what, for each value of `Index.kinds`; kept when its part is not."""

    @property
    def fingerprint(self) -> str:
        """Of the names of the shards, which is all that is known of them."""
        names = [shown(path).rpartition("/")[2] for path in self.paths]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]

    def part(self, number: int) -> Part:
        """Of a shard, scanned if nobody has.

        Raises:
            ShardMissing, ShardDamaged, DataError: the shard is missing, damaged or cannot be read.
            ConfigError: the folder cannot be written.
        """
        with self.lock:
            if number in self.held:
                self.held.move_to_end(number)
                return self.held[number]
        with self._turn_of(number):  # who comes while it is scanned waits instead of scanning it again
            found = self._known(number) or self._scanned(number)
        with self.lock:
            self.tallies.setdefault(number, np.bincount(found.arrays["kinds"], minlength=256))
            self.held[number] = found
            while len(self.held) > _KEPT:
                self.held.popitem(last=False)
        return found

    def tally(self, number: int) -> np.ndarray:
        """How many samples of a shard have what, for each value of `Index.kinds`; as `part` where it is not known."""
        if number not in self.tallies:
            self.part(number)
        return self.tallies[number]

    def check_fresh(self) -> None:
        """Raise `IndexStale` for the first shard that is not the one that was scanned; asks for size and stamp only."""
        found = [(path, read_part(part_file(self.parts, path), ("facts",))) for path in self.paths]
        scanned = [(path, part[0].version) for path, part in found if part is not None]
        now = versions([path for path, _ in scanned], self.reading)
        for (path, known), version in zip(scanned, now, strict=True):
            remedy = (
                "a run that goes on would read other samples; to begin a new one with the shards as they are, run "
                f"`mmcl data index` or remove {self.folder}"
            )
            check_version(path, known, version, remedy)

    def shard_of(self, sample: int) -> IndexedShard:
        """Where it lies."""
        return self.part(sample >> ROW_BITS).shard

    def entry(self, sample: int) -> SampleEntry:
        """Its members."""
        part, row = self.part(sample >> ROW_BITS), sample & ((1 << ROW_BITS) - 1)
        first, end = int(part.starts[row]), int(part.starts[row + 1])
        start = int(part.key_ends[row - 1]) if row else 0
        return SampleEntry(
            part.arrays["keys"][start : int(part.key_ends[row])].tobytes().decode(),
            tuple(part.extensions[number] for number in part.arrays["extensions"][first:end]),
            tuple(part.arrays["offsets"][first:end].tolist()),
            tuple(part.arrays["sizes"][first:end].tolist()),
        )

    def around(self, sample: int) -> tuple[np.ndarray, int]:
        """What the samples of its shard have, and the number of the first of them."""
        shard = sample >> ROW_BITS
        return self.part(shard).arrays["kinds"], shard << ROW_BITS

    def _turn_of(self, number: int) -> Lock:
        with self.lock:
            return self.turns.setdefault(number, Lock())

    def _known(self, number: int) -> Part | None:
        found = read_part(part_file(self.parts, self.paths[number]))
        if found is None:
            return None
        shard, extensions, arrays = found
        shard = shard._replace(path=self.paths[number])
        starts = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(arrays["counts"], dtype=np.uint64)])
        return Part(shard, extensions, arrays, starts, np.cumsum(arrays["key_sizes"], dtype=np.uint64))

    def _scanned(self, number: int) -> Part:
        path = self.paths[number]
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            error, samples = scan_into(path, self.parts, hashes=False, reading=self.reading)
        except OSError as failed:
            raise ConfigError(
                f"{self.folder}: an index cannot be written there: {failed.strerror}; name another in "
                "data.sources.NAME.index"
            ) from failed
        if error is not None:
            raise error
        log.info("indexed %s: %d samples", shown(path), samples)
        found = self._known(number)
        if found is None:
            raise DataError(f"{self.folder}: what was just noted of {shown(path)} is gone: is it removed meanwhile?")
        with self.lock:
            self._finish()
        return found

    def _finish(self) -> None:
        """Make the whole index of the parts, if that was the last of them."""
        if all(part_file(self.parts, path).exists() for path in self.paths):
            merge_parts(self.paths, self.parts, self.folder)
            log.info("all %d shards are indexed in %s", len(self.paths), self.folder)


class _Turn(NamedTuple):
    """A shard of a lane."""

    number: int
    epoch: int
    shard: int
    seed: np.ndarray
    rows: np.ndarray
    """That can be used."""


class ShardOrder:
    """Which sample stands where, shard by shard; as `mmcl_data.order.Order`, for a `GrowingIndex`.

    Args:
        index: of the shards.
        usable: for each value of `Index.kinds`, whether such a sample is taken.
        lanes: at most as many as shards.
        seed: of the run.
        source: number of the source.
        ahead: whether the next shard of a lane is scanned when one is begun.
    """

    def __init__(
        self, index: GrowingIndex, usable: np.ndarray, *, lanes: int, seed: int, source: int, ahead: bool = True
    ) -> None:
        if len(index.paths) < lanes:
            raise ConfigError(
                f"{len(index.paths)} shards without an index are fewer than data.lanes={lanes}: set data.lanes to a "
                "divisor of the batch size that is no larger, such as 1, or make an index with `mmcl data index`"
            )
        self.index, self.usable, self.lanes, self.seed, self.source = index, usable, lanes, seed, source
        self.ends: list[list[int]] = [[] for _ in range(lanes)]
        """Places of each lane up to the end of each of its shards, as far as they are known."""
        self.turns: dict[int, _Turn] = {}
        """That lanes are in."""
        self.counts: dict[int, int] = {}
        """Samples that can be used of each shard that a lane came to."""
        self.shuffled: dict[int, np.ndarray] = {}
        """All shards in the order of an epoch, of the last few that were asked for."""
        self.scanners = ThreadPoolExecutor(2, thread_name_prefix="scan") if ahead else None

    def at(self, lanes: Places, places: Places) -> tuple[Places, Places]:
        """Sample and epoch at places of the endless rows of lanes."""
        found = [self._at(lane, place) for lane, place in zip(lanes.tolist(), places.tolist(), strict=True)]
        samples, epochs = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return samples, epochs

    def _at(self, lane: int, place: int) -> tuple[int, int]:
        ends = self.ends[lane]
        while not ends or ends[-1] <= place:
            self._extend(lane)
        number = bisect.bisect_right(ends, place)
        turn = self.turns.get(lane)
        if turn is None or turn.number != number:
            turn = self.turns[lane] = self._turn(lane, number)
        within = np.array([place - (ends[number - 1] if number else 0)])
        row = int(turn.rows[permuted(np.array([len(turn.rows)]), turn.seed, within)[0]])
        return turn.shard << ROW_BITS | row, turn.epoch

    def _turn(self, lane: int, number: int) -> "_Turn":
        epoch, shard = self._shard(lane, number)
        seed = mix(VERSION, self.seed, self.source, 3, epoch, shard)
        return _Turn(number, epoch, shard, np.array([seed], dtype=np.uint64), self._rows(shard))

    def _extend(self, lane: int) -> None:
        """Count the next shard of a lane."""
        ends = self.ends[lane]
        following = self._shard(lane, len(ends) + 1)[1]
        if self.scanners is not None and following not in self.index.tallies:
            self.scanners.submit(self.index.part, following)  # an error comes up again in its turn
        _, shard = self._shard(lane, len(ends))
        ends.append((ends[-1] if ends else 0) + self._count(shard))
        if len(ends) == len(self.index.paths) and not ends[-1]:
            self._check_any()

    def _count(self, shard: int) -> int:
        """Samples of a shard that can be used."""
        if shard not in self.counts:
            tally = self.index.tally(shard)
            self.counts[shard] = int(tally[: len(self.usable)][self.usable].sum())
        return self.counts[shard]

    def _check_any(self) -> None:
        """Whether a lane that had nothing so far will: in time it comes to every shard."""
        shards = len(self.index.paths)
        if not any(self._count(shard) for shard in range(shards)):
            raise NoUsableSamples(
                f"none of {shards} shards from {shown(self.index.paths[0])} on has a sample with two of image, text "
                "and audio"
            )

    def _shard(self, lane: int, turn: int) -> tuple[int, int]:
        """Epoch, and number of the shard that a lane has in a turn."""
        shards = len(self.index.paths)
        epoch, place = divmod(turn * self.lanes + lane, shards)
        if epoch not in self.shuffled:
            if len(self.shuffled) >= _EPOCHS_KEPT:
                del self.shuffled[min(self.shuffled)]
            seeds = mix_many(mix(VERSION, self.seed, self.source, 2), np.full(shards, epoch))
            self.shuffled[epoch] = permuted(np.full(shards, shards), seeds, np.arange(shards))
        return epoch, int(self.shuffled[epoch][place])

    def _rows(self, shard: int) -> np.ndarray:
        """Of a shard, those that can be used."""
        return np.flatnonzero(self.usable[self.index.part(shard).arrays["kinds"]])


def growing_index(spec: str, folder: Path, reading: Reading) -> GrowingIndex:
    """The index that grows in `folder` of the shards that `spec` names.

    Raises:
        ConfigError, ShardMissing: as `expand_shards`.
        IndexStale: a shard was written again since it was scanned.
    """
    index = GrowingIndex(folder, absolute(expand_shards(spec, reading)), reading)
    index.check_fresh()
    return index
