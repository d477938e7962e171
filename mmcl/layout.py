"""Which tensors of a model the parameters of an optimizer hold.

Mostly each holds one. Under ZeRO an optimizer is given flat buffers that are parts of many, cut wherever ranks share
them out, so that whatever is said of a tensor (the size of its update, the norm of its gradient) has to be put together
from views of the buffers and summed over ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmcl.dist import ONE_PROCESS, Shard


@dataclass(frozen=True, slots=True)
class Held:
    """What one parameter of an optimizer holds."""

    sizes: Mapping[str, int]
    """Elements over all ranks of each tensor that any rank has a part of; the same, in this order, on every rank."""
    parts: Sequence[tuple[str, int, int]]
    """Tensor, first element here and number of elements of what this rank has; at most one part of a tensor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What each parameter of an optimizer holds, and the ranks that share the tensors out."""

    held: Mapping[Tensor, Held]
    shard: Shard = ONE_PROCESS
    """`ONE_PROCESS` where every rank holds all of every tensor."""

    def sizes(self, parameters: Sequence[Tensor]) -> dict[str, int]:
        """Elements of each tensor in `parameters`, in an order that is the same on all ranks."""
        return {name: size for parameter in parameters for name, size in self.held[parameter].sizes.items()}

    def cut(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Views of `values`, which are shaped like `parameters`: this rank's part of each tensor."""
        return [
            (name, value if length == value.numel() else value.narrow(0, first, length))
            for parameter, value in zip(parameters, values, strict=True)
            for name, first, length in self.held[parameter].parts
        ]

    def squares(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Float[Tensor, " tensors"]:
        """Sum of squares of this rank's part of each tensor, in the order of `sizes`: ranks are yet to be summed."""
        zero = values[0].new_zeros(())
        parts = self.cut(parameters, values)
        norms = dict(zip((name for name, _ in parts), _norms([part for _, part in parts]), strict=True))
        return torch.stack([norms.get(name, zero) for name in self.sizes(parameters)]).square()


def _norms(parts: list[Tensor]) -> Sequence[Tensor]:
    """One kernel for all, as in `torch.nn.utils.get_total_norm`; a rank that has only padding has none."""
    return torch._foreach_norm(parts) if parts else ()  # pyright: ignore[reportPrivateImportUsage]


def whole_tensors(model: nn.Module) -> Layout:
    """The layout of an optimizer over the parameters of `model` themselves."""
    return Layout({p: Held({name: p.numel()}, [(name, 0, p.numel())]) for name, p in model.named_parameters()})
