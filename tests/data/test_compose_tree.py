"""Trees of sounds: what says the same is equal, what is a part is true, and what was corrupted is never true."""

from collections import Counter

import pytest
from compose_cases import ANY_TREES, EVENTS, TREES, shape
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.errors import ConfigError
from mmcl_data.compose.tree import (
    MAX_EVENTS,
    OPERATORS,
    Event,
    Mix,
    Seq,
    Tree,
    arrange,
    as_json,
    attribute_swaps,
    canonical,
    corrupt,
    entails,
    events_of,
    flat,
    is_sayable,
    subtrees,
)

A, B, C, D = (Event(name) for name in "abcd")
LOUD, QUIET = (("loudness", "loud"),), (("loudness", "quiet"),)
INVERSE = {"order_swap": "order_swap", "seq_to_mix": "mix_to_seq", "mix_to_seq": "seq_to_mix", "att_swap": "att_swap"}


def by_operator(tree: Tree) -> dict[str, set[Tree]]:
    found: dict[str, set[Tree]] = {}
    for operator, wrong in corrupt(tree):
        found.setdefault(operator, set()).add(canonical(wrong))
    return found


def all_trees(*events: Event) -> dict[Tree, int]:
    """Every sayable tree of the events, and the number of its corruptions."""
    found: dict[Tree, int] = {}
    left: list[Tree] = [Seq(events)]
    while left:
        tree = left.pop()
        if canonical(tree) not in found:
            wrong = [step.tree for step in corrupt(tree)]
            found[canonical(tree)] = len(wrong)
            left += wrong
    return found


@pytest.mark.parametrize(
    ("tree", "same"),
    [
        (Seq((A, Seq((B, C)))), Seq((A, B, C))),
        (Mix((C, Mix((B, A)))), Mix((A, B, C))),
        (Seq((Mix((B,)),)), B),
        (Seq((Mix((C, B)), A)), Seq((Mix((B, C)), A))),
        (Mix((C, Seq((B, A)))), Mix((C, Seq((B, A))))),
        (Event("bell", LOUD, "some.tar#7"), Event("loud bell")),
        (Event("bell", (("loudness", "loud"), ("pitch", "deep"))), Event("loud deep bell")),
        (Event("an owl"), Event("an owl")),
        (Event("an owl", LOUD), Event("a loud owl")),
        (Event("a dog", (("pitch", "odd"),)), Event("an odd dog")),
        (Event("the sea", QUIET), Event("the quiet sea")),
        (Event("a", LOUD), Event("loud a")),
    ],
)
def test_what_says_the_same_has_one_form(tree, same):
    assert canonical(tree) == same


def test_order_matters_in_a_sequence_and_not_in_an_overlay():
    assert canonical(Seq((A, B))) != canonical(Seq((B, A)))
    assert canonical(Mix((A, B))) == canonical(Mix((B, A)))


@given(ANY_TREES)
def test_two_trees_say_the_same_where_each_entails_the_other(tree):
    assert canonical(canonical(tree)) == canonical(flat(tree)) == canonical(tree)
    assert entails(tree, canonical(tree))
    assert entails(canonical(tree), tree)


@given(TREES, TREES)
def test_trees_that_entail_each_other_are_equal(one, other):
    assert (canonical(one) == canonical(other)) == (entails(one, other) and entails(other, one))


@pytest.mark.parametrize(
    ("tree", "sayable"),
    [
        (A, True),
        (Seq((Mix((A, B)), Mix((C, D)))), True),
        (Mix((A, B, C, D)), True),
        (Mix((Seq((A, B)), C, D)), True),
        (Mix((Seq((A, B)), Seq((C, D)))), False),
        (Mix((Seq((A, B, C)), D)), False),
        (Seq((A, Mix((B, Seq((C, D)))))), False),
        (Seq((A, B, C, D, Event("e"))), False),
    ],
)
def test_what_cannot_be_said_plainly_is_told_and_not_corrupted(tree, sayable):
    assert is_sayable(tree) is sayable
    if not sayable:
        with pytest.raises(ConfigError, match="has no captions"):
            corrupt(tree)


def test_parts_of_every_size_are_true():
    parts = {canonical(part) for part in subtrees(Seq((A, Mix((B, C)), D)))}
    assert parts == {Seq((A, Mix((B, C)))), Seq((Mix((B, C)), D)), Mix((B, C)), A, B, C, D}
    assert {canonical(part) for part in subtrees(Mix((Seq((A, B)), C)))} == {Seq((A, B)), A, B, C}
    assert subtrees(A) == []


@given(TREES)
def test_a_part_is_entailed_sayable_and_smaller(tree):
    parts = [canonical(part) for part in subtrees(tree)]
    assert len(parts) == len(set(parts))
    for part in parts:
        assert entails(tree, part)
        assert is_sayable(part)
        assert len(events_of(part)) < len(events_of(tree))


def test_each_operator_does_what_its_name_says():
    assert by_operator(Seq((A, B))) == {"order_swap": {Seq((B, A))}, "seq_to_mix": {Mix((A, B))}}
    assert by_operator(Mix((A, B))) == {"mix_to_seq": {Seq((A, B)), Seq((B, A))}}
    assert by_operator(Seq((A, Mix((B, C))))) == {
        "order_swap": {Seq((Mix((B, C)), A))},
        "seq_to_mix": {Mix((A, B, C))},
        "mix_to_seq": {Seq((A, B, C)), Seq((A, C, B))},
    }
    loud, quiet = Event("a", LOUD), Event("b", QUIET)
    swapped = {canonical(Mix((Event("a", QUIET), Event("b", LOUD))))}
    assert by_operator(Mix((loud, quiet)))["att_swap"] == swapped
    assert corrupt(A) == []


def test_three_events_in_turn_are_also_reversed_as_a_whole():
    assert Seq((C, B, A)) in by_operator(Seq((A, B, C)))["order_swap"]


@given(TREES, st.integers(0, 2**64 - 1))
def test_what_was_corrupted_is_neither_true_nor_a_part_nor_said_twice(tree, seed):
    wrong = corrupt(tree, seed)
    forms = [canonical(step.tree) for step in wrong]
    assert len(forms) == len(set(forms))
    true = {canonical(part) for part in [tree, *subtrees(tree)]}
    for (operator, found), form in zip(wrong, forms, strict=True):
        assert operator in OPERATORS
        assert form not in true
        assert not entails(tree, found)
        assert is_sayable(found)
        assert sorted(event.label for event in events_of(found)) == sorted(event.label for event in events_of(tree))


@given(EVENTS, EVENTS)
def test_equal_events_cannot_be_exchanged_for_the_same(one, other):
    for operator, wrong in corrupt(Seq((one, other))):
        assert canonical(wrong) != canonical(Seq((one, other))), operator
    assert "order_swap" not in by_operator(Seq((one, one)))
    assert attribute_swaps([Event("a", LOUD), Event("a", QUIET)]) == []


def test_an_attribute_goes_to_another_event_alone():
    one = Event("a", (("loudness", "loud"), ("pitch", "deep")), "1")
    other = Event("b", (("loudness", "loud"), ("pitch", "high")), "2")
    (swapped,) = attribute_swaps([one, other])
    assert swapped == [
        Event("a", (("loudness", "loud"), ("pitch", "high")), "1"),
        Event("b", (("loudness", "loud"), ("pitch", "deep")), "2"),
    ]


@given(TREES)
def test_an_order_of_corruptions_follows_from_the_seed(tree):
    assert corrupt(tree, 1) == corrupt(tree, 1)
    assert set(corrupt(tree, 1)) == set(corrupt(tree, 2))


def test_seeds_give_different_orders():
    assert len({tuple(corrupt(Seq((A, B, C)), seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize("count", range(2, MAX_EVENTS + 1))
def test_a_corruption_of_a_corruption_can_be_the_tree_again(count):
    for tree in all_trees(*(A, B, C, D)[:count]):
        for operator, wrong in corrupt(tree):
            assert tree in by_operator(wrong)[INVERSE[operator]]


@pytest.mark.parametrize(
    "events", [(A, B), (A, B, C), (Event("a", LOUD), Event("b", QUIET), Event("c", QUIET)), (A, B, C, D)]
)
def test_a_tree_is_as_likely_as_it_has_corruptions_so_that_pairs_look_alike_from_both_sides(events):
    expected = all_trees(*events)
    if attribute_swaps(events):  # these lead to other events; arrangements alone are drawn
        own = Counter(event.phrase for event in events)
        expected = {t: n for t, n in expected.items() if Counter(event.phrase for event in events_of(t)) == own}
    total = sum(expected.values())
    drawn = Counter(canonical(arrange(events, (number + 0.5) / total)) for number in range(total))
    assert drawn == expected


@settings(max_examples=30)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, MAX_EVENTS))
def test_an_arrangement_has_every_event_once(draw, count):
    events = [Event(name, LOUD, f"clip {name}") for name in "abcd"[:count]]
    tree = arrange(events, draw)
    assert Counter(events_of(tree)) == Counter(events)
    assert is_sayable(tree), shape(tree)


def test_a_tree_as_json_names_its_clips():
    assert as_json(Seq((Event("a", LOUD, "x.tar#1"), Mix((B, C))))) == {
        "seq": [
            {"event": "a", "attributes": {"loudness": "loud"}, "clip": "x.tar#1"},
            {
                "mix": [
                    {"event": "b", "attributes": {}, "clip": ""},
                    {"event": "c", "attributes": {}, "clip": ""},
                ]
            },
        ]
    }
