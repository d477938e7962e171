"""SogCLR, iSogCLR and FastCLIP against dense formulas on 1, 2 and 4 ranks: value, gradients, and what is learnt."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bf16_is_near, draws, hard_negatives, no_negatives, some_negatives, unseen
from loss_oracle import Case, Leaves, batches, check, pair, pool, unit
from rank_cases import own_rows
from torch import Tensor

from mmcl.dist import ONE_PROCESS, Shard
from mmcl.errors import ConfigError
from mmcl.losses import Estimates, dcl, global_contrast, individual_contrast

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
FORMS = {  # times_tau, rho, learnt
    "fastclip_v0": (False, 0.0, True),
    "fastclip_v1": (True, 0.0, False),
    "fastclip_v3": (True, 6.5, True),
}
each_form = pytest.mark.parametrize("form", FORMS)


def ours(leaves: Leaves, rows: slice, shard: Shard, form: str, u: Tensor, **options: Any) -> Tensor:
    return told(leaves, rows, shard, form, u, **options)[0]


def told(leaves: Leaves, rows: slice, shard: Shard, form: str, u: Tensor, **options: Any) -> tuple[Tensor, Estimates]:
    times_tau, rho, learnt = FORMS[form]
    scale = leaves["scale"] if learnt else leaves["scale"].detach()
    if "same" in options:
        options["same"] = options["same"][rows]
    if "owners" in options:
        of, seen_by = options.pop("owners"), options.pop("seen_by")
        options["negatives"] = hard_negatives(leaves["negatives"], of, rows, seen_by)
    loss, now = global_contrast(
        leaves["x"][rows],
        leaves["y"][rows],
        scale,
        shard,
        past=Estimates(log_u=u[rows].log()),
        times_tau=times_tau,
        rho=rho,
        **options,
    )
    return loss + 0.0 * leaves["scale"], now


def others(leaves: Leaves, same: Tensor | None, owners: Tensor | None, seen_by: str) -> tuple[Tensor, Tensor]:
    """Cosines of rows, hard negatives behind, and which of them are in J."""
    x, y = leaves["x"], leaves["y"]
    cosines, counted = x @ y.T, ~no_negatives(len(x), same)
    if owners is not None:
        cosines = torch.cat([cosines, x @ leaves["negatives"].T], 1)
        counted = torch.cat([counted, ~unseen(len(x), owners, seen_by)], 1)
    return cosines, counted


def sides_of(leaves: Leaves, same: Tensor | None, owners: Tensor | None, seen_by: str) -> list[tuple[Tensor, Tensor]]:
    """Of rows and of columns: how much nearer others are than the own one, and who counts."""
    cosines, counted = others(leaves, same, owners, seen_by)
    plain, plain_counted = others(leaves, same, None, seen_by)
    own = plain.diagonal()
    return [(cosines - own[:, None], counted), (plain.T - own[:, None], plain_counted.T)]


def mean_exp(differences: Tensor, counted: Tensor, tau: Tensor) -> Tensor:
    """g of each row; 0 where nothing counts."""
    inside = torch.where(counted, differences, 0.0) / tau[:, None]
    return (inside.exp() * counted).sum(1) / counted.sum(1).clamp(min=1)


def dense(
    leaves: Leaves,
    form: str,
    u: Tensor,
    gamma: float,
    eps: float = 1e-14,
    same: Tensor | None = None,
    owners: Tensor | None = None,
    seen_by: str = "own",
) -> Tensor:
    times_tau, rho, learnt = FORMS[form]
    scale = leaves["scale"] if learnt else leaves["scale"].detach()
    n = len(leaves["x"])
    if not n:
        return leaves["x"].sum()
    tau = (1 / scale).expand(n)
    total = 0.0 * scale
    for column, (differences, counted) in enumerate(sides_of(leaves, same, owners, seen_by)):
        g = mean_exp(differences, counted, tau)
        for i in range(n):
            if not counted[i].any():
                continue
            before = u[i, column]
            after = g[i].detach() if before == 0 else (1 - gamma) * before + gamma * g[i].detach()
            # the value of log(eps + u), the gradient of g / (eps + u)
            term = torch.log(eps + after) + (g[i] - g[i].detach()) / (eps + after)
            total = total + ((term + rho) / scale if times_tau else term)
    return total / (2 * n)


def estimates(n: int, seed: int) -> Tensor:
    """u of rows and columns so far; some were never seen."""
    u = torch.rand(n, 2, generator=draws(seed), dtype=torch.float64) * 3
    return torch.where(torch.rand(n, 2, generator=draws(seed + 1)) < 0.3, 0.0, u)


GAMMAS = st.sampled_from([1.0, 0.8, 0.2])


@each_form
@given(batch=batches(), gamma=GAMMAS, eps=st.sampled_from([0.0, 1e-14, 1e-2]))
@EXAMPLES
def test_it_is_the_formula_on_any_number_of_ranks(form, batch, gamma, eps):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    options = {"form": form, "u": estimates(batch["n"], batch["seed"]), "gamma": gamma, "eps": eps}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@given(batch=batches(least=1), gamma=GAMMAS, different=st.integers(1, 5))
@EXAMPLES
def test_rows_that_share_an_id_are_in_neither_the_sum_nor_the_count(batch, gamma, different):
    same = torch.randint(-1, different, (batch["n"], 2), generator=draws(batch["seed"]))
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    options = {"form": "fastclip_v3", "u": estimates(batch["n"], batch["seed"]), "gamma": gamma, "same": same}
    check(Case(ours, dense, leaves, batch["splits"], options, batch["dtype"]))


@given(batch=batches(least=1), m=st.integers(0, 12), seen_by=st.sampled_from(["own", "all"]))
@EXAMPLES
def test_hard_negatives_are_counted_like_any_other(batch, m, seen_by):
    leaves = pair(batch["n"], batch["d"], batch["seed"], batch["scale"])
    leaves["negatives"], owners = some_negatives(batch["n"], m, batch["d"], batch["seed"])
    options = {"form": "fastclip_v1", "u": estimates(batch["n"], batch["seed"]), "gamma": 0.5}
    check(Case(ours, dense, leaves, batch["splits"], options | {"owners": owners, "seen_by": seen_by}, batch["dtype"]))


def log_u_of(case: Case, shard: Shard) -> Tensor:
    rows = own_rows(case.splits, shard.rank)
    return told(case.leaves, rows, shard, **case.options)[1].log_u.detach()


@pytest.mark.parametrize("splits", [(7,), (3, 4), (0, 2, 5, 0)])
def test_estimates_move_by_gamma_and_start_with_the_first_batch(splits):
    leaves, u = pair(7, 5, 0, 14.3), estimates(7, 0)
    case = Case(ours, dense, leaves, splits, {"form": "fastclip_v1", "u": u, "gamma": 0.3})
    ranks = [log_u_of(case, ONE_PROCESS)] if len(splits) == 1 else pool(len(splits)).run(log_u_of, case)
    tau = torch.full((7,), 1 / 14.3, dtype=torch.float64)
    g = torch.stack([mean_exp(*side, tau) for side in sides_of(leaves, None, None, "own")], 1)
    assert (u == 0).any() and (u > 0).any()
    expected = torch.where(u == 0, g, 0.7 * u + 0.3 * g).log()
    torch.testing.assert_close(torch.cat(list(ranks)), expected)


def test_with_gamma_1_it_is_dcl_but_for_the_number_of_negatives():
    leaves = pair(9, 6, 1, 14.3)
    x, y, s = leaves["x"], leaves["y"], leaves["scale"]
    u = estimates(9, 1)
    loss = ours(leaves, slice(0, 9), ONE_PROCESS, "fastclip_v0", u, gamma=1.0, eps=0.0)
    assert torch.isclose(loss, dcl(x, y, s) - math.log(8), rtol=1e-12)


def test_a_first_estimate_is_not_pulled_towards_zero():
    """SogCLR's code starts at u = 0 and takes gamma g: its first weights are 1 / gamma too large."""
    leaves, nothing = pair(6, 5, 2, 14.3), torch.zeros(6, 2, dtype=torch.float64)
    tau = torch.full((6,), 1 / 14.3, dtype=torch.float64)
    _, now = told(leaves, slice(0, 6), ONE_PROCESS, "fastclip_v1", nothing, gamma=0.1)
    g = torch.stack([mean_exp(*side, tau) for side in sides_of(leaves, None, None, "own")], 1)
    torch.testing.assert_close(now.log_u, g.log())
    assert ((0.1 * g).log() < now.log_u - 2).all()


def test_estimates_of_any_size_overflow_nothing():
    x = unit(9, 8, 4)
    leaves = {"x": x, "y": -x, "scale": torch.tensor(100.0)}
    assert torch.isinf(torch.exp(torch.tensor(200.0)))  # of float32, what the naive version takes
    for u in (1e-30, 1e30):
        options = {"form": "fastclip_v3", "u": torch.full((9, 2), u, dtype=torch.float64), "gamma": 0.2}
        check(Case(ours, dense, leaves, (9,), options, torch.float32))


@pytest.mark.parametrize("n", [0, 1])
def test_a_row_without_any_negative_adds_nothing_and_keeps_its_estimate(n):
    leaves = {name: leaf.requires_grad_() for name, leaf in pair(n, 4, 0, 100.0).items()}
    u = torch.full((n, 2), 2.0, dtype=torch.float64)
    loss, now = told(leaves, slice(0, n), ONE_PROCESS, "fastclip_v3", u, gamma=0.5)
    loss.backward()
    assert loss == 0
    assert (now.log_u.exp() == u).all()
    assert all((leaf.grad == 0).all() for leaf in leaves.values())


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_a_gamma_that_is_no_share_is_refused(gamma):
    leaves = pair(3, 4, 0, 5.0)
    with pytest.raises(ConfigError, match=f"gamma={gamma}"):
        told(leaves, slice(0, 3), ONE_PROCESS, "fastclip_v1", torch.ones(3, 2), gamma=gamma)


def test_under_bf16_autocast_it_is_the_same_loss():
    options = {"form": "fastclip_v0", "u": estimates(48, 0), "gamma": 0.5}
    bf16_is_near(Case(ours, dense, pair(48, 32, 0, 20.0), (48,), options))


# --- a temperature for each row -------------------------------------------------------------------------------------


def alone(
    leaves: Leaves, rows: slice, shard: Shard, u: Tensor, tau: Tensor, same: Tensor | None = None, **options: Any
) -> tuple[Tensor, Estimates]:
    past = Estimates(log_u=u[rows].log(), tau=tau[rows])
    same = None if same is None else same[rows]
    loss, now = individual_contrast(leaves["x"][rows], leaves["y"][rows], shard, past=past, same=same, **options)
    return loss + 0.0 * leaves["scale"], now


def ours_alone(leaves: Leaves, rows: slice, shard: Shard, **options: Any) -> Tensor:
    return alone(leaves, rows, shard, **options)[0]


def terms_alone(
    leaves: Leaves, u: Tensor, tau: Tensor, gamma: float, rho: float, eps: float, same: Tensor | None
) -> list[Tensor]:
    """tau_i (rho + log(eps + u_i)) of every row with something to count, rows first, with the gradient of tau_i too."""
    found = []
    for column, (differences, counted) in enumerate(sides_of(leaves, same, None, "own")):
        g = mean_exp(differences, counted, tau[:, column])
        for i in range(len(g)):
            if counted[i].any():
                now, before = g[i].detach(), u[i, column]
                after = now if before == 0 else (1 - gamma) * before + gamma * now
                term = torch.log(eps + after) + (g[i] - now) / (eps + after)
                found.append(tau[i, column] * (rho + term))
    return found


def dense_alone(
    leaves: Leaves,
    u: Tensor,
    tau: Tensor,
    gamma: float,
    rho: float,
    eps: float = 1e-14,
    same: Tensor | None = None,
) -> Tensor:
    found = terms_alone(leaves, u, tau, gamma, rho, eps, same)
    return torch.stack(found).sum() / (2 * len(leaves["x"])) if found else leaves["x"].sum() * 0


def temperatures(n: int, seed: int) -> Tensor:
    return 0.02 + 0.3 * torch.rand(n, 2, generator=draws(seed + 5), dtype=torch.float64)


@given(batch=batches(), gamma=GAMMAS, masked=st.booleans())
@EXAMPLES
def test_with_temperatures_of_rows_it_is_the_formula_on_any_number_of_ranks(batch, gamma, masked):
    n, seed = batch["n"], batch["seed"]
    options: dict[str, Any] = {"u": estimates(n, seed), "tau": temperatures(n, seed), "gamma": gamma, "rho": 7.0}
    if masked:
        options["same"] = torch.randint(-1, 4, (n, 1), generator=draws(seed))
    leaves = pair(n, batch["d"], seed, 50.0)  # the scale only says how large a logit can be
    check(Case(ours_alone, dense_alone, leaves, batch["splits"], options, batch["dtype"]))


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_each_temperature_is_that_of_its_term(masked):
    leaves, u, tau = pair(7, 5, 0, 1.0), estimates(7, 0), temperatures(7, 0)
    same = torch.tensor([[0], [0], [1], [2], [3], [4], [5]]) if masked else None
    options = {"gamma": 0.4, "rho": 7.0, "eps": 1e-14}
    _, now = alone(leaves, slice(0, 7), ONE_PROCESS, u, tau, same, **options)
    free = tau.clone().requires_grad_()
    torch.stack(terms_alone(leaves, u, free, same=same, **options)).sum().backward()
    torch.testing.assert_close(now.tau_gradient, free.grad)


def gradient_of(case: Case, shard: Shard) -> Tensor:
    gradient = alone(case.leaves, own_rows(case.splits, shard.rank), shard, **case.options)[1].tau_gradient
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("splits", [(3, 4), (0, 2, 5, 0)])
def test_the_gradients_of_temperatures_do_not_depend_on_the_ranks(splits):
    leaves = pair(7, 5, 0, 1.0)
    options = {"u": estimates(7, 0), "tau": temperatures(7, 0), "gamma": 0.4, "rho": 7.0}
    whole = gradient_of(Case(ours_alone, dense_alone, leaves, (7,), options), ONE_PROCESS)
    parts = pool(len(splits)).run(gradient_of, Case(ours_alone, dense_alone, leaves, splits, options))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_factor_tau_is_in_the_gradient_of_the_encoder():
    """FastCLIP-v2's code leaves it out: rows with a small temperature then pull many times as much."""
    leaves, u = pair(6, 5, 1, 1.0), estimates(6, 1)
    small, large = (torch.full((6, 2), value, dtype=torch.float64) for value in (0.02, 0.2))
    tau = torch.cat([small[:3], large[3:]])
    options = {"u": u, "tau": tau, "gamma": 0.5, "rho": 7.0}
    check(Case(ours_alone, dense_alone, leaves, (6,), options))
    x = leaves["x"].clone().requires_grad_()
    (torch.stack(terms_alone(leaves | {"x": x}, eps=1e-14, same=None, **options)).sum()).backward()
    again = leaves["x"].clone().requires_grad_()
    terms = terms_alone(leaves | {"x": again}, eps=1e-14, same=None, **options)
    (torch.stack([term / t for term, t in zip(terms, tau.T.flatten(), strict=True)]).sum()).backward()
    assert not torch.allclose(x.grad / x.grad.norm(), again.grad / again.grad.norm(), rtol=1e-1)


def test_with_temperatures_of_rows_bf16_autocast_gives_the_same_loss():
    options = {"u": estimates(48, 0), "tau": torch.full((48, 2), 0.07), "gamma": 0.5, "rho": 7.0}
    bf16_is_near(Case(ours_alone, dense_alone, pair(48, 32, 0, 20.0), (48,), options))
