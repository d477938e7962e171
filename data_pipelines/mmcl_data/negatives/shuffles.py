"""The shuffles of ARO's order test, for evaluation: Yuksekgonul et al. 2023, https://arxiv.org/abs/2210.01936.

They are easy to tell from captions without looking, which is why they are no operators. As in ARO, caption and shuffles
are cleaned alike afterwards. Unlike there, a shuffle that is equal to the caption, or to another, is given up.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmcl_data.negatives.operators import Draws
from mmcl_data.negatives.parsing import Caption
from mmcl_data.order import mix

_SHUFFLE = 8
"""What a draw of this module is for, as in `augment`."""
_TRIES = 8
_MAX_WORDS = 30
_SIGNS = re.compile(r'[.!"()*#:;~]')
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_ADJECTIVES = ("JJ", "JJR", "JJS")
Shuffle = Callable[[Caption, Draws], list[str]]


def shuffle_nouns_and_adjectives(caption: Caption, draws: Draws) -> list[str]:
    """Nouns among themselves, and adjectives among themselves."""
    words = list(_words(caption))
    for tags in (_NOUNS, _ADJECTIVES):
        _permute(words, [place for place, tag in enumerate(caption.tags) if tag in tags], draws)
    return words


def shuffle_all_but_nouns_and_adjectives(caption: Caption, draws: Draws) -> list[str]:
    """All other words."""
    words = list(_words(caption))
    _permute(words, [p for p, tag in enumerate(caption.tags) if tag not in (*_NOUNS, *_ADJECTIVES)], draws)
    return words


def shuffle_within_trigrams(caption: Caption, draws: Draws) -> list[str]:
    """The words of each three."""
    words = list(_words(caption))
    for start in range(0, len(words), 3):
        _permute(words, list(range(start, min(start + 3, len(words)))), draws)
    return words


def shuffle_trigrams(caption: Caption, draws: Draws) -> list[str]:
    """Each three words stay together, and the threes change places."""
    words = _words(caption)
    threes = [words[start : start + 3] for start in range(0, len(words), 3)]
    order = list(range(len(threes)))
    _permute(order, list(range(len(threes))), draws)
    return [word for place in order for word in threes[place]]


def shuffle_all_words(caption: Caption, draws: Draws) -> list[str]:
    """All words; ARO uses it for retrieval only."""
    words = caption.text.split()
    _permute(words, list(range(len(words))), draws)
    return words


SHUFFLES: Mapping[str, Shuffle] = {
    rule.__name__: rule
    for rule in (
        shuffle_nouns_and_adjectives,
        shuffle_all_but_nouns_and_adjectives,
        shuffle_within_trigrams,
        shuffle_trigrams,
        shuffle_all_words,
    )
}
ORDER_TEST = tuple(SHUFFLES)[:4]
"""What COCO-Order and Flickr30k-Order ask about each caption."""


def shuffled(caption: Caption, seed: int, names: Sequence[str] = ORDER_TEST) -> dict[str, str]:
    """Cleaned shuffles by name, none equal to the cleaned caption or to each other; fewer for short captions."""
    made: dict[str, str] = {}
    for number, name in enumerate(names):
        draws = Draws(mix(seed, _SHUFFLE, number))
        for _ in range(_TRIES):
            text = clean(" ".join(SHUFFLES[name](caption, draws)))
            if text != clean(" ".join(_words(caption))) and text not in made.values():
                made[name] = text
                break
    return made


def clean(text: str) -> str:
    """Lower case, some signs made spaces, single spaces, the first 30 words: what ARO does before it tokenizes."""
    return " ".join(_SIGNS.sub(" ", text.lower()).split()[:_MAX_WORDS])


def _words(caption: Caption) -> tuple[str, ...]:
    return tuple(caption.text[start:end] for start, end in caption.spans)


def _permute(items: list[Any], places: Sequence[int], draws: Draws) -> None:
    """Fisher and Yates's shuffle of what lies at `places`."""
    for last in range(len(places) - 1, 0, -1):
        other = int(draws() * (last + 1))
        items[places[last]], items[places[other]] = items[places[other]], items[places[last]]
