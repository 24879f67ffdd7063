"""`ObservedPolicyResponse`: the hypergradient at the policy seen along the paths, in the leader's own model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.metric import MatrixMetric, Metric
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.referee.exact import exact_world, expected_policy_response
from toy_cmdp.referee.frozen_policy import FrozenPolicy
from toy_cmdp.referee.metric import exact_metric
from toy_cmdp.tables.cmdp import ContextualMDP


@checked
class ObservedPolicyResponse(Hypergradient):
    """The expectation of `PolicyResponse` over all paths of the observed policy, for a leader who knows r, u, P, rho.

    Of the follower only its paths are used: the action probabilities in the states that they visited. States lie on a
    line; log-policies between visited states are interpolated linearly, and constant beyond the outermost ones. Then
    A_F, V_F, V_lambda, the discounted occupancy mu and the trace eta (docs/derivation.md, section 10) solve linear
    equations in the leader's own tables. Nobody asks the follower for its values or solves for a best response, and no
    noise of paths is left, where the score of P would bring most (measured in docs/tax_design.md). At a policy that is
    off by epsilon the estimate is off by the order of epsilon.

    Args:
        cmdp: nature and the ends of episodes.
        position: [S], where the states lie on the line, increasing.

    Raises:
        InputError: positions that do not increase or are not one a state.

    Example:
        >>> from toy_cmdp.problems.tax_design import tax_design
        >>> problem = tax_design(grid=21)
        >>> response = ObservedPolicyResponse(problem.follower.cmdp, problem.leader.assets)
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> sorted(response.backward(problem, rollouts))
        ['gradient_norm', 'objective', 'objective_0', 'objective_1']
    """

    def __init__(self, cmdp: ContextualMDP, position: Tensor) -> None:
        if tuple(position.shape) != (cmdp.states,) or not bool((position.diff() > 0).all()):
            raise InputError(
                f"position: expected {cmdp.states} increasing numbers, one a state, got shape {tuple(position.shape)}"
            )
        self.cmdp = cmdp
        self.position = position

    def log_policy(self, rollouts: Rollouts) -> Tensor:
        """The observed log-policy, interpolated, [C, S, A]; uniform in contexts without paths.

        Raises:
            InputError: rollouts without "state" or "log_policy_all".
        """
        for name in ("state", "log_policy_all"):
            if name not in rollouts.steps:
                raise InputError(f"rollouts.steps: ObservedPolicyResponse needs {name!r}, got {sorted(rollouts.steps)}")
        state, seen = rollouts.steps["state"][:, :-1], rollouts.steps["log_policy_all"]
        table = seen.new_zeros(self.cmdp.contexts, self.cmdp.states, seen.shape[-1])
        for context in rollouts.contexts.unique().tolist():
            here = rollouts.mask & (rollouts.contexts == context)[:, None]
            table[context, state[here]] = seen[here]
            known = state[here].unique()  # [V], sorted
            right = torch.searchsorted(self.position[known], self.position).clamp(max=len(known) - 1)
            left = (right - 1).clamp(min=0)
            start, end = self.position[known[left]], self.position[known[right]]
            share = ((self.position - start) / torch.where(end > start, end - start, 1.0)).clamp(0, 1)[:, None]
            rows = table[context, known]
            table[context] = (1 - share) * rows[left] + share * rows[right]
        return torch.log_softmax(table, -1)

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; `objective` is J of the observed policy, `objective_0`, ... its contexts'.

        Contexts that were not drawn are left out, and the probabilities of the others scaled up.

        Raises:
            InputError: an objective or leader without tables (see `leader_value`).
        """
        observed = self._observed(problem, rollouts)
        world = exact_world(observed)
        norm = accumulate(problem, expected_policy_response(observed, world))
        values = (world.tables.initial * world.value).sum(-1).detach()  # [C]
        each = {f"objective_{c}": values[c].item() for c in rollouts.contexts.unique().tolist()}
        return {"objective": world.objective.item(), "gradient_norm": norm, **each}

    def metric(self, problem: Problem, rollouts: Rollouts) -> Metric:
        """The exact metric at the observed policy, which is the one that was sampled."""
        return MatrixMetric(exact_metric(self._observed(problem, rollouts)))

    def _observed(self, problem: Problem, rollouts: Rollouts) -> Problem:
        """The problem with its follower frozen at the observed policy, in the contexts that were drawn."""
        drawn = torch.bincount(rollouts.contexts, minlength=self.cmdp.contexts) > 0
        nature = torch.where(drawn, self.cmdp.context_probabilities, 0.0)
        cmdp = dataclasses.replace(self.cmdp, context_probabilities=nature / nature.sum())
        follower = problem.follower
        frozen = FrozenPolicy(cmdp, follower.temperature, follower.discount, self.log_policy(rollouts))
        return dataclasses.replace(problem, follower=frozen)
