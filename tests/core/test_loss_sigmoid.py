"""The sigmoid loss against the dense formula on 1, 2 and 4 ranks, and beside open_clip's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, hard_negatives, no_negatives, some_negatives, unseen
from loss_oracle import Case, Leaves, batches, check, evaluate, pair
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.functional import softplus

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import sigmoid

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
BIASES = st.sampled_from([-10.0, 0.0, 3.0])


def ours(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    if "same" in options:
        options["same"] = options["same"][rows]
    if "owners" in options:
        of, seen_by = options.pop("owners"), options.pop("seen_by")
        options["negatives"] = hard_negatives(leaves["negatives"], of, rows, seen_by)
    return sigmoid(leaves["x"][rows], leaves["y"][rows], leaves["scale"], leaves["bias"], shard, **options)


def dense(leaves: Leaves, same: Tensor | None = None, owners: Tensor | None = None, seen_by: str = "own") -> Tensor:
    x, y, s, b = leaves["x"], leaves["y"], leaves["scale"], leaves["bias"]
    n = len(x)
    if not n:
        return x.sum()
    right = torch.eye(n, dtype=torch.bool)
    z = torch.where(right, 1.0, -1.0)
    asked = right | ~no_negatives(n, same)
    total = (softplus(-z * (s * x @ y.T + b)) * asked).sum()
    if owners is not None:
        total = total + (softplus(s * x @ leaves["negatives"].T + b) * ~unseen(n, owners, seen_by)).sum()
    return total / n


def biased(batch: dict[str, Any], bias: float) -> dict[str, Tensor]:
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    return leaves | {"bias": torch.tensor(bias, dtype=torch.float64)}


@given(batch=batches(), bias=BIASES)
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, bias):
    check(Case(ours, dense, biased(batch, bias), batch["splits"], dtype=batch["dtype"]))


@given(batch=batches(least=1), bias=BIASES, kinds=st.integers(1, 3), different=st.integers(1, 6))
@EXAMPLES
def test_pairs_of_rows_that_share_an_id_are_not_asked_about(batch, bias, kinds, different):
    same = torch.randint(-1, different, (batch["n"], kinds), generator=draws(batch["seed"]))
    check(Case(ours, dense, biased(batch, bias), batch["splits"], {"same": same}, batch["dtype"]))


@given(batch=batches(least=1), bias=BIASES, m=st.integers(0, 12), seen_by=st.sampled_from(["own", "all"]))
@EXAMPLES
def test_hard_negatives_are_noes_of_their_row_or_of_all(batch, bias, m, seen_by):
    leaves = biased(batch, bias)
    leaves["negatives"], owners = some_negatives(batch["n"], m, batch["d"], batch["seed"])
    check(Case(ours, dense, leaves, batch["splits"], {"owners": owners, "seen_by": seen_by}, batch["dtype"]))


@pytest.mark.parametrize("bias", [-10.0, 2.0])
def test_in_one_process_it_is_open_clips_loss(bias):
    leaves = biased({"n": 33, "d": 8, "seed": 1, "scale": 10.0}, bias)
    found = evaluate(Case(ours, dense, leaves, (33,)), ONE_PROCESS)
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    loss = SigLipLoss()(theirs["x"], theirs["y"], theirs["scale"], theirs["bias"])
    loss.backward()
    torch.testing.assert_close(torch.as_tensor(found["loss"]), loss.detach())
    for name, leaf in theirs.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), leaf.grad)


def test_dividing_by_the_rows_of_a_rank_counts_rows_of_small_ranks_more():
    """open_clip divides by the rows of each rank, which is right for even ranks only."""
    leaves = biased({"n": 6, "d": 5, "seed": 4, "scale": 10.0}, -10.0)
    logits = leaves["scale"] * leaves["x"] @ leaves["y"].T + leaves["bias"]
    losses = softplus(-torch.where(torch.eye(6).bool(), 1.0, -1.0) * logits).sum(1)
    assert not torch.isclose((losses[:5].mean() + losses[5:].mean()) / 2, losses.mean(), rtol=1e-2)
    check(Case(ours, dense, leaves, (5, 1)))


def test_scale_100_and_opposite_vectors_overflow_nothing():
    x = pair(9, 8, 4, 1.0)["x"]
    for y in (x, -x):
        leaves = {"x": x, "y": y, "scale": torch.tensor(100.0), "bias": torch.tensor(10.0)}
        check(Case(ours, dense, leaves, (9,), dtype=torch.float32))


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves = biased({"n": 48, "d": 32, "seed": 0, "scale": 10.0}, -10.0)
    leaves["negatives"], owners = some_negatives(48, 60, 32, 0)
    bf16_is_near(Case(ours, dense, leaves, (48,), {"owners": owners, "seen_by": "all"}))
