"""HN-NCE against the dense formula on 1, 2 and 4 ranks, and the errors that its copies in the wild share."""

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
from mmcl.losses import dcl, hn_nce, info_nce

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
ALPHAS = st.sampled_from([1.0, 0.999, 0.3, 0.0])
BETAS = st.sampled_from([0.0, 0.25, 1.0])


def ours(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    if "same" in options:
        options["same"] = options["same"][rows]
    if "owners" in options:
        of, seen_by = options.pop("owners"), options.pop("seen_by")
        options["negatives"] = hard_negatives(leaves["negatives"], of, rows, seen_by)
    return hn_nce(leaves["x"][rows], leaves["y"][rows], leaves["scale"], shard, **options)


def one_row(own: Tensor, others: Tensor, alpha: float, beta: float) -> Tensor:
    """The formula of one row, with its weights, on the logits of its negatives."""
    if not len(others):
        return 0.0 * own
    weights = len(others) * torch.softmax(beta * others, 0)
    every = torch.cat([own[None], others])
    factor = torch.cat([own.new_tensor([alpha]), weights])
    top = every.max().detach()
    return torch.log((factor * torch.exp(every - top)).sum()) + top - own


def dense(
    leaves: Leaves,
    alpha: float = 1.0,
    beta: float = 0.25,
    same: Tensor | None = None,
    owners: Tensor | None = None,
    seen_by: str = "own",
) -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    if not n:
        return x.sum()
    logits, out = s * x @ y.T, no_negatives(n, same)
    every, out_of_rows = logits, out
    if owners is not None:
        every = torch.cat([logits, s * x @ leaves["negatives"].T], 1)
        out_of_rows = torch.cat([out, unseen(n, owners, seen_by)], 1)
    total = x.new_zeros(())
    for i in range(n):
        total = total + one_row(logits[i, i], every[i][~out_of_rows[i]], alpha, beta)
        total = total + one_row(logits[i, i], logits[:, i][~out[:, i]], alpha, beta)
    return total / (2 * n)


def copied(logits: Tensor, alpha: float, beta: float) -> Tensor:
    """The class that many repositories copied: (B, B) divided by row sums (B,) as they are, and exp before log."""
    n = len(logits)
    off = 1 - torch.eye(n, dtype=logits.dtype)
    power, hard = torch.exp(logits), torch.exp(beta * logits) * off
    rows = (n - 1) * hard / hard.sum(1)  # divides column j by the sum of row j
    columns = (n - 1) * hard / hard.sum(0)
    own = power.diagonal()
    of_rows = torch.log(alpha * own + (rows * power * off).sum(1)) - logits.diagonal()
    of_columns = torch.log(alpha * own + (columns * power * off).sum(0)) - logits.diagonal()
    return (of_rows + of_columns).mean() / 2


@given(batch=batches(), alpha=ALPHAS, beta=BETAS)
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, alpha, beta):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"alpha": alpha, "beta": beta}, batch["dtype"]))


@given(batch=batches(least=1), alpha=ALPHAS, kinds=st.integers(1, 3), different=st.integers(1, 6))
@EXAMPLES
def test_rows_that_share_an_id_are_in_neither_the_sums_nor_the_count(batch, alpha, kinds, different):
    same = torch.randint(-1, different, (batch["n"], kinds), generator=draws(batch["seed"]))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    check(Case(ours, dense, leaves, batch["splits"], {"same": same, "alpha": alpha}, batch["dtype"]))


@given(batch=batches(least=1), beta=BETAS, m=st.integers(0, 12), own=st.booleans(), masked=st.booleans())
@EXAMPLES
def test_hard_negatives_are_weighed_and_counted_like_any_other(batch, beta, m, own, masked):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"], owners = some_negatives(batch["n"], m, batch["d"], batch["seed"])
    options: dict[str, Any] = {"owners": owners, "seen_by": "own" if own else "all", "beta": beta}
    if masked:  # some rows have nothing but hard negatives, others nothing at all
        options["same"] = torch.randint(0, 2, (batch["n"], 1), generator=draws(batch["seed"]))
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@pytest.mark.parametrize(("alpha", "plain"), [(1.0, info_nce), (0.0, dcl)])
def test_without_beta_it_is_info_nce_or_decoupled(alpha, plain):
    leaves = pair(7, 6, 1, 14.3)
    same = torch.tensor([0, 1, 0, 2, 3, 4, 5])[:, None]
    values, owners = some_negatives(7, 5, 6, 1)
    options = {"same": same, "negatives": hard_negatives(values, owners, slice(0, 7), "own")}
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    assert torch.isclose(
        hn_nce(x, y, s, alpha=alpha, beta=0.0, **options), plain(x, y, s, ONE_PROCESS, **options), rtol=1e-12
    )


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_rows_without_any_negative_add_nothing(alpha):
    for n in (1, 4):
        leaves = pair(n, 4, 0, 100.0)
        options = {"same": torch.zeros(n, 1, dtype=torch.long), "alpha": alpha}
        found = evaluate(Case(ours, dense, leaves, (n,), options), ONE_PROCESS)
        assert all((value == 0).all() for value in found.values())


def test_a_row_of_weights_is_divided_by_its_own_sum():
    """The copied class divides along the wrong axis: another loss, where both directions ought to agree."""
    leaves = pair(8, 6, 3, 14.3)
    logits = leaves["scale"] * leaves["x"] @ leaves["y"].T
    options = {"alpha": 1.0, "beta": 0.25}
    loss = ours(leaves, slice(0, 8), ONE_PROCESS, **options)
    assert torch.isclose(loss, dense(leaves, **options), rtol=1e-9)
    assert not torch.isclose(loss, copied(logits, **options), rtol=1e-3)
    # the loss of a pair is that of the pair turned round; the copied class gives two
    turned = {"x": leaves["y"], "y": leaves["x"], "scale": leaves["scale"]}
    assert torch.isclose(loss, ours(turned, slice(0, 8), ONE_PROCESS, **options), rtol=1e-9)
    assert not torch.isclose(copied(logits, **options), copied(logits.T, **options), rtol=1e-3)


def test_scale_100_overflows_nothing():
    """The copied class takes exp before log: inf at scale 100 in fp32."""
    leaves = pair(8, 6, 3, 100.0)
    logits = (leaves["scale"] * leaves["x"] @ leaves["y"].T).float()
    assert not torch.isfinite(copied(logits, alpha=1.0, beta=0.25))
    for beta in (0.25, 1.0):
        check(Case(ours, dense, leaves, (8,), {"beta": beta}, torch.float32))
        opposite = leaves | {"y": -leaves["x"]}
        check(Case(ours, dense, opposite, (8,), {"beta": beta, "alpha": 0.5}, torch.float32))


def test_the_weights_have_their_gradient():
    """With constant weights the value is the same and the gradient is not."""
    leaves = pair(6, 5, 2, 10.0)
    expected, grads = dense(leaves), []
    for stop in (False, True):
        x = leaves["x"].clone().requires_grad_()
        logits = leaves["scale"] * x @ leaves["y"].T
        total = x.new_zeros(())
        for side in (logits, logits.T):
            hard = (0.25 * side).masked_fill(torch.eye(6).bool(), -torch.inf)
            weights = (5 * hard.softmax(1)).masked_fill(torch.eye(6).bool(), 1.0)
            log = (weights.detach() if stop else weights).log()
            total = total + (log + side).logsumexp(1).sum() - side.diagonal().sum()
        (total / 12).backward()
        assert torch.isclose(total / 12, expected, rtol=1e-9)
        grads.append(x.grad)
    found = torch.from_numpy(evaluate(Case(ours, dense, leaves, (6,)), ONE_PROCESS)["x"])
    assert torch.allclose(found, grads[0], rtol=1e-6)
    assert not torch.allclose(found, grads[1], rtol=1e-2)


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves = pair(48, 32, 0, 20.0)
    leaves["negatives"], owners = some_negatives(48, 60, 32, 0)
    same = torch.randint(0, 40, (48, 1), generator=draws(0))
    bf16_is_near(Case(ours, dense, leaves, (48,), {"owners": owners, "seen_by": "all", "same": same}))


def test_shares_that_are_none_are_refused():
    leaves = pair(3, 4, 0, 5.0)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    with pytest.raises(ConfigError, match=r"alpha=1\.5"):
        hn_nce(x, y, s, alpha=1.5)
    with pytest.raises(ConfigError, match="beta=-1"):
        hn_nce(x, y, s, beta=-1.0)
