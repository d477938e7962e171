"""The process group, and nothing else touches it: a `Shard` is what a rank may know and do about the others.

Losses are written for one rank that can gather; `ONE_PROCESS` makes the same code the single-process case. Ranks may
hold different numbers of rows. Gradient convention: engines AVERAGE gradients over ranks, so a rank's loss is scaled
such that the mean over ranks is the loss of the global batch, and the gradient of a gathered tensor is the SUM over
ranks of what each wants from it.
"""

import datetime
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank among `world` ranks."""

    rank: int = 0
    world: int = 1

    def counts(self, n: int, device: torch.device) -> list[int]:
        """How many rows each rank holds, given that this one holds `n`. Collective."""
        return [count for (count,) in self._told([n], device)]

    def _told(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """What each rank says. Collective."""
        if self.world == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, device=device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own)
        return torch.stack(every).tolist()

    def gather(self, x: Float[Tensor, "n d"]) -> "Gathered":
        """Rows of all ranks in rank order, differentiable. Collective, backward too.

        If those of any rank have a gradient, all ranks take part in the backward pass: also one that has no rows and
        gives a tensor without a graph.
        """
        wanted = x.requires_grad and torch.is_grad_enabled()
        told = self._told([len(x), wanted], x.device)
        if not wanted and any(graph for _, graph in told):
            x = x.detach().requires_grad_()
        counts = [count for count, _ in told]
        values = x if self.world == 1 else _Gather.apply(x, counts, self.rank)
        return Gathered(values, tuple(counts), self)  # pyright: ignore[reportArgumentType]

    def gather_like(self, x: Shaped[Tensor, "n ..."], counts: Sequence[int]) -> Shaped[Tensor, "total ..."]:
        """Likewise without a gradient, for rows whose `counts` are known: ids, masks, statistics. Collective."""
        return x.detach() if self.world == 1 else _gather(x.detach(), list(counts))

    def sum(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sum over ranks, differentiable: every rank gets what all ranks want of it. Collective, backward too."""
        return x if self.world == 1 else _Sum.apply(x)  # pyright: ignore[reportReturnType]

    def log_sum_exp(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Over ranks, element by element, without a gradient; minus infinity is an empty sum. Collective."""
        if self.world == 1:
            return x
        largest = x.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        finite = largest.masked_fill(largest == -torch.inf, 0.0)
        total = (x - finite).exp_()
        dist.all_reduce(total)
        return total.log_().add_(finite)

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


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of all ranks, one rank after another, so that several losses can share one gather."""

    values: Float[Tensor, "total d"]
    counts: tuple[int, ...]
    """Rows of each rank."""
    shard: Shard

    @property
    def own(self) -> slice:
        """Which rows are this rank's."""
        first = sum(self.counts[: self.shard.rank])
        return slice(first, first + self.counts[self.shard.rank])


class _Gather(torch.autograd.Function):
    """All-gather of ragged rows; backward is a reduce-scatter: the sum of what all ranks want of the own rows."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        return _gather(x, counts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        parts = [part.contiguous() for part in grads[0].split(ctx.counts)]
        own = torch.empty_like(parts[ctx.rank])
        if sum(ctx.counts):
            dist.reduce_scatter(own, parts)
        return own, None, None


def _gather(x: Tensor, counts: list[int]) -> Tensor:
    if sum(counts) == 0:  # on every rank
        return x.clone()
    if len(set(counts)) == 1:
        whole = x.new_empty(sum(counts), *x.shape[1:])
        dist.all_gather(list(whole.split(counts)), x.contiguous())
        return whole
    padded = x.new_zeros(max(counts), *x.shape[1:])  # gloo gathers equal sizes only
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: what a rank adds reaches the losses of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor]:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return (grad,)


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
