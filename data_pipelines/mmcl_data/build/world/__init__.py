"""The world: a procedural three-modality data set with exact ground truth, made from a seed, to the byte.

Scenes of coloured shapes in spatial relations, sounds of pitched timbres in temporal relations, and captions from a
grammar in which either part may be named first, so that the relation word carries the meaning. Where a scene and a
sound describe each other, each shape has its timbre, each colour its pitch, large is loud, and left to right is first
to last. Some attribute-object pairs never occur in training. After CLEVR, Johnson et al. 2017,
https://arxiv.org/abs/1612.06890, with sound.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcl_data.build.world.captions import choose, foils, say, true_captions
    from mmcl_data.build.world.config import WorldConfig
    from mmcl_data.build.world.pairs import World, make_world
    from mmcl_data.build.world.scenes import Scene, SceneObject
    from mmcl_data.build.world.sounds import Sound, SoundEvent
    from mmcl_data.build.world.write import build_world

__all__ = [
    "Scene",
    "SceneObject",
    "Sound",
    "SoundEvent",
    "World",
    "WorldConfig",
    "build_world",
    "choose",
    "foils",
    "make_world",
    "say",
    "true_captions",
]

_PLACES = {
    "true_captions": "captions",
    "choose": "captions",
    "foils": "captions",
    "say": "captions",
    "WorldConfig": "config",
    "World": "pairs",
    "make_world": "pairs",
    "Scene": "scenes",
    "SceneObject": "scenes",
    "Sound": "sounds",
    "SoundEvent": "sounds",
    "build_world": "write",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more: the command line wants the settings without numpy."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
