"""Shards are written whole, once, and in the same bytes every time."""

import tarfile
import time

import pytest
from test_stream import sample

from mmcl.errors import ConfigError
from mmcl_data.blobs import Blobs
from mmcl_data.build.shards import bounded_shards, write_shards
from mmcl_data.scan import expand_shards, read_sample, scan_shard

SAMPLES = [sample(n) for n in range(7)]


def test_what_was_written_is_read(tmp_path):
    written = write_shards(SAMPLES, tmp_path / "s", samples_per_shard=3)
    assert [(shard.name, shard.samples) for shard in written] == [
        ("000000.tar", 3),
        ("000001.tar", 3),
        ("000002.tar", 1),
    ]
    found = []
    for path in expand_shards(str(tmp_path / "s")):
        for entry in scan_shard(path).samples:
            found.append({"__key__": entry.key, **read_sample(Blobs(), path, entry)})
    assert found == [{"__key__": s["__key__"], **{k: s[k] for k in s if k != "__key__"}} for s in SAMPLES]


def test_the_description_is_of_the_file(tmp_path):
    import hashlib

    for shard in write_shards(SAMPLES, tmp_path / "s", samples_per_shard=3):
        data = (tmp_path / "s" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_full_last_shard_is_followed_by_none(tmp_path):
    assert [shard.samples for shard in write_shards(SAMPLES[:6], tmp_path / "s", samples_per_shard=3)] == [3, 3]
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_the_same_samples_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    first = write_shards(SAMPLES, tmp_path / "one", samples_per_shard=3)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write_shards(iter(SAMPLES), tmp_path / "two", samples_per_shard=3)
    assert first == second
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname) for m in tar} == {(0, "mmcl", "mmcl")}


def test_the_bytes_of_a_shard_stay_what_they_were(tmp_path):
    import hashlib

    samples = [{"__key__": f"ä/{number}", "txt": b"x" * number, "json": b"{}"} for number in range(1, 4)]
    first, second = write_shards(samples, tmp_path / "s", samples_per_shard=2)
    assert (first.sha256, second.sha256) == (
        "00aca6bfe6299d96babe53bdbcbfaaff74d6bcfe142d45ba727a85070ca7f22a",
        "054ee1f4a7aaf9cbf63fb92dbf418951306024d9e06a6d3cf7b6be0f5d1b5c78",
    )
    (tmp_path / "b").mkdir()
    parts = list(bounded_shards(samples[:2], tmp_path / "b", "000000", 2**20))
    assert [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path, _ in parts] == [
        ("000000.tar", first.sha256)
    ]


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"not empty.*not overwritten"):
        write_shards(SAMPLES, tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "s").mkdir()
    assert len(write_shards(SAMPLES, tmp_path / "s")) == 1


def test_a_build_that_fails_leaves_no_shards_and_the_next_one_succeeds(tmp_path):
    def dying():
        yield from SAMPLES[:4]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shards(dying(), tmp_path / "s", samples_per_shard=2)
    assert not (tmp_path / "s").exists()
    assert [shard.samples for shard in write_shards(SAMPLES, tmp_path / "s")] == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_nothing_to_write_is_an_error_and_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="no sample"):
        write_shards([], tmp_path / "s")
    assert not (tmp_path / "s").exists()
