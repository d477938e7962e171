"""Norms of gradients and of updates, tower by tower, of those steps that somebody watches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.layout import Layout
from mmcl.stable_adamw import StableAdamW
from mmcl.types import MODALITIES

PARTS = (*MODALITIES, "scales")
"""What norms are told of: each tower, and everything outside of them."""


class Watch:
    """Looks at the gradients that an optimizer is given, wherever an engine has put them by then.

    A step that is not watched costs nothing; one that is, a few passes over the gradients and, under ZeRO, sums over
    ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
        self.optimizer, self.layout = optimizer, layout
        self.watching = False
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.squares: list[Tensor] = []
        self.updates: list[Tensor] = []
        self.seen: dict[str, Tensor] = {}
        """The monitors of the last step; nothing if it was not watched."""
        optimizer.register_step_pre_hook(self._look)

    def begin(self, watch: bool) -> None:
        """Before the optimizer steps."""
        self.watching, self.names, self.sizes, self.squares, self.updates, self.seen = watch, [], [], [], [], {}

    def _look(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # DeepSpeed steps one group after another, and drops each gradient after its group
        if not self.watching:
            return
        for group in optimizer.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                sizes = self.layout.sizes(parameters)
                self.names += sizes
                self.sizes += sizes.values()
                self.squares.append(self.layout.squares(parameters, [p.grad for p in parameters]))
                if not isinstance(optimizer, StableAdamW):
                    updates = [_update(p, optimizer.state.get(p, {}), group) for p in parameters]
                    self.updates.append(self.layout.squares(parameters, updates))

    def end(self, norm: Tensor) -> None:
        """After the optimizer stepped; `norm`, shape (), is that of all gradients before they were clipped. Collective.

        Optimizers see clipped gradients, so towers get their share of `norm`: NaN where an engine left the step out.
        """
        if not self.watching:
            return
        shares = torch.zeros(len(PARTS), device=norm.device)
        if self.squares:
            squares = self.layout.shard.sum(torch.cat(self.squares)).to(norm.device)
            shares.index_add_(0, _numbers(self.names, norm.device), squares)
            shares /= shares.sum().clamp(min=torch.finfo(torch.float32).tiny)
        largest = torch.full((len(PARTS),), 0.0 if self.squares else torch.nan, device=norm.device)
        for numbers, rms in self._rms(norm.device):
            largest.scatter_reduce_(0, numbers, rms, "amax")
        self.seen = _named("grad_norm", shares.sqrt() * norm) | _named("update_rms", largest)

    def _rms(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the update of each tensor, and which of `PARTS` it belongs to. Collective."""
        if isinstance(self.optimizer, StableAdamW) and self.squares:
            rms = self.optimizer.rms
            yield _numbers(rms, device), torch.stack(list(rms.values())).to(device)
        elif self.updates:
            squares = self.layout.shard.sum(torch.cat(self.updates)).to(device)
            yield _numbers(self.names, device), (squares / torch.tensor(self.sizes, device=device)).sqrt()


def _update(parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The gradient over the root of the second moment as AdamW is about to have it, as StableAdamW looks at them."""
    assert parameter.grad is not None
    beta2 = group["betas"][1]
    second = (1 - beta2) * parameter.grad.square()
    if "exp_avg_sq" in state:
        second.add_(state["exp_avg_sq"], alpha=beta2)
    time = int(state.get("step", 0)) + 1
    return parameter.grad / second.div_(1 - beta2**time).sqrt_().clamp_(min=group["eps"])


def _numbers(names: Iterable[str], device: torch.device) -> Tensor:
    """Which of `PARTS` each tensor belongs to."""
    owners = [name.split(".")[1] if name.startswith("towers.") else "scales" for name in names]
    return torch.tensor([PARTS.index(owner) for owner in owners], device=device)


def _named(prefix: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{prefix}_{part}": value for part, value in zip(PARTS, values.unbind(), strict=True)}
