"""Trees as sound: cross-faded one after another, matched in loudness at the same time.

A recording loses the silence at its ends. Parts of a sequence share the time that it has equally: a longer recording is
cut, a shorter one keeps its length. Parts of an overlay last as long as its longest, or as the sequence among them: a
shorter one is repeated, so that none is before another. All joins are equal-power cross-fades of 50 ms, less where a
recording is very short, and so are beginning and end.

Every event is brought to the same loudness: the root mean square of what is heard of it, over frames of 20 ms within
30 dB of its loudest. (BS.1770's weighting would change that by a few decibels between a whistle and a rumble, and
costs filtering every part.) Where a tree says "loud" or "quiet", it is 6 dB more or less. If the sum peaks too high,
all of it is turned down alike.

There are no random numbers, and nothing hangs on threads: one tree and the same recordings give the same bits.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from mmcl.errors import DataError
from mmcl_data.compose.tree import Event, Mix, Seq, Tree, events_of, flat

LOUDNESS = 0.1
"""Root mean square of an event, 20 dB below full scale."""
LOUDNESS_DB: Mapping[str, float] = {"loud": 6.0, "quiet": -6.0}
"""What words of the kind `loudness` do to it."""
FADE_S = 0.05
PEAK = 0.95
_FRAME_S = 0.02
_SILENT = 1e-4
"""Power of a frame below that of the loudest: 40 dB."""
_HEARD = 1e-3
Wave = Float32[np.ndarray, " t"]


class _Placed(NamedTuple):
    event: Event
    start: int
    length: int


class _Room(NamedTuple):
    """What the layout goes by, in samples."""

    lengths: Mapping[Event, int]
    fade: int


def render_audio(tree: Tree, clips: Mapping[str, Wave], rate: int, samples: int) -> Wave:
    """`samples` samples at `rate` Hz in [-0.95, 0.95]: the tree from the beginning, then silence if time is left.

    Args:
        tree: its events name their recordings.
        clips: mono recordings at `rate` by those names.
        rate: in Hz.
        samples: length of the result.

    Raises:
        DataError: a recording is silent.
    """
    tree = flat(tree)
    sounds = {event: trimmed(clips[event.clip], rate) for event in dict.fromkeys(events_of(tree))}
    lengths = {event: len(sound) for event, sound in sounds.items()}
    # a fade at either end of a piece, and room between them
    fade = max(1, min(round(FADE_S * rate), min(lengths.values()) // 4, samples // (4 * len(lengths))))
    out = np.zeros(samples, dtype=np.float32)
    rise = np.sin(np.linspace(0, np.pi / 2, fade)).astype(np.float32)
    gains: dict[Event, np.float32] = {}
    for event, start, length in _laid_out(tree, 0, samples, _Room(lengths, fade)):
        heard = sounds[event][:length]
        if event not in gains:
            gains[event] = _gain(event, heard, rate)
        piece = heard * gains[event]
        piece[:fade] *= rise
        piece[-fade:] *= rise[::-1]
        out[start : start + length] += piece
    if (peak := max(out.max(), -out.min())) > PEAK:
        out *= np.float32(PEAK) / peak
    return out


def trimmed(wave: Wave, rate: int) -> Wave:
    """The recording without silence at its ends, except for as much as a fade takes.

    Raises:
        DataError: there is nothing but silence.
    """
    frame = _frame(rate)
    power = _power(wave, frame)
    if not power.size or not power.max():
        raise DataError("the sound is silent")
    loud = np.flatnonzero(power > _SILENT * power.max())
    margin, last = round(FADE_S * rate), int(loud[-1]) * frame
    tail = wave[last : last + frame + margin]
    # a fade of the zeros after a sound that breaks off would leave the break
    return wave[max(0, int(loud[0]) * frame - margin) : last + int(np.flatnonzero(tail)[-1]) + 1]


def loudness(wave: Wave, rate: int) -> float:
    """Root mean square over what is heard: frames within 30 dB of the loudest."""
    power = _power(wave, _frame(rate))
    return float(np.sqrt(power[power >= _HEARD * power.max()].mean()))


def _frame(rate: int) -> int:
    return max(1, round(_FRAME_S * rate))


def _power(wave: Wave, frame: int) -> Float32[np.ndarray, " f"]:
    """Mean square of each frame; what is left at the end counts only where it is all there is."""
    whole = len(wave) // frame
    frames = wave[: whole * frame].reshape(whole, frame) if whole else wave.reshape(1, -1)
    return np.einsum("ft,ft->f", frames, frames) / np.float32(max(1, frames.shape[1]))


def _gain(event: Event, heard: Wave, rate: int) -> np.float32:
    change = LOUDNESS_DB.get(dict(event.attributes).get("loudness", ""), 0.0)
    return np.float32(LOUDNESS * 10 ** (change / 20) / max(loudness(heard, rate), 1e-9))


def _laid_out(tree: Tree, start: int, room: int, known: _Room) -> list[_Placed]:
    """What is played when, in at most `room` samples."""
    match tree:
        case Event():
            return [_Placed(tree, start, min(known.lengths[tree], room))]
        case Seq():
            return _in_turn(tree, start, room, known)
        case Mix():
            return _at_once(tree, start, room, known)


def _in_turn(tree: Seq, start: int, room: int, known: _Room) -> list[_Placed]:
    overlaps = (len(tree.parts) - 1) * known.fade
    share, placed = (room + overlaps) // len(tree.parts), []
    for part in tree.parts:
        placed += _laid_out(part, start, share, known)
        start = _end(placed) - known.fade
    return placed


def _at_once(tree: Mix, start: int, room: int, known: _Room) -> list[_Placed]:
    def leads(part: Tree) -> int:
        return min(known.lengths[part], room) if isinstance(part, Event) else room + 1

    leader = max(tree.parts, key=leads)
    placed = _laid_out(leader, start, room, known)
    end = _end(placed)
    for part in tree.parts:
        if part is not leader:
            placed += [again for event in events_of(part) for again in _repeated(event, start, end, known)]
    return placed


def _repeated(event: Event, start: int, end: int, known: _Room) -> list[_Placed]:
    placed = []
    while end - start >= 2 * known.fade:
        length = min(known.lengths[event], end - start)
        placed.append(_Placed(event, start, length))
        start += length - known.fade
    return placed


def _end(placed: list[_Placed]) -> int:
    return max(piece.start + piece.length for piece in placed)
