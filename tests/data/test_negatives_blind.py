"""Who has only read captions and negatives, and seen and heard nothing, cannot tell a new caption from its negative.

"Separates" means: of a held-out pair, the negative has the higher score, under a linear reader that was trained on
pairs (see `blind_accuracy`). Its power is shown on negatives that are known to give themselves away.
"""

import json
from pathlib import Path

import pytest
from negative_cases import blind_accuracy, made_captions, split, world_captions

from mmcl_data.negatives import DEFAULT, OPERATORS, NegativesConfig, mine_pools, negatives_of
from mmcl_data.negatives.operators import Draws
from mmcl_data.negatives.parsing import WORD

LIMIT = 0.60
FEWEST = 100
"""Pairs of a rule; fewer say nothing."""
NATURAL = Path(__file__).with_name("negative_captions.jsonl")


def unknown(words):
    return ["X"] * len(words)


def negatives(captions, pools, operators, epochs=1, rounds=1):
    config = NegativesConfig(operators=dict.fromkeys(operators, 1.0), rounds=rounds)
    return [
        (caption, negative.text)
        for epoch in range(epochs)
        for number, caption in enumerate(captions)
        for negative in negatives_of(caption, pools, config, number * 1000 + epoch)
    ]


@pytest.fixture(scope="module", params=["world", "made"])
def corpus(request):
    captions = [c for _, c in world_captions(4000, 3)[1]] if request.param == "world" else made_captions(3000)
    return request.param, captions, mine_pools(captions, unknown)


ABSENT = {
    "world": {"add_obj", "add_att", "swap_verb_phrases", "swap_plurals", "swap_adverbs"},
    "made": set(),
}
"""Rules that find too little to say of a corpus."""


@pytest.mark.parametrize("names", [*((name,) for name in OPERATORS), DEFAULT], ids="+".join)
def test_negatives_of_every_rule_cannot_be_told_from_captions(corpus, names):
    kind, captions, pools = corpus
    pairs = negatives(captions, pools, names)
    if len(pairs) < FEWEST:
        pairs = negatives(captions, pools, names, epochs=6)
    if len(pairs) < FEWEST:
        assert set(names) <= ABSENT[kind], f"{len(pairs)} pairs"
        return
    assert blind_accuracy(*split(pairs)) <= LIMIT


def test_neg_clip_as_it_was_released_is_found_out():
    captions = made_captions(1000)
    pairs = negatives(captions, mine_pools(captions, unknown), ["replace_obj"])
    joined = [(caption, " ".join(WORD.findall(negative)).lower()) for caption, negative in pairs]
    assert blind_accuracy(*split(joined)) >= 0.95


def test_swaps_that_ignore_what_captions_are_like_are_found_out():
    captions = made_captions(2000)
    pools = mine_pools(captions, unknown)
    made = [(c, OPERATORS["swap_obj"](pools.parser(c), Draws(number), pools)) for number, c in enumerate(captions)]
    assert blind_accuracy(*split([(caption, proposal.text) for caption, proposal in made if proposal])) >= 0.75


def test_order_that_no_caption_has_is_found_out():
    captions = [f"a {a} {b}" for a in ("red", "blue", "old") for b in ("cup", "box", "car", "dog", "cat", "man")] * 5
    pairs = [(caption, " ".join(reversed(caption.split()))) for caption in captions]
    assert blind_accuracy(*split(pairs)) >= 0.95


@pytest.fixture(scope="module")
def folds():
    """Held-out captions, the others, and pools of the others.

    A word that only held-out captions have must not be in the pools: the reader would know it from negatives alone.
    """
    pytest.importorskip("textblob")
    captions = [json.loads(line)["caption"] for line in NATURAL.read_text().splitlines()]
    parts = [(captions[f::4], [c for n, c in enumerate(captions) if n % 4 != f]) for f in range(4)]
    return [(held, learned, mine_pools(learned)) for held, learned in parts]


@pytest.mark.parametrize("names", [*((n,) for n in DEFAULT if n != "swap_att"), DEFAULT], ids="+".join)
def test_negatives_of_natural_captions_cannot_be_told_from_them(folds, names):  # swap_att has too few: 14 captions
    found = [
        blind_accuracy(negatives(learned, pools, names, 10), negatives(held, pools, names, 10))
        for held, learned, pools in folds
    ]
    assert sum(found) / len(found) <= LIMIT
