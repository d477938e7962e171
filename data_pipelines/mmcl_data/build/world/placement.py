"""Extents along a line without overlap: objects along an axis, events along time."""

from collections.abc import Sequence

import numpy as np


def spread(lengths: Sequence[float], span: float, gap: float, margin: float, rng: np.random.Generator) -> list[float]:
    """Starts of `lengths`, in order, at least `gap` apart and `margin` from both ends, the rest shared at random."""
    slack = span - 2 * margin - gap * (len(lengths) - 1) - sum(lengths)
    starts, taken = [], margin
    for length, before in zip(lengths, np.sort(rng.random(len(lengths))).tolist(), strict=True):
        starts.append(taken + before * slack)
        taken += length + gap
    return starts
