"""A folder that Hugging Face `datasets` saved with `save_to_disk`: Arrow files that hold pictures and sounds.

The library reads its own format and never runs code of a data set. Pictures and sounds come out as the bytes that went
in; where a row only names a file, that file must lie below the root.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError, DataError, MissingExtra
from mmcl_data.build.corpora.manifest import Columns, TableOptions, as_captions, other_facts
from mmcl_data.build.items import Contents, Item, Read, inside, make_key, plain


@dataclass(frozen=True, kw_only=True)
class HfDatasets(TableOptions):
    """a folder written by save_to_disk of Hugging Face `datasets`"""

    split: str = ""
    """of a folder with several, which one"""

    def read(self, root: Path) -> Read:
        """One item a row."""
        table = _open(root, self.split)
        columns = self._columns(root)
        keys = table.select_columns([columns.key]) if columns.key else None
        for row in range(len(table)):
            key = f"{row:09d}" if keys is None else make_key(str(keys[row][columns.key]))
            yield Item(key=key, row=row, facts={"fingerprint": table._fingerprint} if row == 0 else {})

    def load(self, root: Path, item: Item) -> Contents:
        """The contents of one row."""
        columns, cells = self._columns(root), _open(root, self.split)[item.row]
        media = [_bytes(root, name, cells[name]) for name in columns.media if cells[name] is not None]
        captions = as_captions(cells.get(columns.text))
        if captions is None:
            raise DataError(f"column {columns.text!r} holds neither a text nor a list of texts")
        facts = other_facts(cells, columns)
        label = self._label(root)
        number = facts.pop(label, None) if label else None
        if number is not None:
            names = self.classes(root)
            if not 0 <= number < len(names):
                raise DataError(f"the class {number} is none of 0 to {len(names) - 1}")
            facts["class"] = names[number]
        return Contents(media, list(captions), facts, number)

    def classes(self, root: Path) -> list[str]:
        """The names of the first column of classes."""
        label = self._label(root)
        return [name.replace("_", " ") for name in _open(root, self.split).features[label].names] if label else []

    def _label(self, root: Path) -> str:
        features = _open(root, self.split).features
        return next((name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"), "")

    def _columns(self, root: Path) -> Columns:
        features = _open(root, self.split).features
        kinds = {kind: [n for n, f in features.items() if type(f).__name__ == kind] for kind in ("Image", "Audio")}
        chosen = (
            self.image_column or next(iter(kinds["Image"]), ""),
            self.audio_column or next(iter(kinds["Audio"]), ""),
        )
        media = [name for name in chosen if name]
        if not media or not {*media} <= {*kinds["Image"], *kinds["Audio"]}:
            raise ConfigError(
                f"{root}: no Image or Audio feature {' or '.join(media)}: the features are {dict(features)}"
            )
        return self.columns(list(features), root, media=media, labelled=bool(self._label(root)))


@lru_cache(maxsize=2)
def _open(root: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets", "Reading a folder of Hugging Face `datasets`") from error
    try:
        found = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{root} is no folder that `save_to_disk` wrote: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        splits = [str(name) for name in found]
        split = split or (splits[0] if len(splits) == 1 else "")
        if split not in splits:
            raise ConfigError(f"{root} holds the splits {', '.join(splits)}: choose one with --split")
        found = found[split]
    elif split:
        raise ConfigError(f"--split {split}: {root} holds one table without splits")
    for name, feature in found.features.items():
        if type(feature).__name__ in ("Image", "Audio"):
            found = found.cast_column(name, type(feature)(decode=False))
    return found


def _bytes(root: Path, name: str, cell: Any) -> tuple[str, bytes]:
    from mmcl_data.build.contents import read_file
    from mmcl_data.scan import MAX_MEMBER_BYTES

    if (data := cell["bytes"]) is not None:
        if not 0 < len(data) <= MAX_MEMBER_BYTES:
            raise DataError(f"{name} holds {len(data)} bytes: expected 1 to {MAX_MEMBER_BYTES}")
        return name, data
    if not cell["path"]:
        raise DataError(f"{name} holds neither bytes nor a path")
    return name, read_file(root, inside(root, plain(cell["path"]), name))
