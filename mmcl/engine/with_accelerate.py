"""The engine on Hugging Face accelerate: it wraps model and optimizer, averages and clips."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmcl.dist import Shard
from mmcl.engine import load_optimizer_state, optimizer_state, update
from mmcl.engine.watch import Watch
from mmcl.errors import ConfigError, MissingExtra
from mmcl.layout import whole_tensors
from mmcl.model import ThreeTowers
from mmcl.optim import OptimConfig, make_optimizer
from mmcl.types import Modality


class AccelerateEngine:
    """As `PlainEngine`, through an `Accelerator`. The process group must exist before."""

    def __init__(self, model: ThreeTowers, optim: OptimConfig, device: torch.device, shard: Shard) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise MissingExtra("accelerate", "accelerate", "engine.name=accelerate") from error
        # Precision is the model's own: accelerate must not autocast a second time.
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        kind, accumulated = self.accelerator.distributed_type.value, self.accelerator.gradient_accumulation_steps
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or accumulated != 1:
            raise ConfigError(
                f"accelerate was told by its environment to run as {kind} with {accumulated} accumulation steps: unset "
                "ACCELERATE_* variables; engine.name=deepspeed runs DeepSpeed"
            )
        assert self.accelerator.num_processes == shard.world, (self.accelerator.num_processes, shard.world)
        self.shard, self.device = shard, self.accelerator.device
        self.clip_norm = optim.clip_norm
        self.model = model.to(self.device)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, make_optimizer(self.model, optim))
        self.watch = Watch(self.optimizer.optimizer, whole_tensors(self.model))

    def forward(self, values: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        return self.wrapped(values)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def backward_parts(self, parts: Sequence[Callable[[], Tensor]]) -> None:
        *others, last = parts
        with self.accelerator.no_sync(self.wrapped):
            for part in others:
                self.backward(part())
        self.backward(last())

    def step(self, lr: float, *, watch: bool = False) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.clip_norm or float("inf"))
        assert norm is not None  # it is None under engines that mmcl does not run through accelerate
        self.watch.begin(watch)
        update(self.model, self.optimizer, lr)
        self.watch.end(torch.as_tensor(norm))
        return torch.as_tensor(norm)

    def monitors(self) -> dict[str, Tensor]:
        return self.watch.seen

    def state(self, step: int) -> dict[str, Tensor]:
        return optimizer_state(self.model, self.optimizer.optimizer)

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        load_optimizer_state(self.model, self.optimizer.optimizer, state, step)
