"""Contrast of mixtures against the dense formula on 1, 2 and 4 ranks, and what the released code gets wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, starts
from loss_oracle import Case, Leaves, batches, check, evaluate, pair, unit
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import info_nce, mix, mixup

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ours(leaves: Leaves, rows: slice, shard: Shard, share: Tensor, other: Tensor, mixed: bool = False) -> Tensor:
    x, share, other = leaves["x"][rows], share[rows], other[rows] - rows.start
    x = mix(x, share, other) if mixed else x
    return mixup(x, leaves["y"][rows], leaves["scale"], shard, share=share, other=other)


def dense(leaves: Leaves, share: Tensor, other: Tensor, mixed: bool = False) -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    if not n:
        return x.sum()
    if mixed:
        x = share[:, None] * x + (1 - share[:, None]) * x[other]
        x = x / x.norm(dim=1, keepdim=True)
    logits = s * x @ y.T
    total = x.new_zeros(())
    for i in range(n):
        target = torch.zeros(n, dtype=torch.float64)
        target[i] += share[i]
        target[other[i]] += 1 - share[i]
        total = total - (target * logits[i].log_softmax(0)).sum()
    for j in range(n):
        target = torch.stack([(share[i] if i == j else 0.0 * share[i]) for i in range(n)])
        target = target + torch.where(other == j, 1 - share, 0.0)
        if target.sum() > 0:
            total = total - (target / target.sum() * logits[:, j].log_softmax(0)).sum()
    return total / (2 * n)


def mixtures(splits: tuple[int, ...], seed: int) -> dict[str, Any]:
    """A partner on the same rank for every row, and a share: sometimes 0, sometimes 1, and some partners twice."""
    generator = draws(seed)
    place = starts(splits)
    share = torch.rand(len(place), generator=generator, dtype=torch.float64)
    share = torch.where(share < 0.2, 0.0, torch.where(share > 0.7, 1.0, share))
    other = place[:, 0] + (torch.rand(len(place), generator=generator) * place[:, 1]).long()
    return {"share": share, "other": other}


@given(batch=batches(), mixed=st.booleans())
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, mixed):
    leaves = pair(batch["n"], max(3, batch["d"]), batch["seed"], batch["scale"])
    options = mixtures(batch["splits"], batch["seed"]) | {"mixed": mixed}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


def test_rows_that_are_not_mixed_make_it_info_nce():
    leaves = pair(7, 6, 1, 14.3)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    other = torch.tensor([3, 3, 0, 1, 6, 6, 2])
    alone = torch.arange(7)
    for share, partner in ((torch.ones(7), other), (torch.rand(7, generator=draws(0)), alone)):
        assert torch.isclose(mixup(x, y, s, share=share.double(), other=partner), info_nce(x, y, s), rtol=1e-12)
        assert torch.allclose(mix(x, share.double(), alone), x)


def test_a_row_that_is_its_own_partner_has_the_whole_target():
    """The released code writes 1 - l over the l on the diagonal."""
    leaves = pair(5, 6, 2, 14.3)
    share, other = torch.tensor([0.3, 0.8, 1.0, 0.6, 0.9]).double(), torch.tensor([0, 2, 1, 3, 4])
    target = torch.diag(share)
    target[torch.arange(5), other] = 1 - share
    assert (target.sum(1) < 0.75).any()
    logits = leaves["scale"] * leaves["x"] @ leaves["y"].T
    naive = (cross_entropy(logits, target) + cross_entropy(logits.T, target.T)) / 2
    options = {"share": share, "other": other}
    assert torch.isclose(ours(leaves, slice(0, 5), ONE_PROCESS, **options), dense(leaves, **options), rtol=1e-9)
    assert not torch.isclose(dense(leaves, **options), naive, rtol=1e-2)


def test_the_targets_of_a_column_add_up_to_one():
    """The released code transposes the targets of the rows: a row that is everybody's partner counts many times."""
    leaves = pair(5, 6, 3, 14.3)
    share, other = torch.full((5,), 0.5).double(), torch.zeros(5, dtype=torch.long)
    target = torch.diag(share)
    target[:, 0] += 1 - share
    assert target.sum(0).tolist() == [3.0, 0.5, 0.5, 0.5, 0.5]
    logits = leaves["scale"] * leaves["x"] @ leaves["y"].T
    naive = (cross_entropy(logits, target) + cross_entropy(logits.T, target.T)) / 2
    options = {"share": share, "other": other}
    assert torch.isclose(ours(leaves, slice(0, 5), ONE_PROCESS, **options), dense(leaves, **options), rtol=1e-9)
    assert not torch.isclose(dense(leaves, **options), naive, rtol=1e-2)


def test_a_column_that_is_nobodys_target_adds_nothing():
    leaves = pair(3, 4, 4, 100.0)
    options = {"share": torch.tensor([0.0, 1.0, 1.0]).double(), "other": torch.tensor([1, 2, 2])}
    found = evaluate(Case(ours, dense, leaves, (3,), options), ONE_PROCESS)
    assert all(torch.from_numpy(value).isfinite().all() for value in found.values())
    check(Case(ours, dense, leaves, (3,), options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_leaves_what_it_mixes_as_it_was(dtype):
    """The released code mixes in place, on a view of the embeddings that are still to be used clean."""
    x = unit(6, 5, 0).to(dtype)
    before = x.clone()
    mixed = mix(x, torch.full((6,), 0.4), torch.tensor([1, 0, 3, 2, 5, 4]))
    assert torch.equal(x, before)
    assert torch.allclose(mixed.norm(dim=1), torch.ones(6))
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed[0] * (0.4 * x[0] + 0.6 * x[1]).norm(), (0.4 * x[0] + 0.6 * x[1]).float(), atol=1e-2)


def test_opposite_vectors_in_equal_shares_have_a_finite_gradient():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    mixed = mix(x, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
    mixed.sum().backward()
    assert (mixed == 0).all()
    assert torch.isfinite(x.grad).all()


def test_scale_100_and_opposite_vectors_overflow_nothing():
    x = unit(9, 8, 4)
    leaves = {"x": x, "y": -x, "scale": torch.tensor(100.0)}
    check(Case(ours, dense, leaves, (9,), mixtures((9,), 4), torch.float32))


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves = pair(48, 32, 0, 20.0)
    bf16_is_near(Case(ours, dense, leaves, (48,), mixtures((48,), 0) | {"mixed": True}))
