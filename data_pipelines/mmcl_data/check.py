"""`mmcl data check`: read every shard and decode every member, and say what would not survive training.

Unlike a stream, which stops at a damaged shard, the check goes on to the next one, so that one pass finds everything
that has to be mended.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mmcl.errors import DataError, ShardDamaged
from mmcl.types import PAIRS, InputSpec
from mmcl_data.blobs import Blobs
from mmcl_data.decode import KIND_OF_EXTENSION, Kind
from mmcl_data.decode.audio import decode_audio
from mmcl_data.decode.image import decode_image
from mmcl_data.decode.text import decode_caption, decode_class, decode_facts
from mmcl_data.scan import SampleEntry, expand_shards, read_sample, scan_shard

USABLE: tuple[frozenset[Kind], ...] = (
    *(frozenset(pair) for pair in PAIRS.values()),
    frozenset({"image", "class"}),
    frozenset({"audio", "class"}),
)
"""A sample must hold one of these: a pair to train on, or a labelled image or sound to evaluate with."""

_ANY_SPEC = InputSpec(
    image_size=224, resize_mode="shortest", sample_rate=16_000, clip_samples=160_000, context_length=77
)


class Problem(NamedTuple):
    """Something that training would stop at or skip."""

    shard: str
    key: str | None
    """Of the sample; None where the whole shard is concerned."""
    cause: str


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


def check_source(
    spec: str, input_spec: InputSpec | None, on_problem: Callable[[Problem], None] = lambda problem: None
) -> CheckReport:
    """Scan every shard that `spec` names and decode every member of every sample, for the model of `input_spec`.

    `on_problem` is called for each problem as it is found. Of a sound longer than the model's clip the first and the
    last window are decoded. Without `input_spec`, images are checked at 224 pixels and sounds at 16 kHz for 10 s.

    Raises:
        ConfigError, ShardMissing: `spec` names no shards, as `expand_shards` says.
    """
    report = CheckReport()
    for shard in expand_shards(spec):
        report.shards += 1
        try:
            _check_shard(shard, input_spec or _ANY_SPEC, report, on_problem)
        except DataError as error:
            report.problems += 1
            report.damaged_shards += 1
            cause = f"byte {error.offset}: {error.cause}" if isinstance(error, ShardDamaged) else str(error)
            on_problem(Problem(shard, None, cause))
    return report


def _check_shard(shard: str, spec: InputSpec, report: CheckReport, on_problem: Callable[[Problem], None]) -> None:
    scan = scan_shard(shard)
    report.unread[""] += len(scan.ignored)
    blobs = Blobs()
    for sample in scan.samples:
        causes = _check_sample(sample, read_sample(blobs, shard, sample), spec, report)
        report.samples += 1
        report.problems += len(causes)
        report.bad_samples += bool(causes)
        for cause in causes:
            on_problem(Problem(shard, sample.key, cause))


def _check_sample(
    sample: SampleEntry, payloads: Mapping[str, bytes], spec: InputSpec, report: CheckReport
) -> list[str]:
    """The problems of one sample; counts its members in `report`."""
    causes: list[str] = []
    found: set[Kind] = set()
    for extension in sample.extensions:
        kind = KIND_OF_EXTENSION.get(extension)
        if kind is None:
            report.unread[extension] += 1
            continue
        if kind in found:
            causes.append(f"{extension}: a second {kind} in one sample")
        try:
            _decode(kind, payloads[extension], spec)
            found.add(kind)
        except DataError as error:
            causes.append(f"{extension}: {error}")
    report.combinations["+".join(sorted(found)) or "nothing"] += 1
    if not any(usable <= found for usable in USABLE):
        had = ", ".join(sample.extensions)
        causes.append(f"no two of image, text and audio to learn from, and no labelled one (members: {had})")
    return causes


def _decode(kind: Kind, data: bytes, spec: InputSpec) -> None:
    match kind:
        case "image":
            decode_image(data, spec)
        case "audio":
            for start in (0.0, 1.0):  # the last window is where a cut-off file shows
                decode_audio(data, spec, start)
        case "text":
            decode_caption(data)
        case "facts":
            decode_facts(data)
        case "class":
            decode_class(data)
