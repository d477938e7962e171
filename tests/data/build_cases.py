"""Tiny corpora as they are published, and what a build made of them; importable by name for the workers of a build."""

import csv
import io
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from data_cases import png, wav
from PIL import Image

from mmcl_data.blobs import Blobs
from mmcl_data.build.builder import build_corpus
from mmcl_data.build.corpora import CORPORA
from mmcl_data.build.corpora.folder import Folder
from mmcl_data.build.items import Contents, Item
from mmcl_data.build.plan import Options
from mmcl_data.check import check_source
from mmcl_data.scan import expand_shards, read_sample, scan_shard


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, header: str, *rows: list[Any], delimiter: str = ",") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header.split(","), *rows])
    return put(path, text.getvalue())


def picture(number: int, form: str, mode: str = "RGB") -> bytes:
    encoded = io.BytesIO()
    Image.open(io.BytesIO(png(number))).convert(mode).save(encoded, form)
    return encoded.getvalue()


def sound(form: str, subtype: str, samples: int = 80) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, np.linspace(-0.9, 0.9, samples), 8000, format=form, subtype=subtype)
    return encoded.getvalue()


def folder(root: Path, count: int = 12) -> Path:
    """Pictures with captions."""
    for number in range(count):
        put(root / f"{number % 3}/{number:03d}.png", png(number))
        put(root / f"{number % 3}/{number:03d}.txt", f"number {number}")
    return root


@dataclass(frozen=True, kw_only=True)
class Deadly(Folder):
    """A folder with files that end the process which reads them, as a decoder does that crashes."""

    deadly: str = ""
    """Key of the item that always does."""
    unlucky: str = ""
    """Key of one that does three times and is read then: it was not to blame."""
    met: str = ""
    """Folder that notes those times."""

    def load(self, root: Path, item: Item) -> Contents:
        if item.key == self.deadly:
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.key == self.unlucky and len(times := list(Path(self.met).iterdir())) < 3:
            (Path(self.met) / str(len(times))).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(root, item)


def build(name: str, root: Path, out: Path, *, per_shard: int = 1000, max_mb: int = 1024, **words: Any) -> dict:
    """Build with the options in `words` that the corpus (or `deadly`) has, and the rest for the builder."""
    corpus = {**CORPORA, "deadly": Deadly}[name]
    fields = {field: words.pop(field) for field in list(words) if field in corpus.__dataclass_fields__}
    options = Options(samples_per_shard=per_shard, max_shard_mb=max_mb, seed=words.pop("seed", 0))
    return build_corpus(name, corpus(**fields), root, out, options=options, **words)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Members of every sample by key, checked as training would; text, class and facts decoded."""
    problems = []
    check_source(str(out), None, problems.append)
    assert problems == []
    samples = {}
    for shard in expand_shards(str(out)):
        for entry in scan_shard(shard).samples:
            members = dict(read_sample(Blobs(), shard, entry))
            for name, decode in (("txt", bytes.decode), ("json", json.loads), ("cls", int)):
                if name in members:
                    members[name] = decode(members[name])
            samples[entry.key] = members
    return samples


def content(out: Path) -> dict[str, bytes]:
    """Every file of a build."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


__all__ = ["build", "content", "folder", "picture", "png", "put", "read", "sound", "table", "wav"]
