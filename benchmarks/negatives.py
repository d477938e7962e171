"""Captions a second from which `mmcl_data.negatives` makes negatives, beside NegCLIP's swaps with spaCy: one thread.

NegCLIP's generator is written after its authors' (methods and faults as published: tokens joined by spaces, phrases
replaced as strings; one caption after another), but with only those of spaCy's parts that it needs. In batches spaCy is
faster, which helps where no order of samples is to be kept. Without spaCy and its model ours runs alone. The floor is
finding the words of the captions, which nobody can leave out.
"""

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from measure import Result, alternate, parser, ratio, report, table

from mmcl_data.build.world import WorldConfig, choose, make_world, say
from mmcl_data.build.world.pairs import pick
from mmcl_data.build.world.scenes import LAYOUTS, sample_scene
from mmcl_data.build.world.sounds import sample_order, sample_sound
from mmcl_data.negatives import NegativesConfig, mine_pools, negatives_of
from mmcl_data.negatives.parsing import WORD, Tagger, textblob_tagger

OURS, THEIRS, BATCHES, FLOOR = "mmcl, 1 each", "NegCLIP with spaCy", "the same, in batches", "floor: words"
WHO = ("man", "woman", "boy", "girl", "dog", "horse", "cat", "surfer", "chef", "bird", "soccer player", "mechanic")
LIKE = ("young", "old", "small", "large", "brown", "black", "white", "happy", "tall", "quiet", "loud", "tired")
DOES = ("stands", "is sitting", "walks slowly", "jumps", "sleeps", "runs quickly", "barks", "sings", "is laughing")
WHERE = ("next to", "in front of", "behind", "left of", "under", "near", "on top of", "before", "while it passes")
WHAT = ("car", "bus", "table", "umbrella", "fire truck", "kite", "bench", "guitar", "wooden fence", "apple", "stream")
THEN = ("", " in the park", " and looks at the sky", ", then a bell rings", " while a phone rings", " on a sunny day")


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--captions", type=int, default=8000, help="half of the world, half in prose (default: 8000)"
    )
    arguments.add_argument("--spacy-model", default="en_core_web_sm", help="a package (default: en_core_web_sm)")
    args = arguments.parse_args()
    report(compare(args), args.json)


def compare(args: Any) -> dict[str, Result]:
    """Each contestant over all captions once a round; ours with new seeds each time."""
    captions = [*world_captions(args.captions // 2), *prose_captions(args.captions - args.captions // 2)]
    pools = mine_pools(captions, tagger())
    rounds, busy = iter(range(10**6)), []

    def ours(each: int) -> None:
        config, base, began = NegativesConfig(per_caption=each), next(rounds) << 32, time.process_time()
        for number, caption in enumerate(captions):
            negatives_of(caption, pools, config, base + number)
        if each == 1:
            busy.append(time.process_time() - began)

    def words() -> None:
        for caption in captions:
            WORD.findall(caption)

    contestants: dict[str, Callable[[], Any]] = {OURS: lambda: ours(1), "mmcl, 3 each": lambda: ours(3)}
    if importlib.util.find_spec("spacy") and importlib.util.find_spec(args.spacy_model):
        contestants[THEIRS] = lambda: list(neg_clip(captions, args.spacy_model))
        contestants[BATCHES] = lambda: list(neg_clip(captions, args.spacy_model, batch_size=256))
    else:
        print(f"spaCy or its model {args.spacy_model} is not installed: ours runs alone")
    seconds = alternate({**contestants, FLOOR: words}, args.rounds)
    print(f"{len(captions)} captions, the default rules, one thread")
    print(table(seconds, FLOOR, len(captions), "captions"))
    rate = len(captions) / statistics.median(busy[1:])  # by this process's own time: others may use the core too
    results = {"negatives_captions_per_core_second": Result(value=rate, target=10_000, better="higher")}
    if THEIRS in contestants:
        value = ratio(seconds, THEIRS, OURS)
        results["negatives_rate_over_neg_clip"] = Result(value=value, target=15, better="higher")
        print(f"over NegCLIP in batches: {ratio(seconds, BATCHES, OURS):.1f}")
    return results


def tagger() -> Tagger:
    """TextBlob's, or one that knows nothing where it is absent: the lexicon knows most of these words."""
    if importlib.util.find_spec("textblob"):
        return textblob_tagger()
    print("textblob is not installed: words outside of the lexicon are left alone")
    return lambda words: ["X"] * len(words)


def world_captions(count: int) -> list[str]:
    """Of scenes and sounds of up to three things, in turn."""
    import numpy as np

    config, rng, made = WorldConfig(max_objects=3), np.random.default_rng(0), []
    pairs = make_world(config, 0).train
    for number in range(count):
        size = 1 + number // 2 % 3
        if number % 2:
            heard = pick(pairs["audio_text"], size, rng)
            subject = sample_sound(heard, sample_order(size, rng), config, rng)
        else:
            layout = LAYOUTS[size][rng.integers(len(LAYOUTS[size]))]
            subject = sample_scene(pick(pairs["image_text"], size, rng), layout, config, rng)
        made.append(say(subject, choose(subject, config, rng)))
    return made


def prose_captions(count: int) -> list[str]:
    """Sentences of some twelve words from a grammar of their own."""
    draw = random.Random(0).choice
    return [
        f"A {draw(LIKE)} {draw(WHO)} {draw(DOES)} {draw(WHERE)} a {draw(LIKE)} {draw(WHAT)}{draw(THEN)}."
        for _ in range(count)
    ]


def neg_clip(captions: list[str], model: str, batch_size: int = 0) -> Iterator[list[str]]:
    """NegCLIP's negatives of each caption: two phrases, nouns, plurals, adverbs or adjectives swapped."""
    pipeline, matcher, random_numbers = load(model)
    for doc in pipeline.pipe(captions, batch_size=batch_size) if batch_size else map(pipeline, captions):
        chunks = [chunk.text for chunk in doc.noun_chunks if len(chunk.text.split()) > 2]
        made = [swap_strings(doc.text, chunks, random_numbers), swap_strings(doc.text, matcher(doc), random_numbers)]
        for tags in ({"NN"}, {"NNS"}, {"RB", "RBR", "RBS"}, {"JJ", "JJR", "JJS"}):
            places = [token.i for token in doc if token.tag_ in tags]
            if len(places) > 1:
                words = [token.text for token in doc]
                one, other = random_numbers.sample(places, 2)
                words[one], words[other] = words[other], words[one]
                made.append(" ".join(words))
        yield [text for text in made if text and bare(text) != bare(doc.text)]


def load(model: str) -> tuple[Any, Callable[[Any], list[str]], random.Random]:
    """The pipeline, what finds verb phrases, and random numbers; kept, so that loading is not timed."""
    if model not in _LOADED:
        import spacy  # pyright: ignore[reportMissingImports]
        from spacy.matcher import Matcher  # pyright: ignore[reportMissingImports]
        from spacy.util import filter_spans  # pyright: ignore[reportMissingImports]

        pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
        matcher = Matcher(pipeline.vocab)
        verbs = [("VERB", "?"), ("ADV", "*"), ("AUX", "*"), ("VERB", "+")]
        matcher.add("verb phrase", [[{"POS": pos, "OP": often} for pos, often in verbs]])
        _LOADED[model] = (pipeline, lambda doc: [s.text for s in filter_spans(matcher(doc, as_spans=True))])
    return (*_LOADED[model], random.Random(0))


_LOADED: dict[str, tuple[Any, Callable[[Any], list[str]]]] = {}


def swap_strings(text: str, phrases: list[str], random_numbers: random.Random) -> str | None:
    """Two phrases exchanged wherever they occur."""
    if len(phrases) < 2:
        return None
    one, other = random_numbers.sample(phrases, 2)
    return text.replace(one, "\0").replace(other, one).replace("\0", other).lower()


def bare(text: str) -> str:
    """Without full stops, commas and spaces more than one."""
    return " ".join(text.replace(".", "").replace(",", "").lower().split())


if __name__ == "__main__":
    main()
