"""The tokenizer gives open_clip's numbers, for captions that need mending and for those that do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from mmcl_data.decode import tokens
from mmcl_data.decode.tokens import Tokenizer

OURS, THEIRS = Tokenizer(), SimpleTokenizer()
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
PARTS = [
    "a dog",
    "DOG's",
    " ",
    "\t",
    "\n",
    "\x1b[1m",
    "&amp;",
    "&amp;lt;",
    "&#100",
    "é",
    "“",
    "ﬁ",
    "Ã©",
    "\x00",
    "犬",
    "1",
]
MIXED = st.lists(st.sampled_from([*PARTS, "<start_of_text>", "<End_Of_Text>", "<b>"]), max_size=8).map("".join)


@given(st.one_of(PLAIN, MIXED, st.text(max_size=20)), st.integers(2, 20))
def test_any_caption_has_the_numbers_that_open_clip_gives_it(caption, length):
    assert torch.equal(OURS([caption], length), THEIRS([caption], length))


@pytest.mark.parametrize("code", [*range(32), 127, 128, 160])
def test_what_a_terminal_would_act_upon_is_mended_as_ever(code):
    caption = f"a{chr(code)}b {chr(code)}c"
    assert OURS.encode(caption) == THEIRS.encode(caption)


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(tokens, "_MAX_WORDS", 3)
    tokenizer = Tokenizer()
    captions = [f"word{letter} tail" for letter in "abcdefgh"] * 2
    assert torch.equal(tokenizer(captions, 9), THEIRS(captions, 9))
    assert len(tokenizer.words) <= 3
    assert len(tokenizer.slow.cache) <= 5
