"""A sound as samples: ten timbres that differ in spectrum, envelope and noise, each with its fundamental strongest.

All arithmetic is in float64 up to the rounding to 16 bits: the sines of two CPUs differ in the last bit, and float32
would let that bit through to the file.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import soundfile
from numpy.typing import NDArray

from mmcl_data.build.world.sounds import Sound, SoundEvent

_PEAKS = {"loud": (0.36, 0.46), "quiet": (0.08, 0.12)}  # two loud events at once stay below 1
_NOISE = (3e-4, 4e-3)  # root mean square of the background
_FADE = 0.012  # seconds, at both ends: no clicks

_FINE = 256

Floats = NDArray[np.float64]
Tones = NDArray[np.complex128]
"""Rotating in the complex plane: the imaginary part is heard."""

_Voice = Callable[[Floats, float, float, np.random.Generator], Floats]
"""(seconds since the start, fundamental, highest frequency allowed, random numbers) -> samples at any level."""


def render(sound: Sound, clip_seconds: float, sample_rate: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """The sound as int16 samples."""
    low, high = np.log(_NOISE)
    clip = np.exp(rng.uniform(low, high)) * _noise(round(clip_seconds * sample_rate), rng)
    for event in sound.events:
        start = round(event.start * sample_rate)
        samples = _render_event(event, sample_rate, rng)[: len(clip) - start]
        clip[start : start + len(samples)] += samples
    return np.rint(np.clip(clip, -1, 1) * 32767).astype(np.int16)


def encode_sound(samples: NDArray[np.int16], sample_rate: int) -> bytes:
    """FLAC at level 0: its predictors are integers, so that the bytes do not hang on a CPU's floating point."""
    content = io.BytesIO()
    soundfile.write(content, samples, sample_rate, format="FLAC", subtype="PCM_16", compression_level=0.0)
    return content.getvalue()


def _render_event(event: SoundEvent, sample_rate: int, rng: np.random.Generator) -> Floats:
    t = np.arange(round(event.duration * sample_rate)) / sample_rate
    samples = VOICES[event.timbre](t, event.frequency, 0.45 * sample_rate, rng)
    fade = np.linspace(0, 1, round(_FADE * sample_rate))
    samples[: len(fade)] *= fade
    samples[-len(fade) :] *= fade[::-1]
    return samples * (rng.uniform(*_PEAKS[event.loudness]) / np.abs(samples).max())


def _spiral(t: Floats, rate: complex) -> Tones:
    """exp(rate t) for evenly spaced t from 0, as products of coarse and fine steps: few exponentials, so fast."""
    fine = np.exp(rate * t[:_FINE])
    return np.outer(np.exp(rate * t[::_FINE]), fine).ravel()[: len(t)]


def _tone(t: Floats, f: float, decay: float = 0.0) -> Tones:
    return _spiral(t, complex(-decay, 2 * np.pi * f))


def _modulated(phase: Floats) -> Tones:
    return np.cos(phase) + 1j * np.sin(phase)


def _harmonics(tone: Tones, amplitudes: Sequence[float], f: float, limit: float) -> Floats:
    """sum_k a_k Im tone^k below `limit`: where |tone| falls, high harmonics fall faster."""
    power, total = tone.copy(), np.zeros(len(tone))
    for k, amplitude in enumerate(amplitudes, start=1):
        if k * f > limit:
            break
        if k > 1:
            power *= tone
        if amplitude:
            total += amplitude * power.imag
    return total


def _noise(count: int, rng: np.random.Generator) -> Floats:
    """White, of unit power. Uniform: a quarter of the time of normal noise, and the ear cannot tell."""
    return (rng.random(count) - 0.5) * 12**0.5


def _bell(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    partials = [(1.0, 1.0, 3.0), (2.76, 0.6, 5.0), (5.4, 0.4, 8.0), (8.93, 0.25, 12.0)]  # not harmonic
    kept = (p for p in partials if p[0] * f < limit)
    return sum((gain * _tone(t, ratio * f, decay).imag for ratio, gain, decay in kept), np.zeros(len(t)))


def _drum(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    since = t % 0.16  # since the last stroke of a roll
    phase = 2 * np.pi * f * (since + 0.006 * (1 - np.exp(-since / 0.012)))  # the skin is tighter when struck
    return np.sin(phase) * np.exp(-since / 0.045) + 0.35 * _noise(len(t), rng) * np.exp(-since / 0.006)


def _flute(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    phase = 2 * np.pi * f * t + 0.25 * _tone(t, 5.0).imag
    tone = _harmonics(_modulated(phase), (1.0, 0.22, 0.06), f, limit)
    return (tone + 0.1 * _noise(len(t), rng)) * np.minimum(1, t / 0.09)


def _buzzer(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    tone = _harmonics(_tone(t, f), [1 / k**0.7 for k in range(1, 17)], f, limit)
    return tone * (0.35 + 0.65 * (t % 0.04 < 0.02))  # 25 interruptions a second


def _whistle(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    trill = 0.6 + 0.4 * _tone(t, 14.0).imag  # of the pea
    return trill * (_tone(t, f).imag + 0.02 * _noise(len(t), rng))


def _organ(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    return _harmonics(_tone(t, f), (1.0, 0.8, 0, 0.6, 0, 0, 0, 0.5), f, limit)  # stops an octave apart


def _guitar(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    return _harmonics(_tone(t, f, decay=3.5), [1 / k for k in range(1, 13)], f, limit)


def _horn(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    swell = np.minimum(1, np.sqrt(t / 0.25))  # high harmonics come last, as in brass
    return _harmonics(_tone(t, f) * swell, (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3), f, limit)


def _siren(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    depth, rate = 0.12 * f, 3.0
    phase = 2 * np.pi * f * t - depth / rate * _tone(t, rate).real
    return _harmonics(_modulated(phase), (1.0, 0, 0.3), f, limit)


def _rattle(t: Floats, f: float, limit: float, rng: np.random.Generator) -> Floats:
    slow = _noise(int(t[-1] * 100) + 2, rng)  # noise of 50 Hz, moved up to the pitch
    grains = np.interp(t * 100, np.arange(len(slow)), slow)
    return (grains * _tone(t, f).imag + 0.06 * _noise(len(t), rng)) * np.exp(-(t % 0.075) / 0.02)


VOICES: dict[str, _Voice] = {
    "bell": _bell,
    "drum": _drum,
    "flute": _flute,
    "buzzer": _buzzer,
    "whistle": _whistle,
    "organ": _organ,
    "guitar": _guitar,
    "horn": _horn,
    "siren": _siren,
    "rattle": _rattle,
}
