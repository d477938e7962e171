"""What a corpus says: its words' tags, which things, attributes and relations it has how often, and which words follow.

Negatives must be distributed like captions, or a model learns to tell them apart without looking. So replacements are
drawn by frequency, and a changed caption is accepted as Metropolis et al. 1953 do
(https://doi.org/10.1063/1.1699114): with probability min(1, p(negative) / p(caption)) under the corpus. Where proposals
are symmetric, the pair (caption, negative) then is as likely as (negative, caption), and no test of the text alone can
say which is which, as far as p is right. Here p knows three words in a row.
"""

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmcl.errors import DataError
from mmcl_data.negatives.lexicon import Lexicon, load_lexicon
from mmcl_data.negatives.parsing import UNKNOWN, Caption, Parser, Relation, Tagger, Thing, textblob_tagger

FORMAT = 1
_SMOOTHING = 2.0
"""How many sightings of a word it takes until its successors count as much as how frequent each is on its own."""
_MAX_FILE = 1 << 28
_MAX_WORDS, _MAX_PAIRS, _MAX_THREES, _MAX_POOL = 50_000, 500_000, 1_000_000, 5_000
_MAX_LIFTS = 200_000
"""Kept by each process: some 50 MB."""
_SHORTEST = 3
"""Letters of a thing that the lexicon does not know: shorter ones are often letters and units."""
_GOES_ON = frozenset({"NN", "NNS", "NNP", "NNPS", "JJ", "JJR", "CD", "VB", "VBP", UNKNOWN})
"""Tags after which a noun was no last one: "vacuum cleaner" is tagged NN JJR, and "cash register" NN VB."""
OPEN_POOLS = frozenset({"a NN", "the NN", "the NNS"})
"""Of things that the lexicon does not know."""
_SINGLE = frozenset({"a", "an", "one", "another"})
ARTICLES = frozenset({"a", "an", "the"})
Pair = tuple[str, str]
Three = tuple[str, str, str]


@dataclass(frozen=True)
class Pools:
    """Counts of a corpus, capped."""

    lexicon: Lexicon
    tags: dict[str, str]
    """Penn tags of words outside of the lexicon."""
    words: Counter[str]
    pairs: Counter[Pair]
    """Of neighbours, articles left out; the empty word stands twice before the first and once after the last."""
    threes: Counter[Three]
    """Of three in a row."""
    pools: dict[str, Counter[str]]
    """What may replace each other: words and phrases by pool."""
    _lifts: dict[tuple[Three, int], float] = field(default_factory=dict, repr=False)

    @cached_property
    def parser(self) -> Parser:
        """Of captions like the corpus's."""
        return Parser(self.lexicon, self.tags)

    @cached_property
    def total(self) -> int:
        """Words of the corpus."""
        return max(1, self.words.total())

    @cached_property
    def _cumulative(self) -> dict[str, tuple[list[str], list[int]]]:
        ordered = {name: sorted(pool.items()) for name, pool in self.pools.items()}
        return {
            name: ([word for word, _ in pool], list(itertools.accumulate(count for _, count in pool)))
            for name, pool in ordered.items()
        }

    def draw(self, pool: str, number: float) -> str | None:
        """What `number` in [0, 1) picks from a pool, each as often as the corpus has it; None from an empty one."""
        found = self._cumulative.get(pool)
        if found is None:
            return None
        return found[0][bisect.bisect_right(found[1], number * found[1][-1])]

    def log_share(self, word: str) -> float:
        """Logarithm of a word's share of all words."""
        return math.log((self.words[word] + 0.5) / self.total)

    def log_share_of_pool(self, pool: str) -> float:
        """The same of a pool's members together."""
        return math.log(self._cumulative[pool][1][-1] / self.total)

    def lift(self, old: Sequence[str], new: Sequence[str]) -> float:
        """The logarithm of p(new) / p(old), apart from how frequent each word is by itself.

        `old` counts as a member of the corpus, and its own sightings are left out, so that it is no likelier for
        having been seen.
        """
        before, after = set(_neighbours(old)), set(_neighbours(new))
        return sum(self._lift(three, 0) for three in after - before) - sum(self._lift(t, 1) for t in before - after)

    def _lift(self, three: Three, own: int) -> float:
        """Logarithm of p(third | first, second) / p(third), each count smoothed by what fewer words say."""
        key = (three, own)
        found = self._lifts.get(key)
        if found is None:
            first, second, third = three
            alone = (self.words[third] + 0.5) / self.total
            pair = max(0, self.pairs[second, third] - own)
            by_one = (pair / alone + _SMOOTHING) / (max(pair, self.words[second] - own) + _SMOOTHING)
            triple = max(0, self.threes[three] - own)
            context = max(triple, self.pairs[first, second] - own)
            found = math.log((triple / alone + _SMOOTHING * by_one) / (context + _SMOOTHING))
            if len(self._lifts) < _MAX_LIFTS:
                self._lifts[key] = found
        return found

    def save(self, file: Path) -> None:
        """Write JSON, the same bytes for the same corpus."""
        body = {
            "format": FORMAT,
            "lexicon": self.lexicon.version,
            "tags": self.tags,
            "words": self.words,
            "pairs": {" ".join(pair): count for pair, count in self.pairs.items()},
            "threes": {" ".join(three): count for three, count in self.threes.items()},
            "pools": self.pools,
        }
        file.write_text(json.dumps(body, sort_keys=True, ensure_ascii=False, indent=0) + "\n")


def load_pools(file: Path) -> Pools:
    """Pools that `save` wrote.

    Raises:
        DataError: too large, no such file as `save` writes, or mined with another version of the lexicon.
    """
    if (size := file.stat().st_size) > _MAX_FILE:
        raise DataError(f"{file} has {size} bytes, over the limit of {_MAX_FILE}: it is no file of pools")
    try:
        body = json.loads(file.read_text())
        found, lexicon = (body["format"], body["lexicon"]), load_lexicon()
        if found != (FORMAT, lexicon.version):
            expected = f"format {FORMAT}, lexicon {lexicon.version}"
            raise DataError(f"{file}: expected {expected}, found format {found[0]}, lexicon {found[1]}: mine it again")
        pairs = Counter({_split(key, 2): count for key, count in _counts(body["pairs"]).items()})
        threes = Counter({_split(key, 3): count for key, count in _counts(body["threes"]).items()})
        pools = {str(name): _counts(pool) for name, pool in body["pools"].items()}
        tags = {str(word): str(tag) for word, tag in body["tags"].items()}
        return Pools(lexicon, tags, _counts(body["words"]), pairs, threes, pools)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is no file of pools: {error!r}") from error


def mine_pools(captions: Iterable[str], tagger: Tagger | None = None) -> Pools:
    """Pools of a corpus, the same for the same captions in any order.

    Args:
        captions: read once and held as words.
        tagger: of words that the lexicon does not have; TextBlob's unless told. A word gets the tag it has most often.

    Raises:
        MissingExtra: no tagger is given and textblob is absent.
    """
    lexicon = load_lexicon()
    texts = list(captions)
    tags = _mine_tags(texts, lexicon, tagger)
    parser, words, pairs, threes = Parser(lexicon, tags), Counter[str](), Counter[Pair](), Counter[Three]()
    pools: dict[str, Counter[str]] = {}
    for caption in map(parser, texts):
        words.update((*caption.words, ""))
        rows = list(_neighbours(caption.words))
        threes.update(rows)
        pairs.update([("", ""), *((second, third) for _, second, third in rows)])
        for pool, member in _members(caption, lexicon):
            pools.setdefault(pool, Counter())[member] += 1
    kept = {name: _most(pool, _MAX_POOL) for name, pool in sorted(pools.items())}
    return Pools(lexicon, tags, _most(words, _MAX_WORDS), _most(pairs, _MAX_PAIRS), _most(threes, _MAX_THREES), kept)


def thing_pool(caption: Caption, thing: Thing, lexicon: Lexicon) -> str | None:
    """Where a thing's nouns are drawn from; None for one that is never replaced.

    Things of the lexicon are exchanged within their kind; others with those of their number and determiner, so that
    what cannot be counted gets no "a".
    """
    noun, nouns = caption.words[thing.end - 1], caption.words[thing.head : thing.end]
    measures = caption.words[thing.end :][:1] == ("of",)
    if measures or not lexicon.unswappable.isdisjoint(nouns) or goes_on(caption, thing):
        return None
    number = caption.tags[thing.end - 1]
    if noun in lexicon.nouns:
        return f"{lexicon.nouns[noun].kind} {number}"
    if not noun.isalpha() or len(noun) < _SHORTEST:
        return None
    if caption.tags[thing.start] not in ("DT", "PRP$", "CD"):
        return None  # without a determiner taggers are wrong too often
    frame = f"{'a' if caption.words[thing.start] in _SINGLE else 'the'} {number}"
    return frame if frame in OPEN_POOLS else None


def goes_on(caption: Caption, thing: Thing) -> bool:
    """Whether a thing's nouns are only a part of a longer name."""
    after = (*caption.tags, "")[thing.end]
    return after in _GOES_ON and not (after in ("VB", "VBP") and caption.tags[thing.end - 1] == "NNS")


def time_pool(caption: Caption, relation: Relation) -> str:
    """Where a word of time is drawn from, by what follows: a sentence, a verb or a thing."""
    rest = itertools.takewhile(lambda tag: tag not in (",", "."), caption.tags[relation.end :])
    tags = [tag for tag in rest if tag != "RB"]
    frame = "doing" if tags[:1] == ["VBG"] else "sentence" if any(tag[:2] == "VB" for tag in tags) else "thing"
    return f"{relation.entry.kind} {frame}"


def _members(caption: Caption, lexicon: Lexicon) -> Iterable[tuple[str, str]]:
    for thing in caption.things:
        if pool := thing_pool(caption, thing, lexicon):
            yield pool, " ".join(caption.words[thing.head : thing.end])
    for word, tag in zip(caption.words, caption.tags, strict=True):
        if word in lexicon.attributes and tag == lexicon.attributes[word].form:
            yield lexicon.attributes[word].kind, word
        elif word in lexicon.verbs and tag[:2] == "VB":
            yield f"{lexicon.verbs[word].kind} {lexicon.verbs[word].form}", word
    for relation in caption.relations:
        timed = relation.phrase in lexicon.times
        yield time_pool(caption, relation) if timed else relation.entry.kind, relation.phrase


def _mine_tags(texts: Sequence[str], lexicon: Lexicon, tagger: Tagger | None) -> dict[str, str]:
    seen: dict[str, Counter[str]] = {}
    read = Parser(lexicon, {})
    for text in texts:
        caption = read(text)
        if UNKNOWN not in caption.tags:
            continue
        tagger = tagger or textblob_tagger()
        written = [caption.slice(place, place + 1) for place in range(len(caption.words))]
        for word, known, tag in zip(caption.words, caption.tags, tagger(written), strict=True):
            if known == UNKNOWN:
                seen.setdefault(word, Counter())[tag] += 1
    return {word: min(tags, key=lambda tag, tags=tags: (-tags[tag], tag)) for word, tags in sorted(seen.items())}


def _most(counts: Counter[Any], size: int) -> Counter[Any]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Counter(dict(sorted(ranked[:size])))


def _neighbours(words: Sequence[str]) -> Iterable[Three]:
    """Three in a row, without articles, whose neighbours say more of each other than of them."""
    kept = [word for word in words if word not in ARTICLES]
    return zip(("", "", *kept), ("", *kept), (*kept, ""), strict=False)


def _counts(found: dict[str, Any]) -> Counter[str]:
    return Counter({str(word): int(count) for word, count in found.items()})


def _split(key: str, size: int) -> Any:
    parts = tuple(key.split(" "))
    if len(parts) != size:
        raise ValueError(f"{key!r} is not {size} words")
    return parts
