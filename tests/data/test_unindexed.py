"""Shards that nobody indexed: read in turn, exactly resumed, and indexed when all were seen."""

import json
import os
import shutil
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from data_cases import SPEC, digest, sample, take, write

from mmcl.dist import Shard
from mmcl.errors import CheckpointError, ConfigError, IndexStale, NoUsableSamples, ShardDamaged
from mmcl_data.blobs import Reading
from mmcl_data.index import build_index, open_index, read_part
from mmcl_data.sources import Source, SourceConfig
from mmcl_data.stream import DataConfig, ShardStream
from mmcl_data.unindexed import ROW_BITS, ShardOrder, growing_index

SIZES = (7, 12, 3, 9, 5)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of different sizes; their samples are numbered through."""
    numbers = iter(range(sum(SIZES)))
    for number, size in enumerate(SIZES):
        write(tmp_path / f"part{number}", [sample(next(numbers)) for _ in range(size)], size)
        (tmp_path / f"part{number}" / "000000.tar").rename(tmp_path / f"{number}.tar")
        (tmp_path / f"part{number}").rmdir()
    return tmp_path


class Server:
    """A web server of one folder that knows ranges and notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                path = Path(self.translate_path(self.path))
                if not path.is_file():
                    self.send_error(404)
                    return
                start, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
                data = path.read_bytes()
                part = data[int(start) : int(end) + 1 if end else None]
                asked.append(f"{path.name} {start}")
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *_: Any) -> None:
                pass

        self.asked = asked
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
        Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def shards(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{{0..{len(SIZES) - 1}}}.tar"


@pytest.fixture
def server(shards: Path) -> Any:
    pytest.importorskip("aiohttp")
    serving = Server(shards)
    yield serving
    serving.http.shutdown()
    serving.http.server_close()


def remote(spec: str, home: Path, *, batch: int = 4, shard: Shard | None = None, **data: Any) -> ShardStream:
    config = DataConfig(sources={"far": SourceConfig(shards=spec, index=data.pop("index", ""))}, **data)
    return ShardStream(config, SPEC, batch, 0, shard or Shard(0, 1), indexes=home)


def lane_of(order: ShardOrder, lane: int, places: int) -> list[tuple[int, int]]:
    samples, epochs = order.at(np.full(places, lane), np.arange(places))
    return list(zip(samples.tolist(), epochs.tolist(), strict=True))


def order_of(folder: Path, home: Path, lanes: int, usable: bool = True) -> ShardOrder:
    index = growing_index(f"{folder}/{{0..4}}.tar", home, Reading())
    return ShardOrder(index, np.full(32, usable), lanes=lanes, seed=0, source=0, ahead=False)


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_every_epoch_has_every_sample_once_however_many_lanes_share_it(
    shards: Path, tmp_path: Path, lanes: int
) -> None:
    order = order_of(shards, tmp_path / "home", lanes)
    given = [found for lane in range(lanes) for found in lane_of(order, lane, 4 * sum(SIZES))]
    everything = sorted(shard << ROW_BITS | row for shard, size in enumerate(SIZES) for row in range(size))
    for epoch in (0, 1, 2):
        assert sorted(found for found, of in given if of == epoch) == everything


def test_a_lane_finishes_a_shard_before_it_takes_another_and_every_epoch_goes_its_own_way(
    shards: Path, tmp_path: Path
) -> None:
    order = order_of(shards, tmp_path / "home", 1)
    first, second = [[found for found, of in lane_of(order, 0, 2 * sum(SIZES)) if of == epoch] for epoch in (0, 1)]
    for epoch in (first, second):
        turns = [epoch[at] >> ROW_BITS for at in range(len(epoch)) if not at or epoch[at - 1] >> 32 != epoch[at] >> 32]
        assert sorted(turns) == [0, 1, 2, 3, 4]
    assert first != second
    assert [found for found in first if found >> ROW_BITS == 1] != sorted(found for found in first if found >> 32 == 1)


def test_places_can_be_asked_for_in_any_order_and_are_the_same_in_a_new_process(shards: Path, tmp_path: Path) -> None:
    forwards = lane_of(order_of(shards, tmp_path / "a", 2), 1, 50)
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[3]); from pathlib import Path;"
        "from test_unindexed import order_of; import numpy as np;"
        "order = order_of(Path(sys.argv[1]), Path(sys.argv[2]), 2);"
        "places = np.arange(49, -1, -1); found = order.at(np.full(50, 1), places);"
        "print(json.dumps([found[0].tolist()[::-1], found[1].tolist()[::-1]]))"
    )
    command = [sys.executable, "-c", code, str(shards), str(tmp_path / "b"), os.path.dirname(__file__)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [list(found) for found in zip(*told, strict=True)] == [list(found) for found in forwards]


def test_one_epoch_without_an_index_has_the_samples_of_one_with_an_index(server: Server, tmp_path: Path) -> None:
    rows = sum(SIZES)
    without = take(remote(server.shards, tmp_path / "home", batch=rows, lanes=1), 1)[0]
    assert (tmp_path / "home" / "far" / "index.json").exists()  # all shards were seen
    within = take(remote(server.shards, tmp_path / "home", batch=rows, lanes=1), 1)[0]
    assert sorted(without.keys) == sorted(within.keys)
    assert len(set(without.keys)) == rows
    assert without.keys != within.keys


def test_the_index_that_grew_is_the_one_that_is_built(server: Server, tmp_path: Path) -> None:
    take(remote(server.shards, tmp_path / "home", batch=sum(SIZES), lanes=1), 1)
    built = build_index(server.shards, tmp_path / "built")
    grown = open_index(tmp_path / "home" / "far")
    assert grown.fingerprint == built.fingerprint
    assert [grown.entry(number) for number in range(len(grown))] == [
        built.entry(number) for number in range(len(built))
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_exactly_for_other_ranks_and_other_machines(server: Server, tmp_path: Path, workers: int) -> None:
    whole = [digest(batch) for batch in take(remote(server.shards, tmp_path / "a", lanes=2), 12)]
    begun = remote(server.shards, tmp_path / "b", lanes=2, workers=workers, worker_kind="threads")
    take(begun, 5)
    state = json.loads(json.dumps(begun.state_dict()))
    for home in ("b", "c"):  # with the parts of the index, and without
        again = remote(server.shards, tmp_path / home, lanes=2, workers=workers, worker_kind="threads")
        again.load_state_dict(state)
        assert [digest(batch) for batch in take(again, 7)] == whole[5:]
    keys = [batch.keys for batch in take(remote(server.shards, tmp_path / "a2", lanes=2), 12)]
    halves = [remote(server.shards, tmp_path / "d", lanes=2, shard=Shard(rank, 2)) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(state)
    shared = [left.keys + right.keys for left, right in zip(*(take(half, 7) for half in halves), strict=True)]
    assert shared == keys[5:]


def test_a_run_that_began_without_an_index_goes_on_without_when_there_is_one(server: Server, tmp_path: Path) -> None:
    whole = take(remote(server.shards, tmp_path / "a", lanes=2), 25)
    begun = remote(server.shards, tmp_path / "b", lanes=2)
    take(begun, 20)
    assert open_index(tmp_path / "b" / "far")
    again = remote(server.shards, tmp_path / "b", lanes=2)
    again.load_state_dict(begun.state_dict())
    assert [batch.keys for batch in take(again, 5)] == [batch.keys for batch in whole[20:]]


def test_a_run_with_an_index_does_not_go_on_without(server: Server, tmp_path: Path) -> None:
    build_index(server.shards, tmp_path / "built")
    begun = remote(server.shards, tmp_path / "home", index=str(tmp_path / "built"))
    take(begun, 1)
    with pytest.raises(CheckpointError, match=r"source far was 'number 0 weight 1.0 fingerprint"):
        remote(server.shards, tmp_path / "home", index=str(tmp_path / "gone")).load_state_dict(begun.state_dict())


def test_a_cache_reads_each_shard_once(server: Server, tmp_path: Path) -> None:
    made = remote(server.shards, tmp_path / "home", cache=str(tmp_path / "cache"))
    take(made, 4 * sum(SIZES) // 4)
    reads = [line for line in server.asked if line.endswith(" 0")]
    assert sorted(reads) == sorted(f"{number}.tar 0" for number in range(len(SIZES)))


def test_more_lanes_than_shards_and_damage_and_nothing_to_learn_from_are_named(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"5 shards without an index are fewer than data\.lanes=8"):
        remote(server.shards, tmp_path / "a", batch=8, lanes=8)
    with pytest.raises(NoUsableSamples, match="none of 5 shards"):
        lane_of(order_of(shards, tmp_path / "b", 1, usable=False), 0, 1)
    whole = (shards / "3.tar").read_bytes()
    (shards / "3.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardDamaged, match="cut off"):
        take(remote(server.shards, tmp_path / "c"), 9)


def test_a_shard_that_was_written_again_is_not_read_as_if_it_were_the_one_that_was_scanned(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    begun = remote(server.shards, tmp_path / "home", lanes=1)
    take(begun, 1)
    home = tmp_path / "home"
    write(tmp_path / "new", [sample(number) for number in range(40, 60)], 20)
    for number in range(len(SIZES)):
        (shards / f"{number}.tar").write_bytes((tmp_path / "new" / "000000.tar").read_bytes())
    with pytest.raises(IndexStale, match=rf"tar: written again.* remove {home / 'far'}$"):
        remote(server.shards, home, lanes=1)
    shutil.rmtree(home / "far")
    assert len(take(remote(server.shards, home, lanes=1), 1)) == 1


def few_usable(folder: Path, shards: int, usable: set[int]) -> None:
    """Shards of three samples, of which the usable ones have an image."""
    for number in range(shards):
        rows = [sample(3 * number + n, wav=None, **({} if number in usable else {"png": None})) for n in range(3)]
        write(folder / "made", rows)
        (folder / "made" / "000000.tar").rename(folder / f"{number}.tar")
        shutil.rmtree(folder / "made")


def test_lanes_go_past_shards_without_a_usable_sample(tmp_path: Path) -> None:
    few_usable(tmp_path, 16, {3, 11})
    index = growing_index(f"{tmp_path}/{{0..15}}.tar", tmp_path / "home", Reading())
    usable = np.array([bool(bits & 1) for bits in range(32)])
    order = ShardOrder(index, usable, lanes=8, seed=0, source=0, ahead=False)
    given = [found for lane in range(8) for found in lane_of(order, lane, 30)]
    expected = sorted(shard << ROW_BITS | row for shard in (3, 11) for row in range(3))
    for epoch in range(5):
        assert sorted(found for found, of in given if of == epoch) == expected


def test_each_shard_is_read_once_to_count_any_number_of_epochs(tmp_path: Path, monkeypatch: Any) -> None:
    few_usable(tmp_path, 70, set(range(70)))
    read: list[Path] = []

    def reading(file: Path, *more: Any) -> Any:
        read.append(file)
        return read_part(file, *more)

    index = growing_index(f"{tmp_path}/{{0..69}}.tar", tmp_path / "home", Reading())
    monkeypatch.setattr("mmcl_data.unindexed.read_part", reading)
    for lanes in (2, 7):  # as a run that went on with another order would
        order = ShardOrder(index, np.full(32, True), lanes=lanes, seed=0, source=0, ahead=False)
        assert order.at(np.array([0]), np.array([30 * 210 // lanes]))[1][0] >= 29
    assert len(read) <= 2 * 70 + 2  # before and after it is scanned, and the shard that a lane is in


def test_read_only_shards_have_their_index_in_the_run(shards: Path, tmp_path: Path) -> None:
    (shards / ".mmcl-index").write_text("not a folder")
    source = Source("near", SourceConfig(shards=f"{shards}/*.tar"), 0, Reading(), home=tmp_path / "home")
    assert len(source) == sum(SIZES)
    assert source.index.folder == tmp_path / "home" / "near"
