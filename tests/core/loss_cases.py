"""What the tests of several objectives share: masks written out, ragged rows by rank, bf16 beside fp32."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from loss_oracle import Case, evaluate, unit
from torch import Tensor

from mmcl.dist import ONE_PROCESS
from mmcl.losses import HardNegatives


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_rank(owners: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Which ragged things belong to a rank's rows, and to which of these."""
    mine = (owners >= rows.start) & (owners < rows.stop)
    return mine, owners[mine] - rows.start


def hard_negatives(values: Tensor, owners: Tensor, rows: slice, seen_by: str) -> HardNegatives:
    """Those of a rank."""
    mine, place = of_rank(owners, rows)
    return HardNegatives(values=values[mine], rows=place, seen_by=seen_by)  # pyright: ignore


def no_negatives(n: int, same: Tensor | None) -> Tensor:
    """(n, n): the diagonal, and rows that have an id in common."""
    out = torch.eye(n, dtype=torch.bool)
    if same is not None:
        out |= ((same[:, None] == same[None]) & (same[:, None] >= 0)).any(-1)
    return out


def unseen(n: int, owners: Tensor, seen_by: str) -> Tensor:
    """(n, m): hard negatives that a row does not see."""
    return (owners[None] != torch.arange(n)[:, None]) if seen_by == "own" else torch.zeros(n, len(owners)).bool()


def some_negatives(n: int, m: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """m hard negatives and their rows: some rows have several, others none."""
    return unit(m, d, seed + 3), torch.randint(0, n, (m,), generator=draws(seed))


def starts(splits: Sequence[int]) -> Tensor:
    """Of each row, the first row of its rank; and one more, the size of its rank, as (n, 2)."""
    first = torch.tensor([0, *splits]).cumsum(0)[:-1]
    sizes = torch.tensor(splits)
    return torch.stack([first, sizes], 1).repeat_interleave(sizes, 0)


def bf16_is_near(case: Case) -> None:
    """Under bf16 autocast the loss is finite and within 6 % of that in fp32, and so is every gradient as a whole."""
    case = replace(case, dtype=torch.float32, tile=(16, 16))
    exact = evaluate(case, ONE_PROCESS)
    with torch.autocast("cpu", torch.bfloat16):
        low = evaluate(case, ONE_PROCESS)
    for name, value in exact.items():
        a, b = torch.from_numpy(low[name]), torch.from_numpy(value)
        assert torch.isfinite(a).all(), name
        assert a.dtype == torch.float32, name
        assert (a - b).norm() <= 0.06 * b.norm(), f"{name}: {(a - b).norm():.3g} of {b.norm():.3g}"
    assert any((low[name] != exact[name]).any() for name in exact), "nothing was computed in bf16"
