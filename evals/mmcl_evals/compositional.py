"""Composition: is the true caption nearer than one with the same words, or nearly, that means something else?

A row brings wrong captions by kind: an `attribute` moved to the other object, a `relation` turned round, an `order`
of events swapped. The kinds are those of ARO, Yuksekgonul et al. 2023, https://arxiv.org/abs/2210.01936, and for
sounds CompA, Ghosh et al. 2024, https://arxiv.org/abs/2310.08753; the score is SugarCrepe's, Hsieh et al. 2023,
https://arxiv.org/abs/2306.14610: the share of rows where cos(x, true) > cos(x, wrong), strictly, so that a tie is a
miss. Chance is 0.5. One figure for each kind.

To add one: batches whose facts hold `captions`, a true caption for each thing they speak about (`scene`, `sound`), and
`foils`, for the same things a wrong version of it for each kind. A foil that equals its caption is no decision and is
left out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from mmcl.errors import DataError, NoUsableSamples
from mmcl.types import Batch, Encoder, Modality, Score

from .collect import Collected, check_batches, collect
from .metrics import pair_hits, paired_cosines, score

ABOUT: dict[Modality, str] = {"image": "scene", "audio": "sound"}
"""Which of the captions of a joint row speaks about what a modality holds."""


class Decision(NamedTuple):
    """One choice between a true caption and a wrong one."""

    row: int
    kind: str
    true: str
    foil: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compositional:
    """A true caption against minimally different wrong ones."""

    name: str
    modality: Literal["image", "audio"]
    batches: Iterable[Batch]
    """Read anew in every run; rows without the modality, or without foils for it, are left out."""
    main_metric: str = "attribute"
    """The kind that stands for the task in a summary."""

    def __post_init__(self) -> None:
        check_batches(self.name, self.batches)

    @property
    def task(self) -> str:
        """The kind of task."""
        return "compositional"

    @property
    def details(self) -> Mapping[str, Any]:
        """Nothing beyond the figures."""
        return {}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What this compares."""
        return (self.modality, "text")

    def run(self, encoder: Encoder) -> Iterator[tuple[str, Score]]:
        """Embed rows and captions, and compare; the kinds in the order of the alphabet.

        Raises:
            NoUsableSamples: no row has the modality and a foil for it.
            DataError: a row has foils, but not the caption that they belong to.
        """
        found = collect(self.name, encoder, self.batches, [self.modality])
        decisions = self._decisions(found)
        if not decisions:
            raise NoUsableSamples(
                f"{self.name}: of {len(found.facts)} rows with {self.modality} none has 'foils' about it in its facts"
            )
        texts = list(dict.fromkeys(text for decision in decisions for text in (decision.true, decision.foil)))
        place = {text: index for index, text in enumerate(texts)}
        embedded, values = encoder.embed_texts(texts), found.values[self.modality]
        for kind in sorted({decision.kind for decision in decisions}):
            chosen = [decision for decision in decisions if decision.kind == kind]
            x = values[torch.tensor([decision.row for decision in chosen])]
            true = embedded[torch.tensor([place[decision.true] for decision in chosen])]
            foil = embedded[torch.tensor([place[decision.foil] for decision in chosen])]
            yield kind, score(pair_hits(paired_cosines(x, true), paired_cosines(x, foil)), 0.5)

    def _decisions(self, found: Collected) -> list[Decision]:
        about, decisions = ABOUT[self.modality], []
        for row, facts in enumerate(found.facts):
            foils = facts.get("foils", {}).get(about)
            if not foils:
                continue
            true = facts.get("captions", {}).get(about)
            if true is None:
                raise DataError(f"{self.name}: {found.keys[row]}: has foils of its {about}, but no captions.{about}")
            decisions += [Decision(row, kind, true, foil) for kind, foil in foils.items() if foil != true]
        return decisions
