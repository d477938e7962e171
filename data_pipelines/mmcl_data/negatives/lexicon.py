"""The words we know better than a tagger: attributes, things, actions and relations, with what excludes what.

`lexicon.json` groups words into kinds ("colour"), and a kind into senses ("grey gray"): words of one sense may be true
of the same thing, so that only words of two senses of a kind replace each other. So opposites are symmetric, and
synonyms never replace each other, by the shape of the file.
"""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_FILE = Path(__file__).with_name("lexicon.json")
_VOWELS = "aeiou"
_TAGS_OF_FORMS = ("VBZ", "VBG", "VBD", "VBN")


class Entry(NamedTuple):
    """Where a word stands."""

    kind: str
    sense: int
    """Number within the kind."""
    form: str
    """Penn tag: of a verb's inflection, of a noun's number."""


@dataclass(frozen=True)
class Lexicon:
    """The file, made quick to ask."""

    data: dict[str, Any]

    @property
    def version(self) -> int:
        """Raised whenever the file changes: other words make other negatives."""
        return self.data["version"]

    @cached_property
    def attributes(self) -> dict[str, Entry]:
        """Adjectives, adverbs and counts."""
        found = {}
        for kind, senses in self.data["attributes"].items():
            form = {"count": "CD", "loudly": "RB", "quickly": "RB"}.get(kind, "JJ")
            found.update(_entries(kind, senses, lambda word, form=form: {word: form}))
        return found

    @cached_property
    def nouns(self) -> dict[str, Entry]:
        """Things, singular and plural."""
        found: dict[str, Entry] = {}
        for kind, senses in self.data["nouns"].items():
            found.update(_entries(kind, senses, lambda word: {self.plural(word): "NNS", word: "NN"}))
        return found

    @cached_property
    def verbs(self) -> dict[str, Entry]:
        """Actions that replace each other, in all their forms."""
        found: dict[str, Entry] = {}
        for kind, senses in self.data["verbs"].items():
            found.update(_entries(kind, senses, self._verb_forms))
        return found

    @cached_property
    def relations(self) -> dict[str, Entry]:
        """Phrases that say where; of two senses of a kind, the one is false where the other is true."""
        return _relations(self.data["relations"])

    @cached_property
    def times(self) -> dict[str, Entry]:
        """Phrases that say when."""
        return _relations(self.data["times"])

    @cached_property
    def tags(self) -> dict[str, str]:
        """A Penn tag for every single word of the file; function words win over things, and attributes over all."""
        found: dict[str, str] = {}
        for base in self.data["other verbs"].split():
            found.update(self._verb_forms(base))
        found.update({word: entry.form for word, entry in self.verbs.items()})
        found.update({word: entry.form for word, entry in self.nouns.items()})
        for tag, words in self.data["tags"].items():
            found.update(dict.fromkeys(words.split(), tag))
        found.update({word: entry.form for word, entry in self.attributes.items()})
        return found

    @cached_property
    def verb_words(self) -> dict[str, str]:
        """Every form of every verb, whatever else the word may be, with its tag."""
        bases = [*self.data["other verbs"].split(), *_words(self.data["verbs"])]
        return {form: tag for base in bases for form, tag in self._verb_forms(base).items()}

    @cached_property
    def phrases(self) -> dict[str, list[tuple[tuple[str, ...], Entry | None]]]:
        """Relations, times and what only looks like one (None), by first word, longest first."""
        known = {**self.relations, **self.times, **dict.fromkeys(self.data["inert"].split("|"))}
        found: dict[str, list[tuple[tuple[str, ...], Entry | None]]] = {}
        for phrase in sorted(known, key=lambda phrase: -len(phrase.split())):
            found.setdefault(phrase.split()[0], []).append((tuple(phrase.split()), known[phrase]))
        return found

    @cached_property
    def unswappable(self) -> frozenset[str]:
        """Nouns that name no thing of their own (front, group), or one too general to be excluded (person)."""
        return frozenset(self.data["unswappable"].split())

    @cached_property
    def joining(self) -> frozenset[str]:
        """Words that say nothing of which side is which, where nothing else stands between two things."""
        return frozenset(self.data["joining"].split())

    @cached_property
    def beside(self) -> frozenset[str]:
        """Relations that hold both ways, whatever else stands before them."""
        return frozenset(self.data["beside"].split())

    @cached_property
    def mutual(self) -> frozenset[str]:
        """Verbs that both sides do, in all forms."""
        return frozenset(form for base in self.data["mutual"].split() for form in self._verb_forms(base))

    @cached_property
    def attested(self) -> frozenset[str]:
        """Kinds whose words go with few nouns: they need to have been seen before the next word."""
        return frozenset(self.data["attested"].split())

    @cached_property
    def animate(self) -> frozenset[str]:
        """Kinds of nouns."""
        return frozenset(self.data["animate"].split("|"))

    @cached_property
    def places(self) -> frozenset[str]:
        """Kinds of nouns."""
        return frozenset(self.data["places"].split("|"))

    @cached_property
    def collectives(self) -> frozenset[str]:
        """More nouns that act."""
        return frozenset(self.data["collectives"].split())

    @cached_property
    def _covers(self) -> dict[str, frozenset[str]]:
        """General names with all that may be called so, in both numbers."""
        found = {}
        for noun, below in self.data["hypernyms"].items():
            kind = self.nouns[noun].kind
            words = {w for w, entry in self.nouns.items() if entry.kind == kind} if below == "*" else below.split()
            found[noun] = found[self.plural(noun)] = frozenset(words) | {self.plural(w) for w in words}
        return found

    def overlap(self, noun: str, other: str) -> bool:
        """Whether one thing could be called both: equal, one kind of the other, or sharing a word.

        Number does not matter. Words the file does not know overlap where they share a stem.
        """
        last, its_last = noun.rsplit(maxsplit=1)[-1], other.rsplit(maxsplit=1)[-1]
        if last == its_last or noun[:5] == other[:5]:
            return True
        noun, other = last, its_last
        if other in self._covers.get(noun, ()) or noun in self._covers.get(other, ()):
            return True
        mine, its = self.nouns.get(noun), self.nouns.get(other)
        return mine is not None and its is not None and mine[:2] == its[:2]

    def plural(self, noun: str) -> str:
        """Of a singular."""
        if noun in self.data["plurals"]:
            return self.data["plurals"][noun]
        if noun.endswith("man"):
            return noun[:-3] + "men"
        return _with_s(noun)

    def _verb_forms(self, base: str) -> dict[str, str]:
        """Form -> tag; of forms that are alike the first tag is kept."""
        irregular = self.data["forms"].get(base)
        forms = irregular.split() if irregular else [_with_s(base), _with_ing(base), _with_ed(base), _with_ed(base)]
        return dict(reversed([(base, "VB"), *zip(forms, _TAGS_OF_FORMS, strict=True)]))


@lru_cache(maxsize=1)
def load_lexicon() -> Lexicon:
    """The lexicon of this package."""
    return Lexicon(json.loads(_FILE.read_text()))


def _words(kinds: dict[str, list[str]]) -> list[str]:
    return [word for senses in kinds.values() for sense in senses for word in sense.split()]


def _entries(kind: str, senses: list[str], forms: Any) -> dict[str, Entry]:
    return {
        form: Entry(kind, number, tag)
        for number, sense in enumerate(senses)
        for word in sense.split()
        for form, tag in forms(word).items()
    }


def _relations(kinds: dict[str, list[str]]) -> dict[str, Entry]:
    return {
        phrase: Entry(kind, number, "IN")
        for kind, senses in kinds.items()
        for number, sense in enumerate(senses)
        for phrase in sense.split("|")
    }


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z", "tomato", "potato")) else "s")


def _doubled(word: str) -> str:
    """Short verbs double their last letter: stop, stopping."""
    short = len(word) in (3, 4) and word[-1] not in "aeiouwxy" and word[-2] in _VOWELS and word[-3] not in _VOWELS
    return word + word[-1] if short and word != "open" else word


def _with_ing(word: str) -> str:
    return (word[:-1] if word.endswith("e") and not word.endswith("ee") else _doubled(word)) + "ing"


def _with_ed(word: str) -> str:
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ied"
    return word + "d" if word.endswith("e") else _doubled(word) + "ed"
