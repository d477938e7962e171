"""A folder in which the files of a sample have one path but for the extension: `birds/crow.jpg`, `birds/crow.txt`.

A sample is pictures, sounds, `.txt` (the caption), `.json` (facts) and `.cls` (class number), one of each at most. This
also reads img2dataset's `files` format.
"""

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Item, Read, Skipped, make_key, walk

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
SOUNDS = ("flac", "wav", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "caf", "w64", "rf64", "m4a", "mp4",
          "aac")  # fmt: skip
KINDS: dict[str, str] = {
    **dict.fromkeys(PICTURES, "picture"),
    **dict.fromkeys(SOUNDS, "sound"),
    "txt": "caption",
    "json": "facts",
    "cls": "class",
}
"""By extension; of two of a kind the first in this order is taken."""
_ORDER = {extension: number for number, extension in enumerate(KINDS)}


@dataclass(frozen=True, kw_only=True)
class Folder(Corpus):
    """a folder with files of one name but for the extension: crow.jpg, crow.wav, crow.txt, crow.json"""

    def read(self, root: Path) -> Read:
        """The items in the order of their paths."""
        names = (name for name in walk(root) if _extension(name))
        for stem, group in groupby(sorted(names, key=_split), key=lambda name: _split(name)[0]):
            taken: dict[str, str] = {}
            for name in group:
                if (kind := KINDS.get(_extension(name))) is None:
                    yield Skipped(name, "an extension that means nothing here")
                elif kind in taken:
                    yield Skipped(name, f"a second {kind} beside {taken[kind]}")
                else:
                    taken[kind] = name
            if taken.keys() & {"picture", "sound"}:
                yield Item(key=make_key(stem), files=tuple(taken.values()))
            elif taken:
                yield Skipped(stem, f"{' and '.join(taken)} without a picture or sound")


def _split(name: str) -> tuple[str, int, str]:
    stem, dotted = os.path.splitext(name)
    return stem, _ORDER.get(dotted[1:].lower(), len(_ORDER)), dotted


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()
