"""The world on disk: bytes follow from the seed, splits keep their promises, bad settings are refused by name."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcl.errors import ConfigError
from mmcl_data.build.world import WorldConfig, build_world, make_world
from mmcl_data.build.world.pairs import SOURCES, hold_out, sound_of
from mmcl_data.build.world.samples import SAMPLES_PER_CLASS, Job, job_meaning, make_samples

TINY = WorldConfig(num_shapes=3, num_colours=3, num_timbres=3, num_pitches=2, samples_per_shard=20, clip_seconds=1.0)
MEMBERS = {"image_text": {"jpg"}, "audio_text": {"flac"}, "image_audio_text": {"jpg", "flac"}}
RANGES = {
    "num_shapes": (1, 11),
    "num_colours": (1, 11),
    "num_timbres": (1, 11),
    "num_pitches": (1, 7),
    "min_objects": (0, 4),
    "max_objects": (0, 4),
    "image_size": (8,),
    "clip_seconds": (0.1,),
    "sample_rate": (100,),
    "held_out": (-0.1, 0.9),
    "samples_per_shard": (0,),
    "mention_order": ("random",),
    "image_format": ("webp",),
}


def digests(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("world") / "w"
    return out, build_world(TINY, out, samples=70, seed=5, test_samples=16)


def test_one_seed_gives_the_same_bytes_with_one_worker_or_two(world, tmp_path):
    out, summary = world
    ticks: list[tuple[int, int]] = []
    again = build_world(
        TINY, tmp_path / "w", samples=70, seed=5, test_samples=16, workers=2, progress=lambda *t: ticks.append(t)
    )
    assert again == summary
    assert digests(tmp_path / "w") == digests(out)
    total = sum(summary["counts"].values())
    assert ticks[-1] == (total, total) and ticks == sorted(ticks)


def test_another_seed_gives_another_world(world):
    made = make_samples(make_world(TINY, 5), [Job("train", "image_text", i) for i in range(5)])
    other = make_samples(make_world(TINY, 6), [Job("train", "image_text", i) for i in range(5)])
    assert all(a["jpg"] != b["jpg"] for a, b in zip(made, other, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_does_not_depend_on_what_was_made_before_it(world, source):
    (alone,) = make_samples(make_world(TINY, 5), [Job("train", source, 17)])
    key = alone.pop("__key__")
    assert samples_of(world[0] / "train" / source)[key] == alone


def test_world_json_describes_every_shard_and_has_no_date(world):
    out, summary = world
    assert json.loads((out / "world.json").read_text()) == summary
    shards = {str(path.relative_to(out)): path for path in out.rglob("*.tar")}
    assert summary["shards"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(shards.items())
    }
    assert sum(summary["counts"][f"train/{source}"] for source in SOURCES) == 70
    for part, count in summary["counts"].items():
        assert len(samples_of(out / part)) == count
    assert WorldConfig(**summary["config"]) == TINY
    assert not list(out.rglob(".*")), "nothing staged is left"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", SOURCES)
def test_members_decode_and_the_facts_agree_with_them(world, split, source):
    for members in samples_of(world[0] / split / source).values():
        assert set(members) == MEMBERS[source] | {"txt", "json"}
        facts = json.loads(members["json"])
        assert facts["kind"] == source and facts["caption"] == members["txt"].decode()
        assert facts["caption"] in facts["captions"].values()
        assert ("foils" in facts) == (split == "test")
        if "jpg" in members:
            assert Image.open(io.BytesIO(members["jpg"])).size == (64, 64)
            assert facts["scene"]["objects"]
        if "flac" in members:
            samples, rate = soundfile.read(io.BytesIO(members["flac"]))
            assert (len(samples), rate) == (16000, 16000)
            assert facts["sound"]["events"]


def test_scene_and_sound_of_a_joint_sample_describe_each_other():
    config = WorldConfig(max_objects=3)
    world = make_world(config, 1)
    for sample in make_samples(world, [Job("train", "image_audio_text", i) for i in range(25)]):
        facts = json.loads(sample["json"])
        objects, events = facts["scene"]["objects"], facts["sound"]["events"]
        assert [o["x"] for o in objects] == sorted(o["x"] for o in objects)
        assert [e["start"] for e in events] == sorted(e["start"] for e in events)
        heard = [(e["pitch"], e["timbre"]) for e in events]
        assert [sound_of((o["colour"], o["shape"]), config) for o in objects] == heard
        assert len(set(heard)) == len(heard), "two alike have no order"
        assert [(o["size"], e["loudness"]) for o, e in zip(objects, events, strict=True)] == [
            ("large", "loud") if o["size"] == "large" else ("small", "quiet") for o in objects
        ]


def pairs_of(world, split, source, count):
    return Counter(pair for i in range(count) for pair in job_meaning(world, Job(split, source, i))[1:])


@pytest.mark.parametrize("seed", range(3))
def test_training_never_has_a_held_out_pair_and_still_has_every_word(seed):
    config = WorldConfig()
    world = make_world(config, seed)
    assert (len(world.held_out_image), len(world.held_out_audio)) == (8, 6)
    for source, held_out, words in (
        ("image_text", world.held_out_image, (*config.colours, *config.shapes)),
        ("audio_text", world.held_out_audio, (*config.pitches, *config.timbres)),
        ("image_audio_text", world.held_out_audio, (*config.pitches, *config.timbres)),
    ):
        seen = pairs_of(world, "train", source, 400)
        assert not set(seen) & set(held_out)
        assert {word for pair in seen for word in pair} == set(words)
        assert set(pairs_of(world, "test", source, 400)) & set(held_out)
    pictured = set(world.train["image_audio_text"])
    assert not pictured & set(world.held_out_image)
    assert {word for pair in pictured for word in pair} == {*config.colours, *config.shapes}


def test_joint_training_pictures_hold_out_pairs_too(world):
    held_out = {tuple(pair) for pair in world[1]["held_out"]["image"]}
    assert held_out
    for source in SOURCES:
        for members in samples_of(world[0] / "train" / source).values():
            facts = json.loads(members["json"])
            assert facts["held_out"] is False
            for thing in facts.get("scene", {"objects": []})["objects"]:
                assert (thing["colour"], thing["shape"]) not in held_out


def test_whatever_the_sizes_of_the_vocabulary_each_word_keeps_a_pair_in_training():
    for share in (0.1, 0.3, 0.5):
        for shapes in range(2, 11):
            for colours in range(2, 11):
                config = WorldConfig(num_shapes=shapes, num_colours=colours)
                held_out = hold_out(config.colours, config.shapes, share, np.random.default_rng(shapes))
                assert len(set(held_out)) == len(held_out) == pytest.approx(share * shapes * colours, abs=0.61)
                assert max(Counter(colour for colour, _ in held_out).values(), default=0) < shapes
                assert max(Counter(shape for _, shape in held_out).values(), default=0) < colours


@pytest.mark.parametrize("source", SOURCES)
def test_no_two_test_samples_mean_the_same(world, source):
    described = []
    for members in samples_of(world[0] / "test" / source).values():
        facts = json.loads(members["json"])
        if source == "image_text":
            scene = facts["scene"]
            described.append((scene["layout"], *((o["colour"], o["shape"]) for o in scene["objects"])))
        else:
            sound = facts["sound"]
            events = [(e["pitch"], e["timbre"]) for e in sound["events"]]
            described.append((sound["order"], *(sorted(events) if sound["order"] == "overlap" else events)))
    assert len(described) == 16 == len(set(described))
    assert {len(what) for what in described} == {3}, "all have two objects"


@pytest.mark.parametrize(("name", "extension", "held"), [("image", "jpg", "image"), ("audio", "flac", "audio")])
def test_zero_shot_sets_have_clip_benchmarks_layout(world, name, extension, held):
    folder = world[0] / "classes" / name
    names = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert (folder / "test" / "nshards.txt").read_text().strip() == "1"
    assert len(names) == len(set(names)) == (9 if name == "image" else 6)
    assert templates and all(t.count("{c}") == 1 and t.format(c="red circle") for t in templates)
    samples = samples_of(folder / "test")
    assert Counter(int(s["cls"]) for s in samples.values()) == dict.fromkeys(range(len(names)), SAMPLES_PER_CLASS)
    held_out = {" ".join(pair) for pair in world[1]["held_out"][held]}
    for members in samples.values():
        assert set(members) == {extension, "cls", "json"}
        facts = json.loads(members["json"])
        assert facts["held_out"] == (names[int(members["cls"])] in held_out)
    assert any(json.loads(s["json"])["held_out"] for s in samples.values())


def test_a_vocabulary_that_runs_out_repeats_rather_than_fails(tmp_path):
    config = replace(TINY, max_objects=1, held_out=0.0, image_format="png")
    build_world(config, tmp_path / "w", samples=6, seed=0, test_samples=12)
    samples = samples_of(tmp_path / "w" / "test" / "image_text")
    assert len(samples) == 12
    assert len({json.dumps(json.loads(s["json"])["captions"]) for s in samples.values()}) >= 9
    assert all(Image.open(io.BytesIO(s["png"])).format == "PNG" for s in samples.values())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RANGES.items() for value in values])
def test_a_bad_setting_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value!r}.*choose"):
        WorldConfig(**{name: value})


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="min_objects=3 exceeds max_objects=2"):
        WorldConfig(min_objects=3, max_objects=2)
    out = tmp_path / "w"
    good = {"samples": 10, "seed": 0, "test_samples": 1, "workers": 1}
    for name, value in (("samples", 2), ("seed", -1), ("test_samples", 0), ("workers", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            build_world(TINY, out, **{**good, name: value})
    cramped = WorldConfig(num_shapes=2, num_colours=2, num_timbres=2, num_pitches=2, held_out=0.5, max_objects=3)
    with pytest.raises(ConfigError, match=r"held_out=0.5 leaves .* max_objects=3"):
        build_world(cramped, out, **good)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder"):
        build_world(TINY, out, **good)


def test_importing_the_world_does_not_import_torch():
    code = "import sys, mmcl_data.build.world.write; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
