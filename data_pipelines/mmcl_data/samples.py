"""One sample of a shard to the tensors of one row, or a `SampleRejected` that says where and why."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmcl.errors import ConfigError, DataError, SampleRejected
from mmcl.types import ID_KINDS, MODALITIES, OWN, PAIRS, RIGHT, WRONG, Batch, IdKind, InputSpec, Modality
from mmcl_data.augment import Crop, Words
from mmcl_data.beside import Beside
from mmcl_data.blobs import shown
from mmcl_data.decode import KIND_OF_EXTENSION, MAX_BYTES
from mmcl_data.decode.audio import decode_audio
from mmcl_data.decode.image import Decoder, decode_image
from mmcl_data.decode.text import clean_caption, decode_caption, decode_class, decode_facts, pick_caption, tokenize
from mmcl_data.scan import SampleEntry

Exif = Literal["ignore", "apply"]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How members become what a model reads, in training; evaluations decode as open_clip does."""

    images: Decoder = "native"
    """native: libjpeg and resizing on bytes by torchvision. pil: bit for bit open_clip's. draft: PIL, JPEGs decoded at
    the half, quarter or eighth that is still large enough, for images more than twice the model's size."""
    exif: Exif = "ignore"
    """Whether images are turned as their EXIF says; open_clip ignores it, and so do evaluations."""
    clean: bool = False
    """Captions without HTML tags and entities, control characters and mojibake (by ftfy)."""
    crop: Crop = field(default_factory=Crop)
    words: Words = field(default_factory=Words)


EVALUATION = DecodeConfig(images="pil")
"""What a score is comparable under."""


@dataclass(slots=True)
class Row:
    """One decoded sample. Captions become tokens only when a batch is put together."""

    key: str
    image: Tensor | None = None
    audio: Tensor | None = None
    caption: str | None = None
    wrong: list[str] = field(default_factory=list)
    """Captions that are wrong on purpose."""
    right: list[str] = field(default_factory=list)
    """Further right ones."""
    ids: dict[IdKind, int] = field(default_factory=dict)
    seed: int = 0
    """63 bits that augmentation follows from."""
    facts: dict[str, Any] = field(default_factory=dict)

    def has(self, modality: Modality) -> bool:
        """Whether the row has a value of that modality."""
        return (self.caption if modality == "text" else getattr(self, modality)) is not None


def modalities_of(sample: SampleEntry, captions: Mapping[str, float] | None = None) -> set[str]:
    """Modalities that the extensions of a sample promise; with `captions` in its facts, those promise a text too."""
    kinds = {KIND_OF_EXTENSION.get(extension, "") for extension in sample.extensions}
    if captions and "facts" in kinds:
        kinds.add("text")
    return kinds & set(MODALITIES)


def is_usable(modalities: set[str]) -> bool:
    """Whether some pair of modalities can be trained on."""
    return any(modalities.issuperset(pair) for pair in PAIRS.values())


def wanted(path: str, sample: SampleEntry, *, facts: bool) -> SampleEntry:
    """The members of a sample that `decode_row` looks at: of each kind the first.

    Args:
        path: of the shard.
        sample: with all its members.
        facts: whether also the json member and the class.

    Raises:
        SampleRejected: one of them is larger than its kind may be; nothing was read yet.
    """
    first: dict[str, int] = {}
    for number, extension in enumerate(sample.extensions):
        kind = KIND_OF_EXTENSION.get(extension)
        if kind is None or kind in first or (kind in ("facts", "class") and not facts):
            continue
        if sample.sizes[number] > MAX_BYTES[kind]:
            cause = f"{extension}: {sample.sizes[number]} bytes are over the limit of {MAX_BYTES[kind]}"
            raise SampleRejected(shown(path), sample.key, cause)
        first[kind] = number
    numbers = sorted(first.values())
    return SampleEntry(
        sample.key,
        tuple(sample.extensions[n] for n in numbers),
        tuple(sample.offsets[n] for n in numbers),
        tuple(sample.sizes[n] for n in numbers),
    )


def check_captions(where: str, captions: Mapping[str, float]) -> None:
    """Raise `ConfigError` unless these are fields of captions with weights."""
    if any(not weight > 0 for weight in captions.values()):
        raise ConfigError(
            f"{where}.captions={dict(captions)}: expected positive weights of `txt` and fields of the json"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What a row's random choices follow from."""

    seed: int
    """Of the sample in its epoch: nothing depends on who decodes it."""
    captions: Mapping[str, float] = field(default_factory=dict)
    """Fields of the json that may hold its caption, and `txt`, by weight; none is the txt member alone."""
    beside: Beside | None = None
    """What finds or makes captions beside its own."""

    @property
    def reads_facts(self) -> bool:
        """Whether the json member is needed."""
        return bool(self.captions or (self.beside and self.beside.config.fields))


def decode_row(
    path: str,
    key: str,
    members: Mapping[str, bytes],
    spec: InputSpec,
    *,
    start: float | None = None,
    draw: Draw | None = None,
    config: DecodeConfig = EVALUATION,
    with_facts: bool = False,
) -> Row:
    """Decode what a model reads of one sample, of a kind the first member. Unknown extensions are not touched.

    Args:
        path: of the shard.
        key: of the sample.
        members: by extension.
        spec: what the model reads.
        start: where sounds longer than a clip begin, in [0, 1]; with None `draw` says.
        draw: with one, crops, captions and words are drawn from it; without, nothing is.
        config: how to decode.
        with_facts: also the json member and the class.

    Raises:
        SampleRejected: any member that is used cannot be.
    """
    row = Row(key=f"{shown(path).rpartition('/')[2]}#{key}")
    seed = draw.seed if draw else 0
    start = (config.crop.place(seed) if draw else 0.0) if start is None else start
    try:
        facts: dict[str, Any] = {}
        for extension, data in members.items():
            kind = KIND_OF_EXTENSION.get(extension)
            if kind == "image" and row.image is None:
                box = config.crop.box(seed) if draw else None
                row.image = decode_image(data, spec, decoder=config.images, exif=config.exif, box=box)
                row.ids["image"] = hash_of(data)
            elif kind == "audio" and row.audio is None:
                row.audio = decode_audio(data, spec, start)
            elif kind == "text" and row.caption is None:
                row.caption = decode_caption(data)
            elif with_facts or (kind == "facts" and draw and draw.reads_facts):
                facts |= _facts(kind, data)
        if draw and draw.captions:
            row.caption = pick_caption(row.caption, facts, draw.captions, seed)
        _finish_caption(row, config, draw, facts)
        row.facts = facts if with_facts else {}
    except DataError as error:
        raise SampleRejected(shown(path), key, str(error)) from error
    return row


def _finish_caption(row: Row, config: DecodeConfig, draw: Draw | None, facts: Mapping[str, Any]) -> None:
    if row.caption is None:
        return
    if config.clean:
        row.caption = clean_caption(row.caption)
    row.ids["caption"] = hash_of(" ".join(row.caption.casefold().split()).encode())
    if draw and draw.beside:
        row.wrong, row.right = draw.beside.of(row.caption, facts, draw.seed)
    if draw:
        row.caption = config.words.changed(row.caption, draw.seed)


def hash_of(data: bytes) -> int:
    """63 bits, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1  # processors have instructions for it


def _facts(kind: str | None, data: bytes) -> dict[str, Any]:
    if kind == "facts":
        return decode_facts(data)
    if kind == "class":
        return {"label": decode_class(data)}
    return {}


def collate(rows: Sequence[Row], spec: InputSpec, skipped: int = 0, *, beside: bool = False) -> Batch:
    """Rows to a batch; with `beside`, texts have roles, whether or not any of these rows has more than its own."""
    values: dict[Modality, Tensor] = spec.nothing()
    indices: dict[Modality, Tensor] = {}
    for modality in MODALITIES:
        having = [number for number, row in enumerate(rows) if row.has(modality)]
        indices[modality] = torch.tensor(having, dtype=torch.long)
        if having and modality != "text":
            values[modality] = torch.stack([getattr(rows[number], modality) for number in having])
    texts = [text for number, row in enumerate(rows) if row.caption is not None for text in _texts(number, row)]
    indices["text"], roles = (torch.tensor([text[of] for text in texts], dtype=torch.long) for of in (0, 1))
    if texts:
        values["text"] = tokenize([caption for _, _, caption in texts], spec)
    return Batch(
        size=len(rows),
        values=values,
        rows=indices,
        ids=torch.tensor([[row.ids.get(kind, -1) for kind in ID_KINDS] for row in rows], dtype=torch.long).reshape(
            -1, len(ID_KINDS)
        ),
        seeds=torch.tensor([row.seed for row in rows], dtype=torch.long),
        keys=tuple(row.key for row in rows),
        facts=tuple(row.facts for row in rows),
        skipped=skipped,
        roles={"text": roles} if beside else {},
    )


def _texts(number: int, row: Row) -> Iterator[tuple[int, int, str]]:
    """Number, role and caption of all texts of a row."""
    yield number, OWN, row.caption or ""
    yield from ((number, WRONG, caption) for caption in row.wrong)
    yield from ((number, RIGHT, caption) for caption in row.right)


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches one after another, as one."""
    if len(parts) == 1:
        return parts[0]
    starts = [sum(part.size for part in parts[:number]) for number in range(len(parts))]
    return replace(
        parts[0],
        size=sum(part.size for part in parts),
        values={name: torch.cat([part.values[name] for part in parts]) for name in MODALITIES},
        rows={
            name: torch.cat([part.rows[name] + start for part, start in zip(parts, starts, strict=True)])
            for name in MODALITIES
        },
        ids=torch.cat([part.ids for part in parts]),
        seeds=torch.cat([part.seeds for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        facts=tuple(facts for part in parts for facts in part.facts),
        skipped=sum(part.skipped for part in parts),
        roles={name: torch.cat([part.roles[name] for part in parts]) for name in parts[0].roles},
    )
