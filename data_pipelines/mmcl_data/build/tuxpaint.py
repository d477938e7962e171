"""The stamps of Tux Paint: drawings with captions in many languages, some with a sound.

Debian's package tuxpaint-stamps-default (GPL-2) is a tree of folders. A stamp is a stem: `crow.png` or `crow.svg` is
the drawing, `crow.txt` the caption (the first line in English, then `xx.utf8=` translations), `crow.ogg` or `crow.wav`
the sound it makes when it is stamped, `crow_desc_xx.ogg` the caption read aloud, which is not used. For letters and
digits the sound is their name, spoken; the facts tell such sounds from effects.

    png    RGB on white, longest side at most 256 pixels, padded to a square
    txt    the English caption
    flac   the sound, where there is one: mono, 16 bit, at its own rate (the reader resamples to its model's)
    json   {"caption", "translations": {language: caption}, "category": [folder, ...], "stem",
            "sound": "effect" or "speech" or null}

The same stamps, seed and library versions give the same bytes.
"""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError

from mmcl.errors import ConfigError, DataError, MissingExtra, NoUsableSamples
from mmcl_data.build.shards import write_shards
from mmcl_data.decode.text import decode_caption

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIDE = 256
_TRANSLATION = re.compile(r"([A-Za-z@_-]+)\.utf8=(.*)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stamp:
    key: str
    category: tuple[str, ...]
    stem: str
    picture: Path
    caption: Path
    sound: Path | None
    spoken: bool
    """The sound exists in several languages or is that of a letter, so it is a voice."""


@dataclass(slots=True)
class _Tally:
    stamps: int = 0
    with_sound: int = 0
    with_speech: int = 0
    from_svg: int = 0
    captions: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    """Path under the root and why."""

    def skip(self, what: str, why: str) -> None:
        self.skipped[what] = why
        _log.warning("tuxpaint: %s: %s", what, why)


def build_tuxpaint(root: Path, out: Path, *, seed: int = 0, samples_per_shard: int = 250) -> dict[str, Any]:
    """Write every stamp under `root` that has a drawing and a caption to `out/train/NNNNNN.tar`, shuffled by `seed`.

    Returns what is also written to `out/manifest.json`: counts, shards with sha256, and what was skipped and why. A
    sound that cannot be read is left out and named there; its stamp stays.

    Raises:
        NoUsableSamples: `root` is missing or holds no stamp.
        MissingExtra: there are SVG drawings and no rasteriser.
        ConfigError: `out/train` exists and is not empty.
    """
    tally = _Tally()
    stamps = list(_find(root, tally)) if root.is_dir() else []
    if not stamps:
        remedy = f"apt-get install tuxpaint-stamps-default (it lies in {STAMPS}) or name the folder that holds them"
        raise NoUsableSamples(f"{root}: no Tux Paint stamps there: {remedy}")
    if (out / "train").exists() and any((out / "train").iterdir()):
        raise ConfigError(f"{out / 'train'} exists and is not empty: name a new folder or remove it")
    random.Random(seed).shuffle(stamps)
    shards = write_shards(_samples(stamps, root, tally), out / "train", samples_per_shard)
    manifest = {
        "corpus": "tuxpaint",
        "licence": "GPL-2.0 (tuxpaint-stamps; see /usr/share/doc/tuxpaint-stamps-default/copyright)",
        "seed": seed,
        "counts": {
            "stamps": tally.stamps,
            "with_sound": tally.with_sound,
            "of_which_speech": tally.with_speech,
            "from_svg": tally.from_svg,
            "distinct_captions": len(tally.captions),
            "skipped": len(tally.skipped),
        },
        "shards": [
            {"name": f"train/{shard.name}", "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in shards
        ],
        "skipped": dict(sorted(tally.skipped.items())),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _find(root: Path, tally: _Tally) -> Iterator[_Stamp]:
    """The stamps under `root` in the order of their paths, so that the file system's order does not matter."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    keys: set[str] = set()
    for stem in sorted({name[:-4] for name in files if name.endswith((".png", ".svg", ".txt"))}):
        # of both, the bitmap: its pixels do not depend on the version of a rasteriser
        picture = files.get(f"{stem}.png") or files.get(f"{stem}.svg")
        caption = files.get(f"{stem}.txt")
        if picture is None:
            tally.skip(stem, "a caption without a drawing")
        elif caption is None:
            # Tux Paint shows NAME_mirror when the stamp NAME is turned over: no stamp of its own
            mirror = stem.endswith("_mirror")
            tally.skip(stem, "the mirrored drawing of another stamp" if mirror else "a drawing without a caption")
        else:
            key = _key(stem, keys)
            sound = files.get(f"{stem}.ogg") or files.get(f"{stem}.wav")
            voices = any(f"{stem}_{language}.ogg" in files for language in ("de", "el", "en_GB", "es", "fr", "ru"))
            spoken = voices or "/alphabets/" in stem
            *category, name = stem.split("/")
            yield _Stamp(key, tuple(category), name, picture, caption, sound, spoken)


def _key(stem: str, taken: set[str]) -> str:
    """`animals/birds/crow` -> `animals__birds__crow`: no dots, at which keys end, and no slashes."""
    key = re.sub(r"[^A-Za-z0-9_-]", "-", stem.replace("/", "__"))
    if key in taken:
        key += "-" + hashlib.sha256(stem.encode()).hexdigest()[:8]
    taken.add(key)
    return key


def _samples(stamps: list[_Stamp], root: Path, tally: _Tally) -> Iterator[dict[str, bytes | str]]:
    for stamp in stamps:
        try:
            caption, translations = _captions(stamp.caption.read_bytes())
            sample: dict[str, bytes | str] = {
                "__key__": stamp.key,
                "png": _picture(stamp.picture),
                "txt": caption.encode(),
            }
        except DataError as error:
            tally.skip(stamp.picture.relative_to(root).as_posix(), str(error))
            continue
        kind = None
        if stamp.sound is not None:
            try:
                sample["flac"] = _sound(stamp.sound)
                kind = "speech" if stamp.spoken else "effect"
            except DataError as error:
                tally.skip(stamp.sound.relative_to(root).as_posix(), str(error))
        facts = {
            "caption": caption,
            "translations": translations,
            "category": list(stamp.category),
            "stem": stamp.stem,
            "sound": kind,
        }
        sample["json"] = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
        tally.stamps += 1
        tally.with_sound += kind is not None
        tally.with_speech += kind == "speech"
        tally.from_svg += stamp.picture.suffix == ".svg"
        tally.captions.add(caption)
        yield sample


def _captions(data: bytes) -> tuple[str, dict[str, str]]:
    first, *rest = decode_caption(data).splitlines()
    pairs = (match.groups() for line in rest if (match := _TRANSLATION.match(line)))
    translations = {language: text.strip() for language, text in pairs if text.strip()}
    return decode_caption(first.encode()), translations


def _picture(path: Path) -> bytes:
    """The drawing as a PNG: RGB on white, square, at most 256 pixels wide."""
    drawing = _rasterise(path) if path.suffix == ".svg" else _open(path, path.read_bytes())
    scale = min(1.0, SIDE / max(drawing.size))  # small ones stay small: the reader scales to its own size
    size = tuple(max(1, round(length * scale)) for length in drawing.size)
    drawing = drawing.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (max(size), max(size)), "white")
    square.alpha_composite(drawing, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    encoded = BytesIO()
    square.convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()


def _open(path: Path, data: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            return image.convert("RGBA")
    except UnidentifiedImageError as error:  # its own text holds an address, which differs from run to run
        raise DataError(f"{path.name} is no PNG") from error
    except Exception as error:  # PIL's plugins raise anything from SyntaxError to struct.error
        raise DataError(f"{path.name} is no readable drawing: {error}") from error


def _rasterise(path: Path) -> Image.Image:
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise MissingExtra("resvg-py", "svg", "Drawing SVG stamps") from error
    try:
        # without system fonts, which differ from machine to machine; a dpi, or lengths in points come out as 0
        wide = _open(path, svg_to_bytes(svg_path=str(path), width=SIDE, dpi=96, skip_system_fonts=True))
        if wide.height <= SIDE:
            return wide
        return _open(path, svg_to_bytes(svg_path=str(path), height=SIDE, dpi=96, skip_system_fonts=True))
    except ValueError as error:
        raise DataError(f"{path.name} is no readable drawing: {error}") from error


def _sound(path: Path) -> bytes:
    """The sound as FLAC: mono, 16 bit, at its own rate."""
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(f"{path.name} is no readable sound: {error}") from error
    if not wave.any() or not np.isfinite(wave).all():
        raise DataError(f"{path.name} is empty, silent or not finite")
    encoded = BytesIO()
    soundfile.write(encoded, wave.mean(axis=1), rate, format="FLAC", subtype="PCM_16")
    return encoded.getvalue()
