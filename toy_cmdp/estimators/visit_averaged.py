"""`VisitAveraged`: what the authors' code computes on Four Rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.functional import returns_to_go
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.estimators.visits import add_gradient, discounted, expected_utility, visits


@checked
@dataclasses.dataclass(frozen=True)
class VisitAveraged(Hypergradient):
    """HPGD's estimator as published in code (lasgroup/HPGD, train_stochastic_bilevel_opt.py).

    With bars for averages of discounted sums to the end of the path over *all* visits of a state, or of a state and
    action, in the very batch,

        dJ = dVbar_F(s_0) + (1 / (lambda B)) sum over steps of gammaF^t Abar_F(s_t, a_t) dAbar(s_t, a_t),
        Abar = Qbar - Vbar,

    where Qbar, Vbar average sum_{k >= t} gammaF^{k-t} u_k and dQbar, dVbar average sum_{k >= t} gamma^{k-t} dr_k. Both
    factors average the same futures: their errors are correlated, which biases the product by Cov(return, its
    gradient) / visits at each pair, in all of the order of (pairs visited) / B; and Vbar is not centred under the
    policy but only under the actions that were taken.

    The authors hold (steps, environments, |x|) arrays of forward-mode Jacobians; here the same number is one backward
    pass (see `add_gradient`). Unlike theirs, paths are complete episodes and each draws its own context, with states of
    different contexts averaged apart: one context for the whole batch, as theirs, adds the variance between contexts,
    which no number of steps removes. Their episodes cut off at the end of the batch count in the sum but not in B.

    Attributes:
        cell: maps rollouts to the cell of every visited state, long [B, T + 1] (`ContextualMDP.cell`).
        horizon: longer episodes are cut at this many steps, without bootstrap; the authors' 200 by default.

    Raises:
        InputError: a horizon below one; an objective other than an ExpectedUtility; a leader that moves the
            transitions or the initial state; rollouts without "action" and "log_policy_all".

    Example:
        >>> from toy_cmdp import four_rooms
        >>> problem = four_rooms(temperature=0.005)
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 2, torch.Generator().manual_seed(0))
        >>> sorted(VisitAveraged(problem.follower.cmdp.cell).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    cell: Callable[[Rollouts], Tensor]
    horizon: Count = 200

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InputError(f"VisitAveraged.horizon: expected at least one step, got {self.horizon}")

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`."""
        reached = torch.arange(rollouts.horizon) < self.horizon
        rollouts = dataclasses.replace(rollouts, mask=rollouts.mask & reached)
        with torch.no_grad():
            seen = visits(rollouts, self.cell)
            utility = torch.where(rollouts.mask, expected_utility(problem, rollouts, "VisitAveraged"), 0.0)
            returns = returns_to_go(utility, rollouts.mask, problem.objective.discount)
            advantage = seen.pair.spread(returns) - seen.cell.spread(returns)
            credit = torch.where(rollouts.mask, discounted(advantage, problem), 0.0) / rollouts.size
            source = seen.pair.spread(credit) - seen.cell.spread(credit)
        objective = float(returns[:, 0].mean())
        return {"objective": objective, "gradient_norm": add_gradient(problem, rollouts, seen, source)}
