"""One sample to one row, and rows to a batch."""

import pytest
import torch
from test_stream import SPEC, png, wav

from mmcl.errors import SampleRejected
from mmcl.types import MODALITIES
from mmcl_data.augment import Crop, Words
from mmcl_data.samples import DecodeConfig, Draw, Row, collate, decode_row, is_usable, modalities_of, wanted
from mmcl_data.scan import SampleEntry

PATH = "shards/000007.tar"


def members(**changes: bytes) -> dict[str, bytes]:
    return {"png": png(3), "wav": wav(3), "txt": b" three \n", "json": b'{"number": 3}', **changes}


def test_a_row_holds_what_the_members_say():
    row = decode_row(PATH, "k", members(), SPEC, start=0.0, with_facts=True)
    assert (row.key, row.caption, row.facts) == ("000007.tar#k", "three", {"number": 3})
    assert row.image.shape == (3, 8, 8) and row.audio.shape == (80,)
    assert all(row.has(name) for name in MODALITIES)


def test_facts_are_read_only_where_they_are_wanted():
    assert decode_row(PATH, "k", members(json=b"{broken"), SPEC, start=0.0).facts == {}
    with pytest.raises(SampleRejected, match=r"shards/000007.tar: sample 'k': the json member is no JSON"):
        decode_row(PATH, "k", members(json=b"{broken"), SPEC, start=0.0, with_facts=True)


def test_members_of_other_kinds_are_never_touched():
    row = decode_row(PATH, "k", members(pyd=b"cos\nsystem\n", pth=b"\x80"), SPEC, start=0.0, with_facts=True)
    assert row.facts == {"number": 3}


def test_the_first_member_of_a_kind_counts():
    row = decode_row(PATH, "k", {"png": png(3), "jpg": b"nonsense"}, SPEC, start=0.0)
    assert row.image[0, 0, 0] == 3


def test_a_rejection_says_where_and_why():
    with pytest.raises(SampleRejected) as caught:
        decode_row(PATH, "k", members(png=b"GIF89a"), SPEC, start=0.0)
    assert (caught.value.shard, caught.value.key) == (PATH, "k")
    assert "not a readable JPEG, PNG or WebP image" in caught.value.cause


@pytest.mark.parametrize(
    ("extensions", "usable"),
    [
        (("jpg", "txt"), True),
        (("flac", "txt"), True),
        (("webp", "ogg"), True),
        (("jpg", "png", "json", "cls"), False),
        (("txt",), False),
        (("pyd", "npy"), False),
    ],
)
def test_a_sample_is_usable_with_two_modalities(extensions, usable):
    entry = SampleEntry("k", extensions, (0,) * len(extensions), (1,) * len(extensions))
    assert is_usable(modalities_of(entry)) is usable


def test_rows_become_ragged_values_and_their_row_numbers():
    image, sound = torch.ones(3, 8, 8, dtype=torch.uint8), torch.ones(80)
    rows = [Row("a", caption="one"), Row(""), Row("c", image=image, audio=sound), Row("d", image=image, caption="four")]
    batch = collate(rows, SPEC, skipped=1)
    assert (batch.size, batch.skipped, batch.keys) == (4, 1, ("a", "", "c", "d"))
    assert {name: batch.rows[name].tolist() for name in MODALITIES} == {"image": [2, 3], "text": [0, 3], "audio": [2]}
    assert {name: tuple(batch.values[name].shape) for name in MODALITIES} == {
        "image": (2, 3, 8, 8),
        "text": (2, 12),
        "audio": (1, 80),
    }


def test_rows_without_anything_are_a_batch_of_the_right_types():
    batch = collate([Row("")] * 3, SPEC, skipped=3)
    assert batch.size == 3
    for name, dtype in (("image", torch.uint8), ("text", torch.int64), ("audio", torch.float32)):
        assert batch.values[name].dtype == dtype and len(batch.values[name]) == len(batch.rows[name]) == 0
        assert batch.rows[name].dtype == torch.int64


def entry_of(**sizes: int) -> SampleEntry:
    return SampleEntry("k", tuple(sizes), tuple(range(0, 512 * len(sizes), 512)), tuple(sizes.values()))


def test_of_each_kind_the_first_member_is_wanted_and_of_others_none():
    entry = entry_of(npy=9, png=1, jpg=2, txt=3, json=4, pyd=5, cls=6, wav=7)
    assert wanted(PATH, entry, facts=False).extensions == ("png", "txt", "wav")
    found = wanted(PATH, entry, facts=True)
    assert found == SampleEntry(
        "k", ("png", "txt", "json", "cls", "wav"), (512, 1536, 2048, 3072, 3584), (1, 3, 4, 6, 7)
    )


@pytest.mark.parametrize(
    ("extension", "size", "refused"),
    [
        ("txt", 2**16 + 1, True),
        ("txt", 2**16, False),
        ("jpg", 2**26 + 1, True),
        ("json", 10**6 + 1, True),
        ("npy", 2**40, False),
        ("cls", 41, True),
    ],
)
def test_a_member_larger_than_its_kind_may_be_is_refused_before_it_is_read(extension, size, refused):
    entry = entry_of(**{"wav": 5, extension: size})
    if not refused:
        assert wanted(PATH, entry, facts=True).extensions[0] == "wav"
        return
    with pytest.raises(SampleRejected, match=rf"sample 'k': {extension}: {size} bytes are over the limit"):
        wanted(PATH, entry, facts=True)


def test_a_row_that_is_drawn_follows_from_its_seed():
    config = DecodeConfig(crop=Crop(scale=(0.2, 0.6)), words=Words(drop=0.4, swap=0.5))
    held = members(png=png(3, 64), wav=wav(3, 900), txt=b"one two three four five six seven")

    def row(seed: int) -> Row:
        return decode_row(PATH, "k", held, SPEC, draw=Draw(seed=seed), config=config)

    first, again, others = row(5), row(5), [row(seed) for seed in range(20)]
    assert first.caption == again.caption and torch.equal(first.audio, again.audio)
    assert torch.equal(first.image, again.image)
    assert len({other.caption for other in others}) > 10 and len({float(other.audio[0]) for other in others}) > 10
    assert {other.ids["caption"] for other in others} == {first.ids["caption"]}, "the ids are of what was written"


def test_without_a_draw_nothing_is_drawn():
    config = DecodeConfig(crop=Crop(scale=(0.2, 0.6)), words=Words(drop=1.0))
    plain = decode_row(PATH, "k", members(), SPEC, config=config)
    assert plain.caption == "three" and torch.equal(plain.image, decode_row(PATH, "k", members(), SPEC).image)


def test_a_sample_without_a_field_that_holds_a_caption_is_rejected():
    with pytest.raises(SampleRejected, match="none of the fields that may hold a caption: alt"):
        decode_row(PATH, "k", members(), SPEC, draw=Draw(seed=1, captions={"alt": 1.0}))
