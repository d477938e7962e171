"""Scenes: what is where, before anything is drawn.

A scene's layout is its relation, and objects are listed in its reading order: a row from left to right, a column from
top to bottom, a pair from left to right and then the third object below or above both. Coordinates are shares of the
image's side, y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmcl_data.build.world.config import SIZES, TEXTURES, WorldConfig
from mmcl_data.build.world.pairs import Words
from mmcl_data.build.world.placement import spread

Layout = Literal["single", "row", "column", "pair_above", "pair_below"]
LAYOUTS: dict[int, tuple[Layout, ...]] = {
    1: ("single",),
    2: ("row", "column"),
    3: ("row", "column", "pair_above", "pair_below"),
}

_RADII = {"large": (0.18, 0.205), "small": (0.105, 0.125)}
_CROWDED = 0.725  # three large objects must fit a row; even so, large stays larger than any small
_MARGIN, _GAP = 0.02, 0.03
_JITTER = 0.08  # across a row or column; two jitters stay below the least distance along it, so one relation dominates
_MAX_ANGLE = 0.35  # 20 degrees: a square must not become a diamond


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One shape and where it is."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    """Of the circle around it."""
    angle: float
    """In radians."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in the reading order of their layout."""

    objects: tuple[SceneObject, ...]
    layout: Layout

    @property
    def relations(self) -> list[tuple[int, str, int]]:
        """(subject, relation, object) by index, each stated once, from the earlier object to the later."""
        word = {"row": "left", "column": "above"}.get(self.layout)
        if word:
            return [(i, word, i + 1) for i in range(len(self.objects) - 1)]
        if self.layout == "single":
            return []
        vertical = "above" if self.layout == "pair_above" else "below"
        return [(0, "left", 1), (0, vertical, 2), (1, vertical, 2)]

    def facts(self) -> dict[str, Any]:
        """For the json member."""
        fields = SceneObject.__slots__
        objects = [{name: getattr(thing, name) for name in fields} for thing in self.objects]
        return {"layout": self.layout, "objects": objects, "relations": [list(fact) for fact in self.relations]}


def sample_scene(pairs: Sequence[Words], layout: Layout, config: WorldConfig, rng: np.random.Generator) -> Scene:
    """A scene of these (colour, shape) in this layout."""
    sizes = [SIZES[rng.integers(len(SIZES))] if config.sizes else SIZES[0] for _ in pairs]
    textures = [TEXTURES[rng.integers(len(TEXTURES))] if config.textures else TEXTURES[0] for _ in pairs]
    crowded = _CROWDED if len(pairs) > 2 else 1.0
    radii = [crowded * float(rng.uniform(*_RADII[size])) for size in sizes]
    centres = _place(radii, layout, rng)
    angles = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE, len(pairs)).tolist()
    objects = tuple(
        SceneObject(
            shape=shape,
            colour=colour,
            size=size,
            texture=texture,
            x=round(x, 4),
            y=round(y, 4),
            radius=round(radius, 4),
            angle=round(angle, 4),
        )
        for (colour, shape), size, texture, (x, y), radius, angle in zip(
            pairs, sizes, textures, centres, radii, angles, strict=True
        )
    )
    return Scene(objects, layout)


def _place(radii: list[float], layout: Layout, rng: np.random.Generator) -> list[tuple[float, float]]:
    if layout in ("pair_above", "pair_below"):
        return _place_pair(radii, layout, rng)
    along = _along(radii, rng)
    if layout == "single":
        return [(along[0], _along(radii, rng)[0])]
    inset = _MARGIN + max(radii)
    line = rng.uniform(inset, 1 - inset)
    across = np.clip(line + rng.uniform(-_JITTER, _JITTER, len(radii)), inset, 1 - inset).tolist()
    return list(zip(along, across, strict=True)) if layout == "row" else list(zip(across, along, strict=True))


def _place_pair(radii: list[float], layout: Layout, rng: np.random.Generator) -> list[tuple[float, float]]:
    left, right, third = radii
    x = [*_along([left, right], rng), *_along([third], rng)]
    band = max(left, right)
    if layout == "pair_above":
        pair_y, third_y = _along([band, third], rng)
    else:
        third_y, pair_y = _along([third, band], rng)
    loose = [pair_y + (band - radius) * float(rng.uniform(-1, 1)) for radius in (left, right)]
    return list(zip(x, [*loose, third_y], strict=True))


def _along(radii: Sequence[float], rng: np.random.Generator) -> list[float]:
    starts = spread([2 * radius for radius in radii], 1.0, _GAP, _MARGIN, rng)
    return [start + radius for start, radius in zip(starts, radii, strict=True)]
