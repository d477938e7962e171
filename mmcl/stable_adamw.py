"""StableAdamW: AdamW whose rate shrinks, tensor by tensor, when a gradient has outgrown its second moment.

    m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     u = v / (1 - b2^t)
    RMS = sqrt(mean(g^2 / max(u, eps^2)))                 over one tensor of the model
    w = (1 - lr wd) w - lr / max(1, RMS) * m / (1 - b1^t) / (sqrt(u) + eps)

Wortsman et al. 2023, https://arxiv.org/abs/2304.13013. Their debiased betas b (1 - b^(t-1)) / (1 - b^t) give the
bias-corrected moments above; kept are the plain ones, as torch's AdamW keeps them, so that the state of either
optimizer is a state of the other. The decay has the whole rate, as in the authors' code
(https://gist.github.com/mitchellnw/d42e22a0b9ec02ceaf4f7b4457f51423).

Ours, because those of libraries (timm, optimi, pytorch-optimizer) take the RMS of whatever tensor they are given, which
under ZeRO is a buffer of parts of many.
"""

# pyright: reportPrivateImportUsage=false
# (_foreach_*: one kernel for many tensors, which torch's own optimizers use and has no other name)

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmcl.layout import Layout


class StableAdamW(torch.optim.Optimizer):
    """The update of the module's docstring, over parameters that hold what `layout` says.

    `layout` may be replaced when parameters were. Where ranks share tensors out a step is collective: one sum over
    ranks of a number a tensor for each parameter group. Nothing waits for the device.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        layout: Layout,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            [dict(group) for group in groups], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.layout = layout
        self.rms: dict[str, Tensor] = {}
        """Of each tensor in the last step, before it was held against 1; scalars on the device."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "the loss was computed before"
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters)

    def _update(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [self._state(p) for p in parameters]
        first, second = ([state[moment] for state in states] for moment in ("exp_avg", "exp_avg_sq"))
        for state in states:
            state["step"] += 1
        times = [int(state["step"]) for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        # Twice a root, so that never more than one buffer of the group's size is there beside its moments.
        ratios = _roots(second, beta2, times)
        torch._foreach_clamp_min_(ratios, eps)
        torch._foreach_reciprocal_(ratios)
        torch._foreach_mul_(ratios, gradients)
        rms = self._rms(parameters, ratios)
        del ratios
        self.rms |= rms

        denominators = _roots(second, beta2, times)
        torch._foreach_add_(denominators, eps)
        parts = self.layout.cut(parameters, denominators)
        if parts:  # a rank may hold nothing but padding
            shrinks = torch._foreach_clamp_min([rms[name] for name, _ in parts], 1.0)
            torch._foreach_mul_([part for _, part in parts], shrinks)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, first, denominators, [-lr / (1 - beta1**time) for time in times])

    def _rms(self, parameters: Sequence[Tensor], ratios: Sequence[Tensor]) -> dict[str, Tensor]:
        """Root of the mean of the squares of each tensor of `ratios`, over ranks. Collective."""
        means = list(self.layout.shard.sum(self.layout.squares(parameters, ratios)).unbind())
        sizes = self.layout.sizes(parameters)
        torch._foreach_div_(means, list(sizes.values()))
        torch._foreach_sqrt_(means)
        return dict(zip(sizes, means, strict=True))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _roots(second: list[Tensor], beta2: float, times: Sequence[int]) -> list[Tensor]:
    """sqrt(u) of each of the second moments, in new memory."""
    roots = list(torch._foreach_sqrt(second))
    torch._foreach_div_(roots, [math.sqrt(1 - beta2**time) for time in times])
    return roots
