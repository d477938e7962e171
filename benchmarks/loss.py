"""Time, memory and traffic of our losses beside open_clip's, forward and backward: one process, two and four ranks.

The floor is four matrix products: the (N, N) logits, on the way there and again on the way back, and the gradients of
both sides. That is the least that exact gradients take where the logits are not kept.
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from measure import (
    Result,
    Seconds,
    Sent,
    in_fresh_processes,
    parser,
    peak_memory,
    ratio,
    report,
    seconds_of,
    take_turns,
)
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import HardNegatives, info_nce
from mmcl.losses import sigmoid as sigmoid_loss

SMALL = 256
"""Rows on which contestants must agree, and on which a process warms up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is computed."""

    rows: int
    """N, of all ranks together."""
    dim: int
    scale: float
    threads: int
    """Of each rank."""
    world: int = 1
    bf16: bool = False
    """Under bf16 autocast."""


class Inputs(NamedTuple):
    """What this rank holds; all of it may get a gradient."""

    x: Tensor
    y: Tensor
    negatives: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """Of one call, in bytes; of several ranks the most."""

    peak: int
    """Above the inputs."""
    sent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """By contestant."""

    seconds: Seconds
    weights: Mapping[str, Weight]

    def ratio(self, over: str, under: str) -> float:
        """Of times."""
        return ratio(self.seconds, over, under)


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    arguments.add_argument("--rows", type=int, default=8192, help="N where time is measured (default: 8192)")
    arguments.add_argument("--dim", type=int, default=512, help="D, embedding size (default: 512)")
    arguments.add_argument("--scale", type=float, default=1 / 0.07, help="logit scale (default: 14.3, CLIP's first)")
    arguments.add_argument("--repeats", type=int, default=1, help="timed calls in one process (default: 1)")
    arguments.add_argument(
        "--memory-rows",
        type=int,
        nargs="+",
        default=[16384, 32768, 65536],
        help="N where memory is measured; open_clip's on the first only (default: 16384 32768 65536)",
    )
    arguments.add_argument("--inf-cl", action="store_true", help="also Inf-CL's ring loss (pip install inf-cl==1.2.1)")
    args = arguments.parse_args()
    if args.rows % 4:
        arguments.error(f"--rows {args.rows} does not divide among 4 ranks")
    if len(args.memory_rows) < 2:
        arguments.error("--memory-rows needs two sizes at least, to see growth")
    if args.inf_cl and find_spec("inf_cl") is None:
        arguments.error("--inf-cl needs the package: pip install inf-cl==1.2.1")
    results: dict[str, Result] = {}
    for part in args.parts:
        results |= PARTS[part](args)
    report(results, args.json)


# Contestants


def ours(inputs: Inputs, shard: Shard) -> Tensor:
    """InfoNCE."""
    return info_nce(inputs.x, inputs.y, inputs.scale, shard)


def clip_loss(inputs: Inputs, shard: Shard) -> Tensor:
    """InfoNCE as open_clip trains with it on many GPUs."""
    many = shard.world > 1
    loss = ClipLoss(local_loss=many, gather_with_grad=many, rank=shard.rank, world_size=shard.world)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch about its all_gather
        return loss(inputs.x, inputs.y, inputs.scale)


def inf_cl_ring(inputs: Inputs, shard: Shard) -> Tensor:
    """The PyTorch one of Inf-CL's losses, which takes one direction at a time and needs two ranks at least."""
    ring = partial(import_module("inf_cl").cal_ring_loss, head_dim=inputs.x.shape[1])
    scale = inputs.scale * 1.0
    scale.register_hook(lambda grad: grad / shard.world)  # theirs is summed over ranks already, not to be averaged
    return (ring(inputs.x, inputs.y, scale=scale) + ring(inputs.y, inputs.x, scale=scale)) / 2


def ours_with_negatives(inputs: Inputs, shard: Shard) -> Tensor:
    """InfoNCE with a hard negative of each row, seen by all."""
    rows = torch.arange(len(inputs.x))
    negatives = HardNegatives(values=inputs.negatives, rows=rows, seen_by="all")
    return info_nce(inputs.x, inputs.y, inputs.scale, shard, negatives=negatives)


def dense_with_negatives(inputs: Inputs, shard: Shard) -> Tensor:
    """NegCLIP's loss in open_clip's manner, one process, without the logits of negatives that ask, which it drops."""
    assert shard == ONE_PROCESS
    target = torch.arange(len(inputs.x))
    of_x = inputs.scale * inputs.x @ torch.cat([inputs.y, inputs.negatives]).T
    of_y = inputs.scale * inputs.y @ inputs.x.T
    return (cross_entropy(of_x, target) + cross_entropy(of_y, target)) / 2


def ours_sigmoid(inputs: Inputs, shard: Shard) -> Tensor:
    """SigLIP's loss."""
    return sigmoid_loss(inputs.x, inputs.y, inputs.scale, inputs.bias, shard)


def siglip_loss(inputs: Inputs, shard: Shard) -> Tensor:
    """SigLIP's loss, open_clip's."""
    loss = SigLipLoss(rank=shard.rank, world_size=shard.world)
    return loss(inputs.x, inputs.y, inputs.scale, inputs.bias)


LOSSES: Mapping[str, Callable[[Inputs, Shard], Tensor]] = {
    (OURS := "mmcl info_nce"): ours,
    (CLIP_LOSS := "open_clip ClipLoss"): clip_loss,
    (INF_CL := "inf_cl cal_ring_loss"): inf_cl_ring,
    (OURS_NEGATIVES := "mmcl, hard negatives"): ours_with_negatives,
    (DENSE_NEGATIVES := "dense, hard negatives"): dense_with_negatives,
    (OURS_SIGMOID := "mmcl sigmoid"): ours_sigmoid,
    (SIGLIP_LOSS := "open_clip SigLipLoss"): siglip_loss,
}
FLOOR = "floor: four products"


# One measurement


def make_inputs(shard: Shard, setting: Setting) -> Inputs:
    """Random unit vectors, others on each rank."""
    torch.manual_seed(shard.rank)
    sides = (normalize(torch.randn(setting.rows // shard.world, setting.dim), dim=-1) for _ in range(3))
    return Inputs(*(side.requires_grad_() for side in (*sides, torch.tensor(setting.scale), torch.tensor(-10.0))))


def step_of(name: str, shard: Shard, setting: Setting) -> Callable[[], list[Tensor | None]]:
    """What is measured: the loss and its gradients."""
    inputs = make_inputs(shard, setting)
    if name == FLOOR:
        return four_products(inputs.x.detach(), setting)

    def step() -> list[Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            loss = LOSSES[name](inputs, shard)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)]

    return step


def four_products(x: Tensor, setting: Setting) -> Callable[[], list[Tensor | None]]:
    """Of this rank's rows and all columns, into room that is there already."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    x, y = x.to(dtype), torch.randn(setting.rows, setting.dim).to(dtype)
    logits = torch.zeros(len(x), len(y), dtype=dtype)
    to_x, to_y = torch.zeros_like(x), torch.zeros_like(y)

    def products() -> list[Tensor | None]:
        for _ in range(2):
            torch.mm(x, y.T, out=logits)
        torch.mm(logits, y, out=to_x)
        torch.mm(logits.T, x, out=to_y)
        return [to_x, to_y]

    return products


def warm_step(name: str, shard: Shard, setting: Setting) -> Callable[[], list[Tensor | None]]:
    """The step after one on few rows, which loads libraries, starts threads and opens connections. Collective."""
    torch.set_num_threads(setting.threads)
    step_of(name, shard, replace(setting, rows=min(setting.rows, SMALL)))()
    return step_of(name, shard, setting)


def time_one(shard: Shard, name: str, setting: Setting, repeats: int) -> list[float]:
    """Seconds of each call on this rank, after one that does not count. Collective."""
    step = warm_step(name, shard, setting)
    step()
    seconds = []
    for _ in range(repeats):
        shard.wait()
        seconds.append(seconds_of(step))
    return seconds


def weigh_one(shard: Shard, name: str, setting: Setting) -> Weight:
    """Of this rank. Collective."""
    step = warm_step(name, shard, setting)
    peak = peak_memory(step)
    with Sent(shard.world) as sent:
        if shard.world > 1:
            step()
    return Weight(peak=peak, sent=sent.bytes)


def time(name: str, setting: Setting, repeats: int) -> float:
    """Seconds of the slowest rank in fresh processes, the median over calls."""
    ranks = in_fresh_processes(setting.world, time_one, name, setting, repeats)
    return statistics.median(max(call) for call in zip(*ranks, strict=True))


def weigh(name: str, setting: Setting) -> Weight:
    """In fresh processes."""
    ranks = in_fresh_processes(setting.world, weigh_one, name, setting)
    return Weight(peak=max(rank.peak for rank in ranks), sent=max(rank.sent for rank in ranks))


def check_agreement(shard: Shard, names: Sequence[str], setting: Setting) -> None:
    """All give the same loss and gradients, else the figures compare different things. Collective.

    Of the loss and the gradients of scale and bias, which no rank knows alone, the means over ranks are compared.
    """
    torch.set_num_threads(setting.threads)
    tolerance = 3e-2 if setting.bf16 else 1e-4
    expected, *others = (step_of(name, shard, setting)() for name in names)
    for name, values in zip(names[1:], others, strict=True):
        for index, (value, other) in enumerate(zip(values, expected, strict=True)):
            assert (value is None) == (other is None), f"{name} and {names[0]}: gradients of other inputs"
            if value is None or other is None:
                continue
            of_one, of_other = (shard.sum(each) / shard.world if each.ndim == 0 else each for each in (value, other))
            apart = float((of_one - of_other).norm() / of_other.norm())
            assert apart <= tolerance, f"{name} and {names[0]}: output {index} is {apart:.1e} apart"


# Comparisons


def setting_of(args: argparse.Namespace, *, world: int = 1, **changes: Any) -> Setting:
    """Ranks share the threads that one process would have."""
    threads = max(1, torch.get_num_threads() // world)
    return Setting(dim=args.dim, scale=args.scale, threads=threads, world=world, **changes)


def compare(args: argparse.Namespace, what: str, names: Sequence[str], **changes: Any) -> Comparison:
    """Show that the contestants agree, let them take turns, print a table. Ours is the first, its rival the second."""
    setting = setting_of(args, rows=args.rows, **changes)
    losses = [name for name in names if name != FLOOR]
    in_fresh_processes(setting.world, check_agreement, losses, replace(setting, rows=min(args.rows, SMALL)))
    made = Comparison(
        weights={name: weigh(name, setting) for name in losses},
        seconds=take_turns({name: partial(time, name, setting, args.repeats) for name in names}, args.rounds),
    )
    print(f"\n{what}: N={setting.rows} D={setting.dim}, ranks x threads {setting.world} x {setting.threads}")
    print(f"{'':24}{'median ms':>12}{'x rival':>10}{'x floor':>10}{'MB above':>12}{'MB sent':>10}")
    for name in names:
        of_floor = f"{made.ratio(name, FLOOR):10.2f}" if FLOOR in names else f"{'':10}"
        line = (
            f"{name:24}{statistics.median(made.seconds[name]) * 1e3:12.1f}{made.ratio(name, names[1]):10.2f}{of_floor}"
        )
        if name in losses:
            line += f"{made.weights[name].peak / 1e6:12.1f}{made.weights[name].sent / 1e6:10.2f}"
        print(line, flush=True)
    return made


def lower(value: float, target: float) -> Result:
    """Less is better."""
    return Result(value=value, target=target, better="lower")


def fp32(args: argparse.Namespace) -> dict[str, Result]:
    """InfoNCE in one process."""
    made = compare(args, "InfoNCE, fp32", [OURS, CLIP_LOSS, FLOOR])
    return {
        "info_nce_time_over_clip_loss": lower(made.ratio(OURS, CLIP_LOSS), 0.65),
        "info_nce_time_over_floor": lower(made.ratio(OURS, FLOOR), 1.35),
    }


def bf16(args: argparse.Namespace) -> dict[str, Result]:
    """InfoNCE in one process under autocast."""
    made = compare(args, "InfoNCE, bf16 autocast", [OURS, CLIP_LOSS, FLOOR], bf16=True)
    return {"info_nce_bf16_time_over_clip_loss": lower(made.ratio(OURS, CLIP_LOSS), 0.45)}


def ranks(args: argparse.Namespace) -> dict[str, Result]:
    """InfoNCE on two and four ranks."""
    names = [OURS, CLIP_LOSS, *[INF_CL] * args.inf_cl, FLOOR]
    two, _ = (compare(args, "InfoNCE, fp32", names, world=world) for world in (2, 4))
    return {
        "info_nce_2_ranks_time_over_clip_loss": lower(two.ratio(OURS, CLIP_LOSS), 0.65),
        "info_nce_2_ranks_bytes_over_clip_loss": lower(two.weights[OURS].sent / two.weights[CLIP_LOSS].sent, 0.55),
    }


def negatives(args: argparse.Namespace) -> dict[str, Result]:
    """One hard negative of each row, seen by all."""
    made = compare(args, "InfoNCE, a hard negative of each row, fp32", [OURS_NEGATIVES, DENSE_NEGATIVES])
    return {"hard_negatives_time_over_dense": lower(made.ratio(OURS_NEGATIVES, DENSE_NEGATIVES), 0.65)}


def sigmoid(args: argparse.Namespace) -> dict[str, Result]:
    """SigLIP's loss in one process."""
    made = compare(args, "SigLIP, fp32", [OURS_SIGMOID, SIGLIP_LOSS])
    return {"sigmoid_time_over_siglip_loss": lower(made.ratio(OURS_SIGMOID, SIGLIP_LOSS), 0.7)}


def memory(args: argparse.Namespace) -> dict[str, Result]:
    """In one process, of more rows."""
    sizes = sorted(args.memory_rows)
    print(f"\nMemory above the inputs, their gradients included: D={args.dim}, fp32\n{'':24}{'N':>8}{'MB above':>12}")

    def peak(name: str, rows: int) -> int:
        weight = weigh(name, setting_of(args, rows=rows))
        print(f"{name:24}{rows:8}{weight.peak / 1e6:12.1f}", flush=True)
        return weight.peak

    peaks = [peak(OURS, rows) for rows in sizes]
    growth = statistics.linear_regression([math.log(rows) for rows in sizes], [math.log(each) for each in peaks])
    return {
        "info_nce_memory_over_clip_loss": lower(peaks[0] / peak(CLIP_LOSS, sizes[0]), 0.10),
        "info_nce_memory_of_most_rows_gb": lower(peaks[-1] / 1e9, 1.5),
        "info_nce_memory_exponent": lower(growth.slope, 1.1),
        "sigmoid_memory_over_siglip_loss": lower(peak(OURS_SIGMOID, sizes[0]) / peak(SIGLIP_LOSS, sizes[0]), 0.15),
    }


PARTS: Mapping[str, Callable[[argparse.Namespace], dict[str, Result]]] = {
    part.__name__: part for part in (fp32, bf16, ranks, negatives, sigmoid, memory)
}


if __name__ == "__main__":
    main()
