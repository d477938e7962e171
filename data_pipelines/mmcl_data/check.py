"""`mmcl data check`: read every shard and decode every member, and say what would not survive training.

Images are decoded twice, as a run does by default and as evaluations do: either may refuse what the other takes.

Unlike a stream, which stops at a damaged shard, the check goes on to the next one, so that one pass finds everything
that has to be mended. Shards are read side by side, and what is held of one is its problems.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from mmcl.errors import DataError, ShardDamaged
from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs, shown
from mmcl_data.decode import KIND_OF_EXTENSION, MAX_BYTES, Kind
from mmcl_data.decode.audio import decode_audio
from mmcl_data.decode.image import check_image
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts
from mmcl_data.samples import is_usable
from mmcl_data.scan import SampleEntry, expand_shards, read_sample, scan_shard
from mmcl_data.sweep import Told, over_shards, untold

_ANY_SPEC = InputSpec(
    image_size=224, resize_mode="shortest", sample_rate=16_000, clip_samples=160_000, context_length=77
)


_HEADER = 512


def is_of_use(kinds: set[Kind]) -> bool:
    """Whether a sample has a pair to train on, or a labelled image or sound to evaluate with."""
    return is_usable({*kinds}) or ("class" in kinds and not kinds.isdisjoint(("image", "audio")))


class Problem(NamedTuple):
    """Something that training would stop at or skip."""

    shard: str
    key: str | None
    """Of the sample; None where the whole shard is concerned."""
    offset: int
    """In the shard: of the header of the member, or of the sample's first; where a damaged shard stops making sense."""
    cause: str

    def __str__(self) -> str:
        return printable(f"{self.shard}: {'shard' if self.key is None else self.key}: byte {self.offset}: {self.cause}")


def printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def header_of(sample: SampleEntry, number: int = 0) -> int:
    """Where the header of a member lies in the shard."""
    return sample.offsets[number] - _HEADER


def read_known(blobs: Blobs, path: str, sample: SampleEntry) -> tuple[dict[str, bytes], dict[str, str]]:
    """The members of a sample that are of some kind, by extension, and of those that are too large to be read, why.

    Raises:
        as `read_sample`.
    """
    large: dict[str, str] = {}
    kept: list[tuple[str, int, int]] = []
    for extension, offset, size in zip(sample.extensions, sample.offsets, sample.sizes, strict=True):
        kind = KIND_OF_EXTENSION.get(extension)
        if kind and size > MAX_BYTES[kind]:
            large[extension] = f"{size} bytes are over the limit of {MAX_BYTES[kind]}"
        elif kind:
            kept.append((extension, offset, size))
    if not kept:
        return {}, large
    return read_sample(blobs, path, SampleEntry(sample.key, *zip(*kept, strict=True))), large


@dataclass(slots=True)
class CheckReport:
    """What was found; `problems` is 0 if all of it can be used."""

    shards: int = 0
    samples: int = 0
    """In shards that are whole."""
    problems: int = 0
    damaged_shards: int = 0
    bad_samples: int = 0
    """Samples with one problem or more."""
    combinations: Counter[str] = field(default_factory=Counter)
    """Samples by the members that could be decoded, like `image+text`."""
    unread: Counter[str] = field(default_factory=Counter)
    """Members that nothing reads, by extension; `""` for files that belong to no sample."""

    def add(self, other: "CheckReport") -> None:
        """Count what `other` counts too."""
        for name in ("shards", "samples", "problems", "damaged_shards", "bad_samples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.combinations.update(other.combinations)
        self.unread.update(other.unread)


def check_source(
    spec: str,
    input_spec: InputSpec | None,
    on_problem: Callable[[Problem], None] = lambda problem: None,
    *,
    workers: int = 1,
    told: Told = untold,
) -> CheckReport:
    """Scan every shard that `spec` names and decode every member of every sample, for the model of `input_spec`.

    `on_problem` is called for each problem once its shard is read, in the order of the shards and for any number of
    `workers` alike. Of a sound longer than the model's clip the first and the last window are decoded. Without
    `input_spec`, images are checked at 224 pixels and sounds at 16 kHz for 10 s.

    Raises:
        ConfigError, ShardMissing: `spec` names no shards, as `expand_shards` says; no worker.
    """
    report, paths = CheckReport(), expand_shards(spec)
    found = over_shards(partial(_check_shard, input_spec or _ANY_SPEC), paths, workers, told)
    for path, result in zip(paths, found, strict=True):
        part, problems = result if isinstance(result, tuple) else _damaged(CheckReport(shards=1), path, result)
        report.add(part)
        for problem in problems:
            on_problem(problem)
    return report


Checked = tuple[CheckReport, list[Problem]]


def _check_shard(spec: InputSpec, path: str) -> Checked:
    report = CheckReport(shards=1)
    problems: list[Problem] = []
    try:
        scan = scan_shard(path)
        report.unread[""] += len(scan.ignored)
        blobs = Blobs()
        for sample in scan.samples:
            causes = _check_sample(sample, *read_known(blobs, path, sample), spec, report)
            report.samples += 1
            report.problems += len(causes)
            report.bad_samples += bool(causes)
            problems += [Problem(shown(path), sample.key, header_of(sample, number), cause) for number, cause in causes]
    except DataError as error:
        return _damaged(report, path, error, problems)
    return report, problems


def _damaged(report: CheckReport, path: str, error: DataError, problems: Sequence[Problem] = ()) -> Checked:
    report.problems += 1
    report.damaged_shards += 1
    offset, cause = (error.offset, error.cause) if isinstance(error, ShardDamaged) else (0, str(error))
    return report, [*problems, Problem(shown(path), None, offset, cause)]


def _check_sample(
    sample: SampleEntry,
    payloads: Mapping[str, bytes],
    large: Mapping[str, str],
    spec: InputSpec,
    report: CheckReport,
) -> list[tuple[int, str]]:
    """The problems of one sample, each with the number of its member; counts its members in `report`."""
    causes: list[tuple[int, str]] = []
    found: set[Kind] = set()
    for number, extension in enumerate(sample.extensions):
        kind = KIND_OF_EXTENSION.get(extension)
        if kind is None:
            report.unread[extension] += 1
            continue
        if kind in found:
            causes.append((number, f"{extension}: a second {kind} in one sample"))
        try:
            if extension in large:
                raise DataError(large[extension])
            _decode(kind, payloads[extension], spec)
            found.add(kind)
        except DataError as error:
            causes.append((number, f"{extension}: {error}"))
    report.combinations["+".join(sorted(found)) or "nothing"] += 1
    if not is_of_use(found):
        had = ", ".join(sample.extensions)
        causes.append((0, f"no two of image, text and audio to learn from, and no labelled one (members: {had})"))
    return causes


def _decode(kind: Kind, data: bytes, spec: InputSpec) -> None:
    match kind:
        case "image":
            check_image(data, spec)
        case "audio":
            for start in (0.0, 1.0):  # the last window is where a cut-off file shows
                decode_audio(data, spec, start)
        case "text":
            decode_caption(data)
        case "facts":
            decode_facts(data)
        case "class":
            decode_class(data)
