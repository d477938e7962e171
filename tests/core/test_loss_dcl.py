"""DCL and DCLW against the dense formula on 1, 2 and 4 ranks, and what careless versions of them get wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, hard_negatives, no_negatives, some_negatives, unseen
from loss_oracle import Case, Leaves, batches, check, evaluate, pair
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import ConfigError
from mmcl.losses import dcl

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ours(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    if "same" in options:
        options["same"] = options["same"][rows]
    if "owners" in options:
        of, seen_by = options.pop("owners"), options.pop("seen_by")
        options["negatives"] = hard_negatives(leaves["negatives"], of, rows, seen_by)
    return dcl(leaves["x"][rows], leaves["y"][rows], leaves["scale"], shard, **options)


def dense(
    leaves: Leaves, sigma: float = 0.0, same: Tensor | None = None, owners: Tensor | None = None, seen_by: str = "own"
) -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    if not n:
        return x.sum()
    logits = (s * x @ y.T).masked_fill(no_negatives(n, same), -torch.inf)
    every = logits
    if owners is not None:
        hard = (s * x @ leaves["negatives"].T).masked_fill(unseen(n, owners, seen_by), -torch.inf)
        every = torch.cat([logits, hard], 1)
    cosines = (x * y).sum(1)
    w = torch.ones(n)
    if sigma:
        density = torch.exp(cosines / sigma).detach()
        w = 2 - density / density.mean()
    total = x.new_zeros(())
    for i in range(n):
        if torch.isfinite(every[i]).any():
            total = total + every[i].logsumexp(0) - w[i] * s * cosines[i]
        if torch.isfinite(logits[:, i]).any():
            total = total + logits[:, i].logsumexp(0) - w[i] * s * cosines[i]
    return total / (2 * n)


@given(batch=batches(), sigma=st.sampled_from([0.0, 0.5, 0.1]))
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, sigma):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"sigma": sigma}, batch["dtype"]))


@given(batch=batches(least=1), kinds=st.integers(1, 3), different=st.integers(1, 6))
@EXAMPLES
def test_rows_that_share_an_id_are_no_negatives_of_each_other(batch, kinds, different):
    same = torch.randint(-1, different, (batch["n"], kinds), generator=draws(batch["seed"]))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"same": same}, batch["dtype"]))


@given(batch=batches(least=1), m=st.integers(0, 12), seen_by=st.sampled_from(["own", "all"]), masked=st.booleans())
@EXAMPLES
def test_hard_negatives_are_negatives_of_their_row_or_of_all(batch, m, seen_by, masked):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"], owners = some_negatives(batch["n"], m, batch["d"], batch["seed"])
    options: dict[str, Any] = {"owners": owners, "seen_by": seen_by, "sigma": 0.5}
    if masked:  # some rows have nothing but hard negatives, others nothing at all
        options["same"] = torch.randint(0, 2, (batch["n"], 1), generator=draws(batch["seed"]))
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@pytest.mark.parametrize("same", [None, torch.zeros(1, 1, dtype=torch.long)])
def test_a_row_without_any_negative_adds_nothing(same):
    leaves = {name: leaf.requires_grad_() for name, leaf in pair(1, 4, 0, 100.0).items()}
    loss = dcl(leaves["x"], leaves["y"], leaves["scale"], sigma=0.5, same=same)
    loss.backward()
    assert loss == 0
    assert all((leaf.grad == 0).all() for leaf in leaves.values())


def test_a_loss_that_is_masked_altogether_is_zero_and_not_nan():
    leaves = pair(5, 4, 1, 100.0)
    found = evaluate(Case(ours, dense, leaves, (5,), {"same": torch.zeros(5, 1, dtype=torch.long)}), ONE_PROCESS)
    assert all((value == 0).all() for value in found.values())


def test_both_kinds_of_negatives_share_one_logarithm():
    """The naive version adds the logarithms of the two sums, as a widely used DCL once did for its two views."""
    leaves = pair(6, 8, 2, 14.3)
    leaves["negatives"], owners = some_negatives(6, 40, 8, 2)
    s, x, y, negatives = leaves["scale"], leaves["x"], leaves["y"], leaves["negatives"]
    logits, hard = (s * x @ y.T).masked_fill(torch.eye(6).bool(), -torch.inf), s * x @ negatives.T
    naive = (logits.logsumexp(1) + hard.logsumexp(1) + logits.logsumexp(0) - 2 * s * (x * y).sum(1)).mean() / 2
    options = {"owners": owners, "seen_by": "all"}
    loss = ours(leaves, slice(0, 6), ONE_PROCESS, **options)
    assert torch.isclose(loss, dense(leaves, **options), rtol=1e-9)
    assert naive > loss + 1


def test_dclw_weighs_by_the_global_batch_and_has_no_gradient_through_the_weights():
    """The naive version means over each rank's rows, or lets the gradient through; both differ."""
    leaves = pair(8, 6, 5, 14.3)
    density = torch.exp((leaves["x"] * leaves["y"]).sum(1) / 0.5)
    by_rank = torch.cat([2 - part / part.mean() for part in density.split([2, 6])])
    assert not torch.allclose(by_rank, 2 - density / density.mean(), rtol=1e-2)
    check(Case(ours, dense, leaves, (2, 6), {"sigma": 0.5}))

    x = leaves["x"].clone().requires_grad_()
    through = torch.exp((x * leaves["y"]).sum(1) / 0.5)
    (-(2 - through / through.mean()) * 14.3 * (x * leaves["y"]).sum(1)).mean().backward()
    stopped = -(2 - density / density.mean())[:, None] * 14.3 * leaves["y"] / 8
    assert not torch.allclose(x.grad, stopped, rtol=1e-2)


def test_a_small_sigma_overflows_nothing():
    leaves = pair(6, 8, 3, 100.0)
    assert torch.isinf(torch.exp((leaves["x"] * leaves["y"]).sum(1).float() / 0.005)).any()  # the naive version
    loss = ours({name: leaf.float() for name, leaf in leaves.items()}, slice(0, 6), ONE_PROCESS, sigma=0.005)
    assert torch.isclose(loss.double(), dense(leaves, sigma=0.005), rtol=1e-3)  # the weights have few digits left


def test_scale_100_and_opposite_vectors_overflow_nothing():
    x = pair(9, 8, 4, 1.0)["x"]
    leaves = {"x": x, "y": -x, "scale": torch.tensor(100.0)}
    assert torch.isinf(torch.exp(leaves["scale"] * -x.float() @ -x.float().T)).any()  # exp before log
    check(Case(ours, dense, leaves, (9,), {"sigma": 0.5}, torch.float32))


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves = pair(48, 32, 0, 20.0)
    leaves["negatives"], owners = some_negatives(48, 60, 32, 0)
    bf16_is_near(Case(ours, dense, leaves, (48,), {"sigma": 0.5, "owners": owners, "seen_by": "all"}))


def test_a_negative_sigma_is_refused():
    leaves = pair(3, 4, 0, 5.0)
    with pytest.raises(ConfigError, match="sigma=-1"):
        dcl(leaves["x"], leaves["y"], leaves["scale"], sigma=-1.0)
