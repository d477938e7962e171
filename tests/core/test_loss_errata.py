"""What sharded contrastive losses in the wild get wrong, done on two ranks beside what is done here."""

from typing import Any

import torch
from loss_cases import hard_negatives, of_rank
from loss_oracle import Case, Leaves, check, evaluate, pair, pool, reference, unit
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmcl.dist import Shard
from mmcl.losses import hn_nce


def ours(leaves: Leaves, rows: slice, shard: Shard, owners: Tensor | None = None) -> Tensor:
    """With alpha = 1 and beta = 0, which is InfoNCE."""
    options: dict[str, Any] = {"alpha": 1.0, "beta": 0.0}
    if owners is not None:
        options["negatives"] = hard_negatives(leaves["negatives"], owners, rows, "all")
    return hn_nce(leaves["x"][rows], leaves["y"][rows], leaves["scale"], shard, **options)


def dense(leaves: Leaves, owners: Tensor | None = None) -> Tensor:
    logits, labels = leaves["scale"] * leaves["x"] @ leaves["y"].T, torch.arange(len(leaves["x"]))
    every = logits
    if owners is not None:
        every = torch.cat([logits, leaves["scale"] * leaves["x"] @ leaves["negatives"].T], 1)
    return (cross_entropy(every, labels) + cross_entropy(logits.T, labels)) / 2


def own_slot(leaves: Leaves, rows: slice, shard: Shard) -> Tensor:
    """The whole (N, N) loss on every rank, of features gathered without a gradient but for the own ones."""
    every = {}
    for name in ("x", "y"):
        features = leaves[name].detach().clone()  # what a gather without a gradient gives
        features[rows] = leaves[name][rows]
        every[name] = features
    return dense({**every, "scale": leaves["scale"]})


def test_gathering_without_a_gradient_scales_the_encoder_by_one_over_the_ranks():
    """Its logit scale is right all the same, so that one learning rate cannot mend it."""
    leaves = pair(8, 6, 0, 14.3)
    true = reference(Case(own_slot, dense, leaves, (8,)))
    for splits in ((4, 4), (2, 3, 3, 0)):
        (naive, *_) = pool(len(splits)).run(evaluate, Case(own_slot, dense, leaves, splits))
        torch.testing.assert_close(naive["loss"], true["loss"])
        torch.testing.assert_close(naive["scale"], true["scale"])
        for name in ("x", "y"):
            torch.testing.assert_close(naive[name] * len(splits), true[name])
        check(Case(ours, dense, leaves, splits))


def interleaved(leaves: Leaves, rows: slice, shard: Shard, owners: Tensor, own_labels: bool = False) -> Tensor:
    """Each rank puts its hard negatives behind its keys and then gathers both: rows only, since it asks one way."""
    mine, _ = of_rank(owners, rows)
    both = torch.cat([leaves["y"][rows], leaves["negatives"][mine]])
    keys = shard.gather(both).values
    size = len(both) if own_labels else rows.stop - rows.start
    labels = shard.rank * size + torch.arange(rows.stop - rows.start)
    return cross_entropy(leaves["scale"] * leaves["x"][rows] @ keys.T, labels)


def one_way(leaves: Leaves, owners: Tensor, own_labels: bool = False) -> Tensor:
    every = torch.cat([leaves["y"], leaves["negatives"]])
    return cross_entropy(leaves["scale"] * leaves["x"] @ every.T, torch.arange(len(leaves["x"])))


def test_columns_that_are_gathered_with_their_negatives_between_them_do_not_shift_the_labels():
    """rank * B + arange(B) is right on one process, and on two it is somebody's hard negative."""
    leaves = pair(8, 6, 0, 14.3) | {"negatives": unit(8, 6, 9)}
    options = {"owners": torch.arange(8)}
    check(Case(interleaved, one_way, leaves, (8,), options))
    naive = Case(interleaved, one_way, leaves, (4, 4), options)
    assert pool(2).run(evaluate, naive)[0]["loss"] > reference(naive)["loss"] + 1
    check(Case(interleaved, one_way, leaves, (4, 4), options | {"own_labels": True}))
    for splits in ((8,), (4, 4), (2, 0, 5, 1)):
        check(Case(ours, dense, leaves, splits, options))
