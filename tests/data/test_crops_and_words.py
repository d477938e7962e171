"""Crops lie in their image, words are dropped as often as asked for, and a sample's seed decides."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.errors import ConfigError
from mmcl_data.augment import STOP_WORDS, Box, Crop, Words

CAPTION = "A red bird sits on the old fence near a river"
SEEDS = [number * 0x9E3779B97F4A7C15 % (1 << 64) for number in range(1, 2001)]


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    area=st.floats(1e-6, 1.0),
    log_ratio=st.floats(-3.0, 3.0),
    left=st.floats(0, 1),
    top=st.floats(0, 1),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_box_lies_in_its_image_and_is_never_empty(width, height, area, log_ratio, left, top):
    x, y, right, bottom = Box(area, log_ratio, left, top).pixels(width, height)
    assert 0 <= x < right <= width and 0 <= y < bottom <= height


@given(seed=st.integers(0, 2**64 - 1), width=st.integers(200, 4000), height=st.integers(200, 4000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_box_has_the_area_and_the_shape_that_were_asked_for_where_it_fits(seed, width, height):
    crop = Crop(scale=(0.1, 0.3))
    left, top, right, bottom = crop.box(seed).pixels(width, height)
    share, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert share < 0.31
    if 0.5 < width / height < 2:  # then every such box fits
        assert share > 0.09 and 0.74 < ratio < 1.36


def test_boxes_reach_every_corner_and_the_whole_range():
    boxes = [Crop(scale=(0.2, 0.8)).box(seed) for seed in SEEDS]
    assert min(box.area for box in boxes) < 0.21 and max(box.area for box in boxes) > 0.79
    places = [box.pixels(100, 100) for box in boxes]
    assert {0} <= {place[0] for place in places} and {100} <= {place[3] for place in places}


def test_a_scale_of_1_shows_the_whole_image():
    assert Crop().box(7) is None


def test_a_seed_decides_and_epochs_differ():
    crop = Crop(scale=(0.2, 1.0))
    assert crop.box(5) == crop.box(5) != crop.box(6)
    assert crop.place(5) == crop.place(5) != crop.place(6)
    assert Crop(sound=False).place(5) == 0.5
    assert all(0 <= crop.place(seed) < 1 for seed in SEEDS)


def test_words_stay_unless_something_is_asked_for():
    assert Words().changed(f"  {CAPTION}  ", 3) == f"  {CAPTION}  "


@pytest.mark.parametrize("chance", [0.2, 0.8])
def test_words_are_dropped_as_often_as_asked_for_and_stay_in_their_order(chance):
    words, total = CAPTION.split(), 0
    for seed in SEEDS:
        kept = Words(drop=chance).changed(CAPTION, seed).split()
        rest = iter(words)
        assert kept and all(word in rest for word in kept)
        total += len(kept)
    whole = chance ** len(words)  # where every word would go, all stay
    assert total / (len(SEEDS) * len(words)) == pytest.approx(1 - chance + whole, abs=0.02)


def test_only_stop_words_are_dropped_as_such():
    kept = Counter(word for seed in SEEDS for word in Words(stop_words=0.5).changed(CAPTION, seed).split())
    for word in set(CAPTION.split()):
        share = kept[word] / (len(SEEDS) * CAPTION.split().count(word))
        assert share == (pytest.approx(0.5, abs=0.04) if word.casefold() in STOP_WORDS else 1.0), word


def test_a_swap_moves_two_words_and_loses_none():
    words, swapped = CAPTION.split(), 0
    for seed in SEEDS:
        found = Words(swap=0.4).changed(CAPTION, seed).split()
        assert Counter(found) == Counter(words)
        moved = sum(a != b for a, b in zip(found, words, strict=True))
        assert moved in (0, 2)
        swapped += moved == 2
    assert abs(swapped / len(SEEDS) - 0.4) < 0.04


@pytest.mark.parametrize("caption", ["the", "of the", "x"])
def test_a_caption_never_loses_its_last_word(caption):
    assert all(Words(stop_words=1.0, drop=1.0).changed(caption, seed) for seed in SEEDS[:50])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Crop(scale=(0.0, 1.0)),
        lambda: Crop(scale=(0.5, 0.4)),
        lambda: Crop(scale=(0.5, 1.1)),
        lambda: Crop(ratio=(2.0, 1.0)),
        lambda: Words(swap=1.5),
        lambda: Words(drop=-0.1),
        lambda: Words(stop_words=float("nan")),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ConfigError, match=r"data\.decode"):
        make()
