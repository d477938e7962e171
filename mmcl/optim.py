"""AdamW and its schedule: the rate of a step is a function of its number, so that nothing has to be saved."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mmcl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights change."""

    lr: float = 5e-4
    """Peak learning rate."""
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


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the update that makes step `step` of `steps`, counted from 1: linear warm-up, then a cosine to 0.

    SGDR, Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, one cycle, as CLIP used it.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`; vectors and scalars do not decay.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if _decays(name, p)]
    kept = [p for name, p in trained if not _decays(name, p)]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    tokens = ("cls_token", "dist_token", "class_embedding")
    return parameter.ndim >= 2 and not name.endswith(tokens)
