"""Composed sounds, each made by itself: what number n of an epoch is follows from the seed and nothing else.

Labels are drawn evenly, whatever the numbers of their clips, and differ within a sound. Where the data do not say how
loud an event is, some sounds are made of loud and quiet events and say so, so that any corpus has attributes to swap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mmcl.errors import ConfigError, DataError, SampleRejected, TooManyBadSamples
from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs, Reading, shown
from mmcl_data.compose.captions import render_caption
from mmcl_data.compose.clips import Clip, Clips
from mmcl_data.compose.render import LOUDNESS_DB, Wave, render_audio
from mmcl_data.compose.tree import (
    Event,
    Operator,
    Tree,
    arrange,
    as_json,
    corrupt,
    entails,
    events_of,
    shuffled,
    subtrees,
)
from mmcl_data.decode.audio import decode_audio
from mmcl_data.order import mix, uniform
from mmcl_data.samples import wanted
from mmcl_data.scan import read_sample

ATTEMPTS = 8
"""Clips that are tried for one event."""
_EVENTS, _TREE, _CAPTIONS, _POSITIVES, _NEGATIVES = range(5)
"""What a draw is for."""


@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """What sounds are composed, and how much is said of each."""

    events: tuple[float, float, float] = (0.3, 0.6, 0.1)
    """Weights of sounds of two, three and four events."""
    loudness: float = 0.25
    """Share of the sounds of events of unknown loudness that are made of loud and quiet ones."""
    captions: int = 2
    """Of the whole sound, at most; the first is the main one."""
    positives: int = 5
    """Captions of parts, at most."""
    negatives: int = 4
    """Wrong captions of the whole, at most; each part of several events that has a caption brings another one."""

    def __post_init__(self) -> None:
        if min(self.events) < 0 or sum(self.events) <= 0:
            raise ConfigError(f"events={list(self.events)}: expected weights of 2, 3 and 4 events, not all zero")
        if not 0 <= self.loudness <= 1:
            raise ConfigError(f"loudness={self.loudness}: expected a share from 0 to 1")
        for name, least in (("captions", 1), ("positives", 0), ("negatives", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value} is too few: at least {least}")


class Negative(NamedTuple):
    """A caption that is wrong, and what was done to the right one."""

    operator: Operator
    caption: str


@dataclass(frozen=True, kw_only=True)
class Composed:
    """One composed sound."""

    audio: Float32[Tensor, " t"]
    captions: tuple[str, ...]
    """Of the whole, all of the same meaning."""
    positives: tuple[str, ...]
    """Of parts."""
    negatives: tuple[Negative, ...]
    tree: Tree
    sources: tuple[str, ...]
    """`shard#key` of each clip."""
    rejected: tuple[SampleRejected, ...] = field(default=(), repr=False)
    """Clips that could not be used; others took their places."""

    def facts(self) -> dict[str, Any]:
        """For the json member."""
        return {
            "captions": list(self.captions),
            "positives": list(self.positives),
            "negatives": [negative._asdict() for negative in self.negatives],
            "tree": as_json(self.tree),
            "sources": list(self.sources),
        }


class Composer:
    """Composes sounds of clips.

    Args:
        clips: the events there are.
        spec: rate and length of the sounds.
        config: what is composed.
        seed: of the run.
        reading: how to read.

    Raises:
        ConfigError: there are fewer labels than events in a sound.
    """

    def __init__(
        self,
        clips: Clips,
        spec: InputSpec,
        config: ComposeConfig | None = None,
        seed: int = 0,
        reading: Reading | None = None,
    ) -> None:
        self.clips, self.spec, self.config, self.seed = clips, spec, config or ComposeConfig(), seed
        self.blobs = Blobs(reading or Reading())
        self.labels = sorted(clips.by_label)
        most = max(size for size, weight in enumerate(self.config.events, 2) if weight)
        if len(self.labels) < most:
            reasons = "".join(f"; {times} left out: {why}" for why, times in clips.left_out.most_common(3))
            raise ConfigError(
                f"{len(self.labels)} different labels are too few for sounds of {most} different events{reasons}"
            )

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay where they are
        return type(self), (self.clips, self.spec, self.config, self.seed, self.blobs.reading)

    def sample(self, number: int, epoch: int = 0) -> Composed:
        """Sound `number` of an epoch.

        Raises:
            TooManyBadSamples: of `ATTEMPTS` clips in a row none could be used.
            ShardMissing, ShardDamaged, DataError: a shard is gone or cannot be read.
        """
        seed = mix(self.seed, epoch, number)
        events, waves, rejected = self._events(mix(seed, _EVENTS))
        tree = arrange(events, uniform(mix(seed, _TREE), 1)[0])
        chosen = shuffled(subtrees(tree), mix(seed, _POSITIVES))[: self.config.positives]
        wrong = corrupt(tree, mix(seed, _NEGATIVES))[: self.config.negatives]
        for place, part in enumerate(chosen if self.config.negatives else ()):
            # of the same length as a caption that is true
            wrong += [s for s in corrupt(part, mix(seed, _NEGATIVES, place)) if not entails(tree, s.tree)][:1]
        said = [render_caption(tree, mix(seed, _CAPTIONS, n)) for n in range(3 * self.config.captions)]
        audio = render_audio(tree, waves, self.spec.sample_rate, self.spec.clip_samples)
        return Composed(
            audio=torch.from_numpy(audio),
            captions=tuple(dict.fromkeys(said))[: self.config.captions],
            positives=tuple(render_caption(part, mix(seed, _POSITIVES, n)) for n, part in enumerate(chosen)),
            negatives=tuple(
                Negative(operator, render_caption(part, mix(seed, _NEGATIVES, n, 1)))
                for n, (operator, part) in enumerate(wrong)
            ),
            tree=tree,
            sources=tuple(event.clip for event in events_of(tree)),
            rejected=tuple(rejected),
        )

    def _events(self, seed: int) -> tuple[list[Event], dict[str, Wave], list[SampleRejected]]:
        """Events of different labels, with their sounds."""
        size, said, quiet = uniform(seed, 3)
        events, waves, rejected = [], {}, []
        for place in range(_weighted(self.config.events, size) + 2):
            used = {event.label for event in events}
            clip, wave = self._usable(mix(seed, place), used, rejected)
            name = f"{shown(clip.shard).rpartition('/')[2]}#{clip.entry.key}"
            name += f"@{clip.span[0]:g}" if clip.span else ""
            # shards of different folders may be called alike
            event = Event(clip.label, clip.attributes, f"{name} ({place})" if name in waves else name)
            events.append(event)
            waves[event.clip] = wave
        if said < self.config.loudness and not any("loudness" in dict(event.attributes) for event in events):
            events = _with_loudness(events, quiet)
        return events, waves, rejected

    def _usable(self, seed: int, used: set[str], rejected: list[SampleRejected]) -> tuple[Clip, Wave]:
        for attempt in range(ATTEMPTS):
            clip = self._draw(mix(seed, attempt), used)
            try:
                return clip, self._wave(clip)
            except SampleRejected as error:
                rejected.append(error)
        raise TooManyBadSamples(
            f"{ATTEMPTS} clips in a row could not be used, the last {rejected[-1]}; `mmcl data check` finds all"
        )

    def _draw(self, seed: int, used: set[str]) -> Clip:
        draws = (self.labels[mix(seed, number) % len(self.labels)] for number in count())
        clips = self.clips.by_label[next(label for label in draws if label not in used)]
        return clips[mix(seed, len(clips)) % len(clips)]

    def _wave(self, clip: Clip) -> Wave:
        """The clip's sound, at most as long as a composed one."""
        begin, end = clip.span or (0.0, self.spec.clip_samples / self.spec.sample_rate)
        first, last = round(begin * self.spec.sample_rate), ceil(end * self.spec.sample_rate)
        members = read_sample(self.blobs, clip.shard, wanted(clip.shard, clip.entry, facts=False))
        try:
            (data,) = members.values()
            wave = decode_audio(data, replace(self.spec, clip_samples=last)).numpy()[first:][: self.spec.clip_samples]
            if not np.vdot(wave, wave) > 0:
                raise DataError("the event is silent")
            return wave
        except DataError as error:
            raise SampleRejected(shown(clip.shard), clip.entry.key, str(error)) from error


def _weighted(weights: Sequence[float], draw: float) -> int:
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, draw * sums[-1], side="right"))


def _with_loudness(events: Sequence[Event], draw: float) -> list[Event]:
    """Some loud, some quiet, at least one of each."""
    bits = 1 + int(draw * (2 ** len(events) - 2))
    words = list(LOUDNESS_DB)
    return [
        replace(event, attributes=(("loudness", words[bits >> place & 1]), *event.attributes))
        for place, event in enumerate(events)
    ]
