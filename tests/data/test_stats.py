"""Statistics are exact for small sets, alike for any number of workers, and of bounded size for large ones."""

import io
import json
import os

import numpy as np
import pytest
import soundfile
from data_cases import png, sample, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmcl.errors import ConfigError, ShardMissing
from mmcl_data import stats
from mmcl_data.samples import hash_of
from mmcl_data.stats import Hashes, Spread, Tally, script_of, source_stats, stats_report, stats_table


def jpeg(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), 99).save(out, "JPEG")
    return out.getvalue()


def flac(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.full((round(rate * seconds), channels), 0.25), rate, format="FLAC")
    return out.getvalue()


def described(*sources, **options):
    return stats_report({source: source_stats(source, **options) for source in sources})


def test_a_small_set_is_described_exactly(tmp_path):
    rows = [
        {"__key__": "a", "jpg": jpeg(64, 32), "txt": b"A red square"},
        {"__key__": "b", "png": png(1), "txt": "кот".encode(), "cls": b"7"},
        {"__key__": "c", "flac": flac(2), "txt": "猫 cat sat".encode(), "json": b'{"n": 1, "captions": {"x": "y"}}'},
        {"__key__": "d", "flac": flac(0.5, 44_100, 2), "jpg": jpeg(100, 400), "seg.png": b"?"},
    ]
    source = write(tmp_path / "set", rows, 3)
    (found,) = described(source)["sources"]
    assert (found["shards"], found["samples"], found["damaged_samples"]) == (2, 4, 0)
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    assert found["counts"] == {
        "modalities": {"image+text": 1, "class+image+text": 1, "audio+facts+text": 1, "audio+image": 1},
        "image formats": {"JPEG L": 2, "PNG RGB": 1},
        "audio formats": {"FLAC PCM_16": 2},
        "audio rates, Hz": {"16000": 1, "44100": 1},
        "audio channels": {"1": 1, "2": 1},
        "caption scripts": {"Latin": 2, "Cyrillic": 1},
        "letters by script": {"Latin": 16, "Cyrillic": 3, "Han": 1},
        "captions": {"a red square": 1, "кот": 1, "猫 cat sat": 1},
        "json fields": {"n: number": 1, "captions: object": 1, "captions.x: text": 1},
        "classes": {"7": 1},
        "unread members": {"seg.png": 1},
    }
    spreads = found["spreads"]
    assert [spreads["image width, px"][name] for name in ("p0", "p50", "p100")] == [8, 64, 100]
    assert [spreads["image width / height"][name] for name in ("p0", "p50", "p100")] == [0.25, 1, 2]
    assert (spreads["audio seconds"]["total"], spreads["audio seconds"]["p0"]) == (2.5, 0.5)
    assert (spreads["caption characters"]["total"], spreads["caption words"]["total"]) == (12 + 3 + 9, 3 + 1 + 3)


def test_any_number_of_workers_says_the_same(tmp_path):
    rows = [sample(number, txt=f"Number {number % 3}".encode(), wav=flac(0.01 * number + 0.01)) for number in range(23)]
    source = write(tmp_path / "set", rows, 4)
    one, two = (json.dumps(described(source, workers=workers)) for workers in (1, 2))
    assert one == two


def test_duplicates_are_found_within_and_between_sources(tmp_path):
    texts = ["a cat", "A  cat", "a dog", "a cat\n"]
    one = write(tmp_path / "one", [sample(n, png=png(n // 2), txt=text.encode()) for n, text in enumerate(texts)], 1)
    two = write(tmp_path / "two", [sample(9, png=png(1), wav=None, txt=b"A DOG")])
    found = described(one, two)
    assert found["sources"][0]["duplicates"] == {
        "audio": {"count": 4, "distinct": 4, "copies": 0, "alike": 1},
        "caption": {"count": 4, "distinct": 2, "copies": 2, "alike": 3},
        "image": {"count": 4, "distinct": 2, "copies": 2, "alike": 2},
    }
    assert found["sources"][0]["counts"]["captions"] == {"a cat": 3, "a dog": 1}
    shared = [(line["what"], line["distinct"]) for line in found["shared"]]
    assert shared == [("caption", 1), ("image", 1)]
    assert "3 x  a cat" in stats_table(found["sources"][0])


def test_damage_is_counted_and_ends_nothing(tmp_path):
    bad = [sample(0), sample(1, png=b"no picture"), sample(2, wav=b"no sound", txt=b" \n"), sample(3, json=b"[]")]
    source = write(tmp_path / "set", [*bad, sample(4)], 4)
    os.truncate(tmp_path / "set" / "000001.tar", 700)
    (found,) = described(source)["sources"]
    assert (found["shards"], found["damaged_shards"]) == (2, 1)
    assert (found["samples"], found["damaged_samples"], found["empty_captions"]) == (4, 3, 1)
    assert found["counts"]["damaged members"] == {
        "image: no such file": 1,
        "audio: no such file": 1,
        "text: the caption is empty": 1,
        "facts: the json member holds a list, not an object": 1,
    }
    assert found["damage"][0].startswith(f"{source}/000001.tar: ") and "damaged at byte 700" in found["damage"][0]
    with pytest.raises(ShardMissing):
        source_stats(str(tmp_path / "nothing"))


def test_tokens_are_those_of_open_clip_and_cuts_are_counted(tmp_path):
    texts = ["cat", "a cat ! ! !", "one two three four five six seven eight nine ten"]
    source = write(tmp_path / "set", [sample(n, txt=text.encode()) for n, text in enumerate(texts)])
    (found,) = described(source, tokens=8)["sources"]
    assert found["counts"]["caption tokens"] == {"fit into 8": 2, "cut at 8": 1}
    spread = found["spreads"]["caption tokens"]
    with pytest.raises(ConfigError, match="tokens=2"):
        source_stats(source, tokens=2)
    assert (spread["p0"], spread["p50"], spread["p100"]) == (3, 7, 9)  # with start and end; counted up to one too many


@pytest.mark.parametrize(
    ("letter", "script"),
    [("a", "Latin"), ("Ａ", "Latin"), ("ж", "Cyrillic"), ("漢", "Han"), ("か", "Hiragana"), ("ｶ", "Katakana"),
     ("한", "Hangul"), ("ق", "Arabic"), ("ψ", "Greek"), ("ह", "Devanagari"), ("ª", "Latin"), ("\U00020000", "Han")],
)  # fmt: skip
def test_letters_have_scripts(letter, script):
    assert script_of(letter) == script


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=200))
def test_quantiles_are_those_of_numpy_to_four_digits(values):
    spread = Spread()
    for value in values:
        spread.add(value)
    found = spread.described()
    for quantile in stats.QUANTILES:
        exact = np.percentile(values, quantile, method="inverted_cdf")
        assert found[f"p{quantile}"] == pytest.approx(exact, rel=6e-4)
    assert found["total"] == pytest.approx(sum(values))


def test_hashes_are_bounded_and_their_share_is_an_estimate_for_all():
    whole = Hashes(limit=1000)
    for start in range(0, 20_000, 500):
        part = Hashes()
        for number in range(start, start + 500):
            part.add(hash_of(b"%d" % (number // 2)))  # each twice
        whole.merge(part)
        assert len(whole.kept) <= 1000
    found = whole.described()
    assert found["share_looked_at"] == 1 / 32 and found["alike"] == 2 and found["copies"] == found["distinct"]
    assert found["distinct"] / found["share_looked_at"] == pytest.approx(10_000, rel=0.2)


def test_names_are_counted_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(stats, "MAX_NAMES", 3)
    tally, other = Tally(), Tally()
    for name in "abcabd":
        tally.count("captions", name)
    for name in "xab":
        other.count("captions", name)
    tally.merge(other)
    assert tally.counts["captions"] == {"a": 3, "b": 3, "c": 1, "(others)": 2}


def test_nothing_of_the_data_steers_the_terminal(tmp_path):
    source = write(tmp_path / "set", [sample(n, txt=b"x\x1b[2Jy", json=b'{"\\u001b[2J": 1}') for n in range(2)])
    (found,) = described(source)["sources"]
    assert all(character.isprintable() or character == "\n" for character in stats_table(found))
    assert "2 x  x\ufffd[2jy" in stats_table(found)
