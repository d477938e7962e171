"""COCO captions and Karpathy's splits: a picture with about five captions.

    COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy   {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, of COCO, Flickr30k and Flickr8k
    Salesforce [{"image", "caption": text or [text, ...]}]

The last is how BLIP and ARO give Karpathy's splits.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmcl.errors import ConfigError, DataError
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Read, Skipped, inside, item_at, make_key


class _Picture(NamedTuple):
    name: str
    captions: list[Any]
    split: str
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Coco(Corpus):
    """COCO captions JSON, or Karpathy's dataset_coco.json, dataset_flickr30k.json and coco_karpathy_*.json"""

    several = True

    annotations: str
    """the JSON file, as a path below --root"""
    images: str = ""
    """folder of the pictures below --root (default: the likely one that holds the first picture)"""
    split: str = ""
    """of Karpathy's: train, restval, val or test, or several with commas between (default: all)"""

    def read(self, root: Path) -> Read:
        """The items in the order of the file."""
        path = root / inside(root, self.annotations, "--annotations")
        pictures = _pictures(path)
        if self.split:
            wanted, there = set(self.split.split(",")), {picture.split for picture in pictures}
            if not wanted <= there:
                has = ", ".join(sorted(there - {""})) or "no splits"
                raise ConfigError(f"--split {self.split}: {path} has {has}")
            pictures = [picture for picture in pictures if picture.split in wanted]
        folder = self.images or (_folder(root, path, pictures[0].name) if pictures else "")
        for picture in pictures:
            captions = [text for text in picture.captions if isinstance(text, str)]
            if not captions:
                yield Skipped(picture.name, "no caption")
                continue
            facts = picture.facts | ({"split": picture.split} if picture.split else {})
            name = f"{folder}/{picture.name}" if folder else picture.name
            key = make_key(picture.name.rpartition(".")[0] or picture.name)
            yield item_at(root, path.name, [name], key=key, captions=tuple(captions), facts=facts)


def _pictures(path: Path) -> list[_Picture]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    try:
        kind = _salesforce if isinstance(content, list) else _coco if "annotations" in content else _karpathy
        pictures = list(kind(content))
        if odd := [picture for picture in pictures if not (isinstance(picture.name, str) and picture.name)]:
            raise TypeError(f"the name of a picture is {odd[0].name!r}")
        return pictures
    except (KeyError, TypeError, AttributeError) as error:
        expected = '"images" and "annotations" (COCO), or "images" with "sentences" (Karpathy)'
        raise DataError(f"{path}: expected {expected}, found otherwise: {error!r}") from error


def _coco(content: Any) -> Iterator[_Picture]:
    captions: dict[Any, list[Any]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    for entry in content["images"]:
        yield _Picture(entry["file_name"], captions.get(entry["id"], []), "", {"image_id": entry["id"]})


def _karpathy(content: Any) -> Iterator[_Picture]:
    for entry in content["images"]:
        name = "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part)
        facts = {"image_id": entry.get("cocoid", entry["imgid"])}
        yield _Picture(name, [sentence["raw"] for sentence in entry["sentences"]], str(entry["split"]), facts)


def _salesforce(content: list[Any]) -> Iterator[_Picture]:
    captions: dict[str, list[Any]] = {}
    for entry in content:
        captions.setdefault(entry["image"], []).extend(
            entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        )
    for name, texts in captions.items():
        yield _Picture(name, texts, "", {})


def _folder(root: Path, path: Path, first: str) -> str:
    """Where the pictures are, below the root: as `captions_train2017.json` says, or in a folder of the usual names."""
    likely = ["", path.stem.rpartition("_")[2], "images"]
    likely += [f"images/{likely[1]}", "flickr30k-images", "flickr30k_images", "Images"]
    return next((folder for folder in likely if (root / folder / first).is_file()), "")
