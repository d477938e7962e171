"""The process group, and nothing else touches it: a `Shard` is what a rank may know and do about the others.

Losses are written for one rank that can gather; `ONE_PROCESS` makes the same code the single-process case. Ranks may
hold different numbers of rows. Gradient convention: engines AVERAGE gradients over ranks, so a rank's loss is scaled
such that the mean over ranks is the loss of the global batch, and the gradient of a gathered tensor is the SUM over
ranks of what each wants from it.
"""

import datetime
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank among `world` ranks."""

    rank: int = 0
    world: int = 1

    def counts(self, n: int, device: torch.device) -> list[int]:
        """How many rows each rank holds, given that this one holds `n`. Collective."""
        if self.world == 1:
            return [n]
        own = torch.tensor([n], device=device)
        counts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(counts, own)
        return [int(count) for count in torch.cat(counts).tolist()]

    def gather(self, x: Float[Tensor, "n d"], counts: list[int]) -> Float[Tensor, "total d"]:
        """Rows of all ranks in rank order, differentiable. `counts` as from `counts`. Collective, backward too."""
        return x if self.world == 1 else _Gather.apply(x, counts, self.rank)  # pyright: ignore[reportReturnType]

    def first_row(self, counts: list[int]) -> int:
        """Where this rank's rows begin among the gathered ones."""
        return sum(counts[: self.rank])

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean over ranks of scalars, as numbers: waits for the device. Collective; all ranks get the same."""
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()]).double()
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist(), strict=True))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up on any rank, so that all ranks act alike. Collective."""
        if self.world == 1:
            return flag
        raised = torch.tensor([int(flag)], device=device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def wait(self) -> None:
        """Until every rank got here. Collective."""
        if self.world > 1:
            dist.barrier()


ONE_PROCESS = Shard()


class _Gather(torch.autograd.Function):
    """All-gather of ragged rows; backward sums over ranks and keeps the own rows."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        longest = max(counts)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        first = sum(ctx.counts[: ctx.rank])
        return grad[first : first + ctx.counts[ctx.rank]], None, None


def rows_of(shard: Shard, counts: list[int], device: torch.device) -> Int[Tensor, " n"]:
    """Global indices of this rank's rows."""
    first = shard.first_row(counts)
    return torch.arange(first, first + counts[shard.rank], device=device)


def connect(rank: int, world: int, address: str, port: int, timeout_s: float = 600.0) -> Shard:
    """Join the process group and return this rank's shard. gloo on CPU, NCCL on GPU.

    A rank that dies makes its peers' collectives fail at once or, at the latest, after `timeout_s` seconds.
    """
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Shard(rank, world)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
