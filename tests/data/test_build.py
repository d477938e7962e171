"""A build is the same bytes whoever packs it, in how many parts, and however often it is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_cases import build, content, folder, picture, png, put, read, table, wav

from mmcl.errors import ConfigError, DataError, NoUsableSamples, ShardMissing
from mmcl_data.build.img2dataset import adopt_img2dataset
from mmcl_data.build.items import Item
from mmcl_data.build.manifest import LISTED
from mmcl_data.check import check_source
from mmcl_data.scan import expand_shards, scan_shard


@pytest.fixture
def corpus(tmp_path):
    return folder(tmp_path / "c")


def test_a_manifest_tells_counts_shards_and_hashes(corpus, tmp_path):
    import hashlib

    manifest = build("folder", corpus, tmp_path / "out", per_shard=5)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"samples": 12, "image": 12, "text": 12, "skipped": 0}
    assert manifest["arguments"] == {"corpus": "folder", "samples_per_shard": 5, "max_shard_mb": 1024, "seed": 0}
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("000000.tar", 5),
        ("000001.tar", 5),
        ("000002.tar", 2),
    ]
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(read(tmp_path / "out")) == 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(content(tmp_path / "out"))


def test_workers_and_parts_change_no_byte(corpus, tmp_path):
    build("folder", corpus, tmp_path / "one", per_shard=2)
    told = []
    build("folder", corpus, tmp_path / "two", per_shard=2, workers=2, progress=lambda *done: told.append(done))
    assert told == [(done, 12) for done in range(0, 13, 2)]
    first = build("folder", corpus, tmp_path / "parts", per_shard=2, part=(2, 3))
    assert first == {"parts_missing": 4} and not (tmp_path / "parts" / "manifest.json").exists()
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.tar")) == ["000001.tar", "000004.tar"]
    assert build("folder", corpus, tmp_path / "parts", per_shard=2, part=(3, 3)) == {"parts_missing": 2}
    build("folder", corpus, tmp_path / "parts", per_shard=2, part=(1, 3))
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "parts")
    assert len(content(tmp_path / "one")) == 7


def test_parts_that_run_at_once_end_with_one_manifest(corpus, tmp_path):
    build("folder", corpus, tmp_path / "one", per_shard=1)
    for attempt in range(5):
        out = tmp_path / f"two{attempt}"
        with ThreadPoolExecutor(4) as pool:
            parts = [pool.submit(build, "folder", corpus, out, per_shard=1, part=(n + 1, 4)) for n in range(4)]
        assert any("counts" in part.result() for part in parts)
        assert content(tmp_path / "one") == content(out)


def test_the_seed_decides_the_order(corpus, tmp_path):
    orders = set()
    for seed in range(4):
        build("folder", corpus, tmp_path / str(seed), seed=seed)
        orders.add(tuple(read(tmp_path / str(seed))))
    assert len(orders) == 4


def start(*words):
    command = [str(Path(sys.executable).with_name("mmcl")), "data", "build", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_was_killed_goes_on_to_the_same_bytes(tmp_path, workers):
    root, out = folder(tmp_path / "c", 2400), tmp_path / "out"
    build("folder", root, tmp_path / "whole", per_shard=3)
    process = start("folder", "--root", root, "--out", out, "--samples-per-shard", 3, "--workers", workers)
    deadline = time.monotonic() + 100
    while len(list(out.glob("*.tar"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    begun = family(process.pid)
    assert bool(begun) == (workers > 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(alive, begun)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, begun)), "workers end with the process they work for"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 5 <= len(before) < 800 and not (out / "manifest.json").exists(), "it should have been killed in the middle"
    reported = {f"{path.stem}.tar" for path in (out / ".parts").glob("0*.json")}
    told = []
    build("folder", root, out, per_shard=3, progress=lambda *done: told.append(done))
    assert told[0] == (3 * len(reported), 2400) and reported
    assert all((out / name).stat().st_mtime_ns == before[name] for name in reported), "what was whole is left alone"
    assert content(out) == content(tmp_path / "whole")


def family(pid):
    """Processes that descend from `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_file_that_crashes_its_decoder_is_left_out_by_the_workers_that_it_kills(corpus, tmp_path, caplog):
    manifest = build("deadly", corpus, tmp_path / "out", workers=2, per_shard=3, deadly="1__004")
    ((key, why),) = manifest["skipped"]
    assert key == "1__004" and why.startswith("a process that converts it ends")
    assert read(tmp_path / "out").keys() == {f"{n % 3}__{n:03d}" for n in range(12)} - {"1__004"}
    assert "a process died while it packed shard" in caplog.text
    assert sorted(content(tmp_path / "out")) == [*(f"{n:06d}.tar" for n in range(4)), "manifest.json"]


def test_a_file_in_hand_when_a_process_dies_by_no_fault_of_its_own_is_kept(corpus, tmp_path):
    (tmp_path / "met").mkdir()
    words = {"unlucky": "1__004", "met": str(tmp_path / "met")}
    build("deadly", corpus, tmp_path / "out", workers=2, per_shard=3, **words)
    build("folder", corpus, tmp_path / "plain", per_shard=3)
    assert len(list((tmp_path / "met").iterdir())) == 3
    without = [{n: data for n, data in content(tmp_path / out).items() if n[0] == "0"} for out in ("out", "plain")]
    assert without[0] == without[1] and len(without[0]) == 4


def test_a_file_that_crashes_the_build_itself_is_left_out_by_the_next_start(corpus, tmp_path):
    words = {"deadly": "1__004", "per_shard": 3}
    script = f"""
import sys
from pathlib import Path
from build_cases import build
build("deadly", Path(sys.argv[1]), Path(sys.argv[2]), **{words})
"""
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "out")]
    dead = subprocess.run(command, cwd=Path(__file__).parent, timeout=100, capture_output=True, check=False)
    assert dead.returncode == -signal.SIGSEGV, dead.stderr
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    build("deadly", corpus, tmp_path / "out", **words)
    build("deadly", corpus, tmp_path / "two", workers=2, **words)
    assert content(tmp_path / "out") == content(tmp_path / "two") and len(read(tmp_path / "out")) == 11
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == stamp for name, stamp in before.items())


def test_a_shard_that_was_lost_since_is_built_again(corpus, tmp_path):
    build("folder", corpus, tmp_path / "whole", per_shard=2)
    build("folder", corpus, tmp_path / "out", per_shard=2, part=(1, 2))
    (tmp_path / "out" / "000002.tar").unlink()
    os.truncate(tmp_path / "out" / "000004.tar", 10)
    build("folder", corpus, tmp_path / "out", per_shard=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_arguments_or_another_corpus_are_refused(corpus, tmp_path):
    for out, part in ((tmp_path / "begun", (1, 2)), (tmp_path / "whole", (1, 1))):
        build("folder", corpus, out, per_shard=2, part=part)
        before = content(out)
        with pytest.raises(ConfigError, match="samples_per_shard was 2, is 3"):
            build("folder", corpus, out, per_shard=3)
        with pytest.raises(ConfigError, match="corpus was 'folder', is 'imagefolder'"):
            build("imagefolder", corpus, out, per_shard=2)
        put(corpus / "new.png", png(99))
        with pytest.raises(ConfigError, match="it had 12 items in another listing, has 13"):
            build("folder", corpus, out, per_shard=2)
        (corpus / "new.png").unlink()
        assert content(out) == before


def test_a_whole_build_is_left_as_it_is(corpus, tmp_path):
    first = build("folder", corpus, tmp_path / "out")
    stamp = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    put(tmp_path / "out" / ".parts" / "plan-killed" / "items", "left by a kill at the very end")
    assert build("folder", corpus, tmp_path / "out") == first
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == stamp
    assert not (tmp_path / "out" / ".parts").exists()


def test_a_manifest_that_is_no_build_is_not_taken_for_one(corpus, tmp_path):
    for text, error in (("{", DataError), ("[]", DataError), ("{}", ConfigError)):
        put(tmp_path / "out" / "manifest.json", text)
        with pytest.raises(error):
            build("folder", corpus, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_with_other_things_is_not_touched(corpus, tmp_path):
    put(tmp_path / "out" / "000000.tar", "precious")
    with pytest.raises(ConfigError, match="not empty"):
        build("folder", corpus, tmp_path / "out")
    assert content(tmp_path / "out") == {"000000.tar": b"precious"}


def test_no_shard_is_larger_than_it_may_be(tmp_path):
    for number in range(7):
        put(tmp_path / "c" / f"{number}.wav", wav(number, samples=150_000))  # 300 kB
        put(tmp_path / "c" / f"{number}.txt", str(number))
    put(tmp_path / "c" / "huge.wav", wav(1, samples=700_000))
    put(tmp_path / "c" / "huge.txt", "huge")
    manifest = build("folder", tmp_path / "c", tmp_path / "out", max_mb=1, per_shard=8)
    assert len(read(tmp_path / "out")) == 8
    shards = manifest["shards"]
    assert all(re.fullmatch(r"000000(_00\d)?\.tar", shard["name"]) for shard in shards)
    assert sum(shard["samples"] for shard in shards) == 8 and len(shards) >= 4
    assert all(shard["bytes"] <= 2**20 or shard["samples"] == 1 for shard in shards)
    assert sum(shard["bytes"] > 2**20 for shard in shards) == 1, "a single sample may be larger"
    assert [Path(path).name for path in expand_shards(str(tmp_path / "out"))] == [shard["name"] for shard in shards]


def test_a_shard_is_as_large_as_its_limit_and_no_larger(tmp_path):
    rate = 2 * 524_288 - 44
    for number, size in enumerate([rate // 4 - 20_000, rate // 4 - 10_000]):
        put(tmp_path / "c" / f"{number}.wav", wav(number, samples=size))
        put(tmp_path / "c" / f"{number}.txt", str(number))
    (shard,) = build("folder", tmp_path / "c", tmp_path / "out", max_mb=1)["shards"]
    assert shard["bytes"] <= 2**20 and shard["samples"] == 2
    assert scan_shard(tmp_path / "out" / "000000.tar").bytes == shard["bytes"]


def test_duplicates_are_reported_and_kept(tmp_path):
    for name in ("a", "b", "c", "d"):
        put(tmp_path / "c" / f"{name}.png", png(1 if name in "ac" else ord(name)))
        put(tmp_path / "c" / f"{name}.wav", wav(1))
    manifest = build("folder", tmp_path / "c", tmp_path / "out", per_shard=1)
    found = manifest["duplicates"]
    assert (found["image"]["groups"], found["image"]["surplus"]) == (1, 1)
    assert (found["audio"]["groups"], found["audio"]["surplus"]) == (1, 3)
    assert sorted(found["image"]["keys"][0]) == ["a", "c"] and sorted(found["audio"]["keys"][0]) == list("abcd")
    assert len(read(tmp_path / "out")) == 4


def test_a_second_sample_of_one_key_is_left_out(tmp_path):
    put(tmp_path / "c" / "a.png", png(1))
    table(tmp_path / "c" / "m.csv", "image,caption,key", ["a.png", "x", "k"], ["a.png", "y", "k"])
    manifest = build("manifest", tmp_path / "c", tmp_path / "out", manifest=str(tmp_path / "c" / "m.csv"))
    assert manifest["skipped"] == [["k", "a second sample of this key: a.png"]]
    assert read(tmp_path / "out")["k"]["txt"] == "x"


def test_all_that_is_left_out_is_counted_and_the_first_are_named(tmp_path):
    rows = [["a.png", "x"], *([f"gone{number}.png", "x"] for number in range(LISTED + 20))]
    put(tmp_path / "c" / "a.png", png(1))
    table(tmp_path / "c" / "m.csv", "image,caption", *rows)
    words = {"manifest": str(tmp_path / "c" / "m.csv")}
    manifest = build("manifest", tmp_path / "c", tmp_path / "out", **words)
    assert manifest["counts"]["skipped"] == LISTED + 20 and len(manifest["skipped"]) == LISTED


@pytest.mark.parametrize(("count", "per_shard"), [(5, 2), (300, 150)])
def test_a_corpus_of_which_nothing_is_any_good_is_an_error_with_the_first_reasons(tmp_path, count, per_shard):
    table(tmp_path / "c" / "m.csv", "image,caption", *([f"gone{number}.png", "x"] for number in range(count)))
    words = {"manifest": str(tmp_path / "c" / "m.csv"), "per_shard": per_shard}
    told = []
    for _ in range(2):
        with pytest.raises(NoUsableSamples, match=r"none is any good; 0000\d+: gone\d+.png is missing"):
            build("manifest", tmp_path / "c", tmp_path / "out", progress=lambda *done: told.append(done), **words)
    assert max(told) == (min(count, per_shard if count > 100 else count), count), "it is given up after the first shard"
    for number in range(count):
        put(tmp_path / "c" / f"gone{number}.png", png(number))
    assert build("manifest", tmp_path / "c", tmp_path / "out", **words)["counts"]["samples"] == count


def test_options_out_of_range_are_refused(corpus, tmp_path):
    for words in ({"per_shard": 0}, {"max_mb": 0}, {"seed": -1}, {"workers": 0}, {"part": (0, 2)}, {"part": (3, 2)}):
        with pytest.raises(ConfigError):
            build("folder", corpus, tmp_path / "out", **words)


def test_an_item_is_the_same_after_a_line_of_json():
    item = Item(key="k", files=("a/ä.png",), captions=("x\n\u2028",), facts={"n": [1, None]}, label=0, row=3)
    assert "\n" not in item.dump() and Item.load(item.dump()) == item


def img2dataset(root: Path, shards: int = 2, per_shard: int = 3) -> Path:
    """What img2dataset 1.47 leaves with `--output_format webdataset`: tar, stats and table of each shard."""
    import io
    import tarfile

    for shard in range(shards):
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(per_shard):
                key = f"{shard:05d}{number:04d}"
                facts = {"caption": "x", "url": f"http://x/{key}", "key": key, "status": "success", "exif": "{}",
                         "error_message": None, "width": 8, "height": 8, "sha256": "0"}  # fmt: skip
                for extension, data in (
                    ("jpg", picture(number, "JPEG")), ("json", json.dumps(facts, indent=4).encode()), ("txt", b"x"),
                ):  # fmt: skip
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mtime = len(data), 1_700_000_000
                    tar.addfile(info, io.BytesIO(data))
        stats = {"count": per_shard + 1, "successes": per_shard, "failed_to_download": 1, "failed_to_resize": 0,
                 "duration": 0.1, "start_time": 1.0, "end_time": 2.0,
                 "status_dict": {"success": per_shard, "HTTP Error 404: Not Found": 1}}  # fmt: skip
        put(root / f"{shard:05d}_stats.json", json.dumps(stats, indent=4))
        put(root / f"{shard:05d}.parquet", b"PAR1")
    return root


def test_what_img2dataset_wrote_is_taken_as_it_is(tmp_path):
    root = img2dataset(tmp_path / "i")
    before = content(root)
    manifest = adopt_img2dataset(root, workers=2)
    after = content(root)
    assert json.loads(after.pop("manifest.json")) == manifest and after == before
    assert manifest["counts"] == {"samples": 6, "facts": 6, "image": 6, "text": 6, "skipped": 0}
    assert manifest["downloads"] == {"HTTP Error 404: Not Found": 2, "success": 6}
    assert manifest["duplicates"]["image"]["surplus"] == 4
    problems = []
    assert check_source(str(root), None, problems.append).samples == 6 and not problems


def test_a_download_that_is_not_whole_is_refused_with_the_shards_and_the_remedy(tmp_path):
    root = img2dataset(tmp_path / "i", shards=4)
    os.truncate(root / "00000.tar", 3000)
    (root / "00001_stats.json").unlink()
    put(root / "00002_stats.json", '{"successes": 7}')
    with pytest.raises(DataError) as caught:
        adopt_img2dataset(root)
    said = str(caught.value)
    assert said.startswith("3 of 4 shards are not whole") and "--incremental_mode incremental" in said
    assert "00000.tar: damaged" in said and "no 00001_stats.json" in said and "statistics say 7" in said
    assert not (root / "manifest.json").exists()


def test_img2datasets_files_are_a_folder(tmp_path):
    for number in range(3):
        key = f"i/00000/00000000{number}"
        put(tmp_path / f"{key}.jpg", picture(number, "JPEG"))
        put(tmp_path / f"{key}.txt", "x")
        put(tmp_path / f"{key}.json", '{"status": "success"}')
    put(tmp_path / "i/00000_stats.json", '{"successes": 3}')
    with pytest.raises(ConfigError, match="mmcl data build folder"):
        adopt_img2dataset(tmp_path / "i")
    assert build("folder", tmp_path / "i", tmp_path / "out")["counts"]["samples"] == 3
    assert read(tmp_path / "out").keys() == {f"00000__00000000{number}" for number in range(3)}
    with pytest.raises(ShardMissing, match="--output_format webdataset"):
        adopt_img2dataset(tmp_path / "out" / "nothing")


def test_the_command_builds_reports_progress_and_says_how_to_go_on(corpus, tmp_path):
    put(corpus / "alone.txt", "x")
    process = start("folder", "--root", corpus, "--out", tmp_path / "out", "--samples-per-shard", 5, "--workers", 2)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads(out) == {
        "out": str(tmp_path / "out"), "shards": 3, "duplicates": {"image": 0},
        "counts": {"samples": 12, "image": 12, "text": 12, "skipped": 1},
    }  # fmt: skip
    assert re.search(r"sample 12/12, [\d.]+/s", said)
    assert (
        "left out: alone: caption without a picture or sound" in said and f"mmcl data check {tmp_path / 'out'}" in said
    )
