"""One shard of a plan: its items read, checked cheaply, written, and told of in a report. What a worker does.

    png, jpg, ... flac, wav, ...   as they are, under the extension of what they hold
    txt                            the first caption
    json                           the facts, and all `captions` where there are several
    cls                            the class number

A sample is whole or left out: a file that cannot be read costs its sample, a caption that cannot be one costs itself
if there are others. Shard and report are written elsewhere and renamed, the report last: where it is, the shard is.
While a shard is packed a file says so, which is left behind if the process dies.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmcl.errors import DataError
from mmcl_data.build.contents import as_member
from mmcl_data.build.corpus import Corpus
from mmcl_data.build.items import Contents, Item
from mmcl_data.build.plan import Plan, read_items
from mmcl_data.build.shards import bounded_shards
from mmcl_data.check import is_of_use
from mmcl_data.decode import KIND_OF_EXTENSION, MAX_BYTES, Kind
from mmcl_data.decode.text import decode_caption, decode_class


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every worker knows."""

    corpus: Corpus
    root: Path
    out: Path
    plan: Plan
    max_bytes: int
    """Of a shard."""

    @property
    def reports(self) -> Path:
        """Where the reports are: above the folder of this process."""
        return self.plan.folder.parent

    def begun(self, number: str) -> Path:
        """A file that is there while shard `number` is packed, or after a process died over it."""
        return self.reports / f"{number}.begun"


@dataclass(kw_only=True, slots=True)
class Report:
    """Of one shard of the plan."""

    items: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    """One, none if all was skipped, or several if one would be too large."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Samples that have a picture, a sound and so on."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    hashes: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, kind and content hash of each picture and sound."""

    @property
    def samples(self) -> int:
        """How many were written."""
        return sum(shard["samples"] for shard in self.shards)

    def count(self, key: str, members: dict[str, bytes]) -> None:
        """Take in one sample."""
        for extension, data in members.items():
            kind = KIND_OF_EXTENSION.get(extension)
            if kind is not None:
                self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if kind in ("image", "audio"):
                self.hashes.append((key, kind, hashlib.sha256(data).hexdigest()[:32]))


def pack_shard(job: Job, number: str, convert: Callable[[Item], dict[str, bytes]] | None = None) -> Report:
    """Write shard `number` of the plan and its report.

    Args:
        job: what to build.
        number: of six digits.
        convert: the members of an item, if `members_of` is not to be called here.

    Raises:
        DataError: it cannot be written.
    """
    report = Report(items=job.plan.items_of(int(number)))
    samples = _samples(job, int(number), report, convert or partial(members_of, job.corpus, job.root))
    job.begun(number).touch()
    try:
        _write(job, number, report, samples)
        write_json(job.reports / f"{number}.json", asdict(report), job.plan.folder)
    finally:
        job.begun(number).unlink(missing_ok=True)
    return report


def _write(job: Job, number: str, report: Report, samples: Iterator[dict[str, bytes | str]]) -> None:
    try:
        for path, written in bounded_shards(samples, job.plan.folder, number, job.max_bytes):
            path.replace(job.out / written.name)
            report.shards.append(asdict(written))
    except OSError as error:
        raise DataError(f"shard {number} cannot be written to {job.out}: {error}") from error


def read_report(path: Path) -> Report:
    """The report at `path`."""
    return Report(**json.loads(path.read_bytes()))


def write_json(path: Path, content: Any, staging: Path, indent: int | None = None) -> None:
    """Write `content` so that the file is there whole or not at all; `staging` is of the same file system."""
    staged = staging / f"{path.name}.tmp"
    staged.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    staged.replace(path)


def _samples(
    job: Job, number: int, report: Report, convert: Callable[[Item], dict[str, bytes]]
) -> Iterator[dict[str, bytes | str]]:
    for item in read_items(job.plan, number):
        try:
            members = convert(item)
        except DataError as error:
            report.skipped.append((item.key, str(error)))
            continue
        report.count(item.key, members)
        yield {"__key__": item.key, **members}


def members_of(corpus: Corpus, root: Path, item: Item) -> dict[str, bytes]:
    """What is stored of an item, by extension.

    Raises:
        DataError: it is left out, and why.
    """
    return _members(corpus.load(root, item), corpus.several)


def _members(contents: Contents, several: bool) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for name, data in contents.media:
        extension, stored = as_member(name, data)
        kind = KIND_OF_EXTENSION[extension]
        if any(KIND_OF_EXTENSION[other] == kind for other in members):
            raise DataError(f"{name} is a second {kind} of one sample")
        if len(stored) > MAX_BYTES[kind]:
            raise DataError(f"{name}: {len(stored)} bytes are over the limit of {MAX_BYTES[kind]} for {kind}")
        members[extension] = stored
    facts = contents.facts
    if contents.captions:
        captions = _captions(contents.captions)
        members["txt"] = captions[0].encode()
        facts = facts | ({"captions": captions} if several or len(contents.captions) > 1 else {})
    if contents.label is not None:
        members["cls"] = str(decode_class(_bytes(contents.label))).encode()
    if facts:
        members["json"] = _facts(facts)
    found: set[Kind] = {KIND_OF_EXTENSION[extension] for extension in members}
    if not is_of_use(found):
        raise DataError(f"nothing to learn from: {' and '.join(sorted(found)) or 'nothing'} alone")
    return members


def _captions(given: list[str | bytes]) -> list[str]:
    found, reasons = [], []
    for caption in given:
        try:
            found.append(decode_caption(caption if isinstance(caption, bytes) else caption.encode()))
        except UnicodeEncodeError:
            reasons.append("the caption holds half a character")
        except DataError as error:
            reasons.append(str(error))
    if not found:
        raise DataError(reasons[0])
    return found


def _facts(facts: dict[str, Any]) -> bytes:
    try:
        data = json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"the facts are no JSON: {error}") from error
    if len(data) > MAX_BYTES["facts"]:
        raise DataError(f"facts of {len(data)} bytes are over the limit of {MAX_BYTES['facts']}")
    return data


def _bytes(label: int | str | bytes) -> bytes:
    return label if isinstance(label, bytes) else str(label).encode()
