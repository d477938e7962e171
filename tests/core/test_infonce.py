"""InfoNCE with everything that composes on it, against dense float64 formulas on 1, 2 and 4 ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import Case, Leaves, batches, check, pair
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import ConfigError
from mmcl.losses import HardNegatives, info_nce

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def own(rows_of_negatives: Tensor, rows: slice) -> Tensor:
    """Which hard negatives belong to a rank's rows."""
    return (rows_of_negatives >= rows.start) & (rows_of_negatives < rows.stop)


def ours(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    for name in ("same", "weights", "teacher"):
        if name in options:
            options[name] = options[name][rows]
    if "negative_rows" in options:
        of, seen_by = options.pop("negative_rows"), options.pop("seen_by")
        mine = own(of, rows)
        options["negatives"] = HardNegatives(
            values=leaves["negatives"][mine], rows=of[mine] - rows.start, seen_by=seen_by
        )
    return info_nce(leaves["x"][rows], leaves["y"][rows], leaves["scale"], shard, **options)


def shared_ids(same: Tensor) -> Tensor:
    """(n, n): other rows with an id in common."""
    n = len(same)
    found = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            found[i, j] = i != j and any(a == b and a >= 0 for a, b in zip(same[i], same[j], strict=True))
    return found


def dense(
    leaves: Leaves,
    same: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    teacher: Tensor | None = None,
    negative_rows: Tensor | None = None,
    seen_by: str = "own",
) -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    logits = s * x @ y.T
    out = torch.zeros(n, n, dtype=torch.bool) if same is None else shared_ids(same)
    logits = logits.masked_fill(out, -torch.inf)
    every = logits
    if negative_rows is not None:
        hard = s * x @ leaves["negatives"].T
        if seen_by == "own":
            hard = hard.masked_fill(negative_rows[None] != torch.arange(n)[:, None], -torch.inf)
        every = torch.cat([logits, hard], 1)
    counted = (~out).double()
    target = (1 - smoothing) * torch.eye(n) + smoothing * counted / counted.sum(1, keepdim=True)
    target_of_x = target
    if teacher is not None:
        w = (teacher @ teacher.T + 1) / 2
        target_of_x = w / w.sum(1, keepdim=True)
    finite = s * x @ y.T
    x_to_y = every.logsumexp(1) - (target_of_x * finite).sum(1)
    y_to_x = logits.logsumexp(0) - (target.T * finite).sum(0)
    w = torch.ones(n) if weights is None else weights / weights.mean()
    return (w * (x_to_y + y_to_x)).sum() / (2 * n) if n else leaves["x"].sum()


@given(batch=batches())
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], dtype=batch["dtype"]))


@given(batch=batches(least=1), kinds=st.integers(1, 3), different=st.integers(1, 6))
@EXAMPLES
def test_rows_that_share_an_id_are_no_negatives_of_each_other(batch, kinds, different):
    generator = torch.Generator().manual_seed(batch["seed"])
    same = torch.randint(-1, different, (batch["n"], kinds), generator=generator)
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"same": same}, batch["dtype"]))


@given(batch=batches(least=1))
@EXAMPLES
def test_rows_count_by_their_weights(batch):
    weights = torch.rand(batch["n"], generator=torch.Generator().manual_seed(batch["seed"]), dtype=torch.float64) + 0.1
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"weights": weights}, batch["dtype"]))


@given(batch=batches(least=1), smoothing=st.sampled_from([0.1, 0.5]), masked=st.booleans())
@EXAMPLES
def test_smoothed_targets_lie_on_the_columns_that_count(batch, smoothing, masked):
    options: dict[str, Any] = {"smoothing": smoothing}
    if masked:
        options["same"] = torch.randint(0, 5, (batch["n"], 2), generator=torch.Generator().manual_seed(1))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@given(batch=batches(least=1), t=st.integers(1, 7))
@EXAMPLES
def test_a_teacher_spreads_the_targets_of_x(batch, t):
    teacher = pair(batch["n"], t, batch["seed"] + 7, 1.0)["x"]
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"teacher": teacher}, batch["dtype"]))


@given(batch=batches(least=1), m=st.integers(0, 12), seen_by=st.sampled_from(["own", "all"]))
@EXAMPLES
def test_hard_negatives_are_columns_of_their_row_or_of_all_and_never_ask(batch, m, seen_by):
    generator = torch.Generator().manual_seed(batch["seed"])
    of = torch.randint(0, batch["n"], (m,), generator=generator)  # ragged: any number for each row
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"] = pair(m, batch["d"], batch["seed"] + 3, 1.0)["x"]
    options = {"negative_rows": of, "seen_by": seen_by}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


def test_contradicting_options_are_refused():
    leaves = pair(3, 4, 0, 5.0)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    with pytest.raises(ConfigError, match="smoothing=1"):
        info_nce(x, y, s, ONE_PROCESS, smoothing=1.0)
    with pytest.raises(ConfigError, match="teacher"):
        info_nce(x, y, s, ONE_PROCESS, teacher=x, smoothing=0.1)
