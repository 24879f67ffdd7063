"""`ObservedPolicyResponse`: the hypergradient at the policy seen along the paths, in the leader's own model."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.hypergradient import Hypergradient
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.cmdp import ContextualMDP, TabularUtility, require_tabular
from toy_cmdp.solve import by_context, continuation
from toy_cmdp.transition import expected_next, policy_system, pushed


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
        >>> from toy_cmdp.tax_design import tax_design
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
            InputError: an objective other than `ExpectedUtility` of a `TabularUtility`, or a leader without tables.
        """
        objective, follower, cmdp = problem.objective, problem.follower, self.cmdp
        if not isinstance(objective, ExpectedUtility) or not isinstance(objective.utility_function, TabularUtility):
            raise InputError(
                "ObservedPolicyResponse: expected ExpectedUtility(TabularUtility(...)), whose utility is known in "
                f"every state, got {type(objective).__name__}"
            )
        leader = require_tabular(problem.leader)
        tables, utility = leader.tables(), objective.utility_function.table(leader)
        cmdp.check(tables)
        with torch.no_grad():
            fixed, earned = tables.detach(), utility.detach()
            log_policy = self.log_policy(rollouts).to(earned)
            policy = log_policy.exp()
            temperature = by_context(follower.temperature, earned)
            go_on = continuation(cmdp, follower.discount, earned)
            go_on_leader = continuation(cmdp, objective.discount, earned)
            own = policy_system(fixed.transition, go_on * policy)
            leaders = policy_system(fixed.transition, go_on_leader * policy)

            value = leaders.solve((policy * earned).sum(-1))
            q = earned + go_on_leader * expected_next(fixed.transition, value)
            log_ratio = log_policy if fixed.log_prior is None else log_policy - fixed.log_prior
            soft_value = own.solve((policy * (fixed.reward - temperature * log_ratio)).sum(-1))

            mu = leaders.solve(fixed.initial, transpose=True)[..., None] * policy  # [C, S, A]
            source = mu * (q - (policy * q).sum(-1, keepdim=True))
            trace = own.solve(pushed(fixed.transition, go_on * source), transpose=True)
            eta = policy * trace[..., None] + source
            nature = cmdp.context_probabilities.to(earned)
            nature = nature * torch.bincount(rollouts.contexts, minlength=cmdp.contexts).clamp(max=1)
            nature = nature / nature.sum()
        ahead = go_on_leader * mu * expected_next(tables.transition, value)
        ahead = ahead + go_on / temperature * eta * expected_next(tables.transition, soft_value)
        per_step = mu * utility + eta / temperature * tables.reward + ahead
        if tables.log_prior is not None:
            per_step = per_step + eta * tables.log_prior
        surrogate = (nature * (per_step.sum((-1, -2)) + (tables.initial * value).sum(-1))).sum()
        gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
        squares = 0.0
        for parameter, gradient in zip(problem.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                squares += gradient.pow(2).sum().item()
        values = (fixed.initial * value).sum(-1)  # [C]
        each = {f"objective_{c}": values[c].item() for c in range(cmdp.contexts) if nature[c] > 0}
        return {"objective": (nature * values).sum().item(), "gradient_norm": squares**0.5, **each}
