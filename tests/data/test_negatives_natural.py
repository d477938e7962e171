"""Negatives of 223 natural captions, each read by hand: is it English, and is it wrong where its caption is right?

`negative_captions.jsonl` holds captions, negatives and verdicts. A negative that is no longer made, or has no verdict,
fails here by name: whoever changes a rule reads what it says now.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from mmcl_data.negatives import DEFAULT, NegativesConfig, mine_pools, negatives_of

pytest.importorskip("textblob")
ROWS = [json.loads(line) for line in Path(__file__).with_name("negative_captions.jsonl").read_text().splitlines()]
CAPTIONS = [row["caption"] for row in ROWS]
CONFIG = NegativesConfig(per_caption=2, rounds=2)


@pytest.fixture(scope="module")
def pools():
    return mine_pools(CAPTIONS)


def test_every_negative_has_a_verdict_and_no_verdict_is_stale(pools):
    for number, row in enumerate(ROWS):
        made = [tuple(negative) for negative in negatives_of(row["caption"], pools, CONFIG, number)]
        judged = [(negative["text"], negative["operator"]) for negative in row["negatives"]]
        assert made == judged, f"line {number + 1}: read what is new and write it down"


def test_captions_are_many_half_of_pictures_and_half_of_sounds():
    of = Counter(row["of"] for row in ROWS)
    assert len(set(CAPTIONS)) == len(ROWS) >= 200
    assert min(of["picture"], of["sound"]) >= 100


@pytest.mark.parametrize("operator", [*DEFAULT, None])
def test_at_least_95_of_100_are_grammatical_and_false(operator):
    judged = [n for row in ROWS for n in row["negatives"] if operator in (None, n["operator"])]
    good = [n for n in judged if n["grammatical"] and n["false_of_picture"]]
    assert len(judged) >= (300 if operator is None else 10)
    assert len(good) >= 0.95 * len(judged)


def test_most_captions_have_a_negative():
    assert sum(bool(row["negatives"]) for row in ROWS) > 0.8 * len(ROWS)
