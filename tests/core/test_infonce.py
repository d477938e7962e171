"""InfoNCE with everything that composes on it, against dense float64 formulas on 1, 2 and 4 ranks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import Case, Leaves, batches, check, pair, pool
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import ConfigError
from mmcl.losses import HardNegatives, info_nce
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.types import ID_KINDS, MODALITIES, PAIRS, Embeddings, Learned

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
    target = (1 - smoothing) * torch.eye(n, dtype=torch.float64) + smoothing * counted / counted.sum(1, keepdim=True)
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


@given(
    batch=batches(least=1),
    m=st.integers(0, 12),
    seen_by=st.sampled_from(["own", "all"]),
    smoothing=st.sampled_from([0.0, 0.2]),
    masked=st.booleans(),
)
@EXAMPLES
def test_everything_goes_together(batch, m, seen_by, smoothing, masked):
    generator = torch.Generator().manual_seed(batch["seed"])
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"] = pair(m, batch["d"], batch["seed"] + 3, 1.0)["x"]
    options: dict[str, Any] = {
        "negative_rows": torch.randint(0, batch["n"], (m,), generator=generator),
        "seen_by": seen_by,
        "weights": torch.rand(batch["n"], generator=generator, dtype=torch.float64) + 0.1,
        "smoothing": smoothing,
    }
    if masked:
        options["same"] = torch.randint(-1, 5, (batch["n"], 2), generator=generator)
    else:
        options |= {"teacher": pair(batch["n"], 3, batch["seed"] + 7, 1.0)["x"], "smoothing": 0.0}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


def test_weights_that_are_all_zero_cost_nothing():
    leaves = pair(8, 4, 0, 5.0)
    loss = info_nce(leaves["x"], leaves["y"], leaves["scale"], weights=torch.zeros(8))
    assert loss == 0


@pytest.mark.parametrize(("scale", "noise"), [(100.0, 0.0), (100.0, 0.3), (50.0, 0.1)])
def test_what_was_learnt_is_not_lost_to_bf16(scale, noise):
    """The own logit is the same number in the sum and beside it, or a row that is right keeps being pulled about."""
    x = pair(256, 64, 0, 1.0)["x"].float().detach()
    y = torch.nn.functional.normalize(x + noise * pair(256, 64, 5, 1.0)["x"].float(), dim=-1).detach()

    def gradients(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        leaves = [each.to(dtype).clone().requires_grad_() for each in (x, y, torch.tensor(scale))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = info_nce(*leaves)
        loss.backward()
        return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    for low, exact in zip(gradients(torch.float32, True), gradients(torch.float64, False), strict=True):
        assert (low - exact).norm() <= 0.1 * exact.norm() + 1e-6 * scale, (low, exact)


def without_a_graph(kind: str, shard: Shard) -> Tensor:
    """The other rank has no row of something, and a tensor that never saw a model."""
    n = 4 if shard.rank == 0 or kind == "negatives" else 0
    x, y, wrong = (torch.randn(k, 3, generator=torch.Generator().manual_seed(k)) for k in (n, n, 4))
    x, y = (torch.nn.functional.normalize(each, dim=-1) for each in (x, y))
    learns = shard.rank == 0 or kind == "negatives"
    x, y = x.requires_grad_(learns), y.requires_grad_(learns)
    wrong = wrong.requires_grad_() if shard.rank == 0 else wrong[:0]
    rows = torch.arange(len(wrong))
    negatives = HardNegatives(values=wrong, rows=rows, seen_by="all") if kind == "negatives" else None
    loss = info_nce(x, y, torch.tensor(5.0), shard, negatives=negatives)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", ["rows", "negatives"])
def test_a_rank_that_has_nothing_and_no_graph_does_not_hang_the_others(kind):
    assert all(loss > 0 or kind == "rows" for loss in pool(2).run(without_a_graph, kind))


def sent(shard: Shard) -> dict[str, int]:
    """Bytes of the collectives of InfoNCE there and back, and of three pairs that share what they gather."""
    sys.path.insert(0, str(BENCHMARKS))
    from measure import Sent

    x, y = (torch.zeros(64, 256, requires_grad=True) for _ in range(2))
    embeddings = Embeddings(
        values={name: torch.zeros(64, 256, requires_grad=True) for name in MODALITIES},
        rows=dict.fromkeys(MODALITIES, torch.arange(64)),
    )
    scale = torch.tensor(5.0)
    with Sent(shard.world) as one:
        info_nce(x, y, scale, shard).backward()
    ids = torch.full((64, len(ID_KINDS)), -1)
    learned = Learned(scales=dict.fromkeys(PAIRS, scale))
    with Sent(shard.world) as three:
        terms = Objective(ObjectiveConfig()).terms(embeddings, learned, ids, shard, {})
        torch.stack([value for _, value in terms.values()]).sum().backward()
    return {"pair": one.bytes, "three pairs": three.bytes}


def test_a_pair_sends_one_side_there_and_its_gradient_back_and_three_pairs_send_two():
    side = 2 * 64 * 256 * 4 / 2  # half of what two ranks hold goes to the other one
    for found in pool(2).run(sent):
        assert 2 * side <= found["pair"] <= 2.1 * side
        assert 4 * side <= found["three pairs"] <= 4.3 * side


def test_contradicting_options_are_refused():
    leaves = pair(3, 4, 0, 5.0)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    with pytest.raises(ConfigError, match="smoothing=1"):
        info_nce(x, y, s, ONE_PROCESS, smoothing=1.0)
    with pytest.raises(ConfigError, match="teacher"):
        info_nce(x, y, s, ONE_PROCESS, teacher=x, smoothing=0.1)
