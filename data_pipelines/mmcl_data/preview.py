"""`mmcl data preview`: one HTML page that shows samples as a model gets them, to be looked at and listened to.

The page needs nothing but itself: pictures and sounds are part of it, nothing is fetched and no script runs, which its
Content-Security-Policy also says to the browser. Whatever comes from the data goes into a tree of elements as text, and
the tree is written out with all of it escaped.

Pictures are at most 320 pixels wide and high, sounds mono, 16 kHz and cut, texts cut: a sample adds about half a
megabyte at the most, for a sound of ten seconds that is nothing but noise, and mostly far less.
"""

import base64
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from mmcl.errors import ConfigError, DataError
from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs, shown
from mmcl_data.check import header_of, read_known
from mmcl_data.decode import KIND_OF_EXTENSION
from mmcl_data.decode.audio import decode_audio
from mmcl_data.decode.image import FORMATS, decode_image
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts
from mmcl_data.scan import SampleEntry, expand_shards, scan_shard
from mmcl_data.sweep import Told, untold

MAX_SAMPLES = 1000
MAX_SECONDS = 60
SIDE = 320
RATE = 16_000
NEGATIVES = ("foils", "negatives", "hard_negatives")
"""Fields of the json member with captions that do not fit; `captions` and `caption` hold further ones that do."""
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; form-action 'none'"
_MAX_TEXT = 1000
_MAX_TEXTS = 24
_MELS = 80
_DEEP_DB = 70.0
_MAGMA = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Drawn(NamedTuple):
    """A sample that is shown."""

    shard: str
    entry: SampleEntry


@dataclass(slots=True)
class Seen:
    """One sample, decoded for a person."""

    image: Image.Image | None = None
    size: str = ""
    """Of the image, as it is in the shard."""
    sound: Tensor | None = None
    seconds: float = 0.0
    """Of the sound, of which `sound` holds the beginning."""
    caption: str | None = None
    label: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def write_preview(
    specs: Sequence[str], out: Path, *, samples: int = 48, seed: int = 0, seconds: float = 10.0, told: Told = untold
) -> dict[str, int]:
    """Write a page with `samples` of all shards that `specs` name to `out`; the same ones for the same seed.

    Each shard gives as many, as far as it has them; of more shards than samples, that many at even distances are read.
    Sounds are cut after `seconds`. A file that is there is replaced. Returns how many samples, problems and bytes the
    page has.

    Raises:
        ConfigError: samples or seconds out of range, shards that cannot be named so, `out` cannot be written.
        ShardMissing: there are no such shards.
    """
    if not (1 <= samples <= MAX_SAMPLES and 0 < seconds <= MAX_SECONDS):
        raise ConfigError(f"samples={samples}, seconds={seconds}: expected 1..{MAX_SAMPLES} and up to {MAX_SECONDS} s")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: the page cannot be written there: no such folder")
    paths = [path for spec in specs for path in expand_shards(spec)]
    drawn, damage = draw(paths, samples, seed)
    body = Element("body")
    _add(body, "h1", "A look at the data")
    _add(body, "p", f"Samples: {len(drawn)}, drawn with seed {seed}. Shards: {len(paths)}.", {"class": "place"})
    for cause in damage:
        _add(body, "p", f"Problem: {cause}", {"class": "problem"})
    blobs, problems, shard = Blobs(), len(damage), None
    main = grid = _add(body, "main")
    for done, (path, entry) in enumerate(drawn, 1):
        if path != shard:
            shard = path
            _add(main, "h2", shown(path))
            grid = _add(main, "section")
        seen = _look(blobs, path, entry, seconds)
        problems += len(seen.problems)
        _show(grid, seen, path, entry)
        told(done, len(drawn))
    page = _page(body)
    staged = out.with_name(f".{out.name}.tmp")
    try:
        staged.write_bytes(page)
        staged.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: the page cannot be written there: {error.strerror}") from error
    return {"samples": len(drawn), "problems": problems, "bytes": len(page)}


def draw(paths: Sequence[str], samples: int, seed: int) -> tuple[list[Drawn], list[str]]:
    """Samples of all shards alike, in the order of the shards, and what is wrong with shards that cannot be read."""
    chance = random.Random(seed)
    if len(paths) > samples:
        paths = [paths[int((number + chance.random()) * len(paths) / samples)] for number in range(samples)]
    damage: list[str] = []
    found: list[tuple[int, int, int, SampleEntry]] = []  # how early in its shard's turn; shard; number there
    for place, path in enumerate(paths):
        try:
            entries = scan_shard(path).samples
        except DataError as error:
            damage.append(str(error))
            continue
        numbers = chance.sample(range(len(entries)), min(samples, len(entries)))
        found += [(turn, place, number, entries[number]) for turn, number in enumerate(numbers)]
    kept = sorted(sorted(found)[:samples], key=lambda one: one[1:3])
    return [Drawn(paths[place], entry) for _, place, _, entry in kept], damage


def _look(blobs: Blobs, path: str, entry: SampleEntry, seconds: float) -> Seen:
    seen = Seen()
    try:
        members, large = read_known(blobs, path, entry)
    except DataError as error:
        seen.problems.append(str(error))
        return seen
    seen.problems += [f"{extension}: {cause}" for extension, cause in large.items()]
    for extension, data in members.items():
        try:
            _look_at(KIND_OF_EXTENSION.get(extension), data, seen, seconds)
        except DataError as error:
            seen.problems.append(f"{extension}: {error}")
    return seen


def _look_at(kind: str | None, data: bytes, seen: Seen, seconds: float) -> None:
    match kind:
        case "image":
            seen.image, seen.size = thumbnail(data)
        case "audio":
            spec = _spec(clip_samples=round(seconds * RATE))
            wave = decode_audio(data, spec)
            with soundfile.SoundFile(BytesIO(data)) as sound:
                seen.seconds = sound.frames / sound.samplerate
            seen.sound = wave[: max(1, ceil(seen.seconds * RATE))]
        case "text":
            seen.caption = decode_caption(data)
        case "class":
            seen.label = decode_class(data)
        case "facts":
            seen.facts = decode_facts(data)


def _spec(image_size: int = SIDE, clip_samples: int = RATE) -> InputSpec:
    return InputSpec(
        image_size=image_size, resize_mode="longest", sample_rate=RATE, clip_samples=clip_samples, context_length=77
    )


def thumbnail(data: bytes) -> tuple[Image.Image, str]:
    """The whole image, made smaller where it is large, and its own size in words.

    Raises:
        DataError: as `decode_image`.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Exception:  # is said better below
        width = height = SIDE
    side = min(SIDE, max(width, height))
    square = decode_image(data, _spec(image_size=side))
    ratio = max(width, height) / side
    columns, rows = (max(1, min(side, round(length / ratio))) for length in (width, height))
    left, top = (side - columns) // 2, (side - rows) // 2  # beside it lies black
    pixels = square[:, top : top + rows, left : left + columns].permute(1, 2, 0)
    return Image.fromarray(pixels.numpy()), f"{width} x {height} pixels"


def spectrogram(wave: Tensor) -> Image.Image:
    """The sound over time, high above low: 80 mel bands up to 8 kHz, 70 dB from black to bright."""
    hop = max(64, len(wave) // SIDE)
    padded = torch.nn.functional.pad(wave, (0, max(0, 1024 - len(wave))))
    power = _mel(hop)(padded)[:, :-1].clamp_min(1e-10)
    level = 1 + 10 * (power / power.max()).log10() / _DEEP_DB
    picture = Image.fromarray((level.clamp(0, 1) * 255).round().byte().flip(0).numpy())
    shades = np.array(
        [np.interp(range(256), np.linspace(0, 255, len(_MAGMA)), one) for one in zip(*_MAGMA, strict=True)]
    )
    picture.putpalette(shades.T.round().astype(np.uint8).tobytes())
    return picture


@lru_cache(maxsize=64)
def _mel(hop: int) -> Any:
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(RATE, n_fft=1024, win_length=min(1024, max(256, 2 * hop)), hop_length=hop, n_mels=_MELS)


def _add(parent: Element, name: str, text: str = "", attributes: Mapping[str, str] | None = None) -> Element:
    """A new element; its text and attributes may hold anything."""
    element = SubElement(parent, name, {key: _clean(value) for key, value in (attributes or {}).items()})
    element.text = _clean(text)
    return element


def _clean(text: str) -> str:
    return _UNSHOWABLE.sub("\ufffd", text)


def _short(text: str, most: int = _MAX_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _picture(parent: Element, image: Image.Image, form: str, style: str, alt: str) -> None:
    held = BytesIO()
    image.save(held, form, **({"quality": 88} if form == "JPEG" else {"optimize": True}))
    source = _uri(f"image/{form.lower()}", held.getvalue())
    size = {"width": str(image.width), "height": str(image.height)}
    _add(parent, "img", attributes={"src": source, "alt": _short(alt, 200), "class": style, **size})


def _player(parent: Element, wave: Tensor, name: str) -> None:
    held = BytesIO()
    soundfile.write(held, wave.numpy(), RATE, format="FLAC", subtype="PCM_16")
    source = _uri("audio/flac", held.getvalue())
    _add(parent, "audio", attributes={"controls": "", "preload": "metadata", "src": source, "aria-label": name})


def _show(grid: Element, seen: Seen, path: str, entry: SampleEntry) -> None:
    article = _add(grid, "article")
    _add(article, "h3", _short(entry.key, 200), {"dir": "auto"})
    figure = _add(article, "figure")
    what = seen.caption or entry.key
    if seen.image is not None:
        small = max(seen.image.size) <= SIDE // 2  # is drawn larger, where JPEG would show
        _picture(figure, seen.image, *(("PNG", "small") if small else ("JPEG", "large")), alt=what)
    if seen.sound is not None:
        heard = len(seen.sound) / RATE
        _picture(figure, spectrogram(seen.sound), "PNG", "spectrogram", f"Spectrogram, {heard:.2f} s, 0 to 8 kHz")
        _player(figure, seen.sound, f"Sound of {_short(entry.key, 100)}, {heard:.2f} s")
    told = _add(figure, "figcaption")
    if seen.caption is not None:
        _add(told, "p", _short(seen.caption), {"class": "caption", "dir": "auto", "lang": ""})
    captions = [(f, t) for name in ("caption", "captions") for f, t in _texts(name, seen.facts.get(name))]
    _list(told, "Captions of the json", [(label, text) for label, text in captions if text != seen.caption], "more")
    _list(told, "Negatives", [pair for name in NEGATIVES for pair in _texts(name, seen.facts.get(name))], "negatives")
    if seen.label is not None:
        _add(told, "p", f"Class {seen.label}")
    for problem in seen.problems:
        _add(told, "p", f"Problem: {_short(problem)}", {"class": "problem"})
    _place(told, seen, path, entry)


def _list(parent: Element, title: str, pairs: Sequence[tuple[str, str]], style: str) -> None:
    if not pairs:
        return
    _add(parent, "h4", title)
    listed = _add(parent, "ul", attributes={"class": style})
    for label, text in pairs[:_MAX_TEXTS]:
        item = _add(listed, "li")
        _add(item, "small", _short(label, 80))
        _add(item, "span", _short(text), {"dir": "auto", "lang": ""})
    if len(pairs) > _MAX_TEXTS:
        _add(listed, "li", f"and {len(pairs) - _MAX_TEXTS} more")


def _texts(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, str]]:
    """Texts in a field, which may hold one, a list or an object of them, with where they are.

    An object with a `caption` is one text, with its `operator` beside it, if it names one.
    """
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict) and isinstance(value.get("caption"), str):
        operator = value.get("operator")
        yield f"{name}.{operator}" if isinstance(operator, str) else name, value["caption"]
    elif isinstance(value, list) and depth:
        for part in value:
            yield from _texts(name, part, depth - 1)
    elif isinstance(value, dict) and depth:
        for key, part in value.items():
            yield from _texts(f"{name}.{key}", part, depth - 1)


def _place(parent: Element, seen: Seen, path: str, entry: SampleEntry) -> None:
    name = shown(path).rpartition("/")[2]
    _add(parent, "p", f"{name}, byte {header_of(entry)}", {"class": "place"})
    sizes = [f"{extension} {size:,} bytes" for extension, size in zip(entry.extensions, entry.sizes, strict=True)]
    sizes += [seen.size] if seen.size else []
    if seen.sound is not None:
        heard = len(seen.sound) / RATE
        cut = f", of which the first {heard:g} s are here" if heard < seen.seconds - 0.01 else ""
        sizes.append(f"{seen.seconds:.2f} s{cut}")
    _add(parent, "p", "; ".join(sizes), {"class": "place"})
    if seen.facts:
        details = _add(parent, "details")
        _add(details, "summary", "json")
        _add(details, "pre", _short(json.dumps(seen.facts, indent=1, ensure_ascii=False), 4 * _MAX_TEXT), {"lang": ""})


def _page(body: Element) -> bytes:
    root = Element("html", {"lang": "en"})
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    _add(head, "title", "A look at the data")
    _add(head, "style", _STYLE)
    root.append(body)
    return b"<!doctype html>\n" + ElementTree.tostring(root, encoding="utf-8", method="html")


_STYLE = """
:root { color-scheme: light dark; --card: #f4f4f2; --line: #d4d4d0; --quiet: #5c5c58; --bad: #a31515; --not: #8a4b00 }
@media (prefers-color-scheme: dark) {
  :root { --card: #242426; --line: #444448; --quiet: #a8a8a4; --bad: #ff8a80; --not: #f0b36a }
}
body { margin: 0 auto; padding: 1rem; max-width: 100rem; font: 1rem/1.4 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1rem; margin: 2rem 0 .75rem; overflow-wrap: anywhere }
h3 { font-size: .85rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
h4 { font-size: .8rem; margin: .75rem 0 .25rem }
section { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)) }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; min-width: 0 }
figure { margin: 0 }
img, audio { display: block; width: 100%; margin: 0 0 .5rem }
img { height: 14rem; object-fit: contain }
img.small { image-rendering: pixelated }
img.spectrogram { height: 6rem; object-fit: fill; border-radius: .25rem }
p { margin: 0 0 .5rem; overflow-wrap: anywhere; unicode-bidi: isolate }
.caption { font-size: 1.1rem; max-height: 14rem; overflow: auto }
.place, small, summary { color: var(--quiet); font-size: .8rem }
.problem { color: var(--bad); font-weight: 600 }
ul { margin: 0 0 .5rem; padding: 0; list-style: none; font-size: .9rem; overflow-wrap: anywhere }
li { margin: 0 0 .25rem }
li small { display: block }
li span { unicode-bidi: isolate }
.negatives span { color: var(--not) }
pre { margin: .25rem 0 0; font-size: .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
"""
