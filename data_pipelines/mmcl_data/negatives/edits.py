"""Changes of a caption by place that leave everything else as it is written: spacing, case, signs, a and an."""

import re
from collections.abc import Sequence
from functools import lru_cache

from mmcl_data.negatives.parsing import WORD, Caption

Edit = tuple[int, int, str]
"""First word, one past the last, and what stands there instead."""

_LIKE_CONSONANTS = re.compile(r"(?:uni(?!n|m)|u[bks]|use|eu|ewe|one|once|uf)")
_LIKE_VOWELS = re.compile(r"(?:hour|honest|heir|honou?r)")
_ARTICLES = frozenset({"a", "an"})
_SILENT = frozenset({"a", "an", "the", ".", "!", '"', ";", ":"})
_BOTH_WAYS = re.compile(r"(?:^| )(?:and|or|while|as|with|plus|,|beside|near|next to|together with)(?= |$)")


def article(word: str) -> str:
    """a or an, by the sound that `word` begins with."""
    word = word.lower()
    if word[0] in "aeiou":
        return "a" if _LIKE_CONSONANTS.match(word) else "an"
    return "an" if _LIKE_VOWELS.match(word) else "a"


def apply(caption: Caption, edits: Sequence[Edit]) -> str:
    """The text with `edits`, which must not overlap. The first letter keeps its case, and an article before an edit
    follows the new word."""
    pieces, done, text = [], 0, caption.text
    for start, end, new in sorted(edits):
        begin = caption.spans[start][0]
        if start and caption.words[start - 1] in _ARTICLES and (previous := caption.spans[start - 1])[0] >= done:
            pieces.append(text[done : previous[0]])
            said = text[slice(*previous)]
            pieces.append(said if article(new) == said.lower() else _as_written(said, article(new)))
            done = previous[1]
        pieces += [text[done:begin], new]
        done = caption.spans[end - 1][1]
    made = "".join((*pieces, text[done:]))
    return made[:1].upper() + made[1:] if text[:1].isupper() else made


def moved(caption: Caption, start: int, end: int) -> str:
    """The words as they read anywhere in the sentence: a capital that only begins it is made small."""
    text = caption.slice(start, end)
    if start or caption.tags[0][:3] == "NNP" or caption.words[0] == "i":
        return text
    first = text[: caption.spans[0][1] - caption.spans[0][0]]
    return text[0].lower() + text[1:] if first[1:].islower() or len(first) == 1 else text


def replaced(caption: Caption, start: int, end: int, new: str) -> Edit:
    """An edit whose words are in the case of those they replace."""
    return start, end, _as_written(moved(caption, start, end), new)


def exchanged(caption: Caption, one: tuple[int, int], other: tuple[int, int]) -> str:
    """The text in which two stretches of words, the first one before the other, have changed places."""
    return apply(caption, [(*one, moved(caption, *other)), (*other, moved(caption, *one))])


@lru_cache(maxsize=4096)
def meaning_key(text: str) -> tuple[str, ...]:
    """Equal for captions that differ in case, signs, articles, or in what stands on which side of "and"."""
    words = [word for word in WORD.findall(text.lower()) if word not in _SILENT]
    return tuple(sorted(part.strip() for part in _BOTH_WAYS.split(" ".join(words)) if part.strip()))


def _as_written(old: str, new: str) -> str:
    if len(old) > 1 and old.isupper():
        return new.upper()
    if old[:1].isupper():
        return new[:1].upper() + new[1:] if not old[1:].isupper() or len(old) == 1 else new.upper()
    return new
