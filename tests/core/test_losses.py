"""InfoNCE against a dense reference in float64, and many ranks against one process, value and gradient."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from rank_cases import all_cases, own_rows
from torch.nn.functional import normalize

from mmcl.dist import ONE_PROCESS, Gathered, Shard
from mmcl.errors import ConfigError
from mmcl.losses import info_nce
from mmcl.objective import InfoNCEConfig, Objective, ObjectiveConfig
from mmcl.testing import run_ranks
from mmcl.types import ID_KINDS, MODALITIES, PAIRS, Embeddings, Learned


def dense(x: np.ndarray, y: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Loss and gradients by hand: with P, Q the row and column softmax, dL/dlogits = (P + Q - 2I) / 2N."""
    n = len(x)
    if n == 0:
        return 0.0, x, y, 0.0
    logits = scale * x @ y.T
    rows = np.exp(logits - logits.max(1, keepdims=True))
    columns = np.exp(logits - logits.max(0, keepdims=True))
    p, q = rows / rows.sum(1, keepdims=True), columns / columns.sum(0, keepdims=True)
    with np.errstate(divide="ignore"):
        loss = -(np.log(np.diag(p)) + np.log(np.diag(q))).sum() / (2 * n)
    wanted = (p + q - 2 * np.eye(n)) / (2 * n)
    return loss, scale * wanted @ y, scale * wanted.T @ x, float((wanted * (x @ y.T)).sum())


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def assert_close(found, expected, what: str, floor: float = 0.0) -> None:
    """Within 1e-5 of the largest element: an element that is a difference of large ones has no digits of its own."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, what
    size = max(float(np.abs(expected).max(initial=0.0)), floor)
    assert np.abs(found - expected).max(initial=0.0) <= 1e-5 * size, (what, found, expected)


@given(n=st.integers(0, 17), d=st.integers(1, 33), scale=st.floats(1, 100), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_loss_and_gradients_are_those_of_the_dense_formula(n, d, scale, seed):
    x, y = unit(n, d, seed).requires_grad_(), unit(n, d, seed + 1).requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    loss = info_nce(x, y, s)
    loss.backward()
    expected = dense(x.detach().double().numpy(), y.detach().double().numpy(), float(s.detach().double()))
    # fp32 logits up to 100 hold 1e-5, so does what is computed of them
    for name, found, value in zip(
        ("loss", "x", "y", "scale"), (loss.detach(), x.grad, y.grad, s.grad), expected, strict=False
    ):
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-5 * max(1.0, scale / n if n else 1.0), err_msg=name)


def test_a_literal_case():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    right, wrong = info_nce(x, x, torch.tensor(2.0)), info_nce(x, x.flip(0), torch.tensor(2.0))
    assert right.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=2**-21)  # logits of 2 have 2^-22 left
    assert wrong.item() == pytest.approx(math.log(1 + math.exp(2)), abs=2**-21)


def test_it_is_symmetric_and_does_not_depend_on_the_order_of_rows():
    x, y, s = unit(9, 7, 0), unit(9, 7, 1), torch.tensor(14.0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert info_nce(x, y, s).item() == pytest.approx(info_nce(y, x, s).item(), rel=1e-6)
    assert info_nce(x, y, s).item() == pytest.approx(info_nce(x[order], y[order], s).item(), rel=1e-6)


def test_at_the_largest_scale_the_worst_pairs_have_a_finite_loss_and_gradients():
    x = unit(8, 16, 0).requires_grad_()
    s = torch.tensor(100.0, requires_grad=True)
    loss = info_nce(x, -x, s)
    loss.backward()
    assert loss.item() > 100
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and torch.isfinite(s.grad)


def test_one_row_has_nothing_to_tell_apart():
    x, y, s = unit(1, 8, 0).requires_grad_(), unit(1, 8, 1).requires_grad_(), torch.tensor(14.0, requires_grad=True)
    loss = info_nce(x, y, s)
    loss.backward()
    for value in (loss.detach(), x.grad, y.grad, s.grad):  # but for the rounding of a logit of 14
        assert value.abs().max() <= 14 * torch.finfo(torch.float32).eps


def test_no_rows_cost_nothing_and_every_input_still_gets_its_gradient():
    x, y = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, 8, requires_grad=True)
    s = torch.tensor(14.0, requires_grad=True)
    loss = info_nce(x, y, s)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == y.grad.shape == (0, 8) and s.grad == 0


def test_under_autocast_products_are_bf16_and_statistics_fp32():
    x, y, s = unit(64, 16, 0), unit(64, 16, 1), torch.tensor(14.0)
    with torch.autocast("cpu", torch.bfloat16):
        low = info_nce(x, y, s)
    exact = info_nce(x, y, s).item()
    assert low.dtype == torch.float32
    assert low.item() != exact
    assert low.item() == pytest.approx(exact, rel=2**-8)  # bf16 has 8 bits


def test_a_wrong_shape_is_refused_while_tests_run():
    with pytest.raises(TypeCheckError, match="parameter 'y'"):
        info_nce(torch.zeros(4, 8), torch.zeros(3, 8), torch.tensor(1.0))
    with pytest.raises(TypeCheckError, match="parameter 'scale'"):
        info_nce(torch.zeros(4, 8), torch.zeros(4, 8), torch.ones(1))


def one_process(values, rows, config, ids=None):
    """Terms of an objective in one process, where all scales are 5."""
    size = 1 + max(max(numbers, default=0) for numbers in rows.values())
    embeddings = Embeddings(values=values, rows={name: torch.tensor(rows[name]) for name in MODALITIES})
    learned = Learned(scales={pair: torch.tensor(5.0) for pair in PAIRS})
    ids = torch.full((size, len(ID_KINDS)), -1) if ids is None else ids
    return Objective(config).terms(embeddings, learned, ids, ONE_PROCESS, {})


def test_rows_that_lack_a_side_are_left_out_of_that_pair_alone():
    rows = {"image": [0, 1, 3], "text": [1, 2, 3], "audio": [0, 2]}
    values = {name: unit(len(rows[name]), 4, seed) for seed, name in enumerate(MODALITIES)}
    losses = {name: loss for name, (_, loss) in one_process(values, rows, ObjectiveConfig()).items()}
    image, text, audio = (values[name] for name in MODALITIES)
    assert losses["info_nce_image_text"] == info_nce(image[[1, 2]], text[[0, 2]], torch.tensor(5.0)) > 0.1
    assert (
        losses["info_nce_audio_text"]
        == info_nce(audio[[1]], text[[1]], torch.tensor(5.0))
        == pytest.approx(0, abs=1e-6)
    )
    assert (
        losses["info_nce_image_audio"]
        == info_nce(image[[0]], audio[[0]], torch.tensor(5.0))
        == pytest.approx(0, abs=1e-6)
    )


def test_a_pair_without_weight_is_not_computed():
    values, rows = (
        {name: unit(3, 4, seed) for seed, name in enumerate(MODALITIES)},
        {name: [0, 1, 2] for name in MODALITIES},
    )
    config = ObjectiveConfig(info_nce=InfoNCEConfig(weights={"image_text": 2.0, "audio_text": 0.0}))
    terms = one_process(values, rows, config)
    assert {name: weight for name, (weight, _) in terms.items()} == {"info_nce_image_text": 2.0}


def test_rows_with_the_same_caption_are_no_negatives_of_each_other_where_the_config_says_so():
    values, rows = (
        {name: unit(3, 4, seed) for seed, name in enumerate(MODALITIES)},
        {name: [0, 1, 2] for name in MODALITIES},
    )
    ids = torch.tensor([[0, 7, 3], [1, 8, 3], [2, 7, -1]])  # the first and third say the same
    config = ObjectiveConfig(info_nce=InfoNCEConfig(weights={"image_text": 1.0}), false_negatives=["caption"])
    (_, found), *_ = one_process(values, rows, config, ids).values()
    kept = info_nce(values["image"], values["text"], torch.tensor(5.0), same=torch.tensor([[7], [8], [7]]))
    assert found == kept != info_nce(values["image"], values["text"], torch.tensor(5.0))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"info_nce": InfoNCEConfig(weights={})}, "no term has a positive weight"),
        ({"info_nce": InfoNCEConfig(weights={"image_text": 1.0, "image_sound": 1.0})}, "image_sound"),
        ({"info_nce": InfoNCEConfig(weights={"image_text": 1.0, "audio_text": -1.0})}, "not negative"),
        ({"false_negatives": ["speaker"]}, "speaker"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(config, says):
    with pytest.raises(ConfigError, match=says):
        ObjectiveConfig(**config)


# --- many ranks are one process -------------------------------------------------------------------------------------

ALL = {name: [True] * 11 for name in MODALITIES}
SOME = {  # every row lacks something else
    "image": [True, False, True, True, True, False, True, True, False, True, True],
    "text": [True, True, True, False, True, True, True, True, True, False, True],
    "audio": [False, True, True, True, False, True, True, False, True, True, True],
}
NO_AUDIO = {**SOME, "audio": [False] * 11}
AUDIO_ON_ONE_RANK = {**ALL, "audio": [False] * 8 + [True] * 3}
NOTHING = {name: [False] * 11 for name in MODALITIES}
MASKS = {"all": ALL, "some": SOME, "no audio": NO_AUDIO, "audio at the end": AUDIO_ON_ONE_RANK, "nothing": NOTHING}
SPLITS = {2: [(6, 5), (11, 0), (0, 11), (1, 10)], 3: [(4, 4, 3), (0, 7, 4), (8, 0, 3), (1, 10, 0)]}


@cache
def sharded(world: int):
    """All cases of `world` ranks: what every rank found, and what one process finds."""
    cases = [
        (kind, masks, splits, seed)
        for kind in ("linear", "tiny")
        for seed, masks in enumerate(MASKS.values())
        for splits in (SPLITS[world] if kind == "linear" else SPLITS[world][:2])
    ]
    names = [(kind, next(n for n, m in MASKS.items() if m is masks), splits) for kind, masks, splits, _ in cases]
    whole = all_cases(ONE_PROCESS, [(kind, masks, (11,), seed) for kind, masks, _, seed in cases])
    return names, run_ranks(world, all_cases, cases), whole


@pytest.mark.parametrize("kind", ["linear", "tiny"])
@pytest.mark.parametrize("world", [2, 3])
def test_many_ranks_equal_one_process_in_every_loss_and_gradient(world, kind):
    names, by_rank, whole = sharded(world)
    for number, name in enumerate(names):
        if name[0] != kind:
            continue
        expected = whole[number]
        gradients = [value for key, value in expected.items() if key.startswith("gradient") and "which" not in key]
        largest = max(float(np.abs(value).max(initial=0)) for value in gradients)
        for rank in range(world):
            found = by_rank[rank][number]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                # biases of attention keys have no gradient but rounding
                assert_close(found[key], value, f"{name} rank {rank} {key}", floor=1e-2 * largest)


@pytest.mark.parametrize("world", [2, 3])
def test_the_cases_have_losses_and_gradients_worth_comparing(world):
    names, _, whole = sharded(world)
    for name, found in zip(names, whole, strict=False):
        scales = [v for k, v in found.items() if k.startswith("gradient") and any(pair in k for pair in PAIRS)]
        assert len(scales) == 3
        if name[1] in ("all", "some"):
            assert all(np.abs(v).max() > 1e-4 for v in scales), name
            assert all(v > 0.05 for k, v in found.items() if k.startswith("loss")), name


def test_one_process_equals_the_dense_formula_through_a_model():
    (found,) = all_cases(ONE_PROCESS, [("linear", SOME, (11,), 1)])
    generator = torch.Generator().manual_seed(1)
    features = {name: torch.randn(11, 6, generator=generator).double() for name in MODALITIES}
    maps = {name: torch.randn(6, 5, generator=generator).double() for name in MODALITIES}
    units = {name: normalize(features[name] @ maps[name], dim=-1).numpy() for name in MODALITIES}
    for (pair, (x, y)), scale in zip(PAIRS.items(), (14.0, 3.0, 30.0), strict=False):
        both = np.array(SOME[x]) & np.array(SOME[y])
        loss, _, _, of_scale = dense(units[x][both], units[y][both], scale)
        np.testing.assert_allclose(found[f"loss {pair}"], loss, rtol=1e-5)
        weight = {"image_text": 1.0, "audio_text": 0.7, "image_audio": 0.4}[pair]
        np.testing.assert_allclose(found[f"gradient {pair}"], weight * of_scale, rtol=2e-5)


def test_ranks_have_their_rows_one_after_another():
    assert own_rows((4, 0, 3), 2) == slice(4, 7)
    assert Gathered(torch.zeros(7, 1), (4, 0, 3), Shard(2, 3)).own == slice(4, 7)
