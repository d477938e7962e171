"""Captions as words with tags, things and relations, each with its place in the text.

A word's tag comes from our lexicon, else from a table that `pools` mined once with a tagger, so that a tagger's cost
and version are outside of training; a few rules then settle what depends on neighbours ("two rings", "a phone rings").
"""

import gc
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from mmcl.errors import ConfigError, MissingExtra
from mmcl_data.negatives.lexicon import Entry, Lexicon

Tagger = Callable[[Sequence[str]], list[str]]
"""The words of one caption -> their Penn tags."""

UNKNOWN = "X"
"""Tag of a word that nobody knows: left alone."""
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_DETERMINERS = frozenset({"DT", "PRP$"})
_NOUNS = frozenset({"NN", "NNS"})
_MODIFIERS = frozenset({"JJ", "CD", "JJR", "JJS", "PDT"})
_PARTICIPLES = frozenset({"VBG", "VBN"})
_BEFORE_NOUNS = _DETERMINERS | _MODIFIERS
_BEFORE_VERBS = frozenset({"NN", "NNP", "PRP", "WDT", "RB"})


class Thing(NamedTuple):
    """A noun phrase, by numbers of words."""

    start: int
    """Of its determiner, if it has one."""
    head: int
    """Of its first noun; between are what it is like and how many."""
    end: int
    """One past its last noun."""


class Relation(NamedTuple):
    """A phrase that says where or when."""

    start: int
    end: int
    phrase: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Caption:
    """A parsed caption."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Of words and signs, in characters."""
    words: tuple[str, ...]
    """In lower case."""
    tags: tuple[str, ...]
    things: tuple[Thing, ...]
    relations: tuple[Relation, ...]
    inert: frozenset[int]
    """Words within phrases that only look like relations."""

    def slice(self, start: int, end: int) -> str:
        """Of the text, as it is written."""
        return self.text[self.spans[start][0] : self.spans[end - 1][1]]


@dataclass(frozen=True)
class Parser:
    """Turns text into `Caption`s."""

    lexicon: Lexicon
    tags: Mapping[str, str]
    """Of words outside of the lexicon."""

    @cached_property
    def _known(self) -> dict[str, str]:
        return {**self.tags, **self.lexicon.tags}

    def __call__(self, text: str) -> Caption:
        """The caption in `text`."""
        spans, known = [match.span() for match in WORD.finditer(text)], self._known
        words = [text[start:end].lower() for start, end in spans]
        tags = [known.get(word) or (UNKNOWN if word[0].isalnum() else word) for word in words]
        _settle(words, tags, self.lexicon)
        relations, inert = _relations(words, self.lexicon)
        return Caption(text, tuple(spans), tuple(words), tuple(tags), _things(words, tags), relations, inert)


def _settle(words: Sequence[str], tags: list[str], lexicon: Lexicon) -> None:
    """Give words that have several uses the one that their neighbours allow."""
    verbs = lexicon.verb_words
    last = len(words) - 1
    for place, word in enumerate(words):
        before = tags[place - 1] if place else ""
        if word in verbs:
            tags[place] = _verb_or_noun(tags[place], verbs[word], before, tags, place)
        elif tags[place] in _NOUNS and word not in lexicon.nouns and _is_verb(words, tags, place):
            tags[place] = "VBZ" if tags[place] == "NNS" else "VBP"
        elif word[-3:] == "ing" and before in ("VBZ", "VBP", "VBD"):
            tags[place] = "VBG"
        elif word in lexicon.nouns and word in lexicon.attributes:
            after = tags[place + 1] if place < last else ""
            tags[place] = "JJ" if after in _NOUNS or after in ("JJ", "CC") or before[:2] == "VB" else "NN"


def _verb_or_noun(tag: str, as_verb: str, before: str, tags: Sequence[str], place: int) -> str:
    """For a word that may be a form of a verb."""
    if before in _BEFORE_NOUNS:
        return "NNS" if as_verb == "VBZ" and tag in ("VBZ", "NNS") else tag if tag[:2] != "VB" else _as_modifier(tag)
    if as_verb == "VBZ" and before in _BEFORE_VERBS:
        return "VBZ"
    if as_verb == "VB" and before in ("NNS", "TO", "MD"):
        return "VB" if before != "NNS" else "VBP"
    if as_verb == "VB" and tag == "VB":
        return "VBP" if before == "RB" and place > 1 and tags[place - 2] in ("NNS", "MD") else UNKNOWN
    return tag


def _as_modifier(tag: str) -> str:
    return "NN" if tag in ("VB", "VBP") else tag


def _is_verb(words: Sequence[str], tags: Sequence[str], place: int) -> bool:
    """Whether a word that taggers take for a noun is a verb: "a dog jumps", "then fades", "dishes clatter"."""
    before = tags[place - 1] if place else ""
    if tags[place] == "NN":
        return before == "NNS"
    if before != "NN":
        return words[place - 1] == "then" if place else False
    place -= 1
    while place >= 0 and (tags[place] in _NOUNS or (tags[place] in _MODIFIERS and words[place] != "one")):
        place -= 1
    return place >= 0 and words[place] in ("a", "an", "one", "the", "another")


def _things(words: Sequence[str], tags: Sequence[str]) -> tuple[Thing, ...]:
    found, place, count = [], 0, len(words)
    while place < count:
        start = place
        if tags[place] in _DETERMINERS:
            place += 1
        head = _skip_modifiers(words, tags, place, start)
        end = head
        while end < count and tags[end] in _NOUNS:
            end += 1
        if end > head:
            found.append(Thing(start, head, end))
        place = max(end, start + 1)
    return tuple(found)


def _skip_modifiers(words: Sequence[str], tags: Sequence[str], place: int, start: int) -> int:
    """The first word from `place` that is no adjective, number or participle of the noun to come."""
    count, begin = len(words), place
    while place < count:
        tag = tags[place]
        after = tags[place + 1] if place + 1 < count else ""
        joined = words[place] in ("and", ",") and place > begin and tags[place - 1] == "JJ" and after == "JJ"
        participle = tag in _PARTICIPLES and place > start and (after in _NOUNS or after == "JJ")
        if not (tag in _MODIFIERS or joined or participle):
            break
        place += 1
    return place


def _relations(words: Sequence[str], lexicon: Lexicon) -> tuple[tuple[Relation, ...], frozenset[int]]:
    found, inert, place, phrases = [], set(), 0, lexicon.phrases
    while place < len(words):
        step = 1
        for phrase, entry in phrases.get(words[place], ()):
            size = len(phrase)
            if size == 1 or tuple(words[place : place + size]) == phrase:
                step = size
                if entry is None:
                    inert.update(range(place, place + size))
                else:
                    found.append(Relation(place, place + size, " ".join(phrase), entry))
                break
        place += step
    return tuple(found), frozenset(inert)


@lru_cache(maxsize=1)
def textblob_tagger() -> Tagger:
    """TextBlob's PatternTagger: a lexicon of 94,000 words with rules of context, inside its wheel, 25 us a caption.

    Raises:
        MissingExtra: without textblob.
    """
    try:
        from textblob.en import tag  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("textblob", "negatives", "tagging the words of captions") from error
    with warnings.catch_warnings(category=ResourceWarning, action="ignore"):
        tag("a", tokenize=False)  # reads its files now, and leaves closing them to the garbage collector
        gc.collect()
    return lambda words: _aligned(words, [found for _, found in tag(" ".join(words), tokenize=False)])


def spacy_tagger(model: str = "en_core_web_sm") -> Tagger:
    """A spaCy pipeline: better in context, and 40 times as slow.

    Args:
        model: an installed package or a folder, which spaCy loads as code: only one that you trust.

    Raises:
        MissingExtra: without spaCy.
        ConfigError: `model` is not installed.
    """
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("spacy", "spacy", "tagging the words of captions with spaCy") from error
    try:
        pipeline: Any = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise ConfigError(f"spaCy finds no model {model!r}: python -m spacy download {model}") from error
    return tagger_of(pipeline)


def tagger_of(pipeline: Any) -> Tagger:
    """A loaded spaCy pipeline that sets `tag_`, as a tagger."""
    from spacy.tokens import Doc  # pyright: ignore[reportMissingImports]

    return lambda words: [token.tag_ or UNKNOWN for token in pipeline(Doc(pipeline.vocab, words=list(words)))]


def _aligned(words: Sequence[str], tags: list[str]) -> list[str]:
    """Words that a tagger took apart are left alone."""
    return tags if len(tags) == len(words) else [UNKNOWN] * len(words)
