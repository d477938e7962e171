"""The optimizer and its schedule: the rate of a step is a function of its number, so that nothing has to be saved.

Rates differ by tower and by depth: a parameter group has an `lr_scale`, by which engines multiply the rate of a step.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn

from mmcl.errors import ConfigError
from mmcl.layout import whole_tensors
from mmcl.stable_adamw import StableAdamW
from mmcl.types import MODALITIES, Modality

OptimizerName = Literal["adamw", "stable_adamw"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights change."""

    name: OptimizerName = "adamw"
    """adamw; or stable_adamw, which takes a smaller step with each tensor whose gradient outgrew its second moment."""
    lr: float = 5e-4
    """Peak learning rate."""
    layer_decay: float = 1.0
    """Multiplies a tower's rate in its last block, once more in each before it, most in its embeddings; 1 is off."""
    tower_rates: dict[Modality, float] = field(default_factory=dict)
    """Multiplies the rate of a tower (`image`, `text`, `audio`); 1 where nothing is said."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.98
    """Decay of the running mean of their squares."""
    eps: float = 1e-6
    """Added to the root of the latter."""
    weight_decay: float = 0.2
    """Decoupled; never applied to norms, biases, class tokens and logit scales."""
    clip_norm: float = 1.0
    """The gradient of all parameters together is scaled down to this norm; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        self._check_rates()

    def _check_rates(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise ConfigError(f"optim.name={self.name!r}: expected one of {list(get_args(OptimizerName))}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"optim.layer_decay={self.layer_decay}: expected a number above 0 and up to 1, which is off; "
                "fine-tuning commonly has 0.65 to 0.9"
            )
        for tower, rate in self.tower_rates.items():
            if tower not in MODALITIES:
                raise ConfigError(f"optim.tower_rates: no tower {tower!r}, expected some of {list(MODALITIES)}")
            if not 0 < rate < math.inf:
                raise ConfigError(
                    f"optim.tower_rates.{tower}={rate} must be positive: it multiplies the rate, 1 leaves it; "
                    "a tower that is not to learn at all is frozen, which is another thing than a rate of 0"
                )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the update that makes step `step` of `steps`, counted from 1: linear warm-up, then a cosine to 0.

    SGDR, Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, one cycle, as CLIP used it.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trained parameters of `model`, in the groups of `param_groups`.

    AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. StableAdamW: `mmcl.stable_adamw`.
    """
    groups = param_groups(model, config)
    settings: Any = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "stable_adamw":
        return StableAdamW(groups, whole_tensors(model), **settings)
    return torch.optim.AdamW(groups, **settings)


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters that share weight decay and rate, as torch's optimizers take them.

    Args:
        model: has its towers as `towers.image`, `towers.text`, `towers.audio`; what is outside of them has the rate
            itself. Vectors, scalars and class tokens do not decay.

    Returns:
        Groups of `params`, pairs of name and parameter; `weight_decay`; and `lr_scale`, which multiplies the rate. No
        group is empty. Decaying groups come first, higher rates before lower ones.

    Raises:
        ConfigError: `layer_decay` is asked of a tower whose blocks cannot be told apart.
    """
    scales = lr_scales(model, config)
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_decays(name, parameter), scales[name]), []).append((name, parameter))
    return [
        {"params": groups[key], "weight_decay": config.weight_decay if key[0] else 0.0, "lr_scale": key[1]}
        for key in sorted(groups, reverse=True)
    ]


def lr_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """For each parameter of `model` the factor of its rate: that of its tower, times `layer_decay` to its depth.

    Layer-wise decay: ULMFiT, Howard and Ruder 2018, https://arxiv.org/abs/1801.06146; counted as BEiT does, Bao et al.
    2021, https://arxiv.org/abs/2106.08254.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    for modality in MODALITIES:
        prefix = f"towers.{modality}."
        tower = model.get_submodule(prefix.removesuffix("."))
        depths = dict.fromkeys((name for name, _ in tower.named_parameters()), 0)
        if config.layer_decay != 1:
            depths = depths_of(tower)
        for name, depth in depths.items():
            scales[prefix + name] = config.tower_rates.get(modality, 1.0) * config.layer_decay**depth
    return scales


OPEN_CLIP: dict[str, Any] = {
    "stem": r"class_embedding|positional_embedding|token_embedding|cls_emb|ln_pre|conv\d|bn\d",
    "blocks": [(r"transformer\.resblocks\.(\d+)", None), (r"layer(\d+)\.(\d+)", None)],
}
"""Layers of open_clip's own towers, in the form in which timm's models tell theirs; everything else is their head."""


def depths_of(tower: nn.Module) -> dict[str, int]:
    """How deep each parameter of `tower` lies: 0 in head, projection and final norm, 1 in the last block, and so on.

    What lies before the blocks (embeddings, the first convolution) is one layer, the deepest. timm's models tell their
    layers themselves, but put the final norm with the last block: here it goes with the head, in all towers alike.

    Raises:
        ConfigError: no blocks were found.
    """
    prefix, matcher = _layers(tower)
    end = "end of the tower"  # matches nothing, and so has the number of the head also where there is none
    inside = [(name, None) for name, _ in tower.get_submodule(prefix).named_parameters()]
    # Any: its annotation is that of the inverse
    numbers: Any = group_with_matcher(iter([*inside, (end, None)]), matcher, reverse=True)
    if numbers[end] < 2:
        raise ConfigError(
            f"optim.layer_decay: expected numbered blocks in the {type(tower).__name__}, found none in its "
            f"{type(tower.get_submodule(prefix)).__name__}; set optim.layer_decay=1"
        )
    depths = dict.fromkeys((name for name, _ in tower.named_parameters()), 0)
    return depths | {f"{prefix}.{name}": numbers[end] - numbers[name] for name, _ in inside}


def _layers(tower: nn.Module) -> tuple[str, dict[str, Any]]:
    """The module of `tower` that has its blocks, and timm's patterns for their names."""
    for name, module in tower.named_modules():
        if isinstance(matcher := getattr(module, "group_matcher", lambda coarse: None)(coarse=False), dict):
            return name, {kind: _final_is_head(patterns) for kind, patterns in matcher.items()}
    return next(name for name, _ in tower.named_children()), OPEN_CLIP


def _final_is_head(patterns: Any) -> Any:
    """Without what follows all blocks and timm puts with the last one; what follows those of a stage stays."""
    if not isinstance(patterns, list | tuple):
        return patterns
    return [(name, to) for name, to in patterns if to != MATCH_PREV_GROUP or re.compile(name).groups]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    tokens = ("cls_token", "dist_token", "class_embedding")
    return parameter.ndim >= 2 and not name.endswith(tokens)
