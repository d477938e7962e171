"""What a corpus is to a builder: items in an order of its own, read one after the other and never all at once.

An item names files and carries what tables say of them; nothing of the files is read before a worker packs the item.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmcl.errors import DataError

MAX_KEY = 80
"""Characters: with its extension, a name must fit the 100 bytes of a tar header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One sample to be."""

    key: str
    """Unique in the corpus, of letters, digits, `_` and `-`."""
    files: tuple[str, ...] = ()
    """Below the root. What a picture or sound is, its bytes say; .txt, .json and .cls are read as those members."""
    captions: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    label: int | None = None
    """Number of its class."""
    row: int | None = None
    """Where the corpus is a table that also holds the contents."""

    def dump(self) -> str:
        """The item as a line of JSON."""
        return json.dumps([self.key, self.files, self.captions, self.facts, self.label, self.row], sort_keys=True)

    @classmethod
    def load(cls, line: str | bytes) -> "Item":
        """The item of a line."""
        key, files, captions, facts, label, row = json.loads(line)
        return cls(key=key, files=tuple(files), captions=tuple(captions), facts=facts, label=label, row=row)


class Skipped(NamedTuple):
    """Something of a corpus that becomes no item."""

    where: str
    why: str


class Elsewhere(Skipped):
    """Of which a file is no file below the root."""


Read = Iterator[Item | Skipped]


@dataclass(slots=True)
class Contents:
    """An item with what its files hold."""

    media: list[tuple[str, bytes]]
    """Name and bytes of each picture and sound."""
    captions: list[str | bytes]
    facts: dict[str, Any]
    label: int | str | bytes | None


def make_key(text: str) -> str:
    """A key that says what `text` says: `birds/crow` -> `birds__crow`.

    Where something had to be replaced or cut, a hash of `text` follows, so that different texts give different keys.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", text.replace("/", "__"))
    if 0 < len(safe) <= MAX_KEY and safe.replace("__", "/") == text:
        return safe
    return f"{safe[: MAX_KEY - 9]}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:8]}"


def walk(folder: Path, below: Path | None = None) -> Iterator[str]:
    """Files in `folder`, sorted, as paths below `below` or `folder`; no hidden ones, and none in linked folders."""
    start = below or folder
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((Path(place) / name).relative_to(start).as_posix() for name in sorted(files) if name[0] != ".")


def inside(root: Path, path: str, where: str) -> str:
    """`path` as one below `root`.

    Raises:
        DataError: it is a URL or leads elsewhere; names `where`. Links are looked at when the file is read.
    """
    try:
        return _below(root, path)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def item_at(root: Path, where: str, paths: Sequence[str], **fields: Any) -> Item | Elsewhere:
    """An item with the files at `paths`, or what is wrong with one of them.

    Args:
        root: what they lie below.
        where: what names them.
        paths: absolute or below the root.
        fields: the other ones of the item.
    """
    try:
        return Item(files=tuple(_below(root, path) for path in paths), **fields)
    except DataError as error:
        return Elsewhere(where, str(error))


def _below(root: Path, path: str) -> str:
    if "://" in path:
        raise DataError(
            f"{path!r} is a URL, and nothing is downloaded here: let img2dataset download the table, "
            "then `mmcl data build img2dataset`"
        )
    below = os.path.relpath(path, os.path.abspath(root)) if os.path.isabs(path) else os.path.normpath(path)
    if below == "." or below.split(os.sep)[0] == ".." or "\0" in below:
        raise DataError(f"{path!r} is no file below {root}: name with --root the folder that holds all files")
    return below


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, bytes too, and other things their text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes() | bytearray():
            return None
        case Mapping():
            return {str(name): plain(part) for name, part in value.items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case _:
            return str(value)
