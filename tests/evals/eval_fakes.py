"""Encoders whose scores are known beforehand, and batches to give them.

A sample of these tests is a class number: an image is 3x1x1 bytes of it, a sound two samples of it, a caption four
tokens of it, its text "a <name>". An encoder is a function from such a number to a vector.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.types import ID_KINDS, MODALITIES, Batch, Embeddings, Modality

NAMES = ["dog", "cat", "cow", "pig", "hen", "bee", "owl", "fox"]


def hashed(*parts: object, width: int = 32) -> Tensor:
    """A direction that follows from `parts` and is otherwise as good as random."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return normalize(torch.randn(width, generator=generator), dim=0)


def meaning(text: str) -> int:
    """The number of the last name in `text`, or its hash."""
    words = [word.strip(".") for word in text.split()]
    found = [NAMES.index(word) for word in words if word in NAMES]
    return found[-1] if found else int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass
class FakeEncoder:
    """Embeds number `x` of a modality as `direction(modality, x)`."""

    direction: Callable[[str, int], Tensor]

    def embed(self, batch: Batch) -> Embeddings:
        values: dict[Modality, Tensor] = {
            modality: torch.stack([self.direction(modality, round(float(v.flatten()[0]))) for v in value])
            if len(value)
            else torch.zeros(0, 0)
            for modality, value in batch.values.items()
        }
        return Embeddings(values=values, rows=batch.rows)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.direction("text", meaning(text)) for text in texts])


ORACLE = FakeEncoder(lambda modality, x: hashed(x))
RANDOM = FakeEncoder(hashed)
COLLAPSED = FakeEncoder(lambda modality, x: hashed("one point", width=509))
BROKEN = FakeEncoder(lambda modality, x: torch.full((32,), torch.nan))


def batches_of(
    numbers: Sequence[int],
    facts: Sequence[Mapping[str, Any]] | None = None,
    *,
    modalities: Sequence[Modality] = MODALITIES,
    size: int = 7,
    lacking: Mapping[Modality, Sequence[int]] | None = None,
) -> list[Batch]:
    """Batches of `size` rows; row `i` of all lacks the modalities that `lacking` lists it for."""
    facts = facts or [{} for _ in numbers]
    make: dict[Modality, Callable[[int], Tensor]] = {
        "image": lambda x: torch.full((3, 1, 1), x, dtype=torch.int32),  # uint8 in truth; more numbers here
        "text": lambda x: torch.full((4,), x),
        "audio": lambda x: torch.full((2,), float(x)),
    }
    batches = []
    for start in range(0, len(numbers), size):
        some = range(start, min(start + size, len(numbers)))
        has = {m: [i for i in some if m in modalities and i not in (lacking or {}).get(m, ())] for m in MODALITIES}
        batches.append(
            Batch(
                size=len(some),
                values={
                    m: torch.stack([make[m](numbers[i]) for i in rows] or [make[m](0)])[: len(rows)]
                    for m, rows in has.items()
                },
                rows={m: torch.tensor([i - start for i in rows], dtype=torch.long) for m, rows in has.items()},
                ids=torch.full((len(some), len(ID_KINDS)), -1),
                seeds=torch.zeros(len(some), dtype=torch.long),
                keys=tuple(f"0.tar#{i}" for i in some),
                facts=tuple(facts[i] for i in some),
            )
        )
    return batches
