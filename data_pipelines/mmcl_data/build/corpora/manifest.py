"""A table whose columns hold paths of pictures and sounds, and captions; all other columns become facts.

Columns that are not named are guessed by their usual names. The key of a sample is the key column or the number of its
line, so that it can be found in the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Item, Read, Skipped, item_at, make_key, plain
from mmcl_data.build.tables import Row, open_table

IMAGES = ("image", "image_path", "img", "img_path", "image_file")
SOUNDS = ("audio", "audio_path", "sound", "audio_file", "wav")
FILES = ("filepath", "file_path", "file_name", "filename", "path", "file")
"""Of whatever it is."""
TEXTS = ("caption", "captions", "text", "title", "sentence", "description")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns are what; the empty name is none."""

    media: tuple[str, ...]
    text: str
    key: str


@dataclass(frozen=True, kw_only=True)
class TableOptions(Corpus):
    """What tables have in common."""

    image_column: str = ""
    """column of pictures (default: guessed)"""
    audio_column: str = ""
    """column of sounds (default: guessed)"""
    text_column: str = ""
    """column of captions, each a text or a list of them (default: guessed)"""
    key_column: str = ""
    """column of keys (default: `key` if there is one, or else the number of the line)"""

    def columns(self, names: list[str], where: Path, *, media: Sequence[str] = (), labelled: bool = False) -> Columns:
        """Which of a table's columns are what; `media` if those are known, and `labelled` if no pair is needed.

        Raises:
            ConfigError: a named column is not there, or nothing could be paired; lists the columns.
        """
        has = f"{where}: the columns are {', '.join(names)}"
        for option in ("image_column", "audio_column", "text_column", "key_column"):
            if (name := getattr(self, option)) and name not in names:
                raise ConfigError(f"{has}: no {name!r}, as --{option.replace('_', '-')} says")
        media = media or [self.image_column or _guess(IMAGES, names), self.audio_column or _guess(SOUNDS, names)]
        media = [name for name in media if name] or [name for name in [_guess(FILES, names)] if name]
        text = self.text_column or _guess(TEXTS, names)
        if len(media) + bool(text) + labelled < 2:
            lacks = "captions: name them with --text-column" if media else "paths: name --image-column, --audio-column"
            raise ConfigError(f"{has}: none is known to hold {lacks}")
        return Columns(media=tuple(media), text=text, key=self.key_column or _guess(("key",), names))


@dataclass(frozen=True, kw_only=True)
class Manifest(TableOptions):
    """a CSV, TSV, JSONL or Parquet table with columns of paths (below --root, by default its folder) and captions"""

    manifest: str
    """the table"""
    quotes: bool = True
    """whether quotes in a CSV or TSV enclose cells, true or false; if not, they are characters (default: true)"""

    def read(self, root: Path) -> Read:
        """The items in the order of the table."""
        path = Path(self.manifest)
        table = open_table(path, quotes=self.quotes)
        columns = self.columns(table.columns, path)
        for row in table.rows:
            yield row if isinstance(row, Skipped) else _item(root, row, columns)


def _item(root: Path, row: Row, columns: Columns) -> Item | Skipped:
    paths = []
    for name in columns.media:
        path = row.cells.get(name)
        if path is not None and not isinstance(path, str):
            return Skipped(row.where, f"column {name!r} holds a {type(path).__name__}, not a path")
        if path and path.strip():
            paths.append(path.strip())
    captions = as_captions(row.cells.get(columns.text))
    if captions is None:
        return Skipped(row.where, f"column {columns.text!r} holds neither a text nor a list of texts")
    if not paths:
        return Skipped(row.where, "no path")
    key = make_key(str(row.cells.get(columns.key))) if columns.key else f"{row.number:09d}"
    return item_at(root, row.where, paths, key=key, captions=captions, facts=other_facts(row.cells, columns))


def as_captions(cell: Any) -> tuple[str, ...] | None:
    """The captions in a cell; None if it holds something else."""
    texts = [] if cell is None else [cell] if isinstance(cell, str) else cell
    return tuple(texts) if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def other_facts(cells: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The cells of a row that are neither contents nor captions."""
    return {name: plain(cell) for name, cell in cells.items() if name not in (*columns.media, columns.text)}


def _guess(usual: tuple[str, ...], names: list[str]) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), "")
