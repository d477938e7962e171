"""The engine on DeepSpeed, ZeRO stages 0 to 3.

DeepSpeed partitions; what is saved is nevertheless whole tensors by name, read and written through its tensor-fragment
API, because its own checkpoints are pickles that fit one stage and one number of ranks.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.dist import Shard
from mmcl.engine import (
    MOMENTS,
    check_names,
    clamp_scale,
    load_buffers,
    load_optimizer_state,
    optimizer_state,
    persistent_buffers,
    set_rate,
)
from mmcl.engine.watch import Watch
from mmcl.errors import ConfigError, MissingExtra
from mmcl.layout import Held, Layout, whole_tensors
from mmcl.model import ThreeTowers
from mmcl.optim import OptimConfig, make_optimizer
from mmcl.stable_adamw import StableAdamW
from mmcl.types import Modality

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "optimizer", "scheduler")
"""Settings that a run has in its own fields, so that a DeepSpeed file may not say them a second time."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for DeepSpeed settings that mmcl decides or cannot run."""
    sections = ("zero_optimization", "fp16", "bf16", "torch_autocast")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in sections):
        raise ConfigError(f"the DeepSpeed file must be an object, and {', '.join(sections)} objects in it")
    clash = [name for name in OURS if name in settings]
    if clash:
        raise ConfigError(f"the DeepSpeed file sets {clash}: set train.batch_size, optim.* of the run instead")
    if settings.get("gradient_accumulation_steps", 1) != 1:
        raise ConfigError(
            "the DeepSpeed file sets gradient_accumulation_steps: set train.accumulate of the run instead, which keeps "
            "the loss that of the whole batch (GradCache)"
        )
    if any(settings.get(name, {}).get("enabled") for name in ("fp16", "bf16", "torch_autocast")):
        raise ConfigError("the DeepSpeed file sets a precision: set train.precision of the run instead")
    _check_zero(settings.get("zero_optimization", {}))


def _check_zero(zero: Mapping[str, Any]) -> None:
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage={zero['stage']}: expected 0, 1, 2 or 3")
    if zero.get("round_robin_gradients"):
        raise ConfigError(
            "zero_optimization.round_robin_gradients=true: expected false, as DeepSpeed 0.19 then says wrongly which "
            "rank has which part of a tensor, and what is saved is another model; leave it out"
        )
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1:
        raise ConfigError(
            f"zero_optimization.offload_optimizer.ratio={ratio}: expected 1, because DeepSpeed gives the rest to an "
            "AdamW of its own, whatever optim.name says; leave it out"
        )


class DeepSpeedEngine:
    """A `deepspeed` engine around the model, with our optimizer and our settings merged into the user's."""

    def __init__(
        self,
        model: ThreeTowers,
        optim: OptimConfig,
        device: torch.device,
        shard: Shard,
        settings: Mapping[str, Any],
    ) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise MissingExtra("deepspeed", "deepspeed", "engine.name=deepspeed") from error
        check_settings(settings)
        if device.type == "cpu":
            # An optional op that every rank would compile at its first use, for a minute, at the same time, and
            # only where there is a compiler. gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed's business with torch, said once a call and rank
        warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|get_group_rank).*")
        self.device, self.shard = device, shard
        self.clip_norm = optim.clip_norm
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        self.model = model.to(device)
        config = dict(settings) | {
            "train_micro_batch_size_per_gpu": 1,  # rows are ours to count: batches are ragged
            "gradient_clipping": optim.clip_norm if self.stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = make_optimizer(self.model, optim)
        # Any: which of a dozen optimizers it wraps depends on the settings
        self.engine: Any = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        layout = self._layout()
        if isinstance(optimizer, StableAdamW):
            optimizer.layout = layout
        self.watch = Watch(optimizer, layout)

    def forward(self, values: Mapping[Modality, Tensor]) -> dict[str, Tensor]:
        return self.engine(values)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def backward_parts(self, parts: Sequence[Callable[[], Tensor]]) -> None:
        if self.stage == 0:
            *others, last = parts
            with self.engine.no_sync():
                for part in others:
                    self.backward(part())
            self.backward(last())
            return
        # Stages 2 and 3 would otherwise average after each part. What this costs: until the last part is done a rank
        # holds gradients of whole parameters, as under stage 1.
        if not hasattr(self.engine, "coalesce_grad_reduction"):
            raise ConfigError("train.accumulate above 1 under ZeRO needs DeepSpeed 0.19.8 or later: upgrade deepspeed")
        with self.engine.coalesce_grad_reduction():
            for part in parts:
                self.backward(part())

    def step(self, lr: float, *, watch: bool = False) -> Tensor:
        set_rate(self.engine.optimizer.param_groups, lr)
        self.watch.begin(watch)
        norm = None
        if self.stage == 0:  # DeepSpeed clips here too, but does not tell the norm
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        self.engine.step()
        for log_scale in self.model.log_scales.values():
            self._clamp(log_scale)
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm())
        self.watch.end(norm)
        return norm

    def monitors(self) -> dict[str, Tensor]:
        return self.watch.seen

    def _layout(self) -> Layout:
        """What DeepSpeed made the parameters of the optimizer hold."""
        if self.stage == 0:
            return whole_tensors(self.model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        zero = self.engine.optimizer
        if self.stage == 3:
            groups, parts_of = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True), self._own_parts
        else:
            groups, parts_of = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True), _own_fragments
        return Layout(
            {
                flat: Held(
                    {names[id(p)]: getattr(p, "ds_numel", p.numel()) for p in parameters},
                    [(names[id(p)], first, length) for p, first, length in parts_of(parameters)],
                )
                for flat, parameters in groups
            },
            self.shard,
        )

    def _own_parts(self, parameters: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
        """Under stage 3 each rank has a share of each parameter, one after another; those of the last are padded."""
        start = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            length = min(share, parameter.ds_numel - share * self.shard.rank)
            if length > 0:
                yield parameter, start, length
            start += share

    def _clamp(self, log_scale: Tensor) -> None:
        """The parameter, and the fp32 master copy from which the next step would restore it."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        fragment = getattr(log_scale, "_hp_mapping", None)
        if fragment is not None:  # stages 1 and 2, on the rank that owns it
            clamp_scale(fragment.hp_fragment)
        if hasattr(log_scale, "ds_id"):  # stage 3
            master = safe_get_local_fp32_param(log_scale).clone()
            clamp_scale(master)
            safe_set_local_fp32_param(log_scale, master)
            clamp_scale(log_scale.ds_tensor)  # pyright: ignore[reportAttributeAccessIssue]
        clamp_scale(log_scale)

    def state(self, step: int) -> dict[str, Tensor]:
        if self.stage == 0:
            return optimizer_state(self.model, self.engine.optimizer)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if step:
            self._link_moments()
        state = {f"model/{name}": buffer.cpu().clone() for name, buffer in persistent_buffers(self.model).items()}
        for name, parameter in self.model.named_parameters():
            # Each of these is a collective: all ranks walk the same parameters and keep only what rank 0 writes.
            whole: dict[str, Any] = {"model": safe_get_full_fp32_param(parameter)}
            for moment in MOMENTS:
                fresh = torch.zeros_like(whole["model"])
                whole[moment] = safe_get_full_optimizer_state(parameter, moment) if step else fresh
            if self.shard.rank == 0:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                state |= {f"{part}/{name}": tensor.cpu().clone().reshape(shape) for part, tensor in whole.items()}
        return state if self.shard.rank == 0 else {}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        if self.stage == 0:
            load_optimizer_state(self.model, self.engine.optimizer, state, step)
            return
        check_names(state, self.model)
        load_buffers(self.model, state)
        if step:
            self._make_moments(step)
        with self._whole_parameters(), torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"model/{name}"])
        for name, parameter in self.model.named_parameters():
            self._set(parameter, state[f"model/{name}"].to(self.device))
            for moment in MOMENTS if step else ():
                self._set(parameter, state[f"{moment}/{name}"].to(self.device), moment)

    def _set(self, parameter: Any, whole: Tensor, moment: str | None = None) -> None:
        """This rank's part of the fp32 master copy of a parameter, or of one of its moments."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3 and moment is None:
            safe_set_full_fp32_param(parameter, whole)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, moment)
        else:  # there DeepSpeed 0.19 cannot cut what does not divide by the number of ranks
            own = parameter.ds_tensor.numel()
            padded = whole.new_zeros(own * self.shard.world)
            padded[: whole.numel()] = whole.flatten()
            part = padded[own * self.shard.rank :][:own]
            if moment is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, moment)

    def _make_moments(self, step: int) -> None:
        """AdamW makes its state in its first step; a resumed run needs the places to exist before that."""
        optimizer = self.engine.optimizer
        flats = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
        self._link_moments()

    def _link_moments(self) -> None:
        """Let parameters find their moments under stages 1 and 2.

        DeepSpeed 0.19 links all groups after the first step of the first one, when the others have no moments yet.
        """
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0):
            yield


def _own_fragments(parameters: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Under stages 1 and 2 each rank has a piece of all parameters strung together."""
    for parameter in parameters:
        if parameter._hp_mapping is not None:
            address = parameter._hp_mapping.hp_fragment_address
            yield parameter, address.start, address.numel
