"""The shards that pipelines are compared on: JPEGs that cost about what photographs cost, and noise in flac.

An image is a field of 1/f noise, as photographs have it, with some flat shapes on it: about 50 kB at 512 pixels and
quality 90. Its caption is told by no other sample, so that whoever decodes it can be held against it.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from mmcl_data.build.shards import write_shards

QUALITY = 90
OF_A_SHARD = 250
_FIELDS = 6
_REPEATS_S = 10.0
"""Long sounds repeat themselves, which flac does not notice."""
_WORDS = ("red", "small", "dog", "window", "street", "under", "light", "cup", "far", "green", "water", "old", "sign")

Sample = dict[str, bytes | str]


def images(folder: Path, count: int, side: int, *, damaged: float = 0.0) -> Path:
    """`count` JPEGs of `side` pixels with captions; of a share `damaged`, every second is cut in half, the others have
    no header."""
    every = round(1 / damaged) if damaged else 0

    def samples() -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        bank = np.stack([_field(rng, side + 64) for _ in range(_FIELDS)])
        for number in range(count):
            data = _jpeg(np.random.default_rng(number), bank, side)
            if every and number % every == 0:
                data = data[: len(data) // 2] if number % (2 * every) else bytes(400) + data[400:]
            yield {"__key__": f"{number:06d}", "jpg": data, "txt": caption(number).encode()}

    write_shards(samples(), folder, samples_per_shard=OF_A_SHARD)
    return folder


def sounds(folder: Path, count: int, seconds: float, *, rate: int = 48_000, channels: int = 1) -> Path:
    """`count` flacs with captions."""

    def samples() -> Iterator[Sample]:
        for number in range(count):
            yield {
                "__key__": f"{number:06d}",
                "flac": _flac(number, seconds, rate, channels),
                "txt": caption(number).encode(),
            }

    write_shards(samples(), folder, samples_per_shard=max(1, min(OF_A_SHARD, count // 4)))
    return folder


def caption(number: int) -> str:
    """About as long as captions are, and of one sample only."""
    words = " ".join(_WORDS[(number * 7 + place * (3 + number % 5)) % len(_WORDS)] for place in range(10))
    return f"a picture of {words}, number {number}"


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise whose amplitude falls with frequency, of mean 0 and deviation 1."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / np.maximum(frequencies, 1 / side) ** 1.5
    field = np.fft.irfft2(spectrum, (side, side))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _jpeg(rng: np.random.Generator, bank: np.ndarray, side: int) -> bytes:
    tops = rng.integers(0, bank.shape[1] - side, size=(3, 2))
    layers = [bank[rng.integers(len(bank)), top : top + side, left : left + side] for top, left in tops]
    grey, *colours = layers
    pixels = np.stack([grey * 45 + colours[0] * 12, grey * 45, grey * 45 + colours[1] * 12], axis=-1) + 120
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, wide, high = (rng.random(4) * side * [1, 1, 0.3, 0.3]).tolist()
        draw.ellipse((x, y, x + wide, y + high), fill=tuple(rng.integers(0, 256, 3).tolist()))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return held.getvalue()


def _flac(number: int, seconds: float, rate: int, channels: int) -> bytes:
    """Noise under a few tones, which flac makes about half as large."""
    rng = np.random.default_rng(number)
    time = np.arange(round(min(seconds, _REPEATS_S) * rate)) / rate
    wave = 0.01 * rng.standard_normal((len(time), channels))
    wave += 0.1 * np.sin(2 * np.pi * time[:, None, None] * rng.uniform(100, 4000, 3)).sum(axis=-1)
    held = io.BytesIO()
    soundfile.write(held, np.resize(wave, (round(seconds * rate), channels)), rate, format="FLAC", subtype="PCM_16")
    return held.getvalue()


def linked(folder: Path, samples: int, count: int) -> Path:
    """`count` shards of tiny images that are one file under many names: all to be indexed, and little to be written."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(held, "PNG")
    made: Iterator[Sample] = (
        {"__key__": f"{number:06d}", "png": held.getvalue(), "txt": b"red"} for number in range(samples // count)
    )
    write_shards(made, folder / "one", samples_per_shard=samples)
    place = folder / "linked"
    place.mkdir()
    for number in range(count):
        os.link(folder / "one" / "000000.tar", place / f"{number:06d}.tar")
    return place
