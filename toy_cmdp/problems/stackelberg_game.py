"""A leader that plays inside a two-player Markov game: its policy is the follower's world.

Commitment: von Stackelberg (1934); the optimal mixed commitment of a matrix game is a few linear programs, Conitzer and
Sandholm, "Computing the Optimal Strategy to Commit to", EC 2006; Markov games: Letchford et al., AAAI 2012.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Discount, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size, finite_tensor
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class StackelbergLeader(TabularLeader):
    """Commits to a policy pi_L(b | s); the follower sees its mean rewards and transitions.

    Attributes:
        weights: the parameter, [S, B]; its softmax is the leader's policy.
        follower_payoff: [C, S, A, B], r(s, a, b) by type of the follower.
        leader_payoff: [C, S, A, B], u(s, a, b).
        moves: [S, A, B, S], P(s' | s, a, b).
    """

    follower_payoff: Tensor
    leader_payoff: Tensor
    moves: Tensor
    initial: Tensor

    def __init__(self, weights: Tensor, **tables: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        for name, table in tables.items():
            self.register_buffer(name, table)

    def policy(self) -> Tensor:
        """pi_L(b | s), [S, B]."""
        return torch.softmax(self.weights, -1)

    def utility(self) -> Tensor:
        """sum_b pi_L(b | s) u(s, a, b), [C, S, A]."""
        return torch.einsum("csab,sb->csa", self.leader_payoff, self.policy())

    def tables(self) -> Tables:
        """r_x and P_x, means over the leader's action; entropy regularisation."""
        policy = self.policy()
        reward = torch.einsum("csab,sb->csa", self.follower_payoff, policy)
        # A probability that is zero whatever the leader does is a sum of exact zeros.
        transition = torch.einsum("sabt,sb->sat", self.moves, policy)
        return Tables(reward, transition[None], self.initial)


@checked
def stackelberg_game(
    *,
    contexts: Count = 2,
    states: Count = 4,
    actions: Count = 3,
    leader_actions: Count = 3,
    successors: Count = 2,
    follower_payoff: Any = None,
    leader_payoff: Any = None,
    temperature: float | Tensor = 0.2,
    discount: float | Tensor = 0.9,
    leader_discount: Discount = 0.9,
    seed: Whole = 0,
) -> Problem:
    """A random Markov game, played without end from a uniform start; contexts are types of the follower.

    In state s the leader draws b from its committed policy and the follower, knowing that policy but not b, takes a.
    Payoffs are N(0, 1) where they are not given. Each (s, a, b) leads to `successors` random states (draws may
    coincide) with random probabilities. One state and discounts of 0 make a matrix game.

    Args:
        contexts: C.
        states: S.
        actions: A, the follower's.
        leader_actions: B.
        successors: states that a joint action may lead to.
        follower_payoff: [C, S, A, B].
        leader_payoff: [C, S, A, B].
        temperature: the follower's lambda, a number or one for each type, [C].
        discount: the follower's gamma, likewise.
        leader_discount: gammaF.
        seed: of everything, the initial weights N(0, 0.1^2) among it.

    Raises:
        InputError: sizes below one, more successors than states, payoffs of another shape or not finite, a temperature
            or discount out of range.

    Example:
        >>> problem = stackelberg_game()
        >>> tuple(problem.leader.policy().shape), tuple(problem.leader.tables().transition.shape)
        ((4, 3), (1, 4, 3, 4))
    """
    if successors > states:
        raise InputError(f"successors: expected at most states = {states}, got {successors}")
    sizes = {"contexts": contexts, "states": states, "actions": actions, "leader_actions": leader_actions}
    check_size(states * actions * leader_actions * max(contexts, states, successors), **sizes)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (contexts, states, actions, leader_actions)
    payoffs = {}
    for name, given in (("follower_payoff", follower_payoff), ("leader_payoff", leader_payoff)):
        drawn = normal(*shape)  # drawn in any case, so that what is given does not change the rest of the game
        payoffs[name] = drawn if given is None else finite_tensor(name, given, shape)
    joint = (states, actions, leader_actions)
    reached = torch.randint(states, (*joint, successors), generator=generator)
    weight = torch.softmax(normal(*joint, successors), -1)
    moves = torch.zeros(*joint, states, dtype=torch.float64).scatter_add_(-1, reached, weight)

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, StackelbergLeader)
        return leader.utility()

    leader = StackelbergLeader(
        0.1 * normal(states, leader_actions),
        moves=moves,
        initial=torch.full((contexts, states), 1 / states, dtype=torch.float64),
        **payoffs,
    )
    nature = torch.full((contexts,), 1 / contexts, dtype=torch.float64)
    cmdp = ContextualMDP(nature, torch.zeros(contexts, states, dtype=torch.bool))
    objective = ExpectedUtility(TabularUtility(utility), discount=leader_discount, depends_on_leader=True)
    follower = ExactFollower(cmdp, temperature, discount, leader_discount=leader_discount)
    return Problem(leader, objective, follower)
