"""Training order follows from seed, sources and batch number; what cannot be used is counted, named and left out."""

import io
import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmcl.dist import Shard
from mmcl.errors import ConfigError, NoUsableSamples, ShardDamaged, ShardMissing, TooManyBadSamples
from mmcl.types import MODALITIES, Batch, InputSpec
from mmcl_data.build.shards import write_shards
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig

SPEC = InputSpec(image_size=8, resize_mode="squash", sample_rate=8000, clip_samples=80, context_length=12)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(number: int, samples: int = 80) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(0.1, 0.9, samples) * (1 + number % 5) / 5, 8000, format="WAV")
    return buffer.getvalue()


def sample(number: int, *, prefix: str = "", **changes: bytes | None) -> dict[str, bytes | str]:
    """Number `number` in all three modalities; `None` leaves a member out."""
    members = {
        "png": png(number),
        "wav": wav(number),
        "txt": f"number {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
    } | changes
    return {"__key__": f"{prefix}{number:05d}", **{name: data for name, data in members.items() if data is not None}}


def write(folder: Path, samples, per_shard: int = 10) -> str:
    write_shards(samples, folder, per_shard)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Two sources: 30 whole samples in 3 shards, 7 without a sound in one."""
    root = tmp_path_factory.mktemp("shards")
    return {
        "a": write(root / "a", [sample(n, prefix="a") for n in range(30)]),
        "b": write(root / "b", [sample(n, prefix="b", wav=None) for n in range(7)]),
    }


def stream(
    sources: dict[str, str], *, batch: int = 8, seed: int = 0, shard: Shard | None = None, bad: float = 0.01, **weights
) -> ShardStream:
    named = {name: SourceConfig(shards=path, weight=weights.get(name, 1.0)) for name, path in sources.items()}
    return ShardStream(DataConfig(sources=named, max_bad_share=bad), SPEC, batch, seed, shard or Shard())


def take(made: ShardStream, count: int, start: int = 0) -> list[Batch]:
    return list(islice(made.batches(start), count))


def same(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(
        torch.equal(one.values[name], other.values[name]) and torch.equal(one.rows[name], other.rows[name])
        for name in MODALITIES
    )


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(shards):
    first, again, other = (take(stream(shards, seed=seed), 6) for seed in (1, 1, 2))
    assert all(same(x, y) for x, y in zip(first, again, strict=False))
    assert not any(x.keys == y.keys for x, y in zip(first, other, strict=False))


def test_a_batch_is_the_same_read_from_the_start_or_from_the_middle(shards):
    whole = take(stream(shards, b=0.5), 12)
    for start in (1, 5, 11):
        assert all(
            same(x, y) for x, y in zip(whole[start:], take(stream(shards, b=0.5), 12 - start, start), strict=False)
        )
    used = stream(shards, b=0.5)
    take(used, 12)
    assert same(take(used, 1, 3)[0], whole[3]), "and whatever was read before"


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(shards, world):
    whole = take(stream(shards, b=0.4), 9)
    ranks = [take(stream(shards, b=0.4, shard=Shard(rank, world)), 9) for rank in range(world)]
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert [part.size for part in parts] == [8 // world] * world
        assert sorted(key for part in parts for key in part.keys) == sorted(batch.keys)
        for rank, part in enumerate(parts):
            assert part.keys == batch.keys[rank::world]
            assert torch.equal(part.values["image"], batch.values["image"][rank::world])


def test_every_epoch_has_each_sample_once_in_a_new_order(shards):
    batches = take(stream({"a": shards["a"]}, batch=10), 9)
    epochs = [[key for batch in batches[n : n + 3] for key in batch.keys] for n in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 30
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_epochs_need_not_fill_batches(shards):
    keys = [key for batch in take(stream({"b": shards["b"]}, batch=4), 7) for key in batch.keys]
    for epoch in range(4):
        assert len(set(keys[7 * epoch : 7 * epoch + 7])) == 7


@pytest.mark.parametrize("weight", [0.3, 1.0, 1 / 3, 2.7])
def test_the_mixture_is_exact_in_the_long_run_and_even_in_every_batch(shards, weight):
    made = stream(shards, batch=8, b=weight)
    share = weight / (1 + weight)
    drawn = 0
    for number in range(60):
        own = sum(position.path.parent.name == "b" for position in made.positions(number))
        assert abs(own - 8 * share) <= 1
        drawn += own
        assert abs(drawn - 8 * share * (number + 1)) <= 1


def test_ranks_see_the_same_mixture_but_for_one_row(shards):
    for number in range(20):
        counts = [
            sum(p.path.parent.name == "b" for p in stream(shards, b=0.6, shard=Shard(rank, 2)).positions(number))
            for rank in range(2)
        ]
        assert abs(counts[0] - counts[1]) <= 1


def test_long_sounds_are_cut_where_seed_and_epoch_say(tmp_path):
    path = write(tmp_path / "long", [sample(n, wav=wav(4, 4000)) for n in range(4)])
    first, again, other = (take(stream({"a": path}, batch=4, seed=seed), 2) for seed in (0, 0, 1))
    assert all(same(x, y) for x, y in zip(first, again, strict=False))

    def cuts(batch: Batch) -> dict[str, float]:
        return {key: float(value[0]) for key, value in zip(batch.keys, batch.values["audio"], strict=False)}

    assert len(set(cuts(first[0]).values())) == 4
    assert all(cuts(first[0])[key] != cuts(first[1])[key] for key in first[0].keys), "another cut in the next epoch"
    assert all(cuts(first[0])[key] != cuts(other[0])[key] for key in first[0].keys)


# --- content --------------------------------------------------------------------------------------------------------


def test_values_belong_to_their_keys(shards):
    for batch in take(stream({"a": shards["a"]}), 4):
        numbers = [int(key.split("#a")[1]) for key in batch.keys]
        assert batch.values["image"][:, 0, 0, 0].tolist() == numbers
        assert batch.values["image"].dtype == torch.uint8 and batch.values["image"].shape == (8, 3, 8, 8)
        assert batch.values["text"].dtype == torch.int64 and batch.values["text"].shape == (8, 12)
        assert batch.values["audio"].dtype == torch.float32 and batch.values["audio"].shape == (8, 80)
        assert [round(float(peak) / 0.18) for peak in batch.values["audio"].amax(1)] == [1 + n % 5 for n in numbers]


def test_what_a_sample_lacks_is_missing_from_its_row_alone(tmp_path):
    lacking = [{"wav": None}, {"txt": None}, {"png": None}, {}]
    path = write(tmp_path / "some", [sample(n, **lacking[n % 4]) for n in range(16)])
    for batch in take(stream({"a": path}), 4):
        numbers = [int(key.split("#")[1]) for key in batch.keys]
        for kind, name in enumerate(("audio", "text", "image")):
            having = [row for row, n in enumerate(numbers) if n % 4 != kind]
            assert batch.rows[name].tolist() == having
            assert len(batch.values[name]) == len(having)
        assert batch.values["image"][:, 0, 0, 0].tolist() == [n for n in numbers if n % 4 != 2]
        assert batch.size == 8 and batch.skipped == 0


def test_samples_without_two_modalities_are_left_out_with_a_word(tmp_path, caplog):
    path = write(tmp_path / "some", [sample(n, wav=None, txt=None if n % 3 == 0 else b"words") for n in range(9)])
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        made = stream({"mine": path}, batch=6)
    assert len(made.sources[0].samples) == 6
    assert "source mine: 3 of 9 samples are left out" in caplog.text
    assert caplog.text.count("no two of image, text and audio") == 3 and "'00000'" in caplog.text


def test_a_json_member_is_no_business_of_training(tmp_path):
    path = write(tmp_path / "some", [sample(n, json=b"{broken") for n in range(4)])
    (batch,) = take(stream({"a": path}, batch=4), 1)
    assert batch.skipped == 0 and len(batch.values["image"]) == 4


# --- what cannot be used --------------------------------------------------------------------------------------------

BAD = {
    "image": ({"png": b"\x89PNG\r\n\x1a\nnonsense"}, "not a readable JPEG, PNG or WebP image"),
    "image cut off": ({"png": png(3)[:-35]}, "not a readable"),
    "sound": ({"wav": b"RIFF nonsense"}, "not a readable WAV"),
    "silent sound": ({"wav": wav(3)[:44] + bytes(160)}, "the sound is silent"),
    "caption": ({"txt": b"caf\xe9"}, "the caption is not UTF-8: byte 0xe9 at offset 3"),
    "empty caption": ({"txt": b"  \n"}, "the caption is empty"),
}


@pytest.mark.parametrize(("changes", "cause"), BAD.values(), ids=BAD)
def test_a_sample_that_cannot_be_used_is_a_counted_row_without_values(tmp_path, caplog, changes, cause):
    good = write(tmp_path / "good", [sample(n) for n in range(16)])
    path = write(tmp_path / "bad", [sample(n, **(changes if n == 11 else {})) for n in range(16)])
    whole = take(stream({"a": good}), 2)
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        found = take(stream({"a": path}), 2)
    (record,) = caplog.records
    for part in ("000001.tar", "'00011'", cause):
        assert part in record.getMessage()
    hit = next(n for n, batch in enumerate(whole) if "000001.tar#00011" in batch.keys)
    row = whole[hit].keys.index("000001.tar#00011")
    assert found[hit].skipped == 1 and found[1 - hit].skipped == 0
    assert same(found[1 - hit], whole[1 - hit])
    assert found[hit].size == 8
    assert found[hit].keys == (*whole[hit].keys[:row], "", *whole[hit].keys[row + 1 :]), "others keep their rows"
    for name in MODALITIES:
        assert found[hit].rows[name].tolist() == [n for n in range(8) if n != row]
        rest = [n for n in range(8) if n != row]
        assert torch.equal(found[hit].values[name], whole[hit].values[name][rest])


def half_bad(tmp_path) -> str:
    return write(tmp_path / "half", [sample(n, **({"txt": b"\xff"} if n % 2 else {})) for n in range(64)])


def test_too_many_bad_samples_end_the_run(tmp_path):
    path = half_bad(tmp_path)
    with pytest.raises(TooManyBadSamples, match=r"\d+ of \d+ samples .*data.max_bad_share=0.01.*mmcl data check"):
        take(stream({"a": path}, bad=0.01), 10)
    assert sum(batch.skipped for batch in take(stream({"a": path}, bad=1.0), 8)) == 32


def test_a_share_of_0_allows_not_one(tmp_path):
    path = write(tmp_path / "one", [sample(n, **({"txt": b"\xff"} if n == 3 else {})) for n in range(8)])
    with pytest.raises(TooManyBadSamples, match="1 of 8"):
        take(stream({"a": path}, bad=0.0), 1)


def test_a_damaged_shard_is_found_before_the_first_batch(tmp_path):
    path = Path(write(tmp_path / "cut", [sample(n) for n in range(20)])) / "000001.tar"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ShardDamaged, match=r"000001.tar: damaged at byte"):
        stream({"a": str(tmp_path / "cut")})


def test_a_source_of_which_nothing_can_be_used_is_refused_by_name(tmp_path):
    path = write(tmp_path / "texts", [sample(n, png=None, wav=None) for n in range(4)])
    with pytest.raises(NoUsableSamples, match=r"source 'mine'.*none of its 4 samples"):
        stream({"mine": path})


def test_a_path_without_shards_is_refused(tmp_path):
    with pytest.raises(ShardMissing, match="nowhere"):
        stream({"a": str(tmp_path / "nowhere" / "{000000..000003}.tar")})


def test_a_shard_that_vanishes_during_the_run_is_named(tmp_path):
    made = stream({"a": write(tmp_path / "gone", [sample(n) for n in range(8)])})
    (tmp_path / "gone" / "000000.tar").unlink()
    with pytest.raises(ShardMissing, match=r"000000.tar: cannot be opened any more"):
        take(made, 1)


def test_a_source_with_less_than_a_row_of_a_batch_is_refused(shards):
    with pytest.raises(ConfigError, match=r"data.sources.b would get 0.79 rows of a batch of 8: raise its weight"):
        stream(shards, a=10.0, b=1.1)


def test_a_batch_that_ranks_cannot_share_is_refused(shards):
    with pytest.raises(ConfigError, match="batch of 8 cannot be shared by 3 ranks"):
        stream(shards, shard=Shard(0, 3))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ConfigError, match=r"data.sources.a.weight"):
        DataConfig(sources={"a": SourceConfig(shards="x", weight=weight)})


def test_no_sources_and_an_impossible_share_are_refused():
    with pytest.raises(ConfigError, match=r"data.sources is empty"):
        DataConfig(sources={})
    with pytest.raises(ConfigError, match="max_bad_share"):
        DataConfig(sources={"a": SourceConfig(shards="x")}, max_bad_share=1.5)


# --- identity -------------------------------------------------------------------------------------------------------


def test_the_identity_is_the_same_for_the_same_data_and_survives_json(shards):
    first = stream(shards, b=1 / 3).identity
    assert first == stream(shards, b=1 / 3, shard=Shard(1, 2)).identity
    assert json.loads(json.dumps(first)) == first


def test_the_identity_changes_with_seed_batch_weight_and_sources(shards):
    found = [
        stream(shards),
        stream(shards, seed=1),
        stream(shards, batch=10),
        stream(shards, b=2.0),
        stream({"a": shards["a"]}),
        stream({"b": shards["b"], "a": shards["a"]}),
    ]
    assert len({json.dumps(dict(made.identity), sort_keys=True) for made in found}) == len(found)


@pytest.mark.parametrize(
    "other",
    [
        [sample(n) for n in range(9)],
        [sample(n, prefix="x" if n == 3 else "") for n in range(8)],
        [sample(n, **({"txt": b"longer words here"} if n == 3 else {})) for n in range(8)],
        [sample(n, **({"json": None} if n == 3 else {})) for n in range(8)],
    ],
    ids=["one more", "another key", "another size", "a member less"],
)
def test_the_identity_changes_with_the_shards(tmp_path, other):
    first = stream({"a": write(tmp_path / "one", [sample(n) for n in range(8)])}).identity
    second = stream({"a": write(tmp_path / "two", other)}).identity
    assert [name for name in first if first[name] != second[name]] == ["source a"]


def test_the_order_itself_is_pinned(shards):
    """A change here breaks every run that is to be resumed: raise ORDER_VERSION with it."""
    (batch,) = take(stream(shards, seed=5), 1, 3)
    assert Counter(key.split("#")[1][0] for key in batch.keys) == {"a": 4, "b": 4}
    assert [key.split("#")[1] for key in batch.keys] == [
        *("a00025", "a00021", "a00019", "a00029"),
        *("b00005", "b00003", "b00004", "b00003"),
    ]
