"""Captions beside a row's own: wrong ones on purpose, which teach a model what it overlooks, and further right ones.

They come ready made from a field of the json (composed sounds have some, and the world's test sets), and are made from
the row's caption by rules where that gives too few. Which ones follows from the sample and its epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcl.errors import ConfigError, DataError
from mmcl_data.decode.text import check_caption
from mmcl_data.negatives import NegativesConfig, Pools, load_pools, negatives_of
from mmcl_data.order import mix, permuted_list

_WRONG, _RIGHT = 8, 9
"""What draws of this module are for, as in `augment`."""


@dataclass(frozen=True, kw_only=True)
class BesideConfig:
    """Captions beside a row's own."""

    wrong: int = 0
    """Wrong captions of a row at most; a row that has fewer goes without."""
    wrong_field: str = ""
    """Field of the json that holds some: texts, objects with a `caption`, or either of them by kind."""
    pools: str = ""
    """File that `mmcl data negatives` mined: more of them are made from the row's caption by rules."""
    rules: NegativesConfig = field(default_factory=NegativesConfig)
    """Which rules; `per_caption` is what `wrong` leaves to make."""
    right: int = 0
    """Further right captions of a row at most, for objectives that take some (`objective.modular`)."""
    right_field: str = ""
    """Field of the json that holds them."""

    def __post_init__(self) -> None:
        if self.wrong < 0 or self.right < 0:
            raise ConfigError(f"beside: wrong={self.wrong} and right={self.right} must not be negative")
        if (self.wrong > 0) != bool(self.wrong_field or self.pools):
            raise ConfigError(
                f"beside.wrong={self.wrong} with wrong_field={self.wrong_field!r} and pools={self.pools!r}: wrong ones "
                "come from a field of the json or from rules, which need the pools that `mmcl data negatives` mines"
            )
        if (self.right > 0) != bool(self.right_field):
            raise ConfigError(f"beside.right={self.right} needs a right_field, found {self.right_field!r}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Of the json that are read."""
        return tuple(name for name in (self.wrong_field, self.right_field) if name)

    def __bool__(self) -> bool:
        return self.wrong > 0 or self.right > 0


class Beside:
    """Finds and makes captions beside those of one source.

    Raises:
        ConfigError, DataError: the pools cannot be read.
    """

    def __init__(self, config: BesideConfig) -> None:
        self.config = config
        self.pools: Pools | None = load_pools(Path(config.pools)) if config.pools else None

    def of(self, caption: str, facts: Mapping[str, Any], seed: int) -> tuple[list[str], list[str]]:
        """Wrong and further right captions of a row.

        Args:
            caption: of the row.
            facts: its json member.
            seed: of the sample in its epoch.

        Raises:
            DataError: a field holds something else.
        """
        config = self.config
        right = _some(captions_in(facts, config.right_field), config.right, mix(seed, _RIGHT), {caption})
        every_right = {caption, *captions_in(facts, config.right_field)}
        wrong = _some(captions_in(facts, config.wrong_field), config.wrong, mix(seed, _WRONG), every_right)
        if self.pools is not None and len(wrong) < config.wrong:
            made = negatives_of(caption, self.pools, config.rules, seed, others=[*every_right - {caption}, *wrong])
            wrong += [negative.text for negative in made][: config.wrong - len(wrong)]
        return wrong, right


def captions_in(facts: Mapping[str, Any], name: str) -> list[str]:
    """The captions that a field of the json holds; none where there is no such field.

    Raises:
        DataError: it holds something that is no caption.
    """
    return [check_caption(text) for text in _texts(facts.get(name), name)] if name else []


def _texts(held: Any, name: str) -> Iterator[str]:
    if isinstance(held, str):
        yield held
    elif isinstance(held, Mapping) and isinstance(held.get("caption"), str):
        yield held["caption"]
    elif isinstance(held, list | Mapping):
        for part in held.values() if isinstance(held, Mapping) else held:
            yield from _texts(part, name)
    elif held is not None:
        raise DataError(f"the field {name!r} holds a {type(held).__name__} where a caption should be")


def _some(captions: Sequence[str], most: int, seed: int, but: set[str]) -> list[str]:
    """So many of them, drawn, each once and none of `but`."""
    different = [caption for caption in dict.fromkeys(captions) if caption not in but]
    return [different[place] for place in permuted_list(len(different), seed)[:most]]
