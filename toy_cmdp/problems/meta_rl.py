"""Meta-RL: the leader moves the prior, contexts are tasks, and the follower pays for every nat it leaves the prior by.

At one step and at the follower's own trade-off this is rational inattention: Matějka and McKay, "Rational Inattention
to Discrete Choices", American Economic Review 105 (2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, NonNegative, Probability, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility, KLPriced
from align_cbrl.problem import Objective, Problem
from toy_cmdp.followers.exact import ExactFollower, require_exact
from toy_cmdp.followers.solve import continuation
from toy_cmdp.tables.arguments import check_size, nature_law
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility, require_tabular
from toy_cmdp.tables.transition import policy_system

_ACTIONS = ("left", "right")


class MetaLeader(TabularLeader):
    """One prior for all tasks: it does not know which of them nature draws.

    Attributes:
        weights: the parameter, [S, A]; its softmax is the prior.
        reward_table: [C, S, A], the chance that a step reaches the task's goal.
    """

    reward_table: Tensor
    transition: Tensor
    initial: Tensor

    def __init__(self, weights: Tensor, **tables: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        for name, table in tables.items():
            self.register_buffer(name, table)

    def tables(self) -> Tables:
        """Only the prior moves."""
        log_prior = torch.log_softmax(self.weights, -1).expand(len(self.reward_table), -1, -1)
        return Tables(self.reward_table, self.transition, self.initial, log_prior)


@checked
def meta_rl(
    *,
    length: Count = 7,
    goals: Sequence[int] = (0, 2, 6),
    task_probabilities: Any = None,
    slip: Probability = 0.1,
    price: NonNegative = 0.0,
    temperature: float | Tensor = 0.2,
    discount: float | Tensor = 0.9,
    leader_discount: Discount = 0.9,
    seed: Whole = 0,
) -> Problem:
    """Tasks are goals in a corridor; the leader chooses the prior from which the follower adapts to each.

    The follower starts in the middle cell and walks left or right; a step into the goal earns 1, and the episode
    ends there. The leader earns the follower's return after adaptation, less `price` for each nat that the adapted
    policy is away from the prior. With `price` equal to the temperature and equal discounts that is the follower's own
    soft value.

    Args:
        length: S >= 2, cells of the corridor.
        goals: the goal cell of each of the C tasks, none of them the middle cell.
        task_probabilities: [C], uniform by default.
        slip: the probability in [0, 1] of going the other way; walls hold the follower where it is.
        price: kappa >= 0; above zero the objective is `KLPriced`.
        temperature: lambda, the cost of a nat to the follower; a number, or one for each task, [C].
        discount: the follower's gamma, likewise; with both discounts 0 only the first step counts (T = 1).
        leader_discount: gammaF.
        seed: of the initial weights, N(0, 0.1^2).

    Raises:
        InputError: a corridor of one cell, goals outside of it or at the start, probabilities, a slip, price,
            temperature or discount out of range.

    Example:
        >>> problem = meta_rl()
        >>> tuple(problem.leader.tables().log_prior.shape)
        (3, 7, 2)
    """
    if length < 2:
        raise InputError(f"length: expected at least 2 cells, got {length}")
    check_size(2 * length**2, length=length)
    start = length // 2
    if not goals or any(isinstance(g, bool) or not isinstance(g, int) or not 0 <= g < length for g in goals):
        raise InputError(f"goals: expected cells in [0, {length}), one or more, got {list(goals)}")
    if start in goals:
        raise InputError(f"goals: expected cells other than the start, {start}, got {list(goals)}")
    contexts = len(goals)

    one = torch.zeros(length, 2, length, dtype=torch.float64)
    for cell in range(length):
        landing = (max(cell - 1, 0), min(cell + 1, length - 1))
        for action in (0, 1):
            one[cell, action, landing[action]] += 1 - slip
            one[cell, action, landing[1 - action]] += slip
    at = torch.tensor(list(goals))
    terminal = torch.zeros(contexts, length, dtype=torch.bool)
    terminal[torch.arange(contexts), at] = True
    reward = one[..., at].movedim(-1, 0) * (~terminal)[..., None]  # [C, S, A]; nothing is earned in the goal itself
    initial = torch.zeros(contexts, length, dtype=torch.float64)
    initial[:, start] = 1

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, MetaLeader)
        return leader.reward_table

    weights = 0.1 * torch.randn(length, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leader = MetaLeader(weights, reward_table=reward, transition=one[None], initial=initial)
    cmdp = ContextualMDP(
        nature_law("task_probabilities", task_probabilities, contexts),
        terminal,
        context_names=[f"goal {goal}" for goal in goals],
        action_names=_ACTIONS,
    )
    objective: Objective = ExpectedUtility(TabularUtility(utility), discount=leader_discount)
    if price != 0:
        objective = KLPriced(objective, price)
    follower = ExactFollower(cmdp, temperature, discount, leader_discount=leader_discount)
    return Problem(leader, objective, follower)


def average_response(problem: Problem) -> Tensor:
    """The average best response, [S, A]: sum_c Xi(c) d_c(s) pi*_c(a|s), normalised in every state.

    d_c(s) is the discounted number of visits. At a stationary point of the soft value (price = lambda, gammaF = gamma)
    the prior equals it wherever the follower comes by: dJ / dlog prior(a|s) = lambda sum_c Xi(c) d_c(s) pi*_c(a|s), and
    priors sum to one. Replacing the prior by it, again and again, never lowers the soft value (Blahut and Arimoto's
    alternating maximisation, J being the maximum over policies of what is maximised in turn over the prior).

    Raises:
        InputError: a problem that is not tabular, or whose leader does not move the prior.

    Example:
        >>> average_response(meta_rl()).sum(-1).allclose(torch.ones(7, dtype=torch.float64))
        True
    """
    leader, follower = require_tabular(problem.leader), require_exact(problem.follower)
    with torch.no_grad():
        tables, solution = follower.solve(leader)
        policy = solution.log_policy.exp()
        if tables.log_prior is None:
            raise InputError("leader: expected one that moves the prior, got entropy regularisation")
        go_on = continuation(follower.cmdp, problem.objective.discount, tables.reward)
        visits = policy_system(tables.transition, go_on * policy).solve(tables.initial, transpose=True)  # [C, S]
        mass = (follower.cmdp.context_probabilities[:, None, None] * visits[..., None] * policy).sum(0)  # [S, A]
        total = mass.sum(-1, keepdim=True)
        return torch.where(total > 0, mass / total, tables.log_prior[0].exp())  # unreachable: as it was
