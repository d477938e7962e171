"""One directory that mmcl and open_clip both load, verified before it appears.

    mmcl_config.json               the model config
    mmcl_model.safetensors         all three towers and logit scales, in mmcl's names
    open_clip_config.json          model_cfg and preprocess_cfg of the image and text towers
    open_clip_model.safetensors    their weights; `open_clip.create_model_from_pretrained("local-dir:DIR")`
    mmcl.json                      manifest: sha256 of the files, the step, differences measured at export

The open_clip layout is that of open_clip 3.x (`factory.py`, `local-dir:` schema).
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcl import __version__
from mmcl.checkpoint import sha256
from mmcl.errors import ConfigError, ExportError
from mmcl.model import ModelConfig, ThreeTowers, clip_config, input_spec, open_clip_state
from mmcl.towers import AudioConfig

FORMAT = 1
TOLERANCE = 1e-5
"""Largest allowed difference of a component of a unit embedding."""


def export_model(model: ThreeTowers, out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `model` to the new directory `out` and return the manifest.

    The directory is staged, loaded back by mmcl and by open_clip, and renamed only if both give the same embeddings of
    probe images, captions and sounds as `model` does.

    Raises:
        ConfigError: `out` exists.
        ExportError: what was written does not load or does not match.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name a new directory or remove it; exports are not overwritten")
    model = model.cpu().eval()
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        manifest = _write_export(model, staged, facts)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    staged.rename(out)
    return manifest


def _write_export(model: ThreeTowers, staged: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    clip_state = {name: tensor.contiguous() for name, tensor in open_clip_state(state, model.config).items()}
    save_file(state, staged / "mmcl_model.safetensors", {"format": "pt"})
    save_file(clip_state, staged / "open_clip_model.safetensors", {"format": "pt"})
    # the content of the open_clip config and not its name or path: the directory stands alone
    config = dataclasses.replace(model.config, clip=clip_config(model.config))
    _write(staged / "mmcl_config.json", dataclasses.asdict(config))
    _write(staged / "open_clip_config.json", open_clip_files(model.config))
    manifest = {
        "format": FORMAT,
        "mmcl": __version__,
        **facts,
        "difference": {**_compare_open_clip(model, staged), **_compare_native(model, staged)},
        "sha256": {path.name: sha256(path) for path in sorted(staged.iterdir())},
    }
    _write(staged / "mmcl.json", manifest)
    return manifest


def open_clip_files(config: ModelConfig) -> dict[str, Any]:
    """Content of open_clip_config.json."""
    return {
        "model_cfg": clip_config(config) | ({} if config.init_bias is None else {"init_logit_bias": config.init_bias}),
        "preprocess_cfg": {
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": "bicubic",
            "resize_mode": config.resize_mode,
        },
    }


def load_export(folder: Path) -> tuple[ThreeTowers, dict[str, Any]]:
    """The model of an export directory and its manifest.

    Raises:
        ExportError: not an export, or its files are not those the manifest names.
    """
    try:
        manifest = json.loads((folder / "mmcl.json").read_text())
        if manifest["format"] != FORMAT:
            raise ExportError(f"{folder}: format {manifest['format']}, this version of mmcl reads {FORMAT}")
        for name, digest in manifest["sha256"].items():
            if Path(name).name != name or not (folder / name).is_file():  # a device would be read without end
                raise ExportError(f"{folder}: mmcl.json names {name!r}, which is no file of the export")
            if sha256(folder / name) != digest:
                raise ExportError(f"{folder / name}: its sha256 is not the one in mmcl.json: export the run again")
        return _load_native(folder), manifest
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        *(SafetensorError, RuntimeError),  # weights that are none, or not those of the config
    ) as error:
        raise ExportError(
            f"{folder} is no mmcl export: {type(error).__name__}: {error}; make one with `mmcl export RUN --out DIR`"
        ) from error


def _load_native(folder: Path) -> ThreeTowers:
    raw = json.loads((folder / "mmcl_config.json").read_text())
    if isinstance(raw["clip"], dict):  # the weights are here, not on a server
        raw["clip"]["vision_cfg"].pop("timm_model_pretrained", None)
    pixels = {name: tuple(raw[name]) for name in ("mean", "std")}
    model = ThreeTowers(ModelConfig(**{**raw, **pixels, "audio": AudioConfig(**raw["audio"])}))
    model.load_state_dict(load_file(folder / "mmcl_model.safetensors"), strict=True)
    return model.eval()


def _probes(model: ThreeTowers) -> dict[Any, Tensor]:
    spec, generator = input_spec(model.config), torch.Generator().manual_seed(0)
    captions = ["a red circle left of a blue square", "", "Ein Käse-Fondue, s'il vous plaît! 🎺", "a bell " * 100]
    return {
        "image": torch.randint(0, 256, (4, 3, spec.image_size, spec.image_size), generator=generator).to(torch.uint8),
        "text": open_clip.SimpleTokenizer(context_length=spec.context_length)(captions),
        "audio": torch.randn(4, spec.clip_samples, generator=generator) * 0.1,
    }


@torch.no_grad()
def _compare_open_clip(model: ThreeTowers, folder: Path) -> dict[str, float]:
    try:
        theirs = open_clip.create_model_from_pretrained(f"local-dir:{folder.resolve()}", return_transform=False)
        assert isinstance(theirs, torch.nn.Module)
    except Exception as error:
        raise ExportError(f"open_clip does not load what was written: {error!r}") from error
    theirs.eval()
    probes = _probes(model)
    ours = model(probes)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.config.mean, model.config.std))
    pixels = (probes["image"].float() / 255 - mean) / std
    found = {
        "open_clip_image": theirs.encode_image(pixels, normalize=True),  # pyright: ignore[reportCallIssue]
        "open_clip_text": theirs.encode_text(probes["text"], normalize=True),  # pyright: ignore[reportCallIssue]
    }
    return _differences(found, {"open_clip_image": ours["image"], "open_clip_text": ours["text"]})


@torch.no_grad()
def _compare_native(model: ThreeTowers, folder: Path) -> dict[str, float]:
    probes = _probes(model)
    ours, theirs = model(probes), _load_native(folder)(probes)
    return _differences(
        {f"mmcl_{name}": theirs[name] for name in probes}, {f"mmcl_{name}": ours[name] for name in probes}
    )


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    differences = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise ExportError(f"{name}: embeddings differ by {difference:.2e} after reloading, allowed are {TOLERANCE}")
    return differences


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
