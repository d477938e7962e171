"""Training order follows from seed, sources and a cursor; any ranks and workers give the same, and go on anywhere."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_cases import SPEC, digest, png, same, sample, stream, take, wav, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcl.dist import Shard
from mmcl.errors import (
    CheckpointError,
    ConfigError,
    IndexStale,
    NoUsableSamples,
    ShardDamaged,
    ShardMissing,
    TooManyBadSamples,
)
from mmcl.types import MODALITIES, Batch
from mmcl_data.index import build_index
from mmcl_data.samples import DecodeConfig
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Two sources: 32 whole samples in 4 shards, 9 without a sound in one."""
    root = tmp_path_factory.mktemp("shards")
    return {
        "a": write(root / "a", [sample(n, prefix="a") for n in range(32)]),
        "b": write(root / "b", [sample(n, prefix="b", wav=None) for n in range(9)]),
    }


def keys(batches: list[Batch]) -> list[str]:
    return [key.split("#")[1] for batch in batches for key in batch.keys]


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(shards):
    first, again, other = (take(stream(shards, seed=seed), 6) for seed in (1, 1, 2))
    assert [digest(batch) for batch in first] == [digest(batch) for batch in again]
    assert not any(x.keys == y.keys for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("data", [{}, {"lanes": 4, "slice_size": 3, "window": 5}, {"policy": "homogeneous"}])
def test_a_stream_goes_on_behind_any_batch(shards, data):
    digests = [digest(batch) for batch in take(stream(shards, b=0.5, data=data), 14)]
    assert len(set(digests)) == 14
    for number in range(12):
        before, after = (stream(shards, b=0.5, data=data) for _ in range(2))
        take(before, number)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [digest(batch) for batch in take(after, 2)] == digests[number : number + 2]


def test_a_state_is_small_and_counts_what_was_given_and_not_what_was_begun(shards):
    made = stream(shards, data={"workers": 2, "worker_kind": "threads", "ahead": 5})
    batches = made.batches()
    for number in range(4):
        next(batches)
        assert made.state_dict()["rows"] == 8 * (number + 1)
    assert len(json.dumps(made.state_dict())) < 2000


@pytest.mark.parametrize("data", [{}, {"lanes": 1}, {"lanes": 12, "slice_size": 2}, {"policy": "homogeneous"}])
@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_the_parts_of_the_ranks_are_the_global_batch(shards, world, data):
    whole = take(stream({"a": shards["a"], "c": shards["a"]}, batch=12, c=0.4, data=data), 7)
    ranks = [
        take(stream({"a": shards["a"], "c": shards["a"]}, batch=12, c=0.4, data=data, shard=Shard(rank, world)), 7)
        for rank in range(world)
    ]
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert tuple(key for part in parts for key in part.keys) == batch.keys
        assert torch.equal(torch.cat([part.values["image"] for part in parts]), batch.values["image"])
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)


@given(worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=3, max_size=3), cut=st.integers(1, 9))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_may_change_its_number_of_ranks_wherever_it_is_stopped(shards, worlds, cut):
    expected = [digest(batch) for batch in take(stream(shards, batch=12, b=0.5), 3 * cut)]
    state, found = stream(shards, batch=12, b=0.5).state_dict(), []
    for world in worlds:
        ranks = [stream(shards, batch=12, b=0.5, shard=Shard(rank, world)) for rank in range(world)]
        for made in ranks:
            made.load_state_dict(state)
        parts = [take(made, cut) for made in ranks]
        for number in range(cut):
            keys_of_batch = tuple(key for part in parts for key in part[number].keys)
            found.append(keys_of_batch)
        (state,) = {json.dumps(made.state_dict(), sort_keys=True): made.state_dict() for made in ranks}.values()
    assert found == [batch.keys for batch in take(stream(shards, batch=12, b=0.5), 3 * cut)]
    assert len(expected) == len(found)


@pytest.mark.parametrize(
    "workers",
    [
        {"workers": 1, "worker_kind": "threads"},
        {"workers": 3, "worker_kind": "threads", "ahead": 8},
        {"workers": 1},
        {"workers": 3, "ahead": 1},
    ],
)
def test_workers_do_not_change_a_byte(shards, workers):
    expected = [digest(batch) for batch in take(stream(shards, b=0.5), 8)]
    assert [digest(batch) for batch in take(stream(shards, b=0.5, data=workers), 8)] == expected


def test_every_epoch_has_each_sample_once_in_a_new_order(shards):
    found = keys(take(stream({"a": shards["a"]}), 12))
    epochs = [found[n : n + 32] for n in (0, 32, 64)]
    assert all(len(set(epoch)) == 32 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_epochs_need_not_fill_batches_and_nothing_is_repeated_or_padded(shards):
    found = keys(take(stream({"b": shards["b"]}, batch=4, data={"lanes": 2}), 8))
    assert len(found) == 32
    for epoch in range(4):
        lanes = [found[8 * epoch : 8 * epoch + 8]]
        assert len(set(lanes[0])) == 8


@given(batches=st.lists(st.sampled_from([4, 8, 12, 24]), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_another_batch_size_in_the_middle_of_an_epoch_loses_and_repeats_nothing(shards, batches):
    found: list[str] = []
    state = None
    for size in batches:
        made = stream({"a": shards["a"]}, batch=size, data={"lanes": 4})
        if state is not None:
            made.load_state_dict(state)
        found += keys(take(made, 2))
        state = made.state_dict()
    counts = Counter(found)
    epochs = len(found) / 32
    assert max(counts.values()) <= -(-len(found) // 32) and (epochs < 1 or min(counts.values()) >= int(epochs))
    # each lane goes through its places as if the size had never changed
    straight = stream({"a": shards["a"]}, batch=4, data={"lanes": 4})
    assert Counter(keys(take(straight, len(found) // 4))) == counts


# --- mixtures -------------------------------------------------------------------------------------------------------


def of_b(batch: Batch) -> int:
    return sum(key.split("#")[1].startswith("b") for key in batch.keys)


@pytest.mark.parametrize("weight", [0.3, 1.0, 1 / 3, 2.7])
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_mixture_is_exact_in_the_long_run_and_within_a_slot_in_every_batch(shards, weight, lanes):
    share, drawn = weight / (1 + weight), 0
    for number, batch in enumerate(take(stream(shards, b=weight, data={"lanes": lanes}), 40), 1):
        assert abs(of_b(batch) - 8 * share) <= lanes
        drawn += of_b(batch)
        assert abs(drawn - 8 * share * number) <= lanes


@pytest.mark.parametrize("policy", ["stratified", "fixed", "homogeneous"])
def test_every_rank_has_as_many_rows_of_every_source_where_it_has_whole_lanes(shards, policy):
    data = {"lanes": 4, "policy": policy}
    ranks = [take(stream(shards, batch=24, b=0.6, data=data, shard=Shard(rank, 2)), 12) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert of_b(first) == of_b(second)


def test_where_lanes_are_not_whole_ranks_differ_by_a_row_for_each_source(shards):
    ranks = [take(stream(shards, batch=24, b=0.6, data={"lanes": 1}, shard=Shard(rank, 2)), 12) for rank in range(2)]
    assert all(abs(of_b(first) - of_b(second)) <= 1 for first, second in zip(*ranks, strict=True))


def test_a_homogeneous_batch_is_of_one_source_and_sources_take_turns_by_weight(shards):
    found = [of_b(batch) for batch in take(stream(shards, b=1 / 3, data={"policy": "homogeneous"}), 40)]
    assert set(found) == {0, 8} and found.count(8) == 10
    assert all(found[n : n + 4].count(8) == 1 for n in range(0, 40, 4))


def test_a_fixed_batch_has_the_same_number_of_each_source_and_says_what_that_makes_of_the_weights(shards, caplog):
    with caplog.at_level(logging.INFO, "mmcl.data"):
        found = [of_b(batch) for batch in take(stream(shards, b=0.3, data={"policy": "fixed", "lanes": 2}), 9)]
    assert set(found) == {2}
    assert 'effective weights {"a": 0.75, "b": 0.25}' in caplog.text


def test_too_many_sources_for_fixed_slots_are_refused(shards):
    many = {f"s{n}": shards["a"] for n in range(5)}
    with pytest.raises(ConfigError, match=r"policy=fixed: 5 sources cannot share 4 slots"):
        stream(many, data={"policy": "fixed", "lanes": 2}).quotas(0)


# --- content --------------------------------------------------------------------------------------------------------


def test_values_belong_to_their_keys(shards):
    for batch in take(stream({"a": shards["a"]}), 4):
        numbers = [int(key.split("#a")[1]) for key in batch.keys]
        assert batch.values["image"][:, 0, 0, 0].tolist() == numbers
        assert batch.values["image"].dtype == torch.uint8 and batch.values["image"].shape == (8, 3, 8, 8)
        assert batch.values["text"].dtype == torch.int64 and batch.values["text"].shape == (8, 12)
        assert batch.values["audio"].dtype == torch.float32 and batch.values["audio"].shape == (8, 80)
        assert [round(float(peak) / 0.18) for peak in batch.values["audio"].amax(1)] == [1 + n % 5 for n in numbers]


def test_samples_have_numbers_that_never_change_and_are_told_apart_across_sources(shards):
    seen: dict[str, set[int]] = {}
    for shard in (Shard(0, 2), Shard(1, 2)):
        for batch in take(
            stream(shards, seed=shard.rank, shard=shard, data={"workers": 2, "worker_kind": "threads"}), 60
        ):
            for key, number in zip(batch.keys, batch.ids[:, 0].tolist(), strict=True):
                seen.setdefault(key.split("#")[1], set()).add(number)
    assert all(len(numbers) == 1 for numbers in seen.values())
    assert len(set.union(*seen.values())) == len(seen) == 41


def test_a_sample_draws_anew_in_every_epoch_and_alike_on_any_rank(shards):
    one = [batch.seeds.tolist() for batch in take(stream({"a": shards["a"]}), 8)]
    two = [take(stream({"a": shards["a"]}, shard=Shard(rank, 2)), 8) for rank in range(2)]
    assert one == [first.seeds.tolist() + second.seeds.tolist() for first, second in zip(*two, strict=True)]
    assert len({seed for seeds in one for seed in seeds}) == 64


def test_long_sounds_are_cut_where_seed_and_epoch_say(tmp_path):
    path = write(tmp_path / "long", [sample(n, wav=wav(4, 4000)) for n in range(4)])
    first, again, other = (take(stream({"a": path}, batch=4, seed=seed), 2) for seed in (0, 0, 1))
    assert all(same(x, y) for x, y in zip(first, again, strict=True))

    def cuts(batch: Batch) -> dict[str, float]:
        return {key: float(value[0]) for key, value in zip(batch.keys, batch.values["audio"], strict=True)}

    assert len(set(cuts(first[0]).values())) == 4
    assert all(cuts(first[0])[key] != cuts(first[1])[key] for key in first[0].keys), "another cut in the next epoch"
    assert all(cuts(first[0])[key] != cuts(other[0])[key] for key in first[0].keys)


def test_captions_are_drawn_from_the_fields_that_have_some(tmp_path):
    facts = [{"long": f"long {n}", "several": [f"one {n}", f"two {n}"]} for n in range(8)]
    path = write(tmp_path / "s", [sample(n, json=json.dumps(facts[n]).encode()) for n in range(8)])
    source = {"a": SourceConfig(shards=path, captions={"txt": 1.0, "long": 1.0, "several": 2.0, "absent": 9.0})}
    made = ShardStream(DataConfig(sources=source), SPEC, 8, 0)
    tokens = Counter(tuple(row[1:2].tolist()) for batch in take(made, 60) for row in batch.values["text"])
    assert sorted(tokens.values())[-1] > 100
    shares = sorted(count / 480 for count in tokens.values())
    assert shares == pytest.approx([0.25, 0.25, 0.25, 0.25], abs=0.06)


def test_a_field_of_the_json_can_be_all_the_text_there_is(tmp_path):
    path = write(tmp_path / "s", [sample(n, txt=None, wav=None, json=b'{"alt": "a word"}') for n in range(8)])
    with pytest.raises(NoUsableSamples):
        stream({"a": path})
    source = {"a": SourceConfig(shards=path, captions={"alt": 1.0})}
    (batch,) = take(ShardStream(DataConfig(sources=source), SPEC, 8, 0), 1)
    assert len(batch.rows["text"]) == 8


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
    assert len(made.sources[0]) == 6
    assert "source mine: 3 of 9 samples are left out" in caplog.text and "3 image+facts" in caplog.text
    assert set(keys(take(made, 1))) == {f"{n:05d}" for n in (1, 2, 4, 5, 7, 8)}


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
def test_another_sample_takes_the_place_of_one_that_cannot_be_used(tmp_path, caplog, changes, cause):
    good = write(tmp_path / "good", [sample(n) for n in range(16)])
    path = write(tmp_path / "bad", [sample(n, **(changes if n == 11 else {})) for n in range(16)])
    whole = take(stream({"a": good}), 4)
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        found = take(stream({"a": path}, quarantine=tmp_path / "quarantine.jsonl"), 4)
    (record,) = caplog.records  # though it was met twice
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["source"] == "a" and entry["key"] == "00011" and cause in entry["cause"]
    for part in ("000001.tar", "'00011'", cause):
        assert part in record.getMessage()
    for before, after in zip(whole, found, strict=True):
        hit = [row for row, key in enumerate(before.keys) if key.endswith("#00011")]
        assert after.skipped == len(hit) and after.size == 8
        assert all(len(after.rows[name]) == 8 for name in MODALITIES), "with the same modalities"
        for row in range(8):
            assert (after.keys[row] == before.keys[row]) is (row not in hit), "nobody else moves"
    again = take(stream({"a": path}, data={"workers": 2, "worker_kind": "threads"}), 4)
    assert [digest(batch) for batch in again] == [digest(batch) for batch in found]


def test_a_sample_is_replaced_by_one_that_has_the_same(tmp_path):
    rows = [sample(n, wav=None if n % 2 else wav(n)) for n in range(32)]
    rows[5]["txt"] = b"\xff"
    rows[8]["txt"] = b"\xff"
    for batch in take(stream({"a": write(tmp_path / "s", rows)}, bad=1.0), 8):
        numbers = [int(key.split("#")[1]) for key in batch.keys]
        assert batch.rows["audio"].tolist() == [row for row, n in enumerate(numbers) if n % 2 == 0]
        assert 5 not in numbers and 8 not in numbers


def half_bad(tmp_path) -> str:
    return write(tmp_path / "half", [sample(n, **({"txt": b"\xff"} if n % 2 else {})) for n in range(64)])


def test_too_many_bad_samples_end_the_run(tmp_path):
    path = half_bad(tmp_path)
    with pytest.raises(
        TooManyBadSamples,
        match=r"\d+ samples could not .* \d+ rows, more than data.max_bad_share=0.01.*mmcl data check",
    ):
        take(stream({"a": path}, bad=0.01), 10)
    assert sum(batch.skipped for batch in take(stream({"a": path}, bad=1.0), 8)) >= 32


def test_a_share_of_0_allows_not_one(tmp_path):
    path = write(tmp_path / "one", [sample(n, **({"txt": b"\xff"} if n == 3 else {})) for n in range(8)])
    with pytest.raises(TooManyBadSamples, match="1 samples could not be used for 8 rows"):
        take(stream({"a": path}, bad=0.0), 1)


def test_a_rank_stops_alone_only_where_the_others_cannot_make_up_for_it(tmp_path):
    path = write(tmp_path / "s", [sample(n, **({"txt": b"\xff"} if n % 4 == 0 else {})) for n in range(64)])
    made = [stream({"a": path}, batch=64, bad=0.2, shard=Shard(rank, 2)) for rank in (0, 1)]
    for part in made:
        assert sum(batch.skipped for batch in take(part, 20)) > 0.2 * 640  # but less than of the rows of both
    made[0].judge(200, 1200)
    with pytest.raises(TooManyBadSamples, match="260 samples could not be used for 1280 rows"):
        made[0].judge(60, 80)


def test_a_source_that_is_bad_throughout_is_not_searched_for_ever(tmp_path):
    path = write(tmp_path / "bad", [sample(n, txt=b"\xff") for n in range(64)])
    with pytest.raises(TooManyBadSamples, match=r"source a: 8 samples in a row could not be used.*not UTF-8"):
        take(stream({"a": path}, bad=1.0), 1)


@pytest.mark.parametrize("data", [{}, {"workers": 2}], ids=["here", "processes"])
def test_a_damaged_shard_is_found_before_the_first_batch(tmp_path, data):
    path = Path(write(tmp_path / "cut", [sample(n) for n in range(20)])) / "000001.tar"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ShardDamaged, match=r"000001.tar: damaged at byte"):
        stream({"a": str(tmp_path / "cut")}, data=data)


def test_a_source_of_which_nothing_can_be_used_is_refused_by_name(tmp_path):
    path = write(tmp_path / "texts", [sample(n, png=None, wav=None) for n in range(4)])
    with pytest.raises(NoUsableSamples, match=r"source 'mine'.*none of its 4 samples"):
        stream({"mine": path})


def test_a_path_without_shards_is_refused(tmp_path):
    with pytest.raises(ShardMissing, match="nowhere"):
        stream({"a": str(tmp_path / "nowhere" / "{000000..000003}.tar")})


@pytest.mark.parametrize("data", [{}, {"workers": 1, "worker_kind": "threads"}, {"workers": 1}])
def test_a_shard_that_vanishes_during_the_run_is_named(tmp_path, data):
    made = stream({"a": write(tmp_path / "gone", [sample(n) for n in range(8)])}, data=data)
    (tmp_path / "gone" / "000000.tar").unlink()
    with pytest.raises(ShardMissing, match=r"000000.tar: there is no such shard"):
        take(made, 1)


def test_a_source_with_less_than_a_row_of_a_batch_is_refused(shards):
    with pytest.raises(ConfigError, match=r"data.sources.b would get 0.79 rows of a batch of 8: raise its weight"):
        stream(shards, a=10.0, b=1.1)


def test_a_batch_that_ranks_or_lanes_cannot_share_is_refused(shards):
    with pytest.raises(ConfigError, match="batch of 8 cannot be shared by 3 ranks"):
        stream(shards, shard=Shard(0, 3))
    with pytest.raises(ConfigError, match=r"data.lanes=3 does not divide train.batch_size=8"):
        stream(shards, data={"lanes": 3})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ConfigError, match=r"data.sources.a.weight"):
        DataConfig(sources={"a": SourceConfig(shards="x", weight=weight)})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"max_bad_share": 1.5}, "max_bad_share"),
        ({"window": 3, "slice_size": 4}, "window=3 is smaller"),
        ({"ahead": 0}, "ahead=0"),
        ({"workers": -1}, "workers=-1"),
        ({"worker_timeout_s": 0.0}, "worker_timeout_s=0"),
        ({"cache_gb": -1.0}, "cache_gb"),
        ({"sources": {"a": SourceConfig(shards="x", captions={"txt": 0.0})}}, "captions"),
    ],
)
def test_what_cannot_be_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        DataConfig(**({"sources": {"a": SourceConfig(shards="x")}} | fields))


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"b": 2.0}, "source b was"),
        ({"data": {"lanes": 4}}, "lanes was 1 and is 4"),
        ({"data": {"policy": "fixed"}}, "policy was 'stratified' and is 'fixed'"),
        ({"data": {"slice_size": 2}}, "slice_size was 1 and is 2"),
    ],
)
def test_what_would_change_the_order_is_refused_by_name_unless_a_new_one_is_asked_for(shards, caplog, changes, field):
    before = stream(shards)
    take(before, 3)
    after = stream(shards, **changes)
    with pytest.raises(CheckpointError, match=rf"{field}.*data\.reseed"):
        after.load_state_dict(before.state_dict())
    changes["data"] = {"reseed": True} | changes.get("data", {})
    first, second = (stream(shards, **changes) for _ in range(2))
    with caplog.at_level(logging.WARNING, "mmcl.data"):
        for made in (first, second):
            made.load_state_dict(before.state_dict())
    assert "a new order begins" in caplog.text
    assert first.state_dict()["rows"] == 24
    assert [digest(b) for b in take(first, 3)] == [digest(b) for b in take(second, 3)]
    third = stream(shards, **changes)
    third.load_state_dict(first.state_dict())
    assert [digest(b) for b in take(third, 1)] == [digest(b) for b in take(first, 1)], "and goes on from there"


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
def test_other_shards_are_another_order(tmp_path, other):
    before = stream({"a": write(tmp_path / "one", [sample(n) for n in range(8)])})
    after = stream({"a": write(tmp_path / "two", other)})
    with pytest.raises(CheckpointError, match=r"source a was .*fingerprint"):
        after.load_state_dict(before.state_dict())


def test_the_same_shards_elsewhere_are_the_same_order(tmp_path):
    before, after = (stream({"a": write(tmp_path / name, [sample(n) for n in range(8)])}) for name in ("one", "two"))
    take(before, 1)
    after.load_state_dict(before.state_dict())
    assert digest(take(after, 1)[0]) == digest(take(before, 1)[0])


# --- T9: shards that change under an index --------------------------------------------------------------------------


def test_shards_that_were_written_again_are_refused_where_an_index_was_named_and_indexed_where_none_was(tmp_path):
    path = write(tmp_path / "s", [sample(n) for n in range(16)])
    build_index(path, tmp_path / "index")
    named = {"a": SourceConfig(shards=path, index=str(tmp_path / "index"))}
    before = ShardStream(DataConfig(sources=named), SPEC, 8, 0)
    unnamed = stream({"a": path})
    (tmp_path / "t").mkdir()
    write(tmp_path / "t" / "s", [sample(n, prefix="other") for n in range(16)])
    (tmp_path / "t" / "s" / "000000.tar").replace(tmp_path / "s" / "000000.tar")
    with pytest.raises(IndexStale, match=r"000000.tar: written again after it was indexed.*mmcl data index"):
        ShardStream(DataConfig(sources=named), SPEC, 8, 0)
    with pytest.raises(CheckpointError, match=r"source a was .*fingerprint"):
        stream({"a": path}).load_state_dict(unnamed.state_dict())
    assert before.identity["source a"] == unnamed.identity["source a"]


def test_the_stream_is_pinned(shards):
    """A change here breaks every run that is to be resumed: raise order.VERSION with it."""
    (_, _, _, batch) = take(stream(shards, seed=5), 4)
    assert Counter(key.split("#")[1][0] for key in batch.keys) == {"a": 4, "b": 4}
    assert [key.split("#")[1] for key in batch.keys] == [
        "a00018",
        "b00002",
        "a00010",
        "b00003",
        "a00003",
        "b00006",
        "a00009",
        "b00008",
    ]


def test_an_index_of_other_shards_than_the_source_names_is_refused(tmp_path):
    one, two = (write(tmp_path / name, [sample(n) for n in range(8)]) for name in ("one", "two"))
    build_index(one, tmp_path / "index")
    (tmp_path / "link").symlink_to(one)
    for path in (one, str(tmp_path / "link"), f"{one}/{{000000..000000}}.tar"):
        source = SourceConfig(shards=path, index=str(tmp_path / "index"))
        take(ShardStream(DataConfig(sources={"a": source}), SPEC, 8, 0), 1)
    source = SourceConfig(shards=two, index=str(tmp_path / "index"))
    with pytest.raises(IndexStale, match=r"an index of other shards than .*two: of .*one/000000\.tar"):
        ShardStream(DataConfig(sources={"a": source}), SPEC, 8, 0)


def of_source(batch, prefix: str) -> list[str]:
    return [key for key in batch.keys if key.split("#")[1].startswith(prefix)]


@pytest.mark.parametrize("policy", ["stratified", "homogeneous"])
def test_three_sources_never_get_a_sample_again_before_its_epoch_is_over(tmp_path, policy):
    paths = {name: write(tmp_path / name, [sample(n, prefix=name) for n in range(200)]) for name in "abc"}
    data = {"policy": policy, "lanes": 8}
    made = stream(paths, batch=24, data=data, a=0.5, b=0.125, c=0.375)
    batches = take(made, 25)
    assert all(sum(bool(of_source(batch, name)) for name in "abc") == 1 for batch in batches) or policy == "stratified"
    unit = 24 if policy == "homogeneous" else 8
    for name, share in (("a", 0.5), ("b", 0.125), ("c", 0.375)):
        given_of = [of_source(batch, name) for batch in batches]
        assert abs(sum(map(len, given_of)) - 600 * share) < unit
        epoch: list[str] = []
        for keys in given_of:
            if len(epoch) + len(keys) > 200:
                break
            epoch += keys
        assert len(set(epoch)) == len(epoch) > 60


def test_lanes_that_nobody_chose_are_kept_by_a_run_that_changes_its_batch_size(tmp_path):
    paths = {name: write(tmp_path / name, [sample(n, prefix=name) for n in range(64)]) for name in "ab"}
    first = stream(paths, batch=64)
    assert first.lanes == 8
    seen = [key for batch in take(first, 1) for key in batch.keys]
    second = stream(paths, batch=32)
    assert second.lanes == 1
    second.load_state_dict(first.state_dict())
    assert second.lanes == 8
    seen += [key for batch in take(second, 2) for key in batch.keys]
    assert len(set(seen)) == 128
    with pytest.raises(CheckpointError, match="lanes was 8 and is 1"):
        stream(paths, batch=4).load_state_dict(first.state_dict())


def test_a_stream_stands_at_one_place(tmp_path):
    path = write(tmp_path / "s", [sample(n) for n in range(40)])
    made = stream({"a": path})
    batches = made.batches()
    next(batches)
    state = made.state_dict()
    expected = digest(next(batches))
    made.load_state_dict(state)
    with pytest.raises(RuntimeError, match="this iterator is over"):
        next(batches)
    again = made.batches()
    assert digest(next(again)) == expected
    other = made.batches()
    with pytest.raises(RuntimeError, match="this iterator is over"):
        next(again)
    assert made.state_dict()["rows"] == 16
    next(other)
    assert made.state_dict()["rows"] == 24


def test_another_way_to_decode_is_refused_and_a_window_without_slices_is_not(tmp_path):
    path = write(tmp_path / "s", [sample(n) for n in range(40)])
    made = stream({"a": path})
    take(made, 1)
    with pytest.raises(CheckpointError, match="decode was"):
        stream({"a": path}, data={"decode": DecodeConfig(images="pil")}).load_state_dict(made.state_dict())
    stream({"a": path}, data={"window": 64}).load_state_dict(made.state_dict())


def test_a_state_of_an_older_version_is_refused(tmp_path):
    path = write(tmp_path / "s", [sample(n) for n in range(40)])
    with pytest.raises(CheckpointError, match=r"lacks \['generation', 'identity', 'rows', 'taken', 'turns'\]"):
        stream({"a": path}).load_state_dict({"position": 3})
