"""Captions that are wrong in one thing, order or relation: what CLIP-style models do not notice by themselves.

    corpus -> mine_pools -> Pools            once, to a file
    caption, Pools, seed -> negatives_of     while training: under 0.1 ms, no tagger, no model

NegCLIP, Yuksekgonul et al. 2023, https://arxiv.org/abs/2210.01936; the names of the rules and what they should not give
away are from SugarCrepe, Hsieh et al. 2023, https://arxiv.org/abs/2306.14610.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mmcl.errors import ConfigError
from mmcl_data.negatives.edits import meaning_key
from mmcl_data.negatives.operators import OPERATORS, Draws
from mmcl_data.negatives.parsing import WORD
from mmcl_data.negatives.pools import Pools, load_pools, mine_pools
from mmcl_data.order import mix

__all__ = ["DEFAULT", "OPERATORS", "Negative", "NegativesConfig", "Pools", "load_pools", "mine_pools", "negatives_of"]

DEFAULT = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "order_swap")
_NEGATIVES = 7
"""What a draw of this module is for, as in `augment`."""


class Negative(NamedTuple):
    """A wrong caption and the rule that made it."""

    text: str
    operator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NegativesConfig:
    """Which negatives are made."""

    operators: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(DEFAULT, 1.0))
    """Weights of rules, by the names in `OPERATORS`."""
    per_caption: int = 1
    """Most negatives of a caption; fewer where nothing else would be wrong."""
    rounds: int = 1
    """How often each rule is asked. More rounds give more negatives, and give frequent words away: a proposal that was
    refused because the corpus has too few captions like it gets another chance."""
    max_characters: int = 1000
    """Longer captions get none, and no negative is longer."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.operators if name not in OPERATORS]:
            raise ConfigError(f"operators={unknown} are unknown: choose from {', '.join(OPERATORS)}")
        if not self.operators or not all(0 < weight < math.inf for weight in self.operators.values()):
            raise ConfigError(f"operators={dict(self.operators)}: name at least one, with weights above 0")
        for name in ("per_caption", "rounds", "max_characters"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is out of range: it must be at least 1")


def negatives_of(
    caption: str, pools: Pools, config: NegativesConfig, seed: int, others: Iterable[str] = ()
) -> list[Negative]:
    """Up to `per_caption` different captions that are wrong where `caption` is right, the same for the same arguments.

    Args:
        caption: one caption.
        pools: of a corpus like it.
        config: which.
        seed: of the sample in its epoch.
        others: more captions that are right.
    """
    made: list[Negative] = []
    if len(caption) > config.max_characters:
        return made
    parsed, draws = pools.parser(caption), Draws(mix(seed, _NEGATIVES))
    taken: set[tuple[str, ...]] = set()
    for name in _in_turn(config, draws):
        proposal = OPERATORS[name](parsed, draws, pools)
        if proposal is None or len(proposal.text) > config.max_characters:
            continue
        odds = pools.lift(parsed.words, WORD.findall(proposal.text.lower())) + proposal.odds
        if draws() >= math.exp(min(0.0, odds)):
            continue
        taken = taken or {meaning_key(text) for text in (caption, *others)}
        if (key := meaning_key(proposal.text)) in taken:
            continue
        taken.add(key)
        made.append(Negative(proposal.text, name))
        if len(made) == config.per_caption:
            break
    return made


def _in_turn(config: NegativesConfig, draws: Draws) -> Iterator[str]:
    """The rules, each once a round, heavier ones sooner."""
    for _ in range(config.rounds):
        left, total, name = dict(config.operators), sum(config.operators.values()), ""
        while left:
            at = draws() * total
            for name in left:  # noqa: PLC0206
                at -= left[name]
                if at < 0:
                    break
            total -= left.pop(name)
            yield name
