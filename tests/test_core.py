"""Rollouts, contracts, the estimator's refusals, and its invariance to chunks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import toy_cmdp
from align_cbrl import (
    DirectOnly,
    ExpectedUtility,
    FittedCritic,
    GroupCritic,
    InputError,
    KLPriced,
    Leader,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.problem import step_seed


class Quadratic(Leader):
    """r_x(y) = x . features(y)."""

    def __init__(self, dimension: int = 3) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, dimension, dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        return (rollouts.steps["features"] @ self.x)[:, None]


class StandIn:
    """A follower whose samples come from elsewhere."""

    temperature = 0.5
    discount = 0.0


def bandit(size: int = 24, groups: int = 6, **changes: Any) -> Rollouts:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fields: dict[str, Any] = {
        "contexts": torch.arange(size) % groups,
        "steps": {"features": normal(size, 3), "u": normal(size)},
        "log_policy": -normal(size).abs(),
        "log_prior": -normal(size).abs(),
    }
    return Rollouts.bandit(**{**fields, **changes})


def score(leader: Leader, rollouts: Rollouts) -> torch.Tensor:
    return rollouts.steps["u"][:, None]


def problem(leader: Leader | None = None, objective: Any = None) -> Problem:
    return Problem(leader or Quadratic(), objective or ExpectedUtility(score), StandIn())  # type: ignore[arg-type]


def gradient(p: Problem, rollouts: Rollouts, hypergradient: Any) -> torch.Tensor:
    p.leader.zero_grad()
    hypergradient.backward(p, rollouts)
    return p.parameters[0].grad.clone()


def test_bandit_gradient_is_the_group_covariance() -> None:
    rollouts = bandit()
    u, f = rollouts.steps["u"], rollouts.steps["features"]
    want = torch.zeros(3, dtype=torch.float64)
    for g in range(6):
        mine = rollouts.contexts == g
        want += ((u[mine] - u[mine].mean())[:, None] * f[mine]).sum(0) / (mine.sum() - 1) / 0.5 / 6
    torch.testing.assert_close(gradient(problem(), rollouts, PolicyResponse()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [2, 3, 8, 24, 100])
def test_chunks_change_nothing(chunks: int) -> None:
    p = problem(objective=KLPriced(ExpectedUtility(score), 0.3))
    whole = gradient(p, bandit(), PolicyResponse())
    torch.testing.assert_close(gradient(p, bandit(), PolicyResponse(chunks=chunks)), whole, rtol=1e-12, atol=1e-14)


def test_kl_price_enters_the_credit() -> None:
    rollouts = bandit()
    priced = gradient(problem(objective=KLPriced(ExpectedUtility(score), 0.3)), rollouts, PolicyResponse())
    by_hand = dict(rollouts.steps)
    by_hand["u"] = rollouts.steps["u"] - 0.3 * (rollouts.log_policy - rollouts.log_prior)[:, 0]
    torch.testing.assert_close(priced, gradient(problem(), bandit(steps=by_hand), PolicyResponse()))


def test_weighted_groups_follow_their_formula() -> None:
    """(c_i - sum_j W_j c_j) / (1 - sum_j W_j^2), used with weight W_i."""
    rollouts = bandit(
        weight=torch.tensor([2.0, 1.0, 0.0, 1.0] * 6, dtype=torch.float64), groups=6, contexts=torch.arange(24) // 4
    )
    u, f, w = rollouts.steps["u"], rollouts.steps["features"], rollouts.weight
    want = torch.zeros(3, dtype=torch.float64)
    for g in range(6):
        mine = rollouts.contexts == g
        share = w[mine] / w[mine].sum()
        centred = u[mine] - (share * u[mine]).sum()
        want += (share * centred) @ f[mine] / (1 - (share**2).sum()) / 0.5 / 6
    torch.testing.assert_close(gradient(problem(), rollouts, PolicyResponse()), want)


def test_direct_only_knows_no_response() -> None:
    assert gradient(problem(), bandit(), DirectOnly()).abs().max() == 0


def test_gradients_add_up_and_metrics_report_the_change_only() -> None:
    p = problem()
    first = PolicyResponse().backward(p, bandit())
    second = PolicyResponse().backward(p, bandit())
    assert math.isclose(first["gradient_norm"], second["gradient_norm"], rel_tol=1e-9)
    assert math.isclose(p.parameters[0].grad.norm().item(), 2 * first["gradient_norm"], rel_tol=1e-9)


def test_the_utility_is_asked_for_once() -> None:
    calls = []

    def counting(leader: Leader, rollouts: Rollouts) -> torch.Tensor:
        calls.append(rollouts.size)
        return score(leader, rollouts)

    gradient(problem(objective=KLPriced(ExpectedUtility(counting), 0.1)), bandit(), PolicyResponse(chunks=3))
    assert calls == [8, 8, 8]


def test_fitted_critic_is_consistent_with_the_exact_hypergradient() -> None:
    """Sixty batches of a layered problem against the exact hypergradient."""
    p = toy_cmdp.random_cmdp(seed=3, horizon=3)
    toy_cmdp.exact.leader_value(p).backward()
    exact = p.parameters[0].grad.clone()
    p.follower.respond(p.leader, torch.arange(2))
    rows = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        contexts = p.follower.sample_contexts(4000, generator)
        rollouts = p.follower.rollout(contexts, 1, generator)
        rows.append(gradient(p, rollouts, PolicyResponse(FittedCritic(p.follower.cmdp.cell))))
    stacked = torch.stack(rows)
    z = (stacked.mean(0) - exact) / (stacked.std(0) / math.sqrt(60))
    assert z.abs().max() < 4
    assert (stacked.mean(0) - exact).norm() < 0.1 * exact.norm()


# ---- bad input: the message names the argument, what was expected and what came ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"log_policy": torch.full((24,), math.nan)},
            r"log_policy: expected finite numbers, got nan in context 0 at step 0",
        ),
        ({"log_prior": torch.full((24,), -math.inf)}, r"log_prior: expected finite numbers, got -inf in context 0"),
        ({"log_prior": torch.zeros(5)}, r"log_prior: expected shape \(24, 1\), got \(5, 1\)"),
        ({"weight": -torch.ones(24)}, "weight: expected finite, non-negative"),
        ({"weight": torch.full((24,), math.nan)}, "weight: expected finite, non-negative"),
        ({"weight": torch.full((24,), 100.0)}, "weight: expected importance weights with mean one, got mean 100"),
        ({"weight": torch.zeros(24)}, "weight: expected importance weights with mean one, got mean 0"),
        ({"log_policy": torch.full((24,), 5.0)}, "log_policy: expected log-probabilities in nats, at most 0, got 5"),
        ({"log_prior": torch.full((24,), 0.5)}, "log_prior: expected log-probabilities in nats, at most 0, got 0.5"),
        (
            {"contexts": torch.full((24,), math.nan)},
            r"contexts: expected whole numbers \(torch.long\), got torch.float32",
        ),
        ({"steps": {"u": torch.zeros(3)}}, r"steps\['u'\]: expected 24 paths, got 3"),
    ],
)
def test_rollouts_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bandit(**changes)


def test_rollouts_allow_rounding_and_parts_of_a_weighted_batch() -> None:
    weight = torch.ones(24)
    weight[0], weight[1:] = 24.0, 0.0
    rollouts = bandit(weight=weight, log_policy=torch.full((24,), 1e-3))
    assert rollouts.select([0]).weight.tolist() == [24.0]
    assert [float(piece.weight.mean()) for piece in rollouts.knowing({}).chunks(24)] == [24.0, *[0.0] * 23]


def test_rollouts_refuse_masks_with_holes() -> None:
    with pytest.raises(InputError, match="each path must start at step 0"):
        Rollouts(torch.zeros(1), torch.tensor([[True, False, True]]), torch.zeros(1, 3), {})
    with pytest.raises(InputError, match=r"expected a bool tensor \[B, T\], got torch.float32 \(2,\)"):
        Rollouts(torch.zeros(1), torch.zeros(2), torch.zeros(1, 3), {})
    with pytest.raises(InputError, match="at least one path"):
        Rollouts(torch.zeros(0), torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 1), {})


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    follower = StandIn()
    follower.temperature = temperature
    with pytest.raises(InputError, match=r"follower.temperature: expected a positive temperature lambda, got"):
        Problem(Quadratic(), ExpectedUtility(score), follower)  # type: ignore[arg-type]


@pytest.mark.parametrize("discount", [1.0, -0.1, math.nan])
def test_discounts_lie_below_one(discount: float) -> None:
    follower = StandIn()
    follower.discount = discount
    with pytest.raises(InputError, match=r"follower.discount: expected a discount in \[0, 1\), got"):
        Problem(Quadratic(), ExpectedUtility(score), follower)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ExpectedUtility.discount: expected a (discount in \[0, 1\)|finite number)"):
        ExpectedUtility(score, discount=discount)


def test_discounts_next_to_one_warn() -> None:
    with pytest.warns(UserWarning, match=r"ExpectedUtility.discount: 0.9999999999 is within 1e-09 of one"):
        ExpectedUtility(lambda leader, rollouts: None, discount=1 - 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExpectedUtility(lambda leader, rollouts: None, discount=1 - 1e-8)


def test_a_leader_needs_parameters() -> None:
    leader = Quadratic()
    leader.x.requires_grad_(False)
    with pytest.raises(InputError, match="leader: Quadratic has no trainable parameters"):
        problem(leader)


class Deaf(Quadratic):
    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        return super().reward(rollouts).detach()


class Misshapen(Quadratic):
    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        return super().reward(rollouts)[:, 0]


class Broken(Quadratic):
    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        reward = super().reward(rollouts)
        return torch.where(torch.arange(rollouts.size)[:, None] == 7, reward * math.nan, reward)


@pytest.mark.parametrize(
    ("leader", "message"),
    [
        (Deaf(), "Deaf: neither its reward nor anything else depends on its parameters"),
        (Misshapen(), r"Misshapen.reward: expected shape \(24, 1\) \(paths, steps\), got \(24,\)"),
        (Broken(), r"Broken.reward: expected finite numbers, got nan in context 1 at step 0 \(path 7\)"),
    ],
)
def test_leaders_refused(leader: Leader, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PolicyResponse().backward(problem(leader), bandit())


def test_utilities_refused() -> None:
    broken = bandit()
    broken.steps["u"][9] = math.inf  # type: ignore[index]
    with pytest.raises(
        InputError, match=r"utility: expected finite numbers, got inf in context 3 at step 0 \(path 9\)"
    ):
        PolicyResponse().backward(problem(), broken)
    flat = ExpectedUtility(lambda leader, rollouts: rollouts.steps["u"])
    with pytest.raises(InputError, match=r"utility: expected shape \(24, 1\)"):
        PolicyResponse().backward(problem(objective=flat), bandit())


def test_group_size_one_is_refused() -> None:
    with pytest.raises(InputError, match="group size: expected at least 2 samples"):
        PolicyResponse().backward(problem(), bandit(groups=24))


def test_critics_refuse() -> None:
    long = toy_cmdp.random_cmdp(seed=0)
    long.follower.respond(long.leader, torch.arange(2))
    generator = torch.Generator().manual_seed(0)
    rollouts = long.follower.rollout(torch.tensor([0]), 1, generator)
    with pytest.raises(InputError, match="GroupCritic: expected rollouts of one step, got a horizon of"):
        PolicyResponse(GroupCritic()).backward(long, rollouts)
    with pytest.raises(InputError, match="folds: expected at least 2, got 1"):
        FittedCritic(long.follower.cmdp.cell, folds=1)
    with pytest.raises(InputError, match="FittedCritic: expected at least 2 paths"):
        PolicyResponse(FittedCritic(long.follower.cmdp.cell)).backward(long, rollouts)


def test_klpriced_refuses() -> None:
    with pytest.raises(InputError, match=r"KLPriced.price: expected a finite number >= 0, got -1"):
        KLPriced(ExpectedUtility(score), -1.0)
    with pytest.raises(InputError, match="log_policy and log_prior"):
        PolicyResponse().backward(problem(objective=KLPriced(ExpectedUtility(score), 1.0)), bandit(log_policy=None))


def test_step_seeds_do_not_collide() -> None:
    seeds = {step_seed(seed, step) for seed in range(50) for step in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= s < 2**63 for s in seeds)
