"""Three towers into one space, with one learnt logit scale per pair of modalities.

Image and text towers are open_clip's, built from its config, so that weights come from and go to open_clip key by key.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmcl.errors import ConfigError
from mmcl.towers import AudioConfig, AudioTower, ImageTower, TextTower
from mmcl.types import MODALITIES, OWN, PAIRS, Batch, Embeddings, InputSpec, Learned, Modality

MAX_LOG_SCALE = math.log(100)
"""CLIP, section 2.5: logits are never scaled by more than 100."""


CLIP_WORDS = 49408
"""Of open_clip's CLIP tokenizer."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is."""

    clip: str | dict[str, Any] = "ViT-B-32"
    """Image and text towers: the name of an open_clip model config, the path of such a JSON file, or its content."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    resize_mode: str = "shortest"
    """How images become square: `shortest`, `longest` or `squash`, as in open_clip."""
    mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
    """Of pixels in [0, 1]."""
    std: tuple[float, float, float] = OPENAI_DATASET_STD
    """Likewise."""
    init_scale: float = 1 / 0.07
    """Every logit scale starts here; 1 / 0.07 is CLIP's, 10 SigLIP's."""
    init_bias: float | None = None
    """Every logit bias starts here, for `objective.sigmoid`; -10 is SigLIP's. Without it there are none."""

    def __post_init__(self) -> None:
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ConfigError(f"model.resize_mode={self.resize_mode!r}: expected shortest, longest or squash")
        if self.init_bias is not None and not math.isfinite(self.init_bias):
            raise ConfigError(f"model.init_bias={self.init_bias} must be a number, or null for none")
        if not 1 <= self.init_scale <= 100:
            raise ConfigError(f"model.init_scale={self.init_scale} must lie in [1, 100]")


def clip_config(config: ModelConfig) -> dict[str, Any]:
    """The open_clip config of the image and text towers, as open_clip's constructors take it.

    Raises:
        ConfigError: no such name or file, or no image and text tower in it.
    """
    if isinstance(config.clip, dict):
        found: dict[str, Any] | None = copy.deepcopy(config.clip)
    elif config.clip.endswith(".json"):
        try:
            found = json.loads(Path(config.clip).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.clip={config.clip}: cannot be read as an open_clip config: {error}") from error
    else:
        found = open_clip.get_model_config(config.clip)
    if found is None:
        raise ConfigError(
            f"model.clip={config.clip!r} is no open_clip model; `python -c 'import open_clip; "
            "print(open_clip.list_models())'` names them, or give the path of a .json config"
        )
    if not isinstance(found, dict):
        raise ConfigError(f"model.clip={config.clip}: holds a {type(found).__name__}, an open_clip config is an object")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(found)
    if missing:
        raise ConfigError(
            f"model.clip lacks {sorted(missing)}: an open_clip config has embed_dim, vision_cfg, text_cfg"
        )
    if refused := _unsupported(found):
        raise ConfigError(
            f"model.clip: {refused} is not supported: towers read the tokens of open_clip's CLIP tokenizer and come "
            "from no server, and logit biases are asked for by model.init_bias"
        )
    return found


def _unsupported(clip: Mapping[str, Any]) -> str:
    """The first field of an open_clip config that mmcl would ignore, which would train something else than it says."""
    text, vision = clip["text_cfg"], clip["vision_cfg"]
    if ":" in str(vision.get("timm_model_name", "")):  # timm would ask a server for it
        return f"vision_cfg.timm_model_name={vision['timm_model_name']}"
    for name in ("hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs"):
        if text.get(name):
            return f"text_cfg.{name}"
    if text.get("vocab_size", CLIP_WORDS) != CLIP_WORDS:
        return f"text_cfg.vocab_size={text['vocab_size']}"
    return "init_logit_bias" if clip.get("init_logit_bias") is not None else ""


def input_spec(config: ModelConfig) -> InputSpec:
    """What data must be decoded to for this model."""
    clip = clip_config(config)
    size = clip["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise ConfigError(f"model.clip.vision_cfg.image_size={size}: only square images are read, give one number")
    return InputSpec(
        image_size=size,
        resize_mode=config.resize_mode,  # pyright: ignore[reportArgumentType]  # checked above
        sample_rate=config.audio.sample_rate,
        clip_samples=config.audio.clip_samples,
        context_length=clip["text_cfg"].get("context_length", 77),
    )


def _open_clip_towers(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    clip = {key: value for key, value in clip_config(config).items() if key != "custom_text"}
    try:
        whole = open_clip.CustomTextCLIP(**clip)
    except (TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"model.clip: open_clip cannot build it: {error}") from error
    return whole.visual, whole.text


class ThreeTowers(nn.Module):
    """Image, text and audio towers and their logit scales.

    Every tower takes part in every step on every rank: where a rank has no sample of a modality, the tower runs on one
    blank input whose output is dropped, so that collectives over its parameters never lack a rank.
    """

    def __init__(self, config: ModelConfig, *, bf16: bool = False) -> None:
        super().__init__()
        self.config, self.bf16 = config, bf16
        visual, text = _open_clip_towers(config)
        self.towers = nn.ModuleDict(
            {
                "image": ImageTower(visual, config.mean, config.std),
                "text": TextTower(text),
                "audio": AudioTower(config.audio, clip_config(config)["embed_dim"]),
            }
        )
        # One element and not none: DeepSpeed on gloo cannot broadcast 0-dimensional parameters.
        self.log_scales = nn.ParameterDict(
            {pair: nn.Parameter(torch.full((1,), math.log(config.init_scale))) for pair in PAIRS}
        )
        bias = config.init_bias
        self.biases = nn.ParameterDict(
            {} if bias is None else {pair: nn.Parameter(torch.full((1,), bias)) for pair in PAIRS}
        )

    @property
    def spec(self) -> InputSpec:
        """What data must be decoded to for this model."""
        return input_spec(self.config)

    @property
    def embed_dim(self) -> int:
        """Size of the shared space."""
        return clip_config(self.config)["embed_dim"]

    def forward(self, values: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        """Returns (n, d) unit vectors under each modality, the logit scale, shape (), under each pair, and under
        `bias_PAIR` its bias where there is one.

        A dict of tensors and not a type of ours, because engines look through it for what needs a gradient; scales
        come along because ZeRO-3 has them in one piece only inside `forward`.
        """
        outputs: dict[str, Tensor] = {}
        for modality in MODALITIES:
            value = values[modality]
            seen = value if len(value) else value.new_zeros(1, *value.shape[1:])
            with torch.autocast(value.device.type, torch.bfloat16, enabled=self.bf16):
                embedded = self.towers[modality](seen)
            outputs[modality] = normalize(embedded.float(), dim=-1)[: len(value)]
        for pair in PAIRS:
            outputs[pair] = self.log_scales[pair].exp().squeeze(0)
        # copies, as a step changes parameters before its metrics are read
        return outputs | {f"bias_{pair}": bias.squeeze(0).clone() for pair, bias in self.biases.items()}


def split_outputs(outputs: Mapping[str, Tensor], batch: Batch) -> tuple[Embeddings, Learned]:
    """The outputs of `ThreeTowers` on `batch`: of each row what is its own."""
    values: dict[Modality, Tensor] = {modality: outputs[modality] for modality in MODALITIES}
    rows = dict(batch.rows)
    for modality, roles in batch.roles.items():
        own = roles == OWN
        values[modality], rows[modality] = values[modality][own], rows[modality][own]
    learned = Learned(
        scales={pair: outputs[pair] for pair in PAIRS},
        biases={pair: outputs[f"bias_{pair}"] for pair in PAIRS if f"bias_{pair}" in outputs},
    )
    return Embeddings(values=values, rows=rows), learned


def open_clip_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The part of a `ThreeTowers` state dict that open_clip loads for `clip_config(config)`, in its names."""
    clip = clip_config(config)
    custom_text = bool(clip.get("custom_text")) or "hf_model_name" in clip["text_cfg"]  # as open_clip's factory decides
    renamed: dict[str, Tensor] = {"logit_scale": state["log_scales.image_text"].reshape(())}
    if config.init_bias is not None:
        renamed["logit_bias"] = state["biases.image_text"].reshape(())
    for key, value in state.items():
        if key.startswith("towers.image.visual."):
            renamed[key.removeprefix("towers.image.")] = value
        elif key.startswith("towers.text.text."):
            renamed[key.removeprefix("towers.text." if custom_text else "towers.text.text.")] = value
    return renamed


def from_open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict of either layout in the names of `ThreeTowers`: the inverse of `open_clip_state`."""
    renamed: dict[str, Tensor] = {}
    for key, value in open_clip.model.convert_to_custom_text_state_dict(dict(state)).items():
        if key in ("logit_scale", "logit_bias"):
            renamed[f"{'log_scales' if key == 'logit_scale' else 'biases'}.image_text"] = value.reshape(1)
        else:
            renamed[f"towers.{_tower_of(key)}.{key}"] = value
    return renamed


def _tower_of(key: str) -> str:
    for prefix, tower in (("visual.", "image"), ("text.", "text")):
        if key.startswith(prefix):
            return tower
    raise ConfigError(f"open_clip key {key!r} has no place in a three-tower model")


def load_open_clip(model: ThreeTowers, path: Path) -> None:
    """Give the image and text towers, and their logit scale and bias, the weights of an open_clip export.

    Args:
        model: changed in place; the audio tower and the other scales keep their values.
        path: a directory with `open_clip_model.safetensors`, or such a file. Pickles are not read.

    Raises:
        ConfigError: no such file, or weights that do not fit the towers, key by key.
    """
    file = path / "open_clip_model.safetensors" if path.is_dir() else path
    try:
        found = from_open_clip_state(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"train.init_from={path}: no open_clip weights in safetensors form there: {error}") from error
    expected = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.startswith(("towers.image.", "towers.text.")) or name in ("log_scales.image_text", "biases.image_text")
    }
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if wrong := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
        raise ConfigError(
            f"train.init_from={path}: {len(wrong)} tensors do not fit model.clip and model.init_bias, first "
            f"{wrong[0]}: expected shape {expected.get(wrong[0])}, found {shapes.get(wrong[0])}"
        )
    model.load_state_dict(found, strict=False)
