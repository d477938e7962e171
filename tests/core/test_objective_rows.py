"""Every term on rows that lack modalities, with hard negatives and false negatives, is its formula on any ranks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import test_infonce
import test_loss_dcl
import test_loss_global
import test_loss_hn_nce
import test_loss_mixup
import test_loss_modular
import test_loss_multi_positive
import test_loss_multi_view
import test_loss_sigmoid
import torch
from loss_cases import draws
from loss_oracle import Case, Leaves, check, unit
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.losses import HardNegatives, Positives, info_nce
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.terms import InfoNCEConfig, PairTerm
from mmcl.types import MODALITIES, PAIRS, Learned

N, D, WRONG = 13, 6, 9
RIGHT = torch.tensor([0, 0, 3, 5, 5, 5, 12])
"""Rows that further positives are of."""
WEIGHTS = {"image_text": 1.0, "audio_text": 0.7, "image_audio": 0.4}
CAPTION, IMAGE = 1, 2
TERMS: dict[str, dict[str, Any]] = {
    "info_nce": {"smoothing": 0.1},
    "dcl": {"sigma": 0.5},
    "hn_nce": {"alpha": 0.7, "beta": 0.5},
    "sigmoid": {},
    "multi_positive": {"groups": "image"},
    "modular": {},
    "mixup": {"rows": 0.0},
    "global_contrast": {"method": "sogclr", "gamma": 0.5},
    "mv_info_nce": {},
    "mv_dhel": {},
}
"""Fields of each; what is drawn is left out."""
MASKED = {"info_nce", "dcl", "hn_nce", "sigmoid", "global_contrast"}
WITH_NEGATIVES = MASKED | {"multi_positive", "modular"}


def config_of(name: str) -> ObjectiveConfig:
    kind = type(getattr(ObjectiveConfig(), name))
    weights: dict[str, Any] = {"weights": WEIGHTS} if issubclass(kind, PairTerm) else {"weight": 1.0}
    terms = {"info_nce": InfoNCEConfig(weights={})} | {name: kind(**weights, **TERMS[name])}
    return ObjectiveConfig(**terms, false_negatives=["caption"] if name in MASKED else [])


def ours(
    leaves: Leaves, rows: slice, shard: Shard, name: str, masks: Tensor, ids: Tensor, owners: Tensor | None
) -> Tensor:
    embeddings = test_loss_multi_view.embeddings(leaves, rows, masks)
    learned = Learned(
        scales=dict.fromkeys(PAIRS, leaves["scale"]), biases=dict.fromkeys(PAIRS, leaves["bias"].squeeze())
    )
    negatives: Mapping[Any, HardNegatives] = {}
    if owners is not None:
        mine = (owners >= rows.start) & (owners < rows.stop)
        wrong = HardNegatives(values=leaves["wrong"][mine], rows=owners[mine] - rows.start, seen_by="all")
        negatives = {"text": wrong}
    positives = {}
    if name == "modular":
        mine = (rows.start <= RIGHT) & (rows.stop > RIGHT)
        positives = {"text": Positives(values=leaves["right"][mine], rows=RIGHT[mine] - rows.start)}
    terms = Objective(config_of(name)).terms(embeddings, learned, ids[rows], shard, negatives, positives)
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    return total + 0.0 * sum(leaf.sum() for leaf in leaves.values())


def dense(leaves: Leaves, name: str, masks: Tensor, ids: Tensor, owners: Tensor | None) -> Tensor:
    if name in ("mv_info_nce", "mv_dhel"):
        return test_loss_multi_view.dense(leaves, name, masks)
    total = 0.0 * leaves["scale"]
    for pair, (first, second) in PAIRS.items():
        both = (masks[:, MODALITIES.index(first)] & masks[:, MODALITIES.index(second)]).nonzero().flatten()
        part: dict[str, Tensor] = {
            "x": leaves[first][both],
            "y": leaves[second][both],
            "scale": leaves["scale"],
            "bias": leaves["bias"],
        }
        more: dict[str, Any] = {}
        if owners is not None and second == "text":
            kept = torch.isin(owners, both)
            part["negatives"] = leaves["wrong"][kept]
            more = {"owners": torch.searchsorted(both, owners[kept]), "seen_by": "all"}
        if name == "modular":
            kept = torch.isin(RIGHT, both) & (second == "text")
            part |= {"positives": leaves["right"][kept]} | ({} if more else {"negatives": leaves["wrong"][:0]})
            none = {"owners": torch.zeros(0, dtype=torch.long), "seen_by": "all"}
            more = (more or none) | {"right": torch.searchsorted(both, RIGHT[kept])}
            more["wrong"] = more.pop("owners")
        total = total + WEIGHTS[pair] * formula(name, part, ids[both], more)
    return total


def formula(name: str, part: Leaves, ids: Tensor, more: dict[str, Any]) -> Tensor:
    n, same = len(ids), ids[:, [CAPTION]]
    renamed = {"negative_rows" if key == "owners" else key: value for key, value in more.items()}
    return {
        "info_nce": lambda: test_infonce.dense(part, same=same, smoothing=0.1, **renamed),
        "dcl": lambda: test_loss_dcl.dense(part, sigma=0.5, same=same, **more),
        "hn_nce": lambda: test_loss_hn_nce.dense(part, alpha=0.7, beta=0.5, same=same, **more),
        "sigmoid": lambda: test_loss_sigmoid.dense(part, same=same, **more),
        "multi_positive": lambda: test_loss_multi_positive.dense(part, groups=ids[:, IMAGE], **more),
        "modular": lambda: test_loss_modular.dense(part, **more),
        "mixup": lambda: test_loss_mixup.dense(part, torch.ones(n).double(), torch.arange(n), mixed=True),
        "global_contrast": lambda: test_loss_global.dense(
            part, "fastclip_v1", torch.zeros(n, 2).double(), 0.5, same=same, **more
        ),
    }[name]()


@pytest.mark.parametrize("splits", [(N,), (6, 7), (N, 0), (4, 0, 8, 1)])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_formula_on_the_rows_that_have_both(name, splits):
    x = unit(N, D, 1)
    leaves = {m: normalize(x + 0.7 * unit(N, D, 2 + number), dim=-1) for number, m in enumerate(MODALITIES)}
    leaves |= {
        "wrong": unit(WRONG, D, 7),
        "right": unit(len(RIGHT), D, 8),
        "scale": torch.tensor(14.3),
        "bias": torch.tensor(-3.0),
    }
    masks = torch.rand(N, 3, generator=draws(3)) > 0.3
    assert not masks.all(0).any() and masks.any(0).all(), "each modality is missing somewhere"
    ids = torch.stack([torch.arange(N), torch.arange(N) % 6, torch.arange(N) % 4], 1)
    owners = torch.randint(0, N, (WRONG,), generator=draws(4)) if name in WITH_NEGATIVES else None
    options = {"name": name, "masks": masks, "ids": ids, "owners": owners}
    check(Case(ours, dense, leaves, splits, options))


@pytest.mark.parametrize("pair", PAIRS)
def test_hard_negatives_count_for_their_own_row_alone_in_the_pairs_that_say_so(pair):
    leaves = {m: unit(N, D, number) for number, m in enumerate(MODALITIES)} | {"wrong": unit(2, D, 7)}
    masks = torch.ones(N, 3, dtype=torch.bool)
    embeddings = test_loss_multi_view.embeddings(leaves, slice(None), masks)
    wrong = HardNegatives(values=leaves["wrong"], rows=torch.tensor([4, 9]), seen_by="all")
    learned = Learned(scales=dict.fromkeys(PAIRS, torch.tensor(9.0)))
    ids = torch.arange(N)[:, None].expand(N, 3)

    def value(own: list[Any]) -> Tensor:
        config = ObjectiveConfig(info_nce=InfoNCEConfig(weights={pair: 1.0}), own_negatives=own)
        return Objective(config).terms(embeddings, learned, ids, ONE_PROCESS, {"text": wrong})[f"info_nce_{pair}"][1]

    first, second = PAIRS[pair]
    expected = {
        seen: info_nce(leaves[first], leaves[second], torch.tensor(9.0), negatives=replace(wrong, seen_by=seen))
        for seen in ("own", "all")
    }
    if second == "text":
        assert value([pair]) == expected["own"] != expected["all"] == value([])
    else:
        assert value([pair]) == value([]), "they are no sounds"


def test_these_are_all_terms():
    assert TERMS.keys() == {name for name, _ in ObjectiveConfig().terms()}
