"""SupCon across modalities against the dense formula on 1, 2 and 4 ranks."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, hard_negatives, some_negatives, unseen
from loss_oracle import Case, Leaves, batches, check, evaluate, pair
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import info_nce, multi_positive

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ours(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    options["groups"] = options["groups"][rows]
    if "owners" in options:
        of, seen_by = options.pop("owners"), options.pop("seen_by")
        options["negatives"] = hard_negatives(leaves["negatives"], of, rows, seen_by)
    return multi_positive(leaves["x"][rows], leaves["y"][rows], leaves["scale"], shard, **options)


def dense(leaves: Leaves, groups: Tensor, owners: Tensor | None = None, seen_by: str = "own") -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    if not n:
        return x.sum()
    logits = s * x @ y.T
    every = logits
    if owners is not None:
        hard = (s * x @ leaves["negatives"].T).masked_fill(unseen(n, owners, seen_by), -torch.inf)
        every = torch.cat([logits, hard], 1)
    total = x.new_zeros(())
    for i in range(n):
        positives = [p for p in range(n) if p == i or (groups[p] == groups[i] and groups[i] >= 0)]
        of_x = torch.stack([logits[i, p] - every[i].logsumexp(0) for p in positives])
        of_y = torch.stack([logits[p, i] - logits[:, i].logsumexp(0) for p in positives])
        total = total - of_x.mean() - of_y.mean()
    return total / (2 * n)


@given(batch=batches(), different=st.integers(1, 9))
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, different):
    groups = torch.randint(-2, different, (batch["n"],), generator=draws(batch["seed"]))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"groups": groups}, batch["dtype"]))


@given(batch=batches(least=1), m=st.integers(0, 12), seen_by=st.sampled_from(["own", "all"]))
@EXAMPLES
def test_hard_negatives_are_columns_of_their_row_or_of_all_and_never_ask(batch, m, seen_by):
    groups = torch.randint(-1, 4, (batch["n"],), generator=draws(batch["seed"]))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"], owners = some_negatives(batch["n"], m, batch["d"], batch["seed"])
    options = {"groups": groups, "owners": owners, "seen_by": seen_by}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


def test_without_groups_it_is_info_nce():
    leaves = pair(7, 6, 1, 14.3)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    for groups in (torch.full((7,), -1), torch.arange(7)):
        assert torch.isclose(multi_positive(x, y, s, groups=groups), info_nce(x, y, s), rtol=1e-12)


def test_rows_without_a_group_are_not_positives_of_each_other():
    """The naive version takes -1 for a group like any other."""
    leaves = pair(6, 5, 2, 14.3)
    groups = torch.tensor([3, -1, -1, 3, -1, 0])
    naive = dense(leaves, groups=groups - groups.min())
    loss = ours(leaves, slice(0, 6), ONE_PROCESS, groups=groups)
    assert torch.isclose(loss, dense(leaves, groups=groups), rtol=1e-9)
    assert not torch.isclose(loss, naive, rtol=1e-2)


def test_a_group_that_lies_on_several_ranks_is_one_group():
    """The naive version looks for positives among its own rows only."""
    leaves = pair(8, 6, 3, 14.3)
    groups = torch.tensor([5, 1, 2, 5, 5, 1, 7, 2])
    by_rank = torch.cat([groups[:4], groups[4:] + 100])
    assert not torch.isclose(dense(leaves, groups=groups), dense(leaves, groups=by_rank), rtol=1e-2)
    check(Case(ours, dense, leaves, (4, 4), {"groups": groups}))


def test_scale_100_and_opposite_vectors_overflow_nothing():
    x = pair(9, 8, 4, 1.0)["x"]
    leaves = {"x": x, "y": -x, "scale": torch.tensor(100.0)}
    for groups in (torch.zeros(9, dtype=torch.long), torch.arange(9) // 2):
        check(Case(ours, dense, leaves, (9,), {"groups": groups}, torch.float32))
        found = evaluate(Case(ours, dense, leaves, (9,), {"groups": groups}, torch.float32), ONE_PROCESS)
        assert found["loss"] > 10


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves = pair(48, 32, 0, 20.0)
    groups = torch.randint(-1, 12, (48,), generator=draws(0))
    bf16_is_near(Case(ours, dense, leaves, (48,), {"groups": groups}))
