"""What runs a step: the `Engine` protocol, and the plain PyTorch reference that every adapter must agree with.

An engine averages gradients over ranks, clips them, updates, and clamps the logit scales. Its state is canonical: whole
fp32 tensors by parameter name, so that what one engine saved another can load.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmcl.dist import Shard
from mmcl.engine.watch import Watch
from mmcl.errors import CheckpointError
from mmcl.layout import whole_tensors
from mmcl.model import MAX_LOG_SCALE, ThreeTowers
from mmcl.optim import OptimConfig, make_optimizer
from mmcl.types import Modality

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state of a parameter, as torch's AdamW and `StableAdamW` name it; the number of the step is that of the run."""


class Engine(Protocol):
    """One way to train a model on this rank."""

    @property
    def device(self) -> torch.device: ...

    @property
    def shard(self) -> Shard: ...

    @property
    def model(self) -> ThreeTowers:
        """The bare model. Its parameters may be partitioned: run it through `forward` only."""
        ...

    def forward(self, values: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        """`ThreeTowers.forward`. Collective."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, averaged over ranks by the time of `step`. Collective."""
        ...

    def backward_parts(self, parts: Sequence[Callable[[], Tensor]]) -> None:
        """`backward` of the sum of what the parts return, one after another, averaged over ranks once.

        Each part calls `forward`, and its graph is gone before the next one is called. Collective.
        """
        ...

    def step(self, lr: float, *, watch: bool = False) -> Tensor:
        """Clip, update at rate `lr`, clamp the scales, forget the gradients; returns the norm before clipping.

        Collective. `watch` asks for `monitors`, which cost something.
        """
        ...

    def monitors(self) -> dict[str, Tensor]:
        """What the last step showed, if it was watched: scalars on the device, the same on every rank.

        `grad_norm_PART` before clipping, where a part is `image`, `text`, `audio`, or `scales` for all the rest;
        `update_rms_PART`, the largest of any tensor: how much its gradient outgrew its second moment, where
        StableAdamW holds the rate back above 1.
        """
        ...

    def state(self, step: int) -> dict[str, Tensor]:
        """`model/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` on the CPU, after `step` updates. Collective.

        Every rank takes part; only rank 0 needs the result, the others may get an empty dict.
        """
        ...

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Back to a saved state. Collective; every rank passes the whole state."""
        ...


def clamp_scale(log_scale: Tensor) -> None:
    """Logit scales stay in [1, 100]: CLIP, Radford et al. 2021, section 2.5."""
    log_scale.data.clamp_(0.0, MAX_LOG_SCALE)


def check_names(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise `CheckpointError` unless `state` holds exactly the tensors of `model`, in their shapes."""
    shapes = {
        f"{part}/{name}": tuple(getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters()
        for part in ("model", *MOMENTS)
    }
    shapes |= {f"model/{name}": tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"the checkpoint does not fit the model: {len(wrong)} tensors differ, first {first}: "
            f"expected shape {shapes.get(first)}, found {found.get(first)}; resume with the config that was saved"
        )


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state of `model`."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def load_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the persistent buffers of `model` from a state."""
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(state[f"model/{name}"])


def set_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give the groups of `mmcl.optim.param_groups` their part of the rate."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def update(model: ThreeTowers, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of `optimizer` at rate `lr`, then clamped scales and no gradients."""
    set_rate(optimizer.param_groups, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for log_scale in model.log_scales.values():
        clamp_scale(log_scale)


class PlainEngine:
    """PyTorch alone, DistributedDataParallel where there are several ranks."""

    def __init__(self, model: ThreeTowers, optim: OptimConfig, device: torch.device, shard: Shard) -> None:
        self.device, self.shard = device, shard
        self.model = model.to(device)
        self.clip_norm = optim.clip_norm
        self.optimizer = make_optimizer(self.model, optim)
        self.watch = Watch(self.optimizer, whole_tensors(self.model))
        self.wrapped: nn.Module = DistributedDataParallel(self.model) if shard.world > 1 else self.model

    def forward(self, values: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        return self.wrapped(values)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def backward_parts(self, parts: Sequence[Callable[[], Tensor]]) -> None:
        *others, last = parts
        # DistributedDataParallel decides in the forward pass whether the backward pass will average
        with self.wrapped.no_sync() if isinstance(self.wrapped, DistributedDataParallel) else contextlib.nullcontext():
            for part in others:
                self.backward(part())
        self.backward(last())

    def step(self, lr: float, *, watch: bool = False) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        self.watch.begin(watch)
        update(self.model, self.optimizer, lr)
        self.watch.end(norm)
        return norm

    def monitors(self) -> dict[str, Tensor]:
        return self.watch.seen

    def state(self, step: int) -> dict[str, Tensor]:
        return optimizer_state(self.model, self.optimizer)

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        load_optimizer_state(self.model, self.optimizer, state, step)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The canonical state of a whole model and its optimizer. Moments that do not exist yet are zero."""
    state = {f"model/{name}": buffer.detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    for name, parameter in model.named_parameters():
        state[f"model/{name}"] = parameter.detach().cpu().clone()
        moments = optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            state[f"{moment}/{name}"] = moments.get(moment, torch.zeros_like(parameter)).detach().cpu().clone()
    return state


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], step: int
) -> None:
    """The inverse of `optimizer_state`, `step` updates after the start."""
    check_names(state, model)
    load_buffers(model, state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model/{name}"])
            if step:
                moments = {moment: state[f"{moment}/{name}"].to(parameter.device).clone() for moment in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
