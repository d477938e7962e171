"""CompA's modular contrast against the dense formula on 1, 2 and 4 ranks, and what its released code gets wrong."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, hard_negatives, of_rank, unseen
from loss_oracle import Case, Leaves, batches, check, evaluate, pair, unit
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import Positives, info_nce, modular

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def ours(leaves: Leaves, rows: slice, shard: Shard, right: Tensor, wrong: Tensor, seen_by: str = "own") -> Tensor:
    mine, place = of_rank(right, rows)
    return modular(
        leaves["x"][rows],
        leaves["y"][rows],
        leaves["scale"],
        shard,
        positives=Positives(values=leaves["positives"][mine], rows=place),
        negatives=hard_negatives(leaves["negatives"], wrong, rows, seen_by),
    )


def dense(leaves: Leaves, right: Tensor, wrong: Tensor, seen_by: str = "own") -> Tensor:
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    n = len(x)
    if not n:
        return x.sum()
    to_captions, to_x = [], []
    for i in range(n):
        own = torch.cat([y[i : i + 1], leaves["positives"][right == i]])
        against = leaves["negatives"][~unseen(n, wrong, seen_by)[i]]
        log_sum = (s * torch.cat([y, own[1:], against]) @ x[i]).logsumexp(0)
        to_captions.append(torch.stack([log_sum - s * x[i] @ caption for caption in own]).mean())
        to_x += [(s * x @ caption).logsumexp(0) - s * x[i] @ caption for caption in own]
    return (torch.stack(to_captions).mean() + torch.stack(to_x).mean()) / 2


def captioned(n: int, d: int, seed: int, scale: float, right: int, wrong: int) -> tuple[dict[str, Tensor], dict]:
    """A batch with so many further captions, each of a random row: some rows have several, others none."""
    leaves = pair(n, d, seed, scale) | {"positives": unit(right, d, seed + 5), "negatives": unit(wrong, d, seed + 6)}
    generator = draws(seed)
    return leaves, {
        "right": torch.randint(0, max(1, n), (right,), generator=generator),
        "wrong": torch.randint(0, max(1, n), (wrong,), generator=generator),
    }


@given(batch=batches(least=1), right=st.integers(0, 12), wrong=st.integers(0, 12))
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(batch, right, wrong):
    leaves, options = captioned(batch["n"], batch["d"], batch["seed"], batch["scale"], right, wrong)
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@given(batch=batches(least=1), right=st.integers(0, 6), wrong=st.integers(0, 6))
@EXAMPLES
def test_negatives_for_all_are_seen_by_all(batch, right, wrong):
    leaves, options = captioned(batch["n"], batch["d"], batch["seed"], batch["scale"], right, wrong)
    check(Case(ours, dense, leaves, batch["splits"], options | {"seen_by": "all"}, batch["dtype"]))


def test_no_rows_on_any_rank_is_zero_with_gradients():
    for splits in ((0,), (0, 0)):
        leaves, options = captioned(0, 5, 0, 14.3, 0, 0)
        check(Case(ours, dense, leaves, splits, options))


def test_without_further_captions_it_is_info_nce():
    leaves, options = captioned(7, 6, 1, 14.3, 0, 9)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    negatives = hard_negatives(leaves["negatives"], options["wrong"], slice(0, 7), "own")
    expected = info_nce(x, y, s, negatives=negatives)
    assert torch.isclose(ours(leaves, slice(0, 7), ONE_PROCESS, **options), expected, rtol=1e-12)
    nothing = Positives(values=x[:0], rows=options["right"])
    assert torch.isclose(modular(x, y, s, positives=nothing), info_nce(x, y, s), rtol=1e-12)


def test_what_belongs_to_other_rows_is_never_seen():
    """The released code multiplies the logits of foreign negatives by -1e5: a negative cosine explodes the loss."""
    leaves, options = captioned(4, 8, 2, 14.3, 3, 12)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    hard = s * x @ leaves["negatives"].T
    foreign = unseen(4, options["wrong"], "own")
    assert (hard[foreign] < 0).any()
    multiplied = torch.where(foreign, hard * -1e5, hard)
    naive = (torch.cat([s * x @ y.T, multiplied], 1).logsumexp(1) - s * (x * y).sum(1)).mean()
    assert naive > 1e4
    loss = ours(leaves, slice(0, 4), ONE_PROCESS, **options)
    assert torch.isclose(loss, dense(leaves, **options), rtol=1e-9)
    assert loss < 30
    # and the negatives of row 0 mean nothing to the embeddings x of other rows
    options["wrong"] = torch.zeros_like(options["wrong"])
    moved = leaves | {"negatives": -leaves["negatives"]}
    before, after = (evaluate(Case(ours, dense, some, (4,), options), ONE_PROCESS)["x"] for some in (leaves, moved))
    assert abs(before[0] - after[0]).max() > 0.1
    assert (before[1:] == after[1:]).all()


def test_captions_count_alike_on_whatever_rank_they_are():
    """The naive version takes the mean over each rank's own captions: wrong where ranks hold different numbers."""
    leaves, _ = captioned(6, 6, 3, 14.3, 5, 0)
    options = {"right": torch.tensor([0, 0, 0, 1, 1]), "wrong": torch.zeros(0, dtype=torch.long)}
    x, s = leaves["x"], leaves["scale"]

    def asked(rows: slice) -> Tensor:
        mine = (options["right"] >= rows.start) & (options["right"] < rows.stop)
        captions = torch.cat([leaves["y"][rows], leaves["positives"][mine]])
        of = torch.cat([torch.arange(rows.start, rows.stop), options["right"][mine]])
        return (s * captions @ x.T).logsumexp(1) - s * (captions * x[of]).sum(1)

    by_rank = (asked(slice(0, 3)).mean() + asked(slice(3, 6)).mean()) / 2
    assert not torch.isclose(by_rank, asked(slice(0, 6)).mean(), rtol=1e-2)
    check(Case(ours, dense, leaves, (3, 3), options))


def test_scale_100_and_opposite_vectors_overflow_nothing():
    leaves, options = captioned(9, 8, 4, 100.0, 12, 12)
    leaves["y"] = -leaves["x"]
    leaves["negatives"] = leaves["x"][options["wrong"]]
    check(Case(ours, dense, leaves, (9,), options, torch.float32))


def test_under_bf16_autocast_it_is_the_same_loss():
    leaves, options = captioned(48, 32, 0, 20.0, 60, 60)
    bf16_is_near(Case(ours, dense, leaves, (48,), options))
