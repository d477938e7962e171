"""The sources of a stream: what shards hold, and how their samples are numbered."""

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmcl.errors import ConfigError, IndexStale, NoIndex, NoUsableSamples
from mmcl_data.blobs import Reading, scheme_of, shown
from mmcl_data.decode import Kind
from mmcl_data.index import KINDS, Index, absolute, fresh_index, index_folder, open_index
from mmcl_data.order import Order, Places
from mmcl_data.samples import is_usable
from mmcl_data.scan import expand_shards
from mmcl_data.unindexed import GrowingIndex, ShardOrder, growing_index
from mmcl_data.workers import Pile, kind_names

log = logging.getLogger("mmcl.data")
_KINDS_OF_SAMPLE = 1 << len(KINDS)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of shards."""

    shards: str
    """A tar, a directory, a glob or a brace pattern; local, or behind http(s)://, s3:// or hf://."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources."""
    index: str = ""
    """Folder of its index; by default `.mmcl-index` beside local shards, else within the run. Where it is missing it is
    made at the start; that of remote shards grows while they are read in turn, which mixes them less."""
    captions: dict[str, float] = field(default_factory=dict)
    """Fields of the json member that may hold the caption, and `txt`, with weights by which one is drawn each epoch; a
    field may hold a list. Empty is the txt member."""


class Source:
    """The samples of some shards that can be trained on.

    Args:
        name: of the source.
        config: of it.
        number: among the sources of the stream.
        reading: how to read.
        home: folder for an index that has no other place.
        shard_by_shard: as if there were no index, for a run that began without one.
        tell: whether to log what is left out.

    Raises:
        as `find_index`.
        NoUsableSamples: none has two modalities.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        number: int,
        reading: Reading,
        *,
        home: Path | None = None,
        shard_by_shard: bool = False,
        tell: bool = True,
    ) -> None:
        self.name, self.config, self.number = name, config, number
        self.usable = np.array([_is_usable(bits, config) for bits in range(_KINDS_OF_SAMPLE)])
        self.index = find_index(name, config, reading, home, shard_by_shard=shard_by_shard)
        self.chosen: Chosen | None = None
        """Those that can be used; None where all can."""
        if isinstance(self.index, Index):
            self._choose(self.index.kinds, tell)
        elif tell:
            log.warning(
                "source %s: no index of its %d shards: they are read in turn, and indexed in %s meanwhile; with one, "
                "which `mmcl data index` makes, all samples would be mixed",
                *(name, len(self.index.paths), self.index.folder),
            )

    def _choose(self, kinds: np.ndarray, tell: bool) -> None:
        counts = np.sum([np.bincount(part, minlength=_KINDS_OF_SAMPLE) for part in _blocks(kinds)], axis=0)
        dropped = int(counts[~self.usable].sum())
        self.chosen = Chosen(kinds, self.usable, len(kinds) - dropped) if dropped else None
        if dropped == len(kinds):
            raise NoUsableSamples(
                f"source {self.name!r} ({shown(self.config.shards)}): none of its {len(kinds)} samples has two of "
                "image (jpg, png, webp), text (txt, or a field of the json that data.sources names) and audio (flac, "
                "wav, ogg, mp3)"
            )
        if dropped and tell:
            found = ", ".join(
                f"{count} {kind_names(bits)}" for bits, count in enumerate(counts) if count and not self.usable[bits]
            )
            log.warning(
                "source %s: %d of %d samples are left out, without two of image, text and audio: %s",
                *(self.name, dropped, len(kinds), found),
            )

    def __len__(self) -> int:
        """Samples; 0 while nobody counted them."""
        if isinstance(self.index, GrowingIndex):
            return 0
        return len(self.index) if self.chosen is None else len(self.chosen)

    @property
    def most_lanes(self) -> int:
        """That it can be cut into."""
        return len(self.index.paths) if isinstance(self.index, GrowingIndex) else len(self)

    @property
    def identity(self) -> str:
        """What its order follows from."""
        what = "shards" if isinstance(self.index, GrowingIndex) else "fingerprint"
        return f"number {self.number} weight {self.config.weight} {what} {self.index.fingerprint}"

    def order(self, *, lanes: int, seed: int, slice_size: int, window: int) -> Order | ShardOrder:
        """Of its samples."""
        if isinstance(self.index, GrowingIndex):
            return ShardOrder(self.index, self.usable, lanes=lanes, seed=seed, source=self.number)
        return Order(
            samples=len(self), lanes=lanes, seed=seed, source=self.number, slice_size=slice_size, window=window
        )

    def numbers(self, places: Places) -> Places:
        """In the index, of what an order gave."""
        return places if self.chosen is None else self.chosen.at(places)

    def pile(self, first: int) -> Pile:
        """What workers know of it, if `first` is the number of its first sample among those of all sources."""
        assert self.index.folder is not None
        return Pile(
            name=self.name,
            folder=self.index.folder,
            captions=self.config.captions,
            first=first,
            fingerprint=self.index.fingerprint,
            paths=tuple(self.index.paths),
            growing=isinstance(self.index, GrowingIndex),
        )


class Chosen:
    """Which samples of an index are taken, by their place among those.

    It holds the numbers of those that are or of those that are not, whichever are fewer: 8 bytes for each of them.

    Args:
        kinds: of all samples.
        usable: for each value of `kinds`, whether such a sample is taken.
        count: that are taken.
    """

    def __init__(self, kinds: np.ndarray, usable: np.ndarray, count: int) -> None:
        self.count, self.by_taken = count, 2 * count < len(kinds)
        listed = usable if self.by_taken else ~usable
        found = [start * _BLOCK + np.flatnonzero(listed[part]) for start, part in enumerate(_blocks(kinds))]
        self.listed = np.concatenate(found)
        if not self.by_taken:
            self.listed -= np.arange(len(self.listed))  # to how many taken ones each left out one comes after

    def __len__(self) -> int:
        return self.count

    def at(self, places: Places) -> Places:
        """Numbers in the index."""
        if self.by_taken:
            return self.listed[places]
        return places + np.searchsorted(self.listed, places, side="right")


_BLOCK = 1 << 22


def _blocks(kinds: np.ndarray) -> Iterator[np.ndarray]:
    """A few at a time: numpy makes 8 bytes of each."""
    return (kinds[start : start + _BLOCK] for start in range(0, len(kinds), _BLOCK))


def went_shard_by_shard(identity: str) -> bool:
    """Whether a source with this identity had no index."""
    return " shards " in identity


def _is_usable(bits: int, config: SourceConfig) -> bool:
    has: set[Kind] = {kind for number, kind in enumerate(KINDS) if bits >> number & 1}
    if any(name != "txt" for name in config.captions) and "facts" in has:
        has.add("text")
    return is_usable(set(has))


def find_index(
    name: str, config: SourceConfig, reading: Reading, home: Path | None = None, *, shard_by_shard: bool = False
) -> Index | GrowingIndex:
    """The index of a source: that which is there, or one that is made now of local shards, or grows of remote ones.

    Raises:
        ShardMissing, ShardDamaged, DataError: a shard is missing, damaged or cannot be read.
        IndexStale: an index that was named is not that of the shards as they are.
        ConfigError: it cannot be written where it was named.
    """
    beside = index_folder(config.shards)
    folder = Path(config.index) if config.index else beside or _elsewhere(name, home)
    if shard_by_shard:
        return growing_index(config.shards, folder, reading)
    if config.index or scheme_of(config.shards):
        try:
            index = _located(open_index(folder), config, reading)
            index.check_fresh(reading)
            return index
        except NoIndex:
            if scheme_of(config.shards):
                return growing_index(config.shards, folder, reading)
    try:
        return fresh_index(config.shards, folder, reading)
    except ConfigError:
        if config.index or folder != beside:
            raise
        return fresh_index(config.shards, _elsewhere(name, home), reading)  # the data are read-only


def _located(index: Index, config: SourceConfig, reading: Reading) -> Index:
    """An index whose shards are read where the source names them.

    Raises:
        IndexStale: it is one of other shards: those would be read, wherever they lie.
    """

    def place(path: str) -> str:
        return shown(path) if scheme_of(path) else os.path.realpath(path)

    paths = absolute(expand_shards(config.shards, reading))
    named = [place(path) for path in paths]
    held = [place(shard.path) for shard in index.shards]
    if held != named:
        odd = next((path for path in held if path not in set(named)), "fewer of them, or in another order")
        raise IndexStale(
            f"{index.folder}: an index of other shards than {shown(config.shards)}: of {odd}; "
            "`mmcl data index` makes one"
        )
    return index.read_at(paths)


_temporary: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


def _elsewhere(name: str, home: Path | None) -> Path:
    if home is None:
        _temporary.append(tempfile.TemporaryDirectory(prefix="mmcl-index-"))
        home = Path(_temporary[-1].name)
    return home / name
