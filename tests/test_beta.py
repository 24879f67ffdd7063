"""The temperature as a leader parameter: one backward pass gives its hypergradient together with all others."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from known_follower import EnumeratedCritic, Known
from oracles import (
    assert_close,
    assert_unbiased,
    enumerated_gradient,
    finite_differences,
    implicit_gradient,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    GradientEstimator,
    GroupCritic,
    HPGDConfig,
    InputError,
    KLPriced,
    Objective,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.llm import LearnedBeta, RewardMixture, load_leader
from toy_cmdp import ExactCritic, expected_policy_response, random_cmdp
from toy_cmdp.followers.iterative import SoftValueIteration
from toy_cmdp.problems.random_cmdp import RandomLeader


class HeatedLeader(RandomLeader):
    """Sets the temperature by a parameter of its own, beta, and by x, which moves everything else as well."""

    log_beta: nn.Parameter

    def follower_temperature(self) -> Tensor:
        return torch.exp(self.log_beta + 0.3 * torch.tanh(self.x[0]))


def heated(**settings: Any) -> Problem:
    problem = random_cmdp(temperature=7.0, **settings)  # the follower's own, which nobody may use
    problem.leader.__class__ = HeatedLeader
    problem.leader.log_beta = nn.Parameter(torch.tensor(-0.9, dtype=torch.float64))
    return problem


@pytest.mark.parametrize("price", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_beta_and_everything_else_against_central_differences(seed: int, price: float) -> None:
    """Rewards, transitions, start, prior, utility and temperature move together; paths have many steps."""
    problem = heated(seed=seed, price=price, contexts=1 + seed % 2)
    assert [tuple(p.shape) for p in problem.parameters] == [(5,), ()]
    referee = finite_differences(problem)
    assert referee[-1].abs() > 1e-3
    assert_close(implicit_gradient(problem), referee, 1e-6)
    assert_close(torch.cat([g.reshape(-1) for g in expected_policy_response(problem)]), referee, 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_one_backward_pass_on_all_paths(seed: int) -> None:
    """The estimator itself, whole and in chunks, on all paths of three steps with their probabilities."""
    problem = heated(seed=seed, states=2, actions=2, horizon=3)
    referee = finite_differences(problem)
    for chunks in (1, 5):
        assert_close(enumerated_gradient(problem, 3, PolicyResponse(ExactCritic(), chunks=chunks)), referee, 1e-6)


def test_samples_of_both_estimators_are_unbiased() -> None:
    problem = heated(seed=1, states=2, actions=2, horizon=3, leader_discount=0.7, discount=0.7)
    assert_unbiased(problem, PolicyResponse(ExactCritic()), paths=1024)
    assert_unbiased(problem, GradientEstimator(ExactCritic()), paths=4096)


class WithoutBeta(PolicyResponse):
    """Broken: the temperature is held constant."""

    def _surrogate(self, problem: Problem, piece: Rollouts, *rest: Any) -> Tensor:
        beta = problem.temperature
        assert isinstance(beta, Tensor)
        silent = dataclasses.replace(problem, leader=_Silent(problem.leader, beta.item()))
        return super()._surrogate(silent, piece, *rest)


class _Silent:
    """Answers for a leader, but for the temperature, which is a constant."""

    def __init__(self, leader: Any, beta: float) -> None:
        self._leader, self._beta = leader, beta

    def follower_temperature(self) -> Tensor:
        return torch.tensor(self._beta, dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leader, name)


def test_a_detached_temperature_is_caught() -> None:
    problem = heated(seed=0, states=2, actions=2, horizon=3)
    enumerated = enumerated_gradient(problem, 3, WithoutBeta(ExactCritic()))
    assert len(enumerated) == 5  # beta has no gradient at all
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(enumerated, finite_differences(problem)[:5], 1e-6)


def test_followers_that_train_use_the_leaders_temperature() -> None:
    problem = heated(seed=2)
    _, best = problem.follower.solve(problem.leader)  # type: ignore[attr-defined]
    follower = SoftValueIteration(problem.follower.cmdp, 7.0, 0.9, iterations=300)  # type: ignore[attr-defined]
    follower.respond(problem.leader, torch.arange(2))
    assert (follower.log_policy - best.log_policy).abs().max() < 1e-9


@pytest.mark.parametrize("value", [-0.5, 0.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(value: float) -> None:
    problem = heated(seed=2)
    problem.leader.follower_temperature = lambda: torch.tensor(value)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"HeatedLeader.follower_temperature: expected a positive temperature"):
        _ = problem.temperature
    problem.leader.follower_temperature = lambda: torch.ones(2)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="expected a scalar tensor, got shape"):
        _ = problem.temperature


# ---- completions of a language model, all of which are known ----


@pytest.fixture(scope="module")
def follower(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = lm.build(tmp_path_factory.mktemp("enumerable"))
    enumeration = lm.Enumeration.random(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return Known(enumeration, enumeration.log_probs(model, tokenizer), temperature=7.0)  # which nobody may use


def learned(follower: Known, objective: str) -> Problem:
    x = 0.65 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leader = LearnedBeta(lm.LinearLeader(follower.enumeration, x), 0.8, low=0.1, high=5.0)
    wanted: Objective = ExpectedUtility(follower.enumeration.judge)
    problem = Problem(leader, KLPriced(wanted, 0.2) if objective == "priced" else wanted, follower)
    follower.respond(leader, torch.arange(4))
    return problem


def exact_value(problem: Problem) -> Tensor:
    follower, leader = problem.follower, problem.leader
    assert isinstance(follower, Known) and isinstance(leader, LearnedBeta)
    logits = follower.enumeration.features @ leader.leader.x / leader.log_beta.exp()
    log_policy = torch.log_softmax(follower.log_prior + logits, -1)
    utility = follower.enumeration.utility
    if isinstance(problem.objective, KLPriced):
        utility = utility - problem.objective.price * (log_policy - follower.log_prior)
    return (log_policy.exp() * utility).sum(-1).mean()


def differences(problem: Problem, step: float = 1e-5) -> Tensor:
    slopes = []
    with torch.no_grad():
        for parameter in problem.parameters:
            for entry in parameter.view(-1):
                values = []
                for sign in (1, -2, 1):
                    entry += sign * step
                    values.append(exact_value(problem))
                slopes.append((values[0] - values[1]) / (2 * step))
    return torch.stack(slopes)


@pytest.mark.parametrize("objective", ["plain", "priced"])
def test_beta_of_a_language_model_against_finite_differences(follower: Known, objective: str) -> None:
    """All completions with their probabilities, through PolicyResponse itself, whole and in chunks."""
    problem = learned(follower, objective)
    referee = differences(problem)
    assert referee[0].abs() > 0.01  # log beta's own, a good part of the whole
    for chunks in (1, 7):
        gradient = enumerated(problem, PolicyResponse(EnumeratedCritic(), chunks))
        assert (gradient - referee).norm() <= 1e-8 * referee.norm()


def enumerated(problem: Problem, estimator: PolicyResponse) -> Tensor:
    problem.leader.zero_grad(set_to_none=True)
    assert isinstance(problem.follower, Known)
    estimator.backward(problem, problem.follower.everything())
    return torch.cat([p.grad.reshape(-1) for p in problem.parameters if p.grad is not None])


@pytest.mark.parametrize("objective", ["plain", "priced"])
def test_beta_of_a_language_model_from_samples(follower: Known, objective: str) -> None:
    problem, generator, rows = learned(follower, objective), torch.Generator().manual_seed(3), []
    exact = differences(problem)
    for _ in range(60):
        problem.leader.zero_grad(set_to_none=True)
        PolicyResponse(GroupCritic()).backward(problem, follower.rollout(torch.arange(4).repeat(16), 8, generator))
        rows.append(torch.cat([p.grad.reshape(-1) for p in problem.parameters if p.grad is not None]))
    error = torch.stack(rows).std(0) / math.sqrt(len(rows))
    assert (error < 0.25 * exact.norm()).all()
    assert ((torch.stack(rows).mean(0) - exact) / error).abs().max() < 4


def test_hpgd_moves_beta_within_its_bounds(follower: Known) -> None:
    """The reward is frozen; what is wanted is the divergence's price alone, so beta rises to its bound."""
    x = torch.tensor([1.0, 0.5, -0.5, 0.2, 0.0], dtype=torch.float64)
    leader = LearnedBeta(lm.LinearLeader(follower.enumeration, x).requires_grad_(False), 0.5, low=0.25, high=0.8)
    nothing = ExpectedUtility(lambda leader, rollouts: torch.zeros(rollouts.size, 1, dtype=torch.float64))
    problem = Problem(leader, KLPriced(nothing, 1.0), follower)
    optimizer = torch.optim.Adam(problem.parameters, lr=0.2, maximize=True)
    run = HPGD(problem, optimizer, config=HPGDConfig(steps=6, contexts_per_step=16, progress=False))
    run.run()
    assert leader.beta == pytest.approx(0.8, rel=1e-12)
    assert run.history[-1]["kl"] < run.history[0]["kl"]
    assert all(row["gap"] < 1e-12 for row in run.history)  # the certificate uses the leader's temperature


def test_beta_is_saved_with_its_reward(tmp_path: Path) -> None:
    mixture = RewardMixture({"length": lm.length_reward}, {"length": 0.5})
    leader = LearnedBeta(mixture, 0.3, low=0.1, high=1.0)
    leader.save_pretrained(tmp_path / "reward")
    again = load_leader(tmp_path / "reward", trust_code=True)
    assert isinstance(again, LearnedBeta)
    assert (again.beta, again.low, again.high) == (pytest.approx(0.3), 0.1, 1.0)
    assert again.score(["a"], ["a b"]).tolist() == leader.score(["a"], ["a b"]).tolist()
    assert again.describe()["beta"] == pytest.approx(0.3)


@pytest.mark.parametrize(("beta", "low", "high"), [(0.05, 0.1, 1.0), (2.0, 0.1, 1.0), (0.5, 0.0, 1.0), (0.5, 1.0, 0.1)])
def test_bounds_of_beta_are_checked(beta: float, low: float, high: float) -> None:
    with pytest.raises(InputError, match=r"LearnedBeta"):
        LearnedBeta(RewardMixture({"length": lm.length_reward}), beta, low=low, high=high)
