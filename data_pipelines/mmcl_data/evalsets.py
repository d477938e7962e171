"""Shards to evaluation batches: every sample once, in order, with its facts."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmcl.errors import DataError, NoUsableSamples, SampleRejected, ShardMissing
from mmcl.types import Batch, InputSpec, Modality
from mmcl_data.blobs import Blobs
from mmcl_data.decode.text import decode_caption
from mmcl_data.samples import collate, decode_row, modalities_of, wanted
from mmcl_data.scan import expand_shards, read_sample, scan_shard

log = logging.getLogger("mmcl.data")

MAX_LIST_BYTES = 2**22
"""Of classnames.txt and its like."""


class EvalBatches:
    """The samples of some shards that have all of `needs`, as often as they are iterated over.

    With a `limit`, that many at even distances. Sounds longer than a clip are read from their middle.
    """

    def __init__(
        self,
        shards: str,
        spec: InputSpec,
        *,
        needs: Iterable[Modality] = (),
        batch_size: int = 128,
        limit: int | None = None,
    ) -> None:
        self.spec, self.batch_size = spec, batch_size
        found = [(path, sample) for path in expand_shards(shards) for sample in scan_shard(path).samples]
        found = [entry for entry in found if modalities_of(entry[1]).issuperset(needs)]
        if not found:
            raise NoUsableSamples(f"{shards}: no sample has all of {', '.join(needs)}")
        count = min(len(found), len(found) if limit is None else limit)
        self.samples = [found[place * len(found) // count] for place in range(count)]
        self.blobs = Blobs()
        self.skipped = 0
        """Samples that could not be decoded, in the last pass."""
        self.sha256 = ""
        """Of keys and members of all samples, after a whole pass: what a score is a score of."""

    def __iter__(self) -> Iterator[Batch]:
        self.skipped, digest = 0, hashlib.sha256()
        for first in range(0, len(self.samples), self.batch_size):
            rows, before = [], self.skipped
            for path, sample in self.samples[first : first + self.batch_size]:
                try:
                    members = read_sample(self.blobs, path, wanted(path, sample, facts=True))
                    for name, content in ((sample.key, b""), *members.items()):
                        digest.update(f"{name} {len(content)}\n".encode() + content)
                    rows.append(decode_row(path, sample.key, members, self.spec, start=0.5, with_facts=True))
                    if rows[-1].caption is not None:
                        rows[-1].facts.setdefault("caption", rows[-1].caption)
                except SampleRejected as error:
                    self.skipped += 1
                    log.warning("left out of the evaluation: %s", error)
            if rows:
                yield collate(rows, self.spec, self.skipped - before)
        self.sha256 = digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSet:
    """A labelled set in CLIP_benchmark's WebDataset layout."""

    classnames: list[str]
    templates: list[str]
    batches: EvalBatches


def read_classes(folder: Path, spec: InputSpec, split: str = "test", limit: int | None = None) -> ClassSet:
    """Read `folder`: classnames.txt, zeroshot_classification_templates.txt ({c}), SPLIT/nshards.txt, SPLIT/0.tar ...

    Layout: https://github.com/LAION-AI/CLIP_benchmark, `webdataset_builder.py`.

    Raises:
        ShardMissing, DataError: a file of the layout is missing or unreadable.
    """
    names = _lines(folder / "classnames.txt")
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    if bad := [template for template in templates if "{c}" not in template]:
        raise DataError(f"{folder}: template {bad[0]!r} has no {{c}} for the name of the class")
    count = _lines(folder / split / "nshards.txt")[0]
    if not count.isdigit() or count == "0":
        raise DataError(f"{folder / split / 'nshards.txt'}: {count!r} is no number of shards")
    pattern = folder / split / ("0.tar" if count == "1" else f"{{0..{int(count) - 1}}}.tar")
    return ClassSet(classnames=names, templates=templates, batches=EvalBatches(str(pattern), spec, limit=limit))


def _lines(path: Path) -> list[str]:
    try:
        lines = decode_caption(path.read_bytes(), max_bytes=MAX_LIST_BYTES).splitlines()
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} is missing: CLIP_benchmark's WebDataset layout has it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if "" in (stripped := [line.strip() for line in lines]):
        raise DataError(
            f"{path}: line {stripped.index('') + 1} is empty, and the number of a line is that of its class"
        )
    return stripped
