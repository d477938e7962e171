"""Sources share turns by their weights: exactly, at any time, however the turns are asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.errors import ConfigError
from mmcl_data.mixture import fixed_turns, interleaved, next_turns

SHARES = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8).map(lambda raw: [one / sum(raw) for one in raw])


@given(weights=SHARES, steps=st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_every_source_is_within_a_turn_of_its_share_and_never_goes_back(weights, steps):
    given_turns = [0] * len(weights)
    for count in steps:
        turns = next_turns(weights, given_turns, count)
        assert min(turns) >= 0 and sum(turns) == count
        given_turns = [had + more for had, more in zip(given_turns, turns, strict=True)]
        total = sum(given_turns)
        assert all(abs(had - total * weight) < 1 for had, weight in zip(given_turns, weights, strict=True))


@given(weights=SHARES, first=st.integers(0, 50), second=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_turns_are_the_same_asked_for_at_once_or_in_parts(weights, first, second):
    nothing = [0] * len(weights)
    part = next_turns(weights, nothing, first)
    rest = next_turns(weights, part, second)
    assert [a + b for a, b in zip(part, rest, strict=True)] == next_turns(weights, nothing, first + second)


@pytest.mark.parametrize("turns", [10**9, 10**12])
def test_a_run_may_be_as_long_as_it_likes(turns):
    weights = [0.5, 0.3, 0.15, 0.05]
    had = [round(turns * weight) for weight in weights]
    for _ in range(200):
        more = next_turns(weights, had, 7)
        assert min(more) >= 0 and sum(more) == 7
        had = [before + now for before, now in zip(had, more, strict=True)]
    assert all(abs(now - sum(had) * weight) < 1.01 for now, weight in zip(had, weights, strict=True))


@given(weights=SHARES, count=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_fixed_turns_are_near_to_the_weights_and_leave_nobody_out(weights, count):
    try:
        turns = fixed_turns(weights, count)
    except ConfigError as error:
        assert "cannot share" in str(error) and (len(weights) > count or min(weights) * count < 1)
        return
    assert sum(turns) == count and min(turns) >= 1
    assert all(had < weight * count + 1 or had == 1 for had, weight in zip(turns, weights, strict=True))


def test_turns_of_a_source_are_spread_over_a_step():
    order = [source for source, _ in interleaved([4, 2, 2]).tolist()]
    assert order == [0, 1, 2, 0, 0, 1, 2, 0]
    assert [number for source, number in interleaved([4, 2, 2]).tolist() if source == 0] == [0, 1, 2, 3]
    assert interleaved([]).shape == (0, 2)
