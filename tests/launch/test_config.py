"""The typed tree of a run: recipes, merging, overrides, messages, golden files."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mmcl.errors import ConfigError
from mmcl_launch.commands import fields_table
from mmcl_launch.config import (
    changed_fields,
    dump_config,
    field_lines,
    load_config,
    parse_config,
    recipe_names,
    standalone,
)
from mmcl_launch.run import open_run, saved_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "recipes"


def flat(tree, prefix=""):
    if isinstance(tree, dict) and tree:
        return {k: v for key, inner in tree.items() for k, v in flat(inner, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves_to_its_golden_file(name):
    resolved = json.dumps(flat(asdict(load_config([name]))), indent=1, sort_keys=True) + "\n"
    golden = GOLDEN / f"{name}.json"
    assert golden.exists(), f"a new recipe: write {golden} with what follows, and read it\n{resolved}"
    assert resolved == golden.read_text(), "a change of what a recipe means: if it is meant, update the golden file"


def test_every_golden_file_has_its_recipe():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_the_saved_tree_alone_gives_the_run_again(name):
    config = load_config([name], ["--train.steps", "7"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_files_merge_key_by_key_and_overrides_come_last(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {sources: {image_text: {weight: 3}}}\noptim: {lr: 1e-4}\n")
    config = load_config(["world", str(tmp_path / "mine.yaml")], ["--optim.lr=2e-5", "--train.precision", "bf16"])
    assert config.data.sources["image_text"].weight == 3
    assert config.data.sources["image_text"].shards == "world/train/image_text"
    assert set(config.data.sources) == {"image_text", "audio_text", "image_audio_text"}
    assert (config.optim.lr, config.train.precision) == (2e-5, "bf16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--train.stepz", "3"], "unknown field train.stepz: did you mean train.steps"),
        (["--trian.steps", "3"], "unknown field trian: did you mean train"),
        (["--data.sources.image_text.shard", "x"], r"data.sources.image_text.shard: did you mean .*shards"),
        (["--train.steps", "many"], "train.steps.*many"),
        (["--engine.name", "horovod"], "horovod"),
        (["--train.accumulate", "0"], "train.accumulate=0 must be at least 1"),
        (["--train.save_every", "15"], "multiple of log_every"),
        (["--data.sources", "{}", "--data.sources.image_text", "5"], "expected fields of SourceConfig"),
        (["--train.precision", "fp8"], "fp32 or bf16"),
        (["--model.audio.mels", "65"], "multiple of patch_size"),
        (["--train.steps"], "pairs of --field value"),
        (["train.steps", "3"], "pairs of --field value"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["world"], override)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_file_that_is_no_tree_is_refused(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config([str(tmp_path / "broken.yaml")])


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"recipes are: .*world"):
        load_config(["wrold"])


def test_yaml_never_makes_objects(tmp_path):
    (tmp_path / "evil.yaml").write_text("data: !!python/object/apply:os.system ['touch canary']\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config([str(tmp_path / "evil.yaml")])


def test_every_field_says_what_it_is():
    assert [name for name, _, doc in field_lines() if not doc] == []


def test_the_table_of_fields_in_the_readme_is_the_real_one():
    readme = (ROOT / "launch" / "README.md").read_text()
    block = re.search(r"<!-- fields:begin -->\n(.*)<!-- fields:end -->", readme, re.S)
    assert block and block[1] == fields_table(), "put the output of `mmcl config fields` there"


def test_a_saved_run_stands_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    towers = load_config(["tuxpaint"]).model.clip
    Path("towers.json").write_text(json.dumps(towers))
    alone = standalone(load_config(["tuxpaint"], ["--model.clip=towers.json"]))
    assert alone.model.clip == towers
    assert alone.data.sources["stamps"].shards == str(tmp_path / "tuxpaint" / "train")
    assert alone.evals.retrieval["stamps_sounds"].shards == str(tmp_path / "tuxpaint" / "train")
    assert standalone(alone) == alone and alone.engine.deepspeed == "zero1"


def test_a_run_directory_takes_back_only_its_own_run(tmp_path):
    config = load_config(["world"])
    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", config)
    assert saved_config(tmp_path / "run") == config
    other = load_config(["world"], ["--optim.lr", "1", "--train.steps", "9"])
    open_run(tmp_path / "run", other)  # nothing was saved yet
    open_run(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir(parents=True)
    assert len(changed_fields(config, other)) == 2
    with pytest.raises(ConfigError, match=r"optim\.lr: .* -> 1"):
        open_run(tmp_path / "run", other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path / "photos", config)
