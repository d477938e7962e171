"""Labelled sets, to evaluate with: ImageFolder, ESC-50 and UrbanSound8K.

A sample is a picture or sound, its class number as `cls`, and the name of its class in `json`; with a template, a
caption as well, to be trained on. Names have spaces for `_`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmcl.errors import ConfigError, DataError
from mmcl_data.build.corpora.folder import KINDS
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Item, Read, Skipped, item_at, make_key, walk
from mmcl_data.build.tables import Row, open_table


def check_template(template: str) -> None:
    """Raise `ConfigError` unless it has a place for the name."""
    if template and "{}" not in template:
        raise ConfigError(f"--caption-template {template!r} has no {{}} for the name")


@dataclass(frozen=True, kw_only=True)
class Labelled(Corpus):
    """What labelled sets have in common."""

    caption_template: str = ""
    """caption of a sample, with {} for the name of its class, like "the sound of {}" (default: none)"""

    def captions(self, name: str) -> tuple[str, ...]:
        """Those that a sample of a class gets."""
        check_template(self.caption_template)
        return (self.caption_template.replace("{}", name),) if self.caption_template else ()


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Labelled):
    """a folder for each class, as torchvision's ImageFolder reads it: CLASS/anything/NAME.jpg; also of sounds"""

    def read(self, root: Path) -> Read:
        """The items by class and path; classes are numbered by their names in order."""
        folders = _folders(root)
        for number, folder in enumerate(folders):
            name = folder.replace("_", " ")
            for path in walk(root / folder, root):
                if KINDS.get(path.rpartition(".")[2].lower()) not in ("picture", "sound"):
                    yield Skipped(path, "no picture or sound")
                    continue
                facts = {"class": name, "file": path}
                key = make_key(path)  # with the extension, which need not be one
                yield Item(key=key, files=(path,), captions=self.captions(name), facts=facts, label=number)

    def classes(self, root: Path) -> list[str]:
        """The names of the folders."""
        return [folder.replace("_", " ") for folder in _folders(root)]


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


@dataclass(frozen=True, kw_only=True)
class Folds(Labelled):
    """Sounds in numbered folds, with one table."""

    folds: str = ""
    """numbers of the folds to take, with commas between (default: all)"""

    def rows(self, root: Path, table: str, columns: tuple[str, ...], most: int) -> Iterator[Row | Skipped]:
        """Rows of the chosen folds whose class number is one.

        Raises:
            ConfigError: there is no such fold.
            DataError: there is no such table.
        """
        chosen = set(self.folds.split(",")) if self.folds else {str(number + 1) for number in range(most)}
        if bad := chosen - {str(number + 1) for number in range(most)}:
            raise ConfigError(f"--folds {self.folds}: {min(bad)!r} is none of 1 to {most}")
        for row in open_table(root / table, required=("fold", *columns)).rows:
            if isinstance(row, Skipped):
                yield row
            elif row.cells["fold"] in chosen:
                label = row.cells[columns[1]]
                good = label.isascii() and label.isdigit() and len(label) < 6
                yield row if good else Skipped(row.where, f"the class {label!r} is no number")

    def named(self, root: Path, table: str, number: str, name: str) -> list[str]:
        """Names of the classes by number, from the whole table."""
        rows = (row for row in open_table(root / table, required=(number, name)).rows if isinstance(row, Row))
        found = {
            int(row.cells[number]): row.cells[name].replace("_", " ") for row in rows if row.cells[number].isdigit()
        }
        if sorted(found) != list(range(len(found))):
            raise DataError(
                f"{root / table}: the classes are not numbered from 0 on without a gap: {sorted(found)[:60]}"
            )
        return [found[number] for number in range(len(found))]


@dataclass(frozen=True, kw_only=True)
class Esc50(Folds):
    """ESC-50: meta/esc50.csv and audio/"""

    def read(self, root: Path) -> Read:
        """The items in the order of the table."""
        for row in self.rows(root, "meta/esc50.csv", ("filename", "target", "category"), 5):
            if isinstance(row, Skipped):
                yield row
                continue
            cells, name = row.cells, row.cells["category"].replace("_", " ")
            facts = {"class": name, "fold": int(cells["fold"]), "file": cells["filename"]}
            yield item_at(
                root,
                row.where,
                [f"audio/{cells['filename']}"],
                key=make_key(cells["filename"].removesuffix(".wav")),
                captions=self.captions(name),
                facts=facts,
                label=int(cells["target"]),
            )

    def classes(self, root: Path) -> list[str]:
        """The fifty, with spaces for `_`."""
        return self.named(root, "meta/esc50.csv", "target", "category")


@dataclass(frozen=True, kw_only=True)
class UrbanSound8K(Folds):
    """UrbanSound8K: metadata/UrbanSound8K.csv and audio/fold1/ to audio/fold10/"""

    def read(self, root: Path) -> Read:
        """The items in the order of the table."""
        for row in self.rows(root, "metadata/UrbanSound8K.csv", ("slice_file_name", "classID", "class", "fsID"), 10):
            if isinstance(row, Skipped):
                yield row
                continue
            cells, name = row.cells, row.cells["class"].replace("_", " ")
            file, fold = cells["slice_file_name"], int(cells["fold"])
            facts = {"class": name, "fold": fold, "file": file, "fsID": cells["fsID"]}
            yield item_at(
                root,
                row.where,
                [f"audio/fold{fold}/{file}"],
                key=make_key(file.removesuffix(".wav")),
                captions=self.captions(name),
                facts=facts,
                label=int(cells["classID"]),
            )

    def classes(self, root: Path) -> list[str]:
        """The ten, with spaces for `_`."""
        return self.named(root, "metadata/UrbanSound8K.csv", "classID", "class")
