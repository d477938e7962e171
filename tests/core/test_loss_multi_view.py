"""The losses over three modalities at once against dense formulas on 1, 2 and 4 ranks, rows lacking what they lack."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws
from loss_oracle import Case, Leaves, batches, check, evaluate, unit
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import mv_dhel, mv_info_nce
from mmcl.types import MODALITIES, Embeddings

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
LOSSES = {"mv_info_nce": mv_info_nce, "mv_dhel": mv_dhel}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def embeddings(leaves: Leaves, rows: slice, masks: Tensor) -> Embeddings:
    """Of a rank's rows; `masks` is (n, 3)."""
    present = {name: masks[rows, column] for column, name in enumerate(MODALITIES)}
    return Embeddings(
        values={name: leaves[name][rows][present[name]] for name in MODALITIES},
        rows={name: present[name].nonzero().flatten() for name in MODALITIES},
    )


def ours(leaves: Leaves, rows: slice, shard: Shard, loss: str, masks: Tensor) -> Tensor:
    return LOSSES[loss](embeddings(leaves, rows, masks), leaves["scale"], shard)


def dense(leaves: Leaves, loss: str, masks: Tensor) -> Tensor:
    s, n = leaves["scale"], len(masks)
    views = {(i, m): leaves[name][i] for m, name in enumerate(MODALITIES) for i in range(n) if masks[i, m]}
    losses = []
    for i in range(n):
        own = [m for m in range(3) if masks[i, m]]
        if len(own) < 2:
            continue
        if loss == "mv_info_nce":
            right = [s * views[i, a] @ views[i, b] for a in own for b in own if a != b]
            every = [s * views[i, a] @ view for a in own for key, view in views.items() if key != (i, a)]
            losses.append(torch.stack(every).logsumexp(0) - torch.stack(right).logsumexp(0))
        else:
            right = [s * views[i, a] @ views[i, b] for a in own for b in own if a < b]
            apart = s.new_zeros(())
            for a in own:
                others = [s * views[i, a] @ view for (j, m), view in views.items() if m == a and j != i]
                apart = apart + (torch.stack(others).logsumexp(0) if others else 0.0)
            losses.append(apart - torch.stack(right).logsumexp(0))
    return torch.stack(losses).mean() if losses else 0 * s


def rows_of(n: int, d: int, seed: int, scale: float) -> dict[str, Tensor]:
    return {name: unit(n, d, seed + number) for number, name in enumerate(MODALITIES)} | {
        "scale": torch.tensor(scale, dtype=torch.float64)
    }


@each_loss
@given(batch=batches(most=5), missing=st.sampled_from([0.0, 0.3, 0.7]))
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(loss, batch, missing):
    leaves = rows_of(batch["n"], batch["d"], batch["seed"], batch["scale"])
    masks = torch.rand(batch["n"], 3, generator=draws(batch["seed"])) >= missing
    check(Case(ours, dense, leaves, batch["splits"], {"loss": loss, "masks": masks}, batch["dtype"]))


@each_loss
@pytest.mark.parametrize("splits", [(7,), (3, 4), (0, 7), (2, 2, 2, 1)])
@pytest.mark.parametrize("lacking", range(3))
def test_a_modality_that_nobody_has_is_left_out(loss, splits, lacking):
    masks = torch.ones(7, 3, dtype=torch.bool)
    masks[:, lacking] = False
    check(Case(ours, dense, rows_of(7, 5, 3, 14.3), splits, {"loss": loss, "masks": masks}))


@each_loss
def test_a_row_of_one_modality_asks_nothing_and_is_a_negative(loss):
    masks = torch.ones(5, 3, dtype=torch.bool)
    masks[4] = torch.tensor([False, False, True])
    leaves = rows_of(5, 6, 0, 14.3)
    moved = leaves | {"audio": torch.cat([leaves["audio"][:4], leaves["audio"][:1]])}
    first, second = (
        evaluate(Case(ours, dense, some, (5,), {"loss": loss, "masks": masks}), ONE_PROCESS) for some in (leaves, moved)
    )
    assert abs(first["audio"][4]).max() > 1e-3
    assert first["loss"] != second["loss"]
    assert (first["image"][4] == 0).all()


@each_loss
def test_no_rows_and_rows_without_a_partner_are_zero_with_gradients(loss):
    for n, masks in ((0, torch.ones(0, 3).bool()), (3, torch.eye(3).bool())):
        for splits in ((n,), (n, 0)):
            check(Case(ours, dense, rows_of(n, 4, 0, 14.3), splits, {"loss": loss, "masks": masks}))


def literal(**rows: Any) -> Embeddings:
    return Embeddings(
        values={name: torch.tensor(rows[name], dtype=torch.float64) for name in MODALITIES},
        rows={name: torch.arange(len(rows[name])) for name in MODALITIES},
    )


def test_negatives_of_one_modality_are_in_mv_info_nce_and_the_own_one_is_not_in_mv_dhel():
    """The README of the authors has it the other way round."""
    both = literal(image=[[1.0, 0.0], [0.0, 1.0]], text=[[1.0, 0.0], [0.0, 1.0]], audio=[[1.0, 0.0], [0.0, 1.0]])
    s = torch.tensor(2.0, dtype=torch.float64)
    e = torch.exp(s)
    # of each view: 2 right ones at e^2, the 3 views of the other row at 1
    assert mv_info_nce(both, s).item() == pytest.approx(torch.log(3 * (2 * e + 3) / (6 * e)).item(), rel=1e-12)
    # 3 pairs at e^2; in each modality one other row at 1
    assert mv_dhel(both, s).item() == pytest.approx(-torch.log(3 * e).item(), rel=1e-12)


def test_the_denominators_of_dhel_are_not_multiplied():
    """Three sums of exp(100) each are beyond float32 before they are a product."""
    x = unit(6, 8, 0).float()
    same = torch.cat([x[:3], x[:3]])
    masks = torch.ones(6, 3, dtype=torch.bool)
    leaves = {name: same.double() for name in MODALITIES} | {"scale": torch.tensor(100.0)}
    naive = torch.stack([(100 * same @ same.T).exp().masked_fill(torch.eye(6).bool(), 0.0).sum(1)] * 3).prod(0)
    assert torch.isinf(naive).all()
    check(Case(ours, dense, leaves, (6,), {"loss": "mv_dhel", "masks": masks}, torch.float32))


@each_loss
def test_scale_100_and_opposite_vectors_overflow_nothing(loss):
    x = unit(9, 8, 4)
    leaves = {"image": x, "text": -x, "audio": x, "scale": torch.tensor(100.0)}
    masks = torch.ones(9, 3, dtype=torch.bool)
    check(Case(ours, dense, leaves, (9,), {"loss": loss, "masks": masks}, torch.float32))


@each_loss
def test_under_bf16_autocast_it_is_the_same_loss(loss):
    masks = torch.ones(32, 3, dtype=torch.bool)
    leaves = rows_of(32, 32, 0, 20.0)
    bf16_is_near(Case(ours, dense, leaves, (32,), {"loss": loss, "masks": masks}))
