"""`mmcl data stats`: what shards hold, from headers of files and the words of captions; no picture or sound is decoded.

Every byte is read once, for the hashes that duplicates are found by. What is kept does not grow with the data: numbers
are counted to four digits, names and captions up to a limit (the rest as `(others)`, or not at all), and of hashes 2^25
of a kind. Beyond that every second one goes, by its own bits, then three of four, and so on: what is said of duplicates
then holds for that share of the contents, and is exact for it.

Shards are read side by side; the result is the same for any number of workers.
"""

import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import combinations
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmcl.errors import ConfigError, DataError
from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs
from mmcl_data.check import printable, read_known
from mmcl_data.decode import KIND_OF_EXTENSION, Kind
from mmcl_data.decode.audio import FORMATS as SOUNDS
from mmcl_data.decode.image import FORMATS as IMAGES
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts, tokenize
from mmcl_data.samples import hash_of
from mmcl_data.scan import SampleEntry, expand_shards, scan_shard
from mmcl_data.sweep import Told, over_shards, untold

MAX_NAMES = 50_000
"""Different values of one kind that are counted by name."""
MAX_HASHES = 2**25
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_SPEC = InputSpec(image_size=224, resize_mode="shortest", sample_rate=16_000, clip_samples=160_000, context_length=77)
_END_OF_TEXT = 49407
_COMMON = 10
_SHOWN = 200
"""Characters of a caption or a name that are kept."""


class Spread:
    """Numbers by how often they occur, each to four digits."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[float(f"{value:.4g}")] += 1
        self.total += value

    def merge(self, other: "Spread") -> None:
        self.counts.update(other.counts)
        self.total += other.total

    def described(self) -> dict[str, float]:
        """How many, their sum and mean, and quantiles by nearest rank: `p0` is the least and `p100` the largest."""
        values = sorted(self.counts)
        ends = np.cumsum([self.counts[value] for value in values])
        count = int(ends[-1])
        ranks = [max(1, math.ceil(count * quantile / 100)) for quantile in QUANTILES]
        held = {f"p{q}": values[np.searchsorted(ends, rank)] for q, rank in zip(QUANTILES, ranks, strict=True)}
        return {"count": count, "total": self.total, "mean": self.total / count, **held}


class Hashes:
    """63-bit hashes, of which those whose lowest `shift` bits are zero are kept, `limit` at most."""

    def __init__(self, limit: int = MAX_HASHES) -> None:
        self.limit, self.shift = limit, 0
        self.kept = np.zeros(0, dtype=np.uint64)
        self.new: list[int] = []

    def add(self, value: int) -> None:
        self.new.append(value)

    def merge(self, other: "Hashes") -> None:
        self._keep(other.every(max(self.shift, other.shift)), max(self.shift, other.shift))

    def every(self, shift: int) -> np.ndarray:
        """Those whose lowest `shift` bits are zero."""
        held = np.concatenate([self.kept, np.array(self.new, dtype=np.uint64)])
        return held[held & np.uint64((1 << shift) - 1) == 0]

    def _keep(self, more: np.ndarray, shift: int) -> None:
        self.kept, self.new, self.shift = np.concatenate([self.every(shift), more]), [], shift
        while len(self.kept) > self.limit and self.shift < 62:
            self.shift += 1
            self.kept = self.every(self.shift)

    def described(self) -> dict[str, float]:
        """How many were looked at, how many of them are different, copies of another, and alike at most."""
        _, counts = np.unique(self.every(self.shift), return_counts=True)
        count, largest = int(counts.sum()), int(counts.max(initial=0))
        shown_share = {} if self.shift == 0 else {"share_looked_at": 0.5**self.shift}
        return {"count": count, "distinct": len(counts), "copies": count - len(counts), "alike": largest, **shown_share}


@dataclass(slots=True)
class Tally:
    """What was counted of some shards; two of them add up."""

    numbers: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    hashes: dict[str, Hashes] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    """Of the first shards that cannot be read."""

    def count(self, what: str, name: str, number: int = 1) -> None:
        counter, name = self.counts.setdefault(what, Counter()), name[:_SHOWN]
        counter[name if name in counter or len(counter) < MAX_NAMES else "(others)"] += number

    def measure(self, what: str, value: float) -> None:
        self.spreads.setdefault(what, Spread()).add(value)

    def hash(self, what: str, data: bytes) -> None:
        self.hashes.setdefault(what, Hashes()).add(hash_of(data))

    def merge(self, other: "Tally") -> None:
        self.numbers.update(other.numbers)
        for what, counter in other.counts.items():
            for name, number in counter.items():
                self.count(what, name, number)
        for what, spread in other.spreads.items():
            self.spreads.setdefault(what, Spread()).merge(spread)
        for what, hashes in other.hashes.items():
            self.hashes.setdefault(what, Hashes()).merge(hashes)
        self.damage = [*self.damage, *other.damage][:100]

    def described(self) -> dict[str, Any]:
        """For JSON: numbers, counts by name, quantiles, duplicates, what is damaged."""
        return {
            **{
                name: self.numbers[name] for name in ("shards", "samples", "bytes", "damaged_shards", "damaged_samples")
            },
            "empty_captions": self.numbers["empty_captions"],
            "counts": {what: dict(self.counts[what].most_common()) for what in sorted(self.counts)},
            "spreads": {what: self.spreads[what].described() for what in sorted(self.spreads)},
            "duplicates": {what: self.hashes[what].described() for what in sorted(self.hashes)},
            "damage": self.damage,
        }


def source_stats(spec: str, *, workers: int = 1, tokens: int | None = None, told: Told = untold) -> Tally:
    """Count what the shards of `spec` hold; damaged shards and samples are counted and left out.

    Args:
        spec: a tar, directory, glob or brace pattern.
        workers: processes.
        tokens: also count the tokens of captions and those that are cut at this context length.
        told: is told after every shard.

    Raises:
        ConfigError, ShardMissing: `spec` names no shards; no worker; a context length below 3.
    """
    if tokens is not None and tokens < 3:
        raise ConfigError(f"tokens={tokens}: a context holds a start, a word and an end at least")
    whole, paths = Tally(), expand_shards(spec)
    for found in over_shards(partial(_shard, tokens), paths, workers, told):
        whole.merge(found if isinstance(found, Tally) else _unreadable(found))
    return whole


def _unreadable(error: DataError) -> Tally:
    return Tally(numbers=Counter(shards=1, damaged_shards=1), damage=[str(error)])


def _shard(tokens: int | None, path: str) -> Tally:
    tally = Tally()
    try:
        scan, blobs = scan_shard(path), Blobs()
        tally.numbers.update(shards=1, bytes=scan.bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            read = ((sample, *read_known(blobs, path, sample)) for sample in scan.samples)
            captions = [text for held in read for text in _sample(*held, tally)]
    except DataError as error:
        return _unreadable(error)
    if tokens and captions:
        longer = replace(_SPEC, context_length=tokens + 1)
        lengths = (tokenize(captions, longer) == _END_OF_TEXT).int().argmax(dim=1) + 1
        for length in lengths.tolist():
            tally.measure("caption tokens", length)
            tally.count("caption tokens", f"cut at {tokens}" if length > tokens else f"fit into {tokens}")
    return tally


def _sample(sample: SampleEntry, members: Mapping[str, bytes], large: Mapping[str, str], tally: Tally) -> list[str]:
    """Count one sample; its captions."""
    kinds: set[Kind] = set()
    captions: list[str] = []
    damaged = False
    for extension in sample.extensions:
        kind = KIND_OF_EXTENSION.get(extension)
        if kind is None:
            tally.count("unread members", extension)
            continue
        kinds.add(kind)
        try:
            if extension in large:
                raise DataError(large[extension])
            captions += _member(kind, members[extension], tally)
        except Exception as error:  # PIL and soundfile raise anything on hostile bytes
            damaged = True
            tally.count("damaged members", f"{kind}: {str(error) if isinstance(error, DataError) else 'no such file'}")
    tally.numbers.update(samples=1, damaged_samples=int(damaged))
    tally.count("modalities", "+".join(sorted(kinds)) or "nothing")
    return captions


def _member(kind: Kind, data: bytes, tally: Tally) -> list[str]:
    match kind:
        case "image":
            _image(data, tally)
        case "audio":
            _sound(data, tally)
        case "text":
            return [_caption(data, tally)]
        case "facts":
            for name in _fields(decode_facts(data)):
                tally.count("json fields", name)
        case "class":
            tally.count("classes", str(decode_class(data)))
    return []


def _image(data: bytes, tally: Tally) -> None:
    with Image.open(BytesIO(data), formats=IMAGES) as image:  # the header only
        (width, height), form = image.size, f"{image.format} {image.mode}"
    tally.count("image formats", form)
    tally.measure("image width, px", width)
    tally.measure("image height, px", height)
    tally.measure("image width / height", width / height)
    tally.measure("image megapixels", width * height / 1e6)
    tally.measure("image bytes", len(data))
    tally.hash("image", data)


def _sound(data: bytes, tally: Tally) -> None:
    with soundfile.SoundFile(BytesIO(data)) as sound:
        frames, rate, channels, form = sound.frames, sound.samplerate, sound.channels, sound.format
        subtype = sound.subtype
    if form not in SOUNDS or frames <= 0 or rate <= 0:
        raise DataError("no sound, or in no format that is read")
    tally.count("audio formats", f"{form} {subtype}")
    tally.count("audio rates, Hz", str(rate))
    tally.count("audio channels", str(channels))
    tally.measure("audio seconds", frames / rate)
    tally.measure("audio bytes", len(data))
    tally.hash("audio", data)


def _caption(data: bytes, tally: Tally) -> str:
    tally.numbers["empty_captions"] += not data.strip()
    caption = decode_caption(data)
    tally.measure("caption characters", len(caption))
    tally.measure("caption words", len(caption.split()))
    scripts = _scripts(caption)
    tally.count("caption scripts", max(scripts, key=lambda name: (scripts[name], name), default="no letters"))
    for script, letters in scripts.items():
        tally.count("letters by script", script, letters)
    normal = " ".join(caption.casefold().split())
    tally.count("captions", normal)
    tally.hash("caption", normal.encode())
    return caption


def _scripts(text: str) -> Counter[str]:
    """Letters by script."""
    if text.isascii():
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters} if letters else {})
    found: Counter[str] = Counter()
    for character, number in Counter(text).items():
        if character.isalpha():
            found[script_of(character)] += number
    return found


@lru_cache(maxsize=2**16)
def script_of(letter: str) -> str:
    """The script of a letter, as its Unicode name begins: `Latin`, `Cyrillic`, `Han`, `Arabic`."""
    words = unicodedata.name(letter, "unnamed").split()
    first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH", "MODIFIER") and len(words) > 1 else words[0]
    return {"CJK": "Han", "FEMININE": "Latin", "MASCULINE": "Latin", "MICRO": "Greek"}.get(first, first.capitalize())


def _fields(facts: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Names of fields with the types of their values, and of the fields of objects among them."""
    for name, value in facts.items():
        yield f"{before}{name[:60]}: {_TYPES[type(value)]}"
        if isinstance(value, dict) and not before:
            yield from _fields(value, f"{name[:60]}.")


_TYPES = {
    dict: "object",
    list: "list",
    str: "text",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def shared_contents(tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """Different images, sounds and captions that two sources have in common, for every two that have any."""
    found = []
    for (one, first), (other, second) in combinations(tallies.items(), 2):
        for what in sorted(first.hashes.keys() & second.hashes.keys()):
            shift = max(first.hashes[what].shift, second.hashes[what].shift)
            common = len(np.intersect1d(first.hashes[what].every(shift), second.hashes[what].every(shift)))
            if common:
                found.append({"sources": [one, other], "what": what, "distinct": common})
    return found


def shared_line(shared: Mapping[str, Any]) -> str:
    """One of `shared_contents`, for a person."""
    return f"{' and '.join(shared['sources'])} have {_plain(shared['distinct'])} {shared['what']} contents in common"


def stats_table(source: Mapping[str, Any]) -> str:
    """One source of a report, for a person."""
    lines = [
        f"{source['source']}: " + ", ".join(f"{_plain(source[what])} {what}" for what in ("shards", "samples", "bytes"))
    ]
    for what, counts in source["counts"].items():
        if what != "captions":
            lines.append(_names(what, counts))
    lines.append("  " + " " * 22 + "".join(f"{head:>10}" for head in ("count", "mean", *_HEADS)))
    for what, spread in source["spreads"].items():
        cells = [spread["count"], spread["mean"], *(spread[f"p{q}"] for q in QUANTILES)]
        lines.append(f"  {what:<22}" + "".join(f"{_plain(cell):>10}" for cell in cells))
    if "audio seconds" in source["spreads"]:
        lines.append(f"  {'audio in all':<22}{source['spreads']['audio seconds']['total'] / 3600:.3g} h")
    for what, found in source["duplicates"].items():
        share = f", of {found['share_looked_at']:.3g} of all" if "share_looked_at" in found else ""
        numbers = f"{_plain(found['copies'])} copies, at most {_plain(found['alike'])} alike{share}"
        lines.append(f"  {what + ' contents':<22}{_plain(found['distinct'])} different, {numbers}")
    for caption, number in list(source["counts"].get("captions", {}).items())[:_COMMON]:
        if number > 1:
            lines.append(f"  {_plain(number):>8} x  {printable(caption)}")
    damaged = f"{source['damaged_shards']} shards, {source['damaged_samples']} samples"
    lines.append(f"  {'damaged':<22}{damaged}; empty captions: {source['empty_captions']}")
    return "\n".join([*lines, *(f"  {printable(cause)}" for cause in source["damage"])])


_HEADS = ("least", *(f"p{q}" for q in QUANTILES[1:-1]), "most")


def _names(what: str, counts: Mapping[str, int]) -> str:
    first = ", ".join(f"{printable(name)} {_plain(number)}" for name, number in list(counts.items())[:12])
    more = f", and {_plain(len(counts) - 12)} more" if len(counts) > 12 else ""
    return f"  {what:<22}{first}{more}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def stats_report(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """All sources, for JSON; of captions only the most common."""
    sources: Sequence[dict[str, Any]] = [{"source": name, **tally.described()} for name, tally in tallies.items()]
    for source in sources:
        if captions := source["counts"].get("captions"):
            source["counts"]["captions"] = dict(list(captions.items())[:_COMMON])
    return {"sources": sources, "shared": shared_contents(tallies)}
