"""The referee's formulas at a policy that is no best response: `PresentCritic` and `PresentPolicyResponse`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.metric import MatrixMetric, Metric
from align_cbrl.problem import Critic, Critique, Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.followers.iterative import TabularIterativeFollower, policy_q
from toy_cmdp.followers.solve import SoftSolution
from toy_cmdp.referee.exact import ExactCritic, exact_world, expected_policy_response
from toy_cmdp.referee.metric import exact_metric
from toy_cmdp.tables.cmdp import ContextualMDP, Tables


class FrozenPolicy(ExactFollower):
    """Answers `solve` with a given policy and its own soft value, instead of the best response.

    Handed to `ExactCritic` or `expected_policy_response` in place of the follower, it makes them exact at this policy.
    It is not for `leader_value`, which differentiates through a best response.

    Args:
        cmdp, temperature, discount: as for `ExactFollower`.
        log_policy: [C, S, A], log-probabilities.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> tables, best = problem.follower.solve(problem.leader)
        >>> frozen = FrozenPolicy(problem.follower.cmdp, 0.5, 0.9, best.log_policy)
        >>> at_it = expected_policy_response(dataclasses.replace(problem, follower=frozen))
        >>> torch.allclose(at_it[0], expected_policy_response(problem)[0])
        True
    """

    def __init__(
        self, cmdp: ContextualMDP, temperature: float | Tensor, discount: float | Tensor, log_policy: Tensor
    ) -> None:
        super().__init__(cmdp, temperature, discount, horizon=1)
        self._frozen = log_policy.detach()

    def _solve(self, tables: Tables, start: Tensor | None, temperature: float | Tensor) -> SoftSolution:
        fixed = tables.detach()
        self.cmdp.check(fixed)
        with torch.no_grad():
            q, value = policy_q(self.cmdp, fixed, self._frozen, temperature, self.discount)
        return SoftSolution(self._frozen, q, value, 1, 0.0)


def present(problem: Problem, contexts: Tensor | None = None) -> Problem:
    """The problem with its follower frozen at the present policy, and nature at the contexts that were drawn.

    Args:
        problem: its follower one of `toy_cmdp.followers.iterative`.
        contexts: long [B]; nature's law becomes their frequencies. By default it stays.

    Raises:
        InputError: another kind of follower, or one without a policy yet.
    """
    follower = problem.follower
    if not isinstance(follower, TabularIterativeFollower):
        raise InputError(f"follower: expected a TabularIterativeFollower, got {type(follower).__name__}")
    cmdp = follower.cmdp
    if contexts is not None:
        counts = torch.bincount(contexts, minlength=cmdp.contexts).to(cmdp.context_probabilities)
        cmdp = dataclasses.replace(cmdp, context_probabilities=counts / counts.sum())
    frozen = FrozenPolicy(cmdp, follower.temperature, follower.discount, follower.log_policy)
    return dataclasses.replace(problem, follower=frozen)


class PresentCritic(Critic):
    """`ExactCritic` at the present policy of an iterative follower, whatever its distance to the best response.

    Example:
        >>> from align_cbrl import PolicyResponse
        >>> from toy_cmdp import random_cmdp
        >>> from toy_cmdp.followers.iterative import SoftValueIteration
        >>> known = random_cmdp()
        >>> follower = SoftValueIteration(known.follower.cmdp, 0.5, 0.9, iterations=3)
        >>> problem = dataclasses.replace(known, follower=follower)
        >>> _ = follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = follower.rollout(torch.arange(2), 4, torch.Generator().manual_seed(0))
        >>> sorted(PolicyResponse(PresentCritic()).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """See `ExactCritic.evaluate`."""
        return ExactCritic().evaluate(present(problem), rollouts, credit)


class PresentPolicyResponse(Hypergradient):
    """The expectation of `PolicyResponse` with `PresentCritic` over all paths, given the contexts of the rollouts.

    It is the hypergradient's formula at the policy of a follower that was stopped early, without the noise of paths: at
    a policy that is off by delta, it is off by O(delta) (docs/convergence.md).

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> from toy_cmdp.followers.iterative import NaturalPolicyGradient
        >>> known = random_cmdp()
        >>> follower = NaturalPolicyGradient(known.follower.cmdp, 0.5, 0.9, iterations=10)
        >>> problem = dataclasses.replace(known, follower=follower)
        >>> _ = follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = follower.rollout(torch.arange(2), 1, torch.Generator().manual_seed(0))
        >>> sorted(PresentPolicyResponse().backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; `objective` is the leader's at the present policy."""
        frozen = present(problem, rollouts.contexts)
        world = exact_world(frozen)
        norm = accumulate(problem, expected_policy_response(frozen, world))
        return {"objective": float(world.objective), "gradient_norm": norm}

    def metric(self, problem: Problem, rollouts: Rollouts) -> Metric:
        """The exact metric at the present policy, in the contexts of the rollouts."""
        return MatrixMetric(exact_metric(present(problem, rollouts.contexts)))
