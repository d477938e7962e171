"""The stamps of Tux Paint become shards that hold every stamp, the same bytes each time."""

import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcl.errors import ConfigError, MissingExtra, NoUsableSamples
from mmcl_data.blobs import Blobs
from mmcl_data.build.tuxpaint import STAMPS, build_tuxpaint
from mmcl_data.check import check_source
from mmcl_data.scan import expand_shards, read_sample, scan_shard

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="100pt" height="50pt">
<rect width="60" height="60" fill="blue"/></svg>"""


@pytest.fixture
def stamps(tmp_path):
    root = tmp_path / "stamps"
    birds = root / "animals" / "birds"
    birds.mkdir(parents=True)

    def drawing(name, size=(400, 100)):
        Image.new("RGBA", size, (255, 0, 0, 255)).save(birds / f"{name}.png")

    drawing("crow")
    (birds / "crow.txt").write_text("A crow. \nde.utf8=Eine Krähe.\nxx.utf8=\nca@valencia.utf8=Un corb.\nnonsense\n")
    soundfile.write(birds / "crow.wav", np.full((4410, 2), 0.25), 44100)
    soundfile.write(birds / "crow_desc_de.ogg", np.full(4410, 0.25), 44100)
    drawing("v1.5", (40, 60))
    (birds / "v1.5.txt").write_text("A crow.")
    soundfile.write(birds / "v1.5.wav", np.zeros(100), 44100)
    (root / "blue.svg").write_text(SVG)
    (root / "blue.txt").write_text("A blue square.")
    drawing("nameless")
    drawing("crow_mirror")
    (birds / "gone.txt").write_text("A caption.")
    (birds / "bad.png").write_bytes(b"\x89PNG nothing")
    (birds / "bad.txt").write_text("A bad drawing.")
    (birds / "crow.dat").write_text("noflip")
    return root


def read(out) -> dict[str, dict[str, bytes]]:
    samples = {}
    for shard in expand_shards(str(out / "train")):
        for sample in scan_shard(shard).samples:
            samples[sample.key] = read_sample(Blobs(), shard, sample)
    return samples


def test_every_stamp_with_a_drawing_and_a_caption_is_there(stamps, tmp_path):
    manifest = build_tuxpaint(stamps, tmp_path / "out", samples_per_shard=2)
    samples = read(tmp_path / "out")
    assert samples.keys() == {"animals__birds__crow", "animals__birds__v1-5", "blue"}
    crow = samples["animals__birds__crow"]
    assert crow["txt"] == b"A crow."
    assert json.loads(crow["json"]) == {
        "caption": "A crow.",
        "translations": {"de": "Eine Krähe.", "ca@valencia": "Un corb."},
        "category": ["animals", "birds"],
        "stem": "crow",
        "sound": "effect",
    }
    wave, rate = soundfile.read(io.BytesIO(crow["flac"]))
    assert rate == 44100 and wave.shape == (4410,) and abs(wave.mean() - 0.25) < 1e-3
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 1]
    assert manifest["counts"] == {
        "stamps": 3, "with_sound": 1, "of_which_speech": 0, "from_svg": 1, "distinct_captions": 2, "skipped": 5,
    }  # fmt: skip


def test_the_spoken_name_of_a_letter_is_told_from_an_effect(tmp_path):
    folder = tmp_path / "stamps" / "symbols" / "alphabets"
    folder.mkdir(parents=True)
    for place, stem in ((folder, "a"), (folder.parent, "7"), (folder.parent, "bell")):
        Image.new("RGB", (9, 9)).save(place / f"{stem}.png")
        (place / f"{stem}.txt").write_text(stem)
        soundfile.write(place / f"{stem}.ogg", np.full(4410, 0.25), 44100)
    soundfile.write(folder.parent / "7_de.ogg", np.full(4410, 0.25), 44100)
    counts = build_tuxpaint(tmp_path / "stamps", tmp_path / "out")["counts"]
    assert (counts["with_sound"], counts["of_which_speech"]) == (3, 2)
    kinds = {sample["txt"]: json.loads(sample["json"])["sound"] for sample in read(tmp_path / "out").values()}
    assert kinds == {b"a": "speech", b"7": "speech", b"bell": "effect"}


def test_drawings_lie_on_white_in_a_square_of_at_most_256_pixels(stamps, tmp_path):
    build_tuxpaint(stamps, tmp_path / "out")
    samples = read(tmp_path / "out")

    def pixels(key):
        image = Image.open(io.BytesIO(samples[key]["png"]))
        assert image.mode == "RGB"
        return np.asarray(image)

    crow = pixels("animals__birds__crow")  # 400x100 -> 256x64 in the middle
    assert crow.shape == (256, 256, 3)
    assert (crow[:96] == 255).all() and (crow[96:160] == [255, 0, 0]).all() and (crow[160:] == 255).all()
    assert pixels("animals__birds__v1-5").shape == (60, 60, 3)
    blue = pixels("blue")  # 133x67 units, of which the square has 60: points are not pixels
    assert blue.shape == (256, 256, 3)
    assert (blue[100, 20] == [0, 0, 255]).all() and (blue[100, 130] == 255).all()


def test_what_is_skipped_is_named_with_its_reason(stamps, tmp_path):
    skipped = build_tuxpaint(stamps, tmp_path / "out")["skipped"]
    assert skipped.keys() == {
        "animals/birds/nameless", "animals/birds/crow_mirror", "animals/birds/gone",
        "animals/birds/bad.png", "animals/birds/v1.5.wav",
    }  # fmt: skip
    assert skipped["animals/birds/nameless"] == "a drawing without a caption"
    assert "silent" in skipped["animals/birds/v1.5.wav"]


def test_the_same_seed_gives_the_same_bytes_whatever_the_clock_and_the_folder_say(stamps, tmp_path):
    first = build_tuxpaint(stamps, tmp_path / "one", seed=3)
    os.utime(stamps / "blue.svg", (1, 1))
    assert build_tuxpaint(stamps, tmp_path / "two", seed=3) == first
    for name in ("manifest.json", "train/000000.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_seed_shuffles_the_stamps(stamps, tmp_path):
    orders = set()
    for seed in range(6):
        build_tuxpaint(stamps, tmp_path / str(seed), seed=seed)
        orders.add(tuple(read(tmp_path / str(seed))))
    assert len(orders) > 1


def test_without_a_rasteriser_the_extra_is_named(stamps, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtra, match=r"mmcl\[svg\]"):
        build_tuxpaint(stamps, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_stamps_names_the_package_to_install(tmp_path, folder):
    with pytest.raises(NoUsableSamples, match="apt-get install tuxpaint-stamps-default"):
        build_tuxpaint(tmp_path / folder, tmp_path / "out")


def test_shards_are_not_overwritten(stamps, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "000000.tar").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        build_tuxpaint(stamps, tmp_path / "out")


@pytest.mark.tuxpaint
@pytest.mark.skipif(not STAMPS.exists() and "CI" not in os.environ, reason="tuxpaint-stamps-default is not installed")
def test_the_real_stamps_are_all_there_and_all_usable(tmp_path):
    counts = build_tuxpaint(STAMPS, tmp_path)["counts"]
    assert counts["stamps"] >= 900 and counts["with_sound"] >= 120 and counts["from_svg"] >= 150
    problems = []
    report = check_source(str(tmp_path / "train"), None, problems.append)
    assert not problems
    assert report.samples == counts["stamps"]
    assert report.combinations["audio+facts+image+text"] == counts["with_sound"]
