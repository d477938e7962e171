"""`check_source` finds every problem in one pass and says where it lies."""

import io
import os
import tarfile

import numpy as np
import pytest
import soundfile
from data_cases import SPEC
from PIL import Image
from webdataset import TarWriter

from mmcl.errors import DataError, ShardMissing
from mmcl_data import blobs
from mmcl_data.check import Problem, check_source
from mmcl_data.decode.image import decode_image


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "PNG")
    return out.getvalue()


def flac(seconds: float = 0.2) -> bytes:
    out = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, round(16000 * seconds))
    soundfile.write(out, wave, 16000, format="FLAC")
    return out.getvalue()


def write(path, **samples):
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})


def check(folder):
    problems: list[Problem] = []
    return check_source(str(folder), None, problems.append), problems


GOOD = {
    "a": {"png": png(), "txt": b"a red square"},
    "b": {"flac": flac(), "txt": b"noise", "json": b"{}"},
    "c": {"png": png(), "flac": flac()},
    "d": {"png": png(), "cls": b"3"},
}


def test_good_shards_have_no_problems_and_are_counted_by_combination(tmp_path):
    write(tmp_path / "0.tar", **GOOD)
    report, problems = check(tmp_path)
    assert not problems and report.problems == 0
    assert (report.shards, report.samples) == (1, 4)
    assert report.combinations == {"image+text": 1, "audio+facts+text": 1, "audio+image": 1, "class+image": 1}


def test_each_problem_is_reported_with_shard_key_and_cause(tmp_path):
    bad = {
        "broken": {"png": png()[:-30], "txt": b"cut"},
        "latin": {"png": png(), "txt": b"caf\xe9"},
        "lonely": {"txt": b"a caption of nothing"},
        "list": {"png": png(), "txt": b"x", "json": b"[]"},
        "two": {"png": png(), "webp": png(), "txt": b"x"},
        "label": {"png": png(), "cls": b"dog"},
    }
    write(tmp_path / "1.tar", **GOOD, **bad)
    report, problems = check(tmp_path)
    assert {problem.shard for problem in problems} == {str(tmp_path / "1.tar")}
    by_key = {key: [p.cause for p in problems if p.key == key] for key in bad}
    assert by_key["broken"][0].startswith("png: not a readable JPEG, PNG or WebP image")
    assert by_key["latin"][0] == "txt: the caption is not UTF-8: byte 0xe9 at offset 3"
    assert by_key["lonely"] == ["no two of image, text and audio to learn from, and no labelled one (members: txt)"]
    assert by_key["list"] == ["json: the json member holds a list, not an object"]
    assert by_key["two"] == ["webp: a second image in one sample"]
    assert by_key["label"][0] == "cls: a class is a number in ASCII digits, not b'dog'"
    assert report.bad_samples == len(bad) and report.problems == len(problems) == 9
    assert not {p.key for p in problems} & GOOD.keys()


def test_an_image_that_only_one_decoder_takes_is_a_problem_that_names_the_other(tmp_path):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    half = out.getvalue()[: len(out.getvalue()) // 2]
    members = {"a": out.getvalue(), "b": half + bytes(len(half)), "c": half}
    write(tmp_path / "0.tar", **{key: {"jpg": data, "txt": b"noise"} for key, data in members.items()})
    assert decode_image(members["b"], SPEC, decoder="pil").shape == (3, 8, 8)
    with pytest.raises(DataError):
        decode_image(members["b"], SPEC, decoder="native")
    _, problems = check(tmp_path)
    causes = {key: [p.cause for p in problems if p.key == key and "image" in p.cause][0:1] for key in members}
    assert not causes["a"]
    assert causes["b"][0].startswith("jpg: ") and "the decoder `native` refuses it, `pil` takes it" in causes["b"][0]
    assert causes["c"][0].startswith("jpg: ") and "the decoder" not in causes["c"][0], "both do"


def test_a_damaged_shard_does_not_hide_the_others(tmp_path):
    for name in ("0.tar", "1.tar", "2.tar"):
        write(tmp_path / name, **GOOD)
    os.truncate(tmp_path / "1.tar", 700)
    report, problems = check(tmp_path)
    assert (report.shards, report.damaged_shards, report.samples) == (3, 1, 8)
    assert [(p.shard, p.key) for p in problems] == [(str(tmp_path / "1.tar"), None)]
    assert (problems[0].offset, problems[0].cause) == (700, "cut off inside the payload of 'a.png'")
    assert str(problems[0]) == f"{tmp_path}/1.tar: shard: byte 700: cut off inside the payload of 'a.png'"


def test_a_problem_has_the_offset_of_its_member_or_of_its_sample(tmp_path):
    write(tmp_path / "0.tar", **GOOD, bad={"png": png()[:-30], "cls": b"3"})
    with tarfile.open(tmp_path / "0.tar") as tar:
        headers = {member.name: member.offset for member in tar}
    _, problems = check(tmp_path)
    assert [(p.offset, p.cause[:4]) for p in problems] == [(headers["bad.png"], "png:"), (headers["bad.cls"], "no t")]
    assert headers["bad.png"] > headers["bad.cls"] > 0


def test_what_is_too_large_or_of_no_kind_is_not_read(tmp_path, monkeypatch):
    write(tmp_path / "0.tar", a={**GOOD["a"], "json": b" " * 1_000_001, "npy": b"x" * 2_000_000}, b={"npy": b"x"})
    asked: list[int] = []
    read = blobs.pread
    monkeypatch.setattr(blobs, "pread", lambda file, size, at: asked.append(size) or read(file, size, at))
    report, problems = check(tmp_path)
    assert [p.cause for p in problems if p.key == "a"] == ["json: 1000001 bytes are over the limit of 1000000"]
    assert (report.bad_samples, report.unread["npy"]) == (2, 2) and max(asked) < 20_000


def test_processes_find_the_same_in_the_same_order(tmp_path):
    for number in range(7):
        write(tmp_path / f"{number}.tar", **GOOD, **{f"bad{number}": {"png": png()[:-30], "txt": b"\xff"}})
    os.truncate(tmp_path / "3.tar", 700)
    told: list[tuple[int, int]] = []
    alone, first = check(tmp_path)
    found: list[Problem] = []
    together = check_source(str(tmp_path), None, found.append, workers=2, told=lambda done, of: told.append((done, of)))
    assert (together, found) == (alone, first) and len(found) == 6 * 3 + 1
    assert told == [(number, 7) for number in range(1, 8)]


def test_a_long_sound_that_is_cut_off_is_found(tmp_path):
    whole = flac(30)
    write(tmp_path / "0.tar", a={"flac": whole[: int(len(whole) * 0.8)], "txt": b"noise"})
    _, problems = check(tmp_path)
    assert problems[0].cause.startswith("flac: ")


def test_members_that_nothing_reads_are_counted_and_never_decoded(tmp_path):
    write(tmp_path / "0.tar", a={**GOOD["a"], "pyd": b"cos\nsystem\n(S'touch canary'\ntR.", "seg.png": b"x"})
    report, problems = check(tmp_path)
    assert not problems
    assert report.unread == {"pyd": 1, "seg.png": 1, "": 0}


def test_a_source_that_is_not_there_is_an_error_and_not_a_clean_report(tmp_path):
    with pytest.raises(ShardMissing):
        check(tmp_path)
