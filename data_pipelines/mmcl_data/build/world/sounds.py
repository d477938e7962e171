"""Sounds: what is heard when, before anything is synthesised.

Events are listed by their start. In a sequence one ends before the next begins; overlapping events start almost
together and last alike, so that neither is before the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmcl_data.build.world.config import LOUDNESSES, PITCHES, WorldConfig
from mmcl_data.build.world.pairs import Words
from mmcl_data.build.world.placement import spread

Order = Literal["solo", "sequence", "overlap"]
OVERLAPPING = 0.35
"""Share of the two-event sounds that overlap."""

_MARGIN, _GAP = 0.02, 0.04  # shares of the clip
_LENGTHS = {1: (0.35, 0.8), 2: (0.25, 0.42), 3: (0.18, 0.27)}  # of one event among so many in sequence
_OVERLAP_LENGTH = (0.5, 0.7)
_DETUNED = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundEvent:
    """One timbre at one pitch."""

    timbre: str
    pitch: str
    loudness: str
    start: float
    """In seconds."""
    duration: float
    """In seconds."""
    frequency: float
    """Of the fundamental in Hz: within 2 % of its pitch's."""


@dataclass(frozen=True, slots=True)
class Sound:
    """Events by their start."""

    events: tuple[SoundEvent, ...]
    order: Order

    def facts(self) -> dict[str, Any]:
        """For the json member."""
        fields = SoundEvent.__slots__
        events = [{name: getattr(event, name) for name in fields} for event in self.events]
        return {"order": self.order, "events": events}


def sample_order(count: int, rng: np.random.Generator) -> Order:
    """How `count` events relate in time."""
    if count == 1:
        return "solo"
    return "overlap" if count == 2 and rng.random() < OVERLAPPING else "sequence"


def sample_sound(
    pairs: Sequence[Words],
    order: Order,
    config: WorldConfig,
    rng: np.random.Generator,
    loudnesses: Sequence[str] | None = None,
) -> Sound:
    """A sound of these (pitch, timbre) in this order; loudness is drawn where it is not given."""
    loudnesses = loudnesses or [LOUDNESSES[rng.integers(len(LOUDNESSES))] for _ in pairs]
    low, high = _OVERLAP_LENGTH if order == "overlap" else _LENGTHS[len(pairs)]
    lengths = rng.uniform(low, high, len(pairs)).tolist()
    if order == "overlap":
        first = rng.uniform(_MARGIN, 1 - _MARGIN - high - _GAP)
        starts = [first, first + rng.uniform(0, _GAP)]
    else:
        starts = spread(lengths, 1.0, _GAP, _MARGIN, rng)
    detuned = rng.uniform(1 - _DETUNED, 1 + _DETUNED, len(pairs)).tolist()
    events = tuple(
        SoundEvent(
            timbre=timbre,
            pitch=pitch,
            loudness=loudness,
            start=round(float(start) * config.clip_seconds, 4),
            duration=round(length * config.clip_seconds, 4),
            frequency=round(PITCHES[pitch] * factor, 2),
        )
        for (pitch, timbre), loudness, start, length, factor in zip(
            pairs, loudnesses, starts, lengths, detuned, strict=True
        )
    )
    return Sound(events, order)
