"""Evaluation batches: every sample once, in order, with its facts, as often as they are asked for."""

import json
import logging

import pytest
import torch
from test_stream import SPEC, png, sample, wav, write

from mmcl.errors import DataError, NoUsableSamples, ShardDamaged, ShardMissing
from mmcl.types import MODALITIES
from mmcl_data.evalsets import EvalBatches, read_classes


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("evals") / "e", [sample(n) for n in range(25)])


def test_every_sample_comes_once_in_order(folder):
    batches = list(EvalBatches(folder, SPEC, batch_size=8))
    assert [batch.size for batch in batches] == [8, 8, 8, 1]
    assert keys(batches) == [f"00000{n // 10}.tar#{n:05d}" for n in range(25)]
    assert [facts["number"] for batch in batches for facts in batch.facts] == list(range(25))
    assert [n for b in batches for n in b.values["image"][:, 0, 0, 0].tolist()] == list(range(25))


def test_they_may_be_iterated_over_again(folder):
    batches = EvalBatches(folder, SPEC, batch_size=8)
    first, second = list(batches), list(batches)
    assert keys(first) == keys(second)
    for one, other in zip(first, second, strict=False):
        assert all(torch.equal(one.values[name], other.values[name]) for name in MODALITIES)


def test_a_limit_takes_that_many_at_even_distances(folder):
    def numbers(limit: int) -> list[int]:
        return [int(key.split("#")[1]) for key in keys(EvalBatches(folder, SPEC, batch_size=8, limit=limit))]

    assert numbers(5) == [0, 5, 10, 15, 20]
    assert numbers(1) == [0]
    assert numbers(25) == numbers(1000) == list(range(25))


def test_samples_without_what_is_needed_are_left_out(tmp_path):
    path = write(tmp_path / "n", [sample(n, **{("wav", "txt", "png")[n % 3]: None}) for n in range(9)])
    assert [key.split("#")[1] for key in keys(EvalBatches(path, SPEC, needs=("image", "text")))] == [
        *("00000", "00003", "00006")
    ]
    assert len(keys(EvalBatches(path, SPEC, needs=("image",), limit=2))) == 2
    with pytest.raises(NoUsableSamples, match="no sample has all of image, text, audio"):
        EvalBatches(path, SPEC, needs=MODALITIES)


def test_the_caption_is_among_the_facts_unless_they_have_their_own(tmp_path):
    own = json.dumps({"caption": "its own"}).encode()
    path = write(tmp_path / "c", [sample(0), sample(1, json=own), sample(2, json=None), sample(3, txt=None)])
    (batch,) = EvalBatches(path, SPEC)
    assert [facts.get("caption") for facts in batch.facts] == ["number 0", "its own", "number 2", None]


def test_classes_are_read_from_their_member(tmp_path):
    samples = [{"__key__": f"{n}", "png": png(n), "cls": f"{n % 3}\n".encode()} for n in range(6)]
    (batch,) = EvalBatches(write(tmp_path / "k", samples), SPEC)
    assert [facts["label"] for facts in batch.facts] == [0, 1, 2, 0, 1, 2]
    assert batch.values["text"].shape == (0, 12) and len(batch.values["image"]) == 6


def test_long_sounds_are_read_from_their_middle_whatever_the_seed(tmp_path):
    path = write(tmp_path / "long", [sample(4, wav=wav(4, 880))])
    (batch,) = EvalBatches(path, SPEC)
    ramp = torch.linspace(0.1, 0.9, 880)[400:480]
    torch.testing.assert_close(batch.values["audio"][0], ramp, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"png": b"nonsense"}, "not a readable JPEG, PNG or WebP image"),
        ({"json": b"{broken"}, "the json member is no JSON"),
        ({"json": b'{"a": NaN}'}, "not finite"),
        ({"txt": b"caf\xe9"}, "not UTF-8"),
        ({"cls": b"dog"}, "a class is a number"),
    ],
)
def test_a_sample_that_cannot_be_used_is_left_out_counted_and_named(tmp_path, caplog, changes, cause):
    path = write(tmp_path / "bad", [sample(n, **(changes if n == 2 else {})) for n in range(5)])
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        (batch,) = EvalBatches(path, SPEC)
    assert batch.size == 4 and batch.skipped == 1
    assert [key.split("#")[1] for key in batch.keys] == ["00000", "00001", "00003", "00004"]
    (record,) = caplog.records
    for part in ("left out of the evaluation", "000000.tar", "'00002'", cause):
        assert part in record.getMessage()


def test_damaged_and_missing_shards_are_found_at_once(tmp_path):
    with pytest.raises(ShardMissing):
        EvalBatches(str(tmp_path / "none.tar"), SPEC)
    path = tmp_path / "cut" / "000000.tar"
    write(tmp_path / "cut", [sample(n) for n in range(3)])
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ShardDamaged):
        EvalBatches(str(path), SPEC)


# --- labelled sets --------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path):
    """A labelled set as CLIP_benchmark lays it out: two shards of three samples."""
    root = tmp_path / "set"
    root.mkdir()
    (root / "classnames.txt").write_text("dog\ncat\nsea horse\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    samples = [{"__key__": f"{n}", "png": png(n), "cls": str(n % 3).encode()} for n in range(6)]
    write(tmp_path / "shards", samples, per_shard=3)
    (root / "test").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"00000{number}.tar").rename(root / "test" / f"{number}.tar")
    (root / "test" / "nshards.txt").write_text("2\n")
    return root


def test_a_labelled_set_has_names_templates_and_samples(layout):
    found = read_classes(layout, SPEC)
    assert found.classnames == ["dog", "cat", "sea horse"]
    assert found.templates == ["a photo of a {c}.", "the {c}"]
    assert [f["label"] for batch in found.batches for f in batch.facts] == [0, 1, 2, 0, 1, 2]
    assert len(keys(read_classes(layout, SPEC, limit=4).batches)) == 4


def test_one_shard_is_read_as_one(layout):
    (layout / "test" / "nshards.txt").write_text("1")
    assert len(keys(read_classes(layout, SPEC).batches)) == 3


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"])
def test_a_missing_file_of_the_layout_is_named(layout, name):
    (layout / name).unlink()
    with pytest.raises(ShardMissing, match=f"{name} is missing"):
        read_classes(layout, SPEC)


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"])
@pytest.mark.parametrize("data", [b"", b" \n\n", b"\xff\xfe"])
def test_an_unreadable_file_of_the_layout_is_named(layout, name, data):
    (layout / name).write_bytes(data)
    with pytest.raises(DataError, match=name) as caught:
        read_classes(layout, SPEC)
    assert not isinstance(caught.value, ShardMissing) and issubclass(NoUsableSamples, DataError)


def test_a_template_without_a_place_for_the_name_is_refused(layout):
    (layout / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na photo\n")
    with pytest.raises(DataError, match=r"'a photo' has no \{c\}"):
        read_classes(layout, SPEC)


@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_a_number_of_shards_that_is_none_is_refused(layout, count):
    (layout / "test" / "nshards.txt").write_text(count)
    with pytest.raises(DataError, match=f"'{count}' is no number of shards"):
        read_classes(layout, SPEC)


def test_a_missing_shard_of_the_layout_is_named(layout):
    (layout / "test" / "nshards.txt").write_text("3")
    with pytest.raises(ShardMissing, match=r"2\.tar"):
        read_classes(layout, SPEC)
