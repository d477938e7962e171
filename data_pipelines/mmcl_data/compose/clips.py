"""Which single events there are in shards, and what they are called.

A sample is one event, called by the first of some places that holds a name: fields of its json, its class, its caption.
Or its json lists `events` with label, start and end, as the strong labels of AudioSet do: then each of these that no
other overlaps is one. What cannot be an event is counted by its reason and left out. Only headers, names and facts are
read here; a sound is read when it is drawn.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmcl.errors import ConfigError, DataError
from mmcl_data.blobs import Blobs
from mmcl_data.compose.captions import plain_label
from mmcl_data.decode import KIND_OF_EXTENSION, MAX_BYTES
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts
from mmcl_data.index import KINDS, Index
from mmcl_data.scan import SampleEntry, read_sample

LABELS = ("label", "labels", "category", "class", "cls", "txt")
MAX_END_S = 60.0
"""Of a listed event: the sound before it is decoded, too."""
_AUDIO = 1 << KINDS.index("audio")


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Shards of single events."""

    shards: str
    """As a source names them."""
    index: str = ""
    """Folder of their index; by default `.mmcl-index` beside local shards."""
    label: tuple[str, ...] = LABELS
    """Where the name is looked for, in this order: fields of the json with dots between (a list on the way must hold
    one thing), `cls` for the name of the class, `txt` for the caption."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Kinds of attributes that are known, in the order of speaking, each with its field: {pitch: facts.pitch}."""
    only: dict[str, str] = field(default_factory=dict)
    """Fields and what they must hold."""
    classnames: str = ""
    """A file with the names of the classes, a line each."""
    event_s: tuple[float, float] = (1.0, 9.5)
    """Of listed events, the shortest and longest that are taken, in seconds."""


class Clip(NamedTuple):
    """One event in a shard."""

    label: str
    attributes: tuple[tuple[str, str], ...]
    shard: str
    entry: SampleEntry
    """Of the sound alone."""
    span: tuple[float, float] | None = None
    """Where in it the event is, in seconds; all of it where nothing is said."""


@dataclass(slots=True)
class Clips:
    """Events by their label."""

    by_label: dict[str, list[Clip]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    """Samples by the reason."""

    def __len__(self) -> int:
        return sum(map(len, self.by_label.values()))

    def add(self, index: Index, source: ClipSource, blobs: Blobs | None = None) -> None:
        """Take in the events of some shards.

        Raises:
            ConfigError: the file of class names cannot be read.
            ShardMissing, ShardDamaged: a shard is gone or was written again.
        """
        blobs, names = blobs or Blobs(), _class_names(source.classnames)
        for sample in range(len(index)):
            if not index.kinds[sample] & _AUDIO:
                continue
            entry, shard = index.entry(sample), index.shard_of(sample).path
            kinds = [KIND_OF_EXTENSION.get(extension) for extension in entry.extensions]
            members = read_sample(blobs, shard, _only(entry, [n for n, k in enumerate(kinds) if _is_name(k, entry, n)]))
            sound = _only(entry, [kinds.index("audio")])
            try:
                for label, attributes, span in _events(_facts(members, names), source):
                    clip = Clip(label, attributes, shard, sound, span)
                    self.by_label.setdefault(label, []).append(clip)
            except DataError as error:
                self.left_out[re.sub(r"'.*'", "...", str(error))] += 1


def _is_name(kind: str | None, entry: SampleEntry, number: int) -> bool:
    return kind in ("facts", "class", "text") and entry.sizes[number] <= MAX_BYTES[kind]


def _only(entry: SampleEntry, numbers: Sequence[int]) -> SampleEntry:
    return SampleEntry(
        entry.key,
        tuple(entry.extensions[n] for n in numbers),
        tuple(entry.offsets[n] for n in numbers),
        tuple(entry.sizes[n] for n in numbers),
    )


def _class_names(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text("utf-8").splitlines()] if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"classnames={path}: {error}") from error


def _facts(members: Mapping[str, bytes], names: Sequence[str]) -> dict[str, Any]:
    """The json, with `cls` and `txt` beside its fields."""
    facts: dict[str, Any] = {}
    for extension, data in members.items():
        match KIND_OF_EXTENSION.get(extension):
            case "facts":
                facts = decode_facts(data) | facts
            case "text":
                facts["txt"] = decode_caption(data)
            case "class" if (number := decode_class(data)) < len(names):
                facts["cls"] = names[number]
    return facts


_Named = tuple[str, tuple[tuple[str, str], ...], tuple[float, float] | None]


def _events(facts: Mapping[str, Any], source: ClipSource) -> Iterator[_Named]:
    for path, wanted in source.only.items():
        if (found := _at(facts, path)) != wanted:
            raise DataError(f"{path} is {found!r}")
    if isinstance(listed := facts.get("events"), list):
        yield from _apart(listed, source)
        return
    label = next((found for path in source.label if (found := _at(facts, path))), None)
    if label is None:
        raise DataError(f"no name in any of {', '.join(source.label)}, or several")
    words = {kind: _at(facts, path) for kind, path in source.attributes.items()}
    yield plain_label(label), tuple((kind, plain_label(word)) for kind, word in words.items() if word), None


def _at(facts: Any, path: str) -> str | None:
    """The word at a path; None where there is none, or several."""
    for name in [*path.split("."), ""]:
        while isinstance(facts, list) and len(facts) == 1:
            facts = facts[0]
        facts = facts.get(name) if name and isinstance(facts, dict) else None if name else facts
    return facts if isinstance(facts, str) else None


def _apart(listed: list[Any], source: ClipSource) -> Iterator[_Named]:
    """Listed events that are heard alone."""
    low, high = source.event_s
    try:
        events = [(str(event["label"]), float(event["start"]), float(event["end"])) for event in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("an event without label, start and end") from error
    for number, (label, start, end) in enumerate(events):
        others = [*events[:number], *events[number + 1 :]]
        alone = all(until <= start or end <= since for _, since, until in others)
        if alone and start >= 0 and end <= MAX_END_S and low <= end - start <= high:
            yield plain_label(label), (), (start, end)
