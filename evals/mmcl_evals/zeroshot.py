"""Zero-shot classification: does an image, or a sound, lie nearest to the prompts of its own class?

The embedding of a class is the normalised mean of the normalised embeddings of its name in every template, as in
CLIP, Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.4; for sounds as in CLAP, Elizalde et al. 2022,
https://arxiv.org/abs/2206.04769.

Figures: `acc1`, and if rows are marked `held_out` (what training never showed) also `acc1_held_out` and `acc1_seen`,
all choosing among all classes. A tie for the top is a miss. Chance is one in the number of classes.

To add one: batches whose facts hold an integer `label`, the names of the classes in that order, and templates with
`{c}` where the name goes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.errors import ConfigError, DataError
from mmcl.types import Batch, Encoder, Modality, Score

from .collect import Collected, check_batches, collect
from .metrics import accuracy_hits, cosines, score

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot:
    """Classification by prompts."""

    name: str
    modality: Literal["image", "audio"]
    """What is classified; rows without it are left out."""
    batches: Iterable[Batch]
    """Read anew in every run; `facts[row]["label"]` is the index of the true class."""
    classnames: Sequence[str]
    templates: Sequence[str]
    """Prompts with `{c}` for the name of the class."""

    def __post_init__(self) -> None:
        check_batches(self.name, self.batches)
        if len(self.classnames) < 2 or len(set(self.classnames)) < len(self.classnames):
            twice = sorted({name for name in self.classnames if list(self.classnames).count(name) > 1})
            raise ConfigError(
                f"{self.name}: expected two or more classnames, all different; found {len(self.classnames)}"
                f"{f', of which several times {twice}' if twice else ''}: equal names tie, and a tie is a miss"
            )
        without = [template for template in self.templates if "{c}" not in template]
        if without or not self.templates:
            raise ConfigError(f"{self.name}: every template needs {{c}} for the class name; found {without or 'none'}")

    @property
    def task(self) -> str:
        """The kind of task."""
        return "zeroshot_classification"

    @property
    def main_metric(self) -> str:
        """Top-1 accuracy."""
        return "acc1"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What this compares."""
        return (self.modality, "text")

    @property
    def details(self) -> Mapping[str, Any]:
        """What a result says beyond its figures."""
        prompts = "\n".join(self.templates).encode()
        return {"n_classes": len(self.classnames), "templates_sha256": hashlib.sha256(prompts).hexdigest()}

    def run(self, encoder: Encoder) -> Iterator[tuple[str, Score]]:
        """Embed prompts and rows, and score.

        Raises:
            NoUsableSamples: no row has the modality.
            DataError: a label is absent or no class.
        """
        found = collect(self.name, encoder, self.batches, [self.modality])
        labels = self._labels(found)
        classes = class_embeddings(encoder, self.classnames, self.templates)
        parts = zip(found.values[self.modality].split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)
        hits: Bool[Tensor, " n"] = torch.cat([accuracy_hits(cosines(x, classes), label) for x, label in parts])
        chance = 1 / len(self.classnames)
        yield "acc1", score(hits, chance)
        held_out = torch.tensor([bool(facts.get("held_out")) for facts in found.facts])
        if held_out.any():
            yield "acc1_held_out", score(hits[held_out], chance)
            if not held_out.all():
                yield "acc1_seen", score(hits[~held_out], chance)

    def _labels(self, found: Collected) -> Int[Tensor, " n"]:
        labels, last = [facts.get("label") for facts in found.facts], len(self.classnames) - 1
        for key, label in zip(found.keys, labels, strict=True):
            if type(label) is not int or not 0 <= label <= last:
                raise DataError(
                    f"{self.name}: {key}: expected a fact 'label' from 0 to {last}, found {label!r}: "
                    "the classnames must be those of this data, in its order"
                )
        return torch.tensor(labels)


def class_embeddings(encoder: Encoder, classnames: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "c d"]:
    """One unit vector for each class: the direction of the mean of its prompts."""
    prompts = [template.replace("{c}", name) for name in classnames for template in templates]
    embedded = normalize(encoder.embed_texts(prompts), dim=1)
    return normalize(embedded.unflatten(0, (len(classnames), len(templates))).mean(dim=1), dim=1)


def templates_for(modality: Literal["image", "audio"]) -> tuple[str, ...]:
    """The prompts that ship with mmcl, one a line in `prompts/`."""
    text = (files("mmcl_evals") / "prompts" / f"{modality}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())
