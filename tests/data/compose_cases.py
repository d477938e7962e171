"""Trees of sounds for the tests of composed sounds, and shards of single events."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import strategies as st

from mmcl_data.build.shards import write_shards
from mmcl_data.compose.clips import Clips, ClipSource
from mmcl_data.compose.tree import Event, Mix, Seq, Tree, is_sayable
from mmcl_data.index import build_index

RATE = 8000
LABELS = ("dog bark", "church bells", "rain", "an owl", "the sea", "chirp (tweet)", "boat & ship horn", "s.o.s.")
LOUDNESS = st.sampled_from(((), (("loudness", "loud"),), (("loudness", "quiet"),)))
PITCH = st.sampled_from(((), (("pitch", "deep"),), (("pitch", "shrill"),)))
EVENTS = st.builds(lambda label, *words: Event(label, sum(words, ())), st.sampled_from(LABELS), LOUDNESS, PITCH)
ANY_TREES = st.recursive(
    EVENTS,
    lambda parts: st.builds(
        lambda kind, held: kind(tuple(held)), st.sampled_from((Seq, Mix)), st.lists(parts, min_size=1, max_size=3)
    ),
    max_leaves=6,
)
TREES = ANY_TREES.filter(is_sayable)


def shape(tree: Tree) -> str:
    """The tree without its events: "s(e m(e e))"."""
    if isinstance(tree, Event):
        return "e"
    return f"{type(tree).__name__[0].lower()}({' '.join(map(shape, tree.parts))})"


def tone(hz: float, seconds: float = 0.5, level: float = 0.3, rate: int = RATE) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def flac(wave: np.ndarray, rate: int = RATE) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, wave, rate, format="FLAC")
    return encoded.getvalue()


def clip_sample(key: str, facts: object = None, **members: bytes) -> dict[str, bytes | str]:
    held = {"flac": flac(tone(440))} | members
    if facts is not None:
        held["json"] = json.dumps(facts).encode()
    return {"__key__": key, **held}


def collect(samples: list[dict[str, bytes | str]], folder: Path, **source: object) -> Clips:
    """The clips of samples that are written to `folder`."""
    write_shards(samples, folder, 3)
    clips = Clips()
    clips.add(build_index(str(folder), folder / "index"), ClipSource(shards=str(folder), **source))  # pyright: ignore[reportArgumentType]
    return clips
