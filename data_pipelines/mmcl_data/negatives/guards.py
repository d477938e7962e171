"""What rules must know of a caption before they change it: what belongs together, what may be true both ways."""

from collections.abc import Iterator, Sequence

from mmcl_data.negatives.lexicon import Entry, Lexicon
from mmcl_data.negatives.parsing import Caption, Relation, Thing
from mmcl_data.negatives.pools import ARTICLES, Pools, goes_on, thing_pool

_GENDERED = frozenset({"he", "she", "his", "her", "him", "hers"})
_DETERMINED = frozenset({"DT", "PRP$", "CD", "PDT", "JJ", "NN", "NNS"})
"""Tags that a thing may begin with."""
_PARTICLES = frozenset({"up", "down", "off", "out", "away", "by", "past", "over", "on", "in", "back"})
_IT = frozenset({"it", "its"})
"""After "a cup with a spoon": "on its left" gives "with" a direction."""
_OF_ANIMATE = frozenset({"posture", "motion", "voice"})
"""Kinds of actions."""
Span = tuple[int, int]


def attributes_of(caption: Caption, lexicon: Lexicon, places: range | None = None) -> Iterator[tuple[int, Entry]]:
    """The attributes of the lexicon among the words at `places`, or anywhere."""
    known = lexicon.attributes
    for place in range(len(caption.words)) if places is None else places:
        entry = known.get(caption.words[place])
        if entry is not None and entry.form == caption.tags[place]:
            yield place, entry


def is_said(caption: Caption, noun: str, lexicon: Lexicon) -> bool:
    """Whether a thing of the caption may be called so."""
    return any(lexicon.overlap(noun, " ".join(caption.words[t.head : t.end])) for t in caption.things)


def breaks_gender(caption: Caption, pool: str) -> bool:
    """Whether a pronoun says who a person is."""
    return pool == "person NN" and not _GENDERED.isdisjoint(caption.words)


def is_attested(caption: Caption, thing: Thing, new: str, pools: Pools) -> bool:
    """Whether the corpus has a new noun before or after one of its new neighbours, which must say something."""
    words, start = new.split(), thing.head
    while start and caption.words[start - 1] in ARTICLES:
        start -= 1
    before, after = word_at(caption, start - 1), word_at(caption, thing.end)
    telling = [word[:1].isalnum() and word not in pools.lexicon.joining for word in (before, after)]
    seen = pools.pairs[before, words[0]], pools.pairs[words[-1], after]
    return bool((telling[0] and seen[0]) or (telling[1] and seen[1]))


def same_noun(caption: Caption, one: Thing, other: Thing, lexicon: Lexicon) -> bool:
    """Whether two things may be called the same."""
    return lexicon.overlap(caption.words[one.end - 1], caption.words[other.end - 1])


def say_the_same(caption: Caption, one: Span, other: Span, lexicon: Lexicon) -> bool:
    """Whether exchanging two stretches says the same or nearly so."""
    a, b = caption.words[one[1] - 1], caption.words[other[1] - 1]
    same = lexicon.attributes.get(a), lexicon.attributes.get(b)
    return caption.words[slice(*one)] == caption.words[slice(*other)] or (same[0] is not None and same[0] == same[1])


def frame_of(caption: Caption, thing: Thing) -> str:
    """What kind of word a thing begins with."""
    tag = caption.tags[thing.start]
    return tag if tag in ("DT", "CD", "PRP$", "PDT") else ""


def moves(caption: Caption, thing: Thing, lexicon: Lexicon) -> bool:
    """Whether a thing can stand elsewhere: it belongs to no other, measures no other, and is no place."""
    noun, first, after = caption.words[thing.end - 1], caption.tags[thing.start], word_at(caption, thing.end)
    if noun in lexicon.unswappable or first == "PRP$" or after == "of" or goes_on(caption, thing):
        return False
    return not _is_place(noun, lexicon)


def _is_place(noun: str, lexicon: Lexicon) -> bool:
    entry = lexicon.nouns.get(noun)
    return entry is not None and entry.kind in lexicon.places


def class_of(caption: Caption, thing: Thing, lexicon: Lexicon) -> tuple[str, bool]:
    """What a thing agrees with, and whether it acts."""
    return caption.tags[thing.end - 1], _acts(caption.words[thing.end - 1], lexicon)


def is_mutual(caption: Caption, one: Thing, other: Thing, lexicon: Lexicon) -> bool:
    """Whether what stands between two things holds both ways: "and", "next to", "while", "kissing"."""
    between = caption.words[one.end : other.start]
    if any(relation.entry.kind in ("sweep", "drop") for relation in caption.relations):
        return False  # "a cat, a dog and a cow from left to right"
    signs = any(not word[0].isalnum() and word != "," for word in between)
    if not between or signs or not lexicon.mutual.isdisjoint(between):
        return True
    if between[-1] in lexicon.beside or between[-2:] == ("next", "to"):
        return _IT.isdisjoint(caption.words[other.end : other.end + 3])
    return set(between) <= lexicon.joining


def says_where(caption: Caption, relation: Relation, lexicon: Lexicon) -> bool:
    """Whether a phrase relates something to a thing or direction."""
    if relation.phrase not in lexicon.relations:
        return False
    complete = relation.entry.kind in ("sweep", "drop", "its side", "at side", "to that side")
    after = (*caption.tags, "")[relation.end]
    return complete or after in _DETERMINED or word_at(caption, relation.end) == "it"


def has_actor(caption: Caption, place: int, kind: str, lexicon: Lexicon) -> bool:
    """Whether an action of `kind` at `place` has a subject of which it excludes the others of its kind: a cup or bird
    that stands may as well be said to sit."""
    if kind not in _OF_ANIMATE:
        return True
    nouns = [caption.words[thing.end - 1] for thing in caption.things if thing.end <= place]
    if kind == "posture":
        nouns = [noun for noun in nouns if noun not in lexicon.nouns or lexicon.nouns[noun].kind != "bird"]
    return any(_acts(noun, lexicon) or noun in lexicon.collectives for noun in nouns)


def _acts(noun: str, lexicon: Lexicon) -> bool:
    entry = lexicon.nouns.get(noun)
    return entry is not None and entry.kind in lexicon.animate


def word_at(caption: Caption, place: int) -> str:
    """In lower case; empty outside of the caption."""
    return caption.words[place] if 0 <= place < len(caption.words) else ""


def is_colour(caption: Caption, place: int, lexicon: Lexicon) -> bool:
    """Whether the word at `place` is one."""
    entry = lexicon.attributes.get(word_at(caption, place))
    return entry is not None and entry.kind == "colour"


def is_countable(caption: Caption, thing: Thing, lexicon: Lexicon) -> bool:
    """Whether a thing has an article and nothing else, and may be replaced."""
    return (
        caption.words[thing.start] in ("a", "an")
        and thing.head == thing.start + 1
        and thing_pool(caption, thing, lexicon) is not None
    )


def verb_phrases(caption: Caption) -> Iterator[Span]:
    """Verbs with their auxiliaries and the adverbs between, right after their subject."""
    start = None
    for place, tag in enumerate((*caption.tags, "")):
        inside = tag[:2] == "VB" or tag == "MD" or (tag == "RB" and start is not None)
        if inside and start is None:
            start = place
        elif not inside and start is not None:
            end = place
            while caption.tags[end - 1] == "RB":
                end -= 1
            if start and caption.tags[start - 1] in ("NN", "NNS") and word_at(caption, end) not in _PARTICLES:
                yield start, end
            start = None


def needs_of(caption: Caption, phrase: Span) -> tuple[str, str, str]:
    """What a verb phrase needs around it: its first and last form, and what follows."""
    first, last = caption.tags[phrase[0]], caption.tags[phrase[1] - 1]
    after = (*caption.tags, "")[phrase[1]]
    return first, last, "thing" if after in _DETERMINED else after if after == "JJR" else ""


def sides_of(caption: Caption, relation: Relation, relations: Sequence[Relation]) -> tuple[Span, Span]:
    """The words before and after a word of time, up to the next one or the end of the sentence."""
    stops = {place for place, word in enumerate(caption.words) if word in (".", ";", "!", ",")}
    stops |= {place for other in relations for place in range(other.start, other.end)}
    first = relation.start
    while first and (caption.words[first - 1] in (",", "and", "is", "are")):
        first -= 1
    begin = first
    while begin and begin - 1 not in stops:
        begin -= 1
    end = relation.end
    while end < len(caption.words) and end not in stops:
        end += 1
    return (begin, first), (relation.end, end)


def are_alike(caption: Caption, one: Span, other: Span) -> bool:
    """Whether two stretches are both sentences or both things, neither of which needs the other."""
    shapes = []
    for span in (one, other):
        tags = caption.tags[slice(*span)]
        begins = any(thing.start == span[0] for thing in caption.things)
        shapes.append((begins, any(tag in ("VBZ", "VBP", "VBD") for tag in tags), "VBG" in tags))
        if not begins or "PRP" in tags or "PRP$" in tags or "WDT" in tags:
            return False
    return shapes[0] == shapes[1]
