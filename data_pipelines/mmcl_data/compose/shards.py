"""Composed sounds ahead of time: shards built as those of any corpus are, in parts, and gone on with after a kill.

flac   mono, 16 bit
txt    the first caption
json   {"captions", "positives", "negatives": [{"operator", "caption"}], "tree", "sources"}
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mmcl.errors import ConfigError
from mmcl.types import InputSpec
from mmcl_data.blobs import shown
from mmcl_data.build.builder import build_corpus
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Contents, Item, Read
from mmcl_data.build.plan import Options
from mmcl_data.compose.clips import Clips, ClipSource
from mmcl_data.compose.composer import ComposeConfig, Composer
from mmcl_data.index import Index, fresh_index, index_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions(Options):
    """How many sounds are written and how they are cut into shards. The seed is that of the sounds, too."""

    count: int
    """sounds"""
    sample_rate: int = 48_000
    """of the sounds, in Hz"""
    seconds: float = 10.0
    """length of every sound"""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name, low, high in (("count", 1, 10**8), ("sample_rate", 4_000, 384_000), ("seconds", 0.5, 60)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}={value:g} is out of range: choose from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class ComposedCorpus(Corpus):
    """The first sounds of a composer."""

    several = True

    sources: tuple[ClipSource, ...]
    fingerprints: tuple[str, ...]
    """Of the index of each: a build does not go on with other clips."""
    compose: ComposeConfig
    sounds: ShardOptions

    def read(self, root: Path) -> Read:
        """One item a sound."""
        yield from (Item(key=f"{number:08d}", row=number) for number in range(self.sounds.count))

    def load(self, root: Path, item: Item) -> Contents:
        """Compose it."""
        assert item.row is not None
        made = _composer(self).sample(item.row)
        flac = BytesIO()
        pcm = np.rint(made.audio.numpy() * 32767).astype(np.int16)
        soundfile.write(flac, pcm, self.sounds.sample_rate, format="FLAC", subtype="PCM_16")
        return Contents([("flac", flac.getvalue())], list(made.captions), made.facts(), None)


def compose_shards(
    sources: Sequence[ClipSource],
    out: Path,
    options: ShardOptions,
    *,
    config: ComposeConfig | None = None,
    part: tuple[int, int] = (1, 1),
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write composed sounds to shards in `out`; `part`, `workers`, `progress` and what returns are `build_corpus`'s.

    One set of arguments and clips gives one set of bytes, whatever the parts and workers. An index is made where local
    shards have none.

    Raises:
        ConfigError: arguments that make no sense or are not those of the build in `out`; too few labels.
        ShardMissing, ShardDamaged, DataError: a source cannot be read.
    """
    corpus = ComposedCorpus(
        sources=tuple(sources),
        fingerprints=tuple(_index(source).fingerprint for source in sources),
        compose=config or ComposeConfig(),
        sounds=options,
    )
    _composer(corpus)  # what is wrong with the clips shows before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    return build_corpus(
        "composed", corpus, out.parent, out, options=options, part=part, workers=workers, progress=progress
    )


def _index(source: ClipSource) -> Index:
    folder = Path(source.index) if source.index else index_folder(source.shards)
    if folder is None:
        raise ConfigError(f"{shown(source.shards)}: not the shards of one local folder: say where their index is")
    return fresh_index(source.shards, folder)


_composers: dict[str, Composer] = {}


def _composer(corpus: ComposedCorpus) -> Composer:
    """That of a corpus, one in each process: its clips take a while to list."""
    key = json.dumps(asdict(corpus), sort_keys=True)
    if key not in _composers:
        clips, sounds = Clips(), corpus.sounds
        for source in corpus.sources:
            clips.add(_index(source), source)
        spec = InputSpec(
            image_size=1,
            resize_mode="squash",
            sample_rate=sounds.sample_rate,
            clip_samples=round(sounds.seconds * sounds.sample_rate),
            context_length=77,
        )
        _composers.clear()
        _composers[key] = Composer(clips, spec, corpus.compose, sounds.seed)
    return _composers[key]
