"""Which decisions count as right, on matrices small enough to check by hand."""

import math

import pytest
import torch

from mmcl_evals import accuracy_hits, pair_hits, recall_chance, recall_hits, score, wilson
from mmcl_evals.metrics import cosines, paired_cosines

SCORES = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.1], [0.2, 0.8, 0.3]])


def test_a_true_class_must_be_strictly_above_all_others():
    assert accuracy_hits(SCORES, torch.tensor([0, 1, 2])).tolist() == [True, False, False]
    assert accuracy_hits(SCORES, torch.tensor([0, 0, 1])).tolist() == [True, False, True]


def test_recall_on_four_queries_of_eight_items():
    scores = torch.tensor(
        [
            [8, 7, 6, 5, 4, 3, 2, 1],
            [8, 7, 6, 5, 4, 3, 2, 1],
            [8, 7, 7, 5, 4, 3, 2, 1],  # the relevant 7 ties with an irrelevant one, so it is third
            [1, 1, 1, 1, 1, 1, 1, 1],
        ]
    ).float()
    relevant = torch.zeros(4, 8, dtype=torch.bool)
    relevant[0, 0] = relevant[1, 2] = relevant[1, 7] = relevant[2, 1] = relevant[3, 4] = True
    hits = {k: recall_hits(k, scores, relevant).tolist() for k in (1, 2, 3, 7, 8)}
    assert hits == {
        1: [True, False, False, False],
        2: [True, False, False, False],
        3: [True, True, True, False],
        7: [True, True, True, False],
        8: [True, True, True, True],
    }


def test_relevant_items_do_not_stand_in_each_others_way():
    assert recall_hits(1, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)).tolist() == [True]


def test_a_query_without_a_relevant_item_is_a_miss():
    assert recall_hits(3, SCORES, torch.zeros(3, 3, dtype=torch.bool)).tolist() == [False, False, False]


def test_a_wrong_caption_that_scores_the_same_wins():
    assert pair_hits(torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.2])).tolist() == [True, False, False]


def test_nan_is_a_miss_on_either_side():
    nan = math.nan
    scores = torch.tensor([[nan, 0.0], [0.5, nan], [nan, nan], [0.5, 0.0]])
    assert accuracy_hits(scores, torch.zeros(4, dtype=torch.long)).tolist() == [False, False, False, True]
    relevant = torch.tensor([[True, False]]).expand(4, 2)
    assert recall_hits(2, scores, relevant).tolist() == [False, True, False, True]
    assert pair_hits(scores[:, 0], scores[:, 1]).tolist() == [False, False, False, True]


@pytest.mark.parametrize("width", [3, 127, 768])
def test_equal_vectors_score_equal_wherever_they_stand(width):
    x = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(width)), dim=0)
    scores = cosines(x.expand(37, width), x.expand(1001, width))
    assert len(scores.unique()) == 1
    assert not accuracy_hits(scores, torch.arange(37)).any()
    assert not pair_hits(paired_cosines(x.expand(5, -1), x.expand(5, -1)), scores[:5, 0]).any()


def test_wilson_equals_published_and_hand_computed_values():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 0 of 20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_chance_of_recall_equals_counting_all_orders():
    # 4 items, 2 relevant, 2 drawn: of 6 draws 1 has none
    assert recall_chance(2, torch.tensor([2]), 4) == pytest.approx(5 / 6)
    assert recall_chance(1, torch.tensor([1, 3]), 10) == pytest.approx((0.1 + 0.3) / 2)
    assert recall_chance(3, torch.tensor([8]), 10) == 1.0
    expected = 1 - math.comb(993, 10) / math.comb(1000, 10)
    assert recall_chance(10, torch.tensor([7]), 1000) == pytest.approx(expected, rel=1e-12)


def test_a_score_of_nothing_is_undefined_and_its_interval_is_everything():
    empty = score(torch.zeros(0, dtype=torch.bool), 0.5)
    assert math.isnan(empty.value) and (empty.n, empty.low, empty.high) == (0, 0.0, 1.0)
    some = score(torch.tensor([True, False, True, True]), 0.5)
    assert (some.value, some.n, some.chance) == (0.75, 4, 0.5) and some.low < 0.75 < some.high
