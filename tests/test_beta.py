"""The temperature as a leader parameter: one backward pass gives its hypergradient together with all others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracles import (
    assert_close,
    assert_unbiased,
    enumerated_gradient,
    finite_differences,
    implicit_gradient,
)
from torch import Tensor, nn

from align_cbrl import GradientEstimator, InputError, PolicyResponse, Problem, Rollouts
from toy_cmdp import ExactCritic, expected_policy_response, random_cmdp
from toy_cmdp.iterative import SoftValueIteration
from toy_cmdp.random_cmdp import RandomLeader


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
