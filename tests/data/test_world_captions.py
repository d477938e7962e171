"""Captions are true, foils are false, and both are checked by a reader that does not know the grammar's tables."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl_data.build.world import Scene, Sound, WorldConfig, choose, foils, say, true_captions
from mmcl_data.build.world.config import SHAPES, TIMBRES
from mmcl_data.build.world.pairs import make_world, pick
from mmcl_data.build.world.scenes import LAYOUTS, sample_scene
from mmcl_data.build.world.sounds import sample_order, sample_sound

CONFIG = WorldConfig(num_shapes=10, num_colours=10, num_timbres=10, max_objects=3)
FIXED = WorldConfig(mention_order="fixed", max_objects=3)
THING = re.compile(rf"\b(?:an?|one) ((?:\w+ )*?\w+ (?:{'|'.join((*SHAPES, *TIMBRES))}))\b")
SIDE = "left of|right of|to the left of|to the right of|above|below"
TIME = "then|before|followed by|but first|after|preceded by|and before that"
PATTERNS = {
    rf"0(?: is)? ({SIDE}) 1": [(0, 1, 1)],
    r"0 with 1 (?:on its )?(left|right|above|below)(?: it)?": [(1, 1, 0)],
    rf"0 ({SIDE}) 1, which is ({SIDE}) 2": [(0, 1, 1), (1, 2, 2)],
    r"0, 1 and 2 from (left|right|top|bottom) to (?:left|right|top|bottom)": [(0, 1, 1), (1, 1, 2)],
    rf"0 ({SIDE}) 1, both ({SIDE}) 2": [(0, 1, 1), (0, 2, 2), (1, 2, 2)],
    rf"0 with 1 ({SIDE}) 2 (above|below) it": [(1, 1, 2), (1, 2, 0), (2, 2, 0)],
    r"0 (while) 1 plays|0 (together) with 1|0 and 1 at the same (time)": [(0, 1, 1)],
    rf"0(?:,| is heard)? ({TIME}) 1": [(0, 1, 1)],
    rf"0,? ({TIME}) 1,(?: which is)? ({TIME}) 2": [(0, 1, 1), (1, 2, 2)],
}
"""Form -> (thing, group of the relation word, thing), things numbered by mention."""
FORWARD = {"left": "left", "above": "above", "top": "above", "then": "before", "before": "before"}
FORWARD |= {"followed by": "before"}
BACKWARD = {"right": "left", "below": "above", "bottom": "above", "after": "before", "preceded by": "before"}
BACKWARD |= {"but first": "before", "and before that": "before"}


def subjects(seed: int, config: WorldConfig = CONFIG) -> tuple[Scene, Sound]:
    rng = np.random.default_rng(seed)
    world = make_world(config, 0)
    count = int(rng.integers(1, 4))
    layout = LAYOUTS[count][rng.integers(len(LAYOUTS[count]))]
    scene = sample_scene(pick(world.everything["image_text"], count, rng), layout, config, rng)
    heard = pick(world.everything["audio_text"], count, rng)
    return scene, sample_sound(heard, sample_order(count, rng), config, rng)


def read(caption: str) -> frozenset:
    """What a caption says: (thing, left | above | before | while, thing), or the one thing there is."""
    things = [" ".join(phrase.split()[-2:]) for phrase in THING.findall(caption)]
    numbers = iter(range(3))
    said = THING.sub(lambda _: str(next(numbers)), caption).removeprefix("there is ")
    if len(things) == 1:
        assert said in {"0", "a picture of 0", "the sound of 0", "0 is heard"}, caption
        return frozenset(things)
    ((found, triples),) = [(m, t) for pattern, t in PATTERNS.items() if (m := re.fullmatch(pattern, said))]
    facts = set()
    for i, group, j in triples:
        word = (found[group] or "while").removeprefix("to the ").removesuffix(" of")
        if word in FORWARD:
            facts.add((things[i], FORWARD[word], things[j]))
        elif word in BACKWARD:
            facts.add((things[j], BACKWARD[word], things[i]))
        else:
            facts.add((frozenset((things[i], things[j])), "while"))
    return frozenset(facts)


def truth(subject: Scene | Sound) -> frozenset:
    if isinstance(subject, Scene):
        names = [f"{o.colour} {o.shape}" for o in subject.objects]
        relations = [(i, r, j) if r != "below" else (j, "above", i) for i, r, j in subject.relations]
    else:
        names = [f"{e.pitch} {e.timbre}" for e in subject.events]
        relations = [(i, "before", i + 1) for i in range(len(names) - 1)]
        if subject.order == "overlap":
            return frozenset({(frozenset(names), "while")})
    return frozenset((names[i], r, names[j]) for i, r, j in relations) or frozenset(names)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_all_captions_of_a_subject_say_the_same_and_it_is_true(seed):
    for subject in subjects(seed):
        said = true_captions(subject, CONFIG)
        assert len(said) >= 6
        assert {read(caption) for caption in said} == {truth(subject)}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([CONFIG, FIXED]))
def test_a_foil_is_never_a_true_caption_and_says_something_false(seed, config):
    rng = np.random.default_rng(seed)
    for subject in subjects(seed, config):
        wording = choose(subject, config, rng)
        caption = say(subject, wording)
        true = true_captions(subject, config) | true_captions(subject, CONFIG)
        assert caption in true_captions(subject, config)
        for kind, foil in foils(subject, wording, rng).items():
            assert foil not in true, (kind, caption, foil)
            assert read(foil) != truth(subject), (kind, caption, foil)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_foil_differs_as_little_as_its_kind_allows(seed):
    rng = np.random.default_rng(seed)
    for subject in subjects(seed):
        wording = choose(subject, CONFIG, rng)
        caption = say(subject, wording)
        bag = lambda text: sorted(re.sub(r"\ban\b", "a", text).replace(",", "").split())  # noqa: E731
        for kind, foil in foils(subject, wording, rng).items():
            assert THING.sub("#", foil) == THING.sub("#", caption) or kind in ("relation", "order")
            assert (bag(foil) == bag(caption)) or kind in ("relation", "order")
            assert (THING.findall(foil) == THING.findall(caption)) == (kind in ("relation", "order"))


def test_every_relation_has_every_kind_of_foil_and_a_single_thing_has_none():
    kinds: dict[str, set[str]] = {}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        for subject in subjects(seed):
            name = subject.layout if isinstance(subject, Scene) else subject.order
            kinds.setdefault(name, set()).update(foils(subject, choose(subject, CONFIG, rng), rng))
    scene, sequence = {"attribute", "relation", "swap"}, {"attribute", "order", "swap"}
    pictures = dict.fromkeys(("row", "column", "pair_above", "pair_below"), scene)
    assert kinds == {"single": set(), "solo": set(), **pictures, "sequence": sequence, "overlap": {"attribute"}}


def test_free_order_names_either_part_first_and_fixed_order_always_the_first():
    first: dict[str, set[bool]] = {"free": set(), "fixed": set()}
    for seed in range(200):
        for config in (CONFIG, FIXED):
            rng = np.random.default_rng(seed)
            for subject in subjects(seed, config):
                item = subject.objects[0] if isinstance(subject, Scene) else subject.events[0]
                name = f"{item.colour} {item.shape}" if hasattr(item, "colour") else f"{item.pitch} {item.timbre}"
                named = THING.findall(say(subject, choose(subject, config, rng)))
                first[config.mention_order].add(named[0].endswith(name))
    assert first == {"free": {True, False}, "fixed": {True}}


def test_the_relation_word_carries_the_meaning_where_order_is_free():
    """Either word of each pair is about as frequent, whatever the scene."""
    words = {"left": 0, "right": 0}
    for seed in range(600):
        scene, _ = subjects(seed)
        if scene.layout == "row" and len(scene.objects) == 2:
            caption = say(scene, choose(scene, CONFIG, np.random.default_rng(seed)))
            words[re.search("left|right", caption)[0]] += 1  # type: ignore[index]
    assert sum(words.values()) > 80
    assert 0.3 < words["left"] / sum(words.values()) < 0.7


def test_details_are_sometimes_said_and_never_where_they_do_not_vary():
    plain = WorldConfig(sizes=False, textures=False)
    details = {"large", "small", "plain", "striped", "dotted"}
    said: set[str] = set()
    for seed in range(100):
        scene, _ = subjects(seed)
        said |= set(say(scene, choose(scene, CONFIG, np.random.default_rng(seed))).split())
        bare = subjects(seed, plain)[0]
        assert {(o.size, o.texture) for o in bare.objects} == {("large", "plain")}
        assert not details & set(" ".join(true_captions(bare, plain)).split())
    assert details <= said


@pytest.mark.parametrize("seed", range(30))
def test_captions_are_lower_case_with_the_right_article(seed):
    for subject in subjects(seed):
        for caption in true_captions(subject, CONFIG):
            assert caption == caption.lower() and "  " not in caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
