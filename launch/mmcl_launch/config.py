"""A run as one typed tree: YAML files and dotted overrides merged, checked field by field, made into dataclasses.

Files given together merge key by key, later ones over earlier ones, and `--a.b.c VALUE` is such a file of one line.
An unknown field fails with the names that come nearest. Field docs are the strings under the fields.
"""

import dataclasses
import difflib
import functools
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mmcl.augment import AugmentConfig
from mmcl.errors import ConfigError
from mmcl.model import ModelConfig, clip_config
from mmcl.objective import ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.train import TrainConfig
from mmcl.types import Pair
from mmcl_data.stream import DataConfig
from mmcl_launch.fields import field_docs

RECIPES = Path(__file__).parent / "recipes"
DEEPSPEED = Path(__file__).parent / "deepspeed"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs a step."""

    name: Literal["plain", "accelerate", "deepspeed"] = "plain"
    """plain: PyTorch, DDP on several ranks. accelerate and deepspeed need the extra of that name."""
    deepspeed: str = "zero1"
    """With name=deepspeed: `zero0` to `zero3`, shipped with mmcl, or the path of a DeepSpeed JSON file."""
    timeout_s: float = 600.0
    """A collective that takes longer ends the run."""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"engine.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """Zero-shot classification of a labelled set in CLIP_benchmark's WebDataset layout."""

    folder: str
    """Holds classnames.txt, zeroshot_classification_templates.txt and test/."""
    modality: Literal["image", "audio"]
    """What is classified."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Retrieval between two modalities of some shards."""

    shards: str
    """As of a source. Samples that lack a side are left out."""
    pair: Pair
    """image_text, audio_text or image_audio; both directions are measured."""


@dataclass(frozen=True, kw_only=True)
class CompositionalConfig:
    """True caption against minimally different wrong ones, which the shards' json holds as `foils`."""

    shards: str
    """As of a source."""
    modality: Literal["image", "audio"]
    """What the captions are about."""


@dataclass(frozen=True, kw_only=True)
class EvalsConfig:
    """What a model is tested on, by name."""

    classes: dict[str, ClassesConfig] = field(default_factory=dict)
    retrieval: dict[str, RetrievalConfig] = field(default_factory=dict)
    compositional: dict[str, CompositionalConfig] = field(default_factory=dict)
    limit: int = 1000000
    """At most this many samples of each set."""
    limit_in_training: int = 256
    """Likewise, for the evaluations that `train.eval_every` asks for."""

    def __post_init__(self) -> None:
        for name in ("limit", "limit_in_training"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evals.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run; saved in its directory, from which alone it can be started again."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evals: EvalsConfig = field(default_factory=EvalsConfig)

    def __post_init__(self) -> None:
        if self.model.init_bias is None and any(name == "sigmoid" for name, *_ in self.objective.active()):
            raise ConfigError("objective.sigmoid needs logit biases: set model.init_bias (SigLIP starts at -10)")


def load_config(files: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `files` (recipe names or paths) and `overrides` (`--a.b VALUE` or `--a.b=VALUE`) describe.

    Raises:
        ConfigError: a file is missing or no YAML, a field is unknown, or a value does not fit its field.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, read_recipe(file))
    for path, value in _override_pairs(overrides):
        merged = merge(merged, functools.reduce(lambda inner, key: {key: inner}, reversed(path), value))
    return parse_config(merged)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A nested dict as a `RunConfig`."""
    _check_fields(RunConfig, raw, "")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        return RunConfig(**vars(parser.instantiate(parser.parse_object(dict(raw)))))
    except ConfigError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"the config does not fit: {textwrap.shorten(str(error), 600)}") from error


def standalone(config: RunConfig) -> RunConfig:
    """The same run, told without the user's files that could change: absolute paths, the towers' config itself."""
    sources = {name: replace(source, shards=_absolute(source.shards)) for name, source in config.data.sources.items()}
    evals = {}
    for kind, where in (("classes", "folder"), ("retrieval", "shards"), ("compositional", "shards")):
        found = getattr(config.evals, kind).items()
        paths = {name: _absolute(getattr(entry, where)) for name, entry in found}
        evals[kind] = {name: replace(entry, **{where: paths[name]}) for name, entry in found}
    is_file = isinstance(config.model.clip, str) and config.model.clip.endswith(".json")
    shipped = (DEEPSPEED / f"{config.engine.deepspeed}.json").exists()
    deepspeed = config.engine.deepspeed if shipped else _absolute(config.engine.deepspeed)
    start = config.train.init_from and _absolute(config.train.init_from)
    return replace(
        config,
        train=replace(config.train, init_from=start),
        data=replace(config.data, sources=sources),
        evals=replace(config.evals, **evals),
        model=replace(config.model, clip=clip_config(config.model)) if is_file else config.model,
        engine=replace(config.engine, deepspeed=deepspeed),
    )


def _absolute(path: str) -> str:
    """A local path from the root; what looks like a URL or a command stays as it is, to be refused by who reads it."""
    return path if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) else str(Path(path).absolute())


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a shipped recipe or of a YAML file."""
    path = Path(name)
    if not path.is_file() and (RECIPES / f"{name}.yaml").exists():
        path = RECIPES / f"{name}.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no file and no recipe {name!r}; recipes are: {', '.join(recipe_names())}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected fields of a run, found {type(found).__name__}")
    return found


def recipe_names() -> list[str]:
    """Recipes that come with mmcl."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, key by key at every depth."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def changed_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """`a.b: OLD -> NEW` for each field that differs."""
    before, after = (_flat(_plain(dataclasses.asdict(config))) for config in (old, new))
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names]


def field_lines(cls: type = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(field, default, doc) of every field of the tree, depth first."""
    lines = []
    for entry in dataclasses.fields(cls):
        name, kind = f"{prefix}{entry.name}", typing.get_type_hints(cls)[entry.name]
        inner, label = _dataclass_in(kind), f"{name}.NAME" if typing.get_origin(kind) is dict else name
        if inner:
            lines += field_lines(inner, f"{label}.")
        else:
            lines.append((name, _default_text(entry), field_docs(cls).get(entry.name, "")))
    return lines


def _default_text(entry: dataclasses.Field) -> str:
    if entry.default is not dataclasses.MISSING:
        return repr(entry.default)
    return "required" if entry.default_factory is dataclasses.MISSING else repr(entry.default_factory())


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass that `kind` is, or the one its dict holds."""
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)
    if typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
        return typing.get_args(kind)[1]
    return None


def _check_fields(cls: type, raw: Any, where: str) -> None:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where or 'the config'}: expected fields of {cls.__name__}, found {raw!r}")
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.5) or sorted(hints)
            raise ConfigError(f"unknown field {where}{key}: did you mean {' or '.join(f'{where}{n}' for n in near)}?")
        inner = _dataclass_in(hints[key])
        if inner and typing.get_origin(hints[key]) is dict:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}{key}: expected a name for each entry, found {value!r}")
            for name, entry in value.items():
                _check_fields(inner, entry, f"{where}{key}.{name}.")
        elif inner:
            _check_fields(inner, value, f"{where}{key}.")


def _override_pairs(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        raise ConfigError(f"overrides are pairs of --field value, found: {' '.join(overrides)}")
    try:
        return [
            (name.removeprefix("--").split("."), yaml.safe_load(value))
            for name, value in zip(words[::2], words[1::2], strict=True)
        ]
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"a value cannot be read as YAML: {error}") from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {
        name: value
        for key, inner in tree.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML needs no tags."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
