"""What the tests judge by: gradient routes, checks that raise, and estimators that are broken on purpose."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.estimators.baselines import DirectOnly
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.functional import eligibility_trace, returns_to_go
from align_cbrl.problem import Critic, Critique, Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.referee.exact import ExactCritic, enumerate_paths
from toy_cmdp.validate import deviations, finite_differences, implicit_gradient, sample_gradients

__all__ = [
    "MUTANTS",
    "assert_close",
    "assert_unbiased",
    "enumerated_gradient",
    "finite_differences",
    "implicit_gradient",
    "relative_error",
]


def relative_error(gradient: Tensor, referee: Tensor) -> float:
    return float((gradient - referee).norm() / referee.norm())


def assert_close(gradient: Tensor, referee: Tensor, tolerance: float) -> None:
    error = relative_error(gradient, referee)
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"


def enumerated_gradient(problem: Problem, horizon: int, estimator: Hypergradient) -> Tensor:
    """The exact expectation of an estimator as it stands: the estimator itself on all paths of a layered problem."""
    for parameter in problem.parameters:
        parameter.grad = None
    estimator.backward(problem, enumerate_paths(problem, horizon))
    gradients = [p.grad for p in problem.parameters]
    for parameter in problem.parameters:
        parameter.grad = None
    return torch.cat([g.reshape(-1) for g in gradients if g is not None])


def assert_unbiased(
    problem: Problem, estimator: Hypergradient, *, repetitions: int = 40, paths: int = 1024, seed: int = 0
) -> None:
    """The mean over independent batches lies within four standard errors of the referee in every direction."""
    estimates = sample_gradients(problem, estimator, repetitions=repetitions, paths=paths, seed=seed)
    z = deviations(estimates, implicit_gradient(problem)).abs().max().item()
    assert z <= 4, f"{z:.1f} standard errors from the exact hypergradient"


class OwnPathCritic(Critic):
    """Broken: the advantage is the path's own return, which is correlated with the path's own reward gradients."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        exact = ExactCritic().evaluate(problem, rollouts, credit)
        assert exact.value is not None
        own = returns_to_go(credit, rollouts.mask, problem.objective.discount)
        return dataclasses.replace(exact, advantage=torch.where(rollouts.mask, own - exact.value[:, :-1], 0.0))


class RawReturnCritic(Critic):
    """Broken: Q_F instead of the advantage, so that no factor is centred."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        exact = ExactCritic().evaluate(problem, rollouts, credit)
        assert exact.value is not None
        q = exact.advantage + exact.value[:, :-1]
        return dataclasses.replace(exact, advantage=torch.where(rollouts.mask, q, 0.0))


class UndiscountedTrace(PolicyResponse):
    """Broken: w_k = w_{k-1} + gammaF^k A_F, without the follower's gamma."""

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        return eligibility_trace(critique.advantage, rollouts.mask, 1.0, problem.objective.discount)


class UndiscountedLeader(PolicyResponse):
    """Broken: w_k = gamma w_{k-1} + A_F, without the leader's gammaF."""

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        return eligibility_trace(critique.advantage, rollouts.mask, problem.follower.discount, 1.0)


class MyopicTrace(PolicyResponse):
    """Broken: only the reward of the very action responds, dA = dr - E dr."""

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        return eligibility_trace(critique.advantage, rollouts.mask, 0.0, problem.objective.discount)


class NoSoftValue(Critic):
    """Broken: the follower's V_lambda is left out of the transition term."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        exact = ExactCritic().evaluate(problem, rollouts, credit)
        assert exact.soft_value is not None
        return dataclasses.replace(exact, soft_value=torch.zeros_like(exact.soft_value))


class NoLeaderValue(Critic):
    """Broken: the leader's V_F is left out of the transition and initial terms."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        exact = ExactCritic().evaluate(problem, rollouts, credit)
        assert exact.value is not None
        return dataclasses.replace(exact, value=torch.zeros_like(exact.value))


MUTANTS: dict[str, Hypergradient] = {
    "own_path_critic": PolicyResponse(OwnPathCritic()),
    "raw_return_critic": PolicyResponse(RawReturnCritic()),
    "no_response_term": DirectOnly(ExactCritic()),
    "trace_without_gamma": UndiscountedTrace(ExactCritic()),
    "trace_without_leader_discount": UndiscountedLeader(ExactCritic()),
    "myopic": MyopicTrace(ExactCritic()),
    "no_soft_value": PolicyResponse(NoSoftValue()),
    "no_leader_value": PolicyResponse(NoLeaderValue()),
}
