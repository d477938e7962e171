"""Captions of trees: each is read back as the tree it says, so that no caption has two meanings."""

import re
from collections import Counter

import pytest
from compose_cases import LABELS, TREES, shape
from hypothesis import given
from hypothesis import strategies as st

from mmcl.errors import DataError
from mmcl_data.compose.captions import RESERVED, plain_label, read_caption, render_caption
from mmcl_data.compose.tree import Event, Mix, Seq, arrange, canonical, corrupt, entails, subtrees
from mmcl_data.order import mix, uniform

A, B, C, D = (Event(name) for name in ("dog bark", "church bells", "rain", "an owl"))
SEEDS = st.integers(0, 2**64 - 1)


def phrasings(tree) -> set[str]:
    return {render_caption(tree, mix(seed)) for seed in range(400)}


@given(TREES, SEEDS)
def test_a_caption_is_read_back_as_what_it_was_said_of(tree, seed):
    assert read_caption(render_caption(tree, seed)) == canonical(tree)


@given(TREES, TREES, SEEDS, SEEDS)
def test_trees_that_say_different_things_have_no_caption_in_common(one, other, seed, second):
    if render_caption(one, seed) == render_caption(other, second):
        assert canonical(one) == canonical(other)


@given(TREES, SEEDS)
def test_no_negative_is_a_caption_of_its_sound_or_of_a_part_of_it(tree, seed):
    true = {canonical(part) for part in [tree, *subtrees(tree)]}
    for _, wrong in corrupt(tree, seed):
        said = read_caption(render_caption(wrong, seed))
        assert said not in true
        assert not entails(tree, said)


def test_two_events_in_sequence_are_said_in_eight_ways():
    assert phrasings(Seq((A, B))) == {
        "dog bark, then church bells",
        "dog bark, followed by church bells",
        "dog bark, and after that church bells",
        "dog bark before church bells",
        "church bells, preceded by dog bark",
        "church bells, and before that dog bark",
        "church bells, but before that dog bark",
        "church bells after dog bark",
    }


def test_two_events_at_once_are_said_in_eight_ways():
    ways = ("{} together with {}", "{} along with {}", "{} and {} at the same time", "{} at the same time as {}")
    pairs = (("dog bark", "rain"), ("rain", "dog bark"))
    assert phrasings(Mix((A, C))) == {way.format(*pair) for way in ways for pair in pairs}


@pytest.mark.parametrize(
    ("tree", "caption"),
    [
        (C, "the sound of rain"),
        (Seq((A, B, C)), "rain after church bells after dog bark"),
        (Seq((Mix((A, B)), C)), "rain, preceded by dog bark along with church bells"),
        (Seq((A, Mix((B, C)), D)), "dog bark, then rain and church bells at the same time, then an owl"),
        (Mix((A, B, C, D)), "an owl together with rain, dog bark and church bells"),
        (Mix((Seq((A, B)), C, D)), "rain and an owl throughout, with church bells, but before that dog bark"),
        (Mix((Seq((A, B)), C)), "dog bark before church bells, with rain throughout"),
    ],
)
def test_nested_sounds_are_said_without_brackets(tree, caption):
    assert caption in phrasings(tree)


@pytest.mark.parametrize("tree", [Seq((A, B)), Seq((A, B, C)), Seq((Mix((A, B)), C)), Mix((Seq((A, B)), C))])
def test_a_sequence_is_told_forwards_and_backwards_equally_often(tree):
    said = [render_caption(tree, mix(seed)) for seed in range(2000)]
    backwards = sum(bool(re.search(r"preceded by|before that| after (?!that)", caption)) for caption in said)
    assert 900 < backwards < 1100


def test_text_alone_does_not_tell_negatives_from_captions():
    """Bayes' rule over all shapes and connectives, learned from one half of the pairs and tried on the other."""
    counts = {True: Counter[str](), False: Counter[str]()}
    right = total = 0
    for number in range(6000):
        first, seed = uniform(mix(7, number), 2)
        tree = arrange((A, B, C, D)[: 2 + int(seed * 3)], first)
        wrong = corrupt(tree, mix(8, number))[0].tree
        pair = {
            fits: f"{shape(canonical(said))} {_masked(render_caption(said, mix(9 + fits, number)))}"
            for fits, said in ((True, tree), (False, wrong))
        }
        for fits, text in pair.items():
            if number < 3000:
                counts[fits][text] += 1
            elif counts[True][text] != counts[False][text]:
                right += fits == (counts[True][text] > counts[False][text])
                total += 1
    assert total > 2000
    assert abs(right / total - 0.5) < 0.03


def _masked(caption: str) -> str:
    return re.sub("|".join(sorted(LABELS, key=len, reverse=True)), "_", caption)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("dog", "dog"),
        ("church_bells", "church bells"),
        ("A beaver.", "a beaver"),
        ("The sound of rain", "rain"),
        ("a recording of an owl.", "an owl"),
        ("The sound of the sound of rain", "rain"),
        ("(the sound of rain)", "rain"),
        ("Chirp, tweet", "chirp (tweet)"),
        ("Howl (wind)", "howl (wind)"),
        ("Rodents, rats, mice", "rodents (rats; mice)"),
        ("Fire engine, fire truck (siren)", "fire engine (fire truck; siren)"),
        ("Boat_and_Water_vehicle", "boat & water vehicle"),
        ("  many \n spaces ", "many spaces"),
    ],
)
def test_a_label_becomes_a_noun_phrase_without_what_joins(text, label):
    assert plain_label(text) == label
    assert plain_label(label) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no label"),
        (" . ", "no label"),
        ("Happy!", "no label"),
        ("“No U-Turn”", "no label"),
        ("one two three four five six seven eight nine", "no label"),
        ("thunder before rain", "before"),
        ("a dog together with a cat", "together"),
        ("morning after", "after"),
    ],
)
def test_what_cannot_be_a_label_is_refused(text, why):
    with pytest.raises(DataError, match=why):
        plain_label(text)


@given(st.text(max_size=40), st.text(max_size=40), SEEDS)
def test_any_two_labels_that_are_taken_give_captions_that_are_read_back(one, other, seed):
    try:
        labels = [plain_label(one), plain_label(other)]
    except DataError:
        return
    for tree in (Seq((Event(labels[0]), Event(labels[1]))), Mix((Event(labels[0]), Event(labels[1])))):
        assert read_caption(render_caption(tree, seed)) == canonical(tree)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a, b",
        "a then b",
        "a, then b, preceded by c",
        "a, then b before c",
        "a throughout, with b",
        "a together with b together with c",
        "a, then b, then c, then d, then e",
    ],
)
def test_a_text_that_the_grammar_does_not_give_is_not_read(text):
    with pytest.raises(DataError, match="no caption of the grammar"):
        read_caption(text)


def test_every_connective_is_reserved():
    said = " ".join(
        _masked(caption) for tree in (Seq((A, B)), Mix((A, B)), Mix((Seq((A, B)), C))) for caption in phrasings(tree)
    )
    helpers = {"by", "that", "but", "with", "at", "the", "time", "as", "_"}
    assert set(re.findall(r"\w+", said)) - helpers == RESERVED
