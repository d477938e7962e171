"""One sound file to the waveform that a model reads: mono, at the model's rate, exactly as long as it wants.

soundfile decodes (wav, flac, ogg, mp3, with nothing to install), seeking to the window instead of decoding the whole
file; channels are averaged; soxr in its HQ setting resamples, as librosa and transformers do. What a header claims is
held against limits before anything is allocated, and against the data that follow.
"""

from io import BytesIO
from math import ceil

import numpy as np
import soundfile
import soxr
import torch
from jaxtyping import Float32
from torch import Tensor

from mmcl.errors import DataError
from mmcl.types import InputSpec

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 4_000, 384_000
_MP3_WARM_UP = 10 * 1152
MAX_PEAK = 8.0
"""A float file a little over full scale is clipped; one far over it holds integers or worse."""


def decode_audio(data: bytes, spec: InputSpec, start: float = 0.0) -> Float32[Tensor, " t"]:
    """`spec.clip_samples` samples at `spec.sample_rate` Hz in [-1, 1] from the sound in `data`.

    A longer sound is cut to a window, placed by `start` in [0, 1] between the first possible position and the last;
    a shorter one is followed by silence.

    Raises:
        DataError: not a whole WAV, FLAC, OGG or MP3 file; more than 8 channels, a rate outside 4..384 kHz, no samples;
            fewer samples than the header claims, NaN or infinite ones, far over full scale, or nothing but zeros.
    """
    assert 0 <= start <= 1, start
    try:
        with soundfile.SoundFile(BytesIO(data)) as sound:
            _check(sound)
            wave, rate = _window(sound, spec, start), sound.samplerate
    except (DataError, MemoryError):
        raise
    except Exception as error:  # LibsndfileError, but also what cffi makes of hostile headers
        raise DataError(f"not a readable WAV, FLAC, OGG or MP3 sound: {error}") from error
    peak = float(max(-wave.min(), wave.max()) if len(wave) else 0.0)  # a NaN comes through both
    if not np.isfinite(peak):
        raise DataError("the sound holds NaN or infinite samples")
    if not peak:
        raise DataError("the sound is silent: every sample is zero")
    if peak > MAX_PEAK:
        raise DataError(f"the sound peaks at {peak:g}, where full scale is 1")
    return _fit(wave, rate, spec)


def _check(sound: soundfile.SoundFile) -> None:
    if sound.format not in FORMATS:
        raise DataError(f"a sound in {sound.format} format, not one of {', '.join(FORMATS)}")
    if not 1 <= sound.channels <= MAX_CHANNELS:
        raise DataError(f"a sound of {sound.channels} channels is over the limit of {MAX_CHANNELS}")
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise DataError(f"a sound at {sound.samplerate} Hz is outside {MIN_RATE}..{MAX_RATE}")
    if sound.frames <= 0:
        raise DataError("the sound is empty")


def _window(sound: soundfile.SoundFile, spec: InputSpec, start: float) -> Float32[np.ndarray, " t"]:
    wanted = ceil(spec.clip_samples * sound.samplerate / spec.sample_rate)
    present = min(wanted, sound.frames)
    begin = round(start * (sound.frames - present))
    # an MP3 frame needs the frames before it, which a seek throws away: read those too and drop what they give
    warm_up = min(begin, _MP3_WARM_UP) if sound.format == "MP3" else 0
    if begin:
        sound.seek(begin - warm_up)
    wave = sound.read(warm_up + present, dtype="float32", always_2d=True)[warm_up:]
    if len(wave) < present:
        raise DataError(
            f"the sound ends after {begin + len(wave)} of the {sound.frames} samples that its header claims"
        )
    return _mono(wave)


def _mono(wave: Float32[np.ndarray, "t c"]) -> Float32[np.ndarray, " t"]:
    if wave.shape[1] == 1:
        return wave[:, 0]
    if wave.shape[1] == 2:  # ten times as quick as a mean over so few
        return (wave[:, 0] + wave[:, 1]) / 2
    return wave.mean(axis=1)


def _fit(wave: Float32[np.ndarray, " s"], rate: int, spec: InputSpec) -> Float32[Tensor, " t"]:
    if rate != spec.sample_rate:
        wave = soxr.resample(wave, rate, spec.sample_rate, quality="HQ")
    if not len(wave):
        raise DataError(f"the sound is too short for one sample at {spec.sample_rate} Hz")
    fitted = np.empty(spec.clip_samples, dtype=np.float32)
    length = min(len(wave), spec.clip_samples)
    np.clip(wave[:length], -1, 1, out=fitted[:length])
    fitted[length:] = 0
    return torch.from_numpy(fitted)
