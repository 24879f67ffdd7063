"""Four Rooms with incentives, as published (Thoma et al. 2024, section 4.1 and the authors' code)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, NonNegative, Probability, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility

_MAP = """
xxxxxxxxxxxxx
x     x     x
x     x     x
x           x
x     x     x
x     x     x
xx xxxx     x
x     xxx xxx
x     x     x
x     x     x
x           x
x     x     x
xxxxxxxxxxxxx
"""
_MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
_START, _TARGET = (4, 1), (8, 4)
Goals = tuple[tuple[int, int], ...]
"""Cells (row, column)."""

GOALS: Goals = ((1, 9), (11, 11))
"""The goals (row, column) of the published problem."""
_DISCOUNT, _BUDGET = 0.99, 0.2


@functools.cache
def four_rooms_map() -> tuple[tuple[int, int], ...]:
    """The 104 free cells (row, column), in row-major order: a cell's place in this tuple is its state.

    Example:
        >>> len(four_rooms_map()), four_rooms_map()[0]
        (104, (1, 1))
    """
    rows = _MAP.strip().splitlines()
    return tuple((i, j) for i, row in enumerate(rows) for j, mark in enumerate(row) if mark == " ")


class FourRoomsLeader(TabularLeader):
    """Puts a fine of 0.2 softmax(w)_i on acting in cell i, which the follower pays everywhere but in its goal.

    Attributes:
        weights: the parameter w, [105]; the last one is the share of the budget that is left unspent.
    """

    goal: Tensor
    transition: Tensor
    initial: Tensor

    def __init__(self, goal: Tensor, transition: Tensor, initial: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.register_buffer("goal", goal)  # [C, S], one in the follower's goal
        self.register_buffer("transition", transition)
        self.register_buffer("initial", initial)

    def incentive(self) -> Tensor:
        """-0.2 softmax(w)_i of the 104 cells, [S]."""
        return -_BUDGET * torch.softmax(self.weights, 0)[:-1]

    def tables(self) -> Tables:
        """Reward 1 in the goal and the incentive elsewhere; P and rho are constant; entropy regularisation."""
        reward = self.goal + (1 - self.goal) * self.incentive()  # [C, S]
        return Tables(reward[..., None].expand(-1, -1, len(_MOVES)), self.transition, self.initial)


@checked
def four_rooms(
    temperature: float = 0.001,
    price: NonNegative = 1.0,
    slip: Probability = 0.44,
    seed: Whole = 0,
    horizon: Count | None = None,
    goals: Goals = GOALS,
) -> Problem:
    """The published problem: lead the follower through cell (8, 4) by fines that cost the leader in the goal.

    The follower's goal is one of `goals`, each with the same probability; acting there pays 1 and ends the episode.
    Regularisation is by entropy, in the goal as well: V(goal) = 1 + lambda log 4. The leader earns 1 for
    every step that the follower acts in (8, 4), and pays `price` times the sum of all fines, the goal's own included,
    when the follower acts in its goal. gamma = gammaF = 0.99.

    Args:
        temperature: lambda; published: 0.001, 0.003, 0.005.
        price: beta; published: 1, 3, 5.
        slip: probability of each of the three other directions, added up. 0.44 is the published exact matrix; the
            authors' simulator corresponds to 0.33.
        seed: of the initial weights, N(0, 0.01^2).
        horizon: longest sampled path; by default discount^T <= 1e-3.
        goals: cells (row, column), a context each; ((1, 9),) is the problem of BC-HG (ICAPS 2026).

    Raises:
        InputError: a temperature that is not positive, a slip outside [0, 1] (rows of P that are no laws), goals that
            are not different free cells.

    Example:
        >>> from toy_cmdp.referee.exact import leader_value
        >>> 0.2 < leader_value(four_rooms(temperature=0.001, price=1.0)).item() < 0.8
        True
    """
    cells = four_rooms_map()
    place = {cell: i for i, cell in enumerate(cells)}
    if not goals or len(set(goals)) < len(goals) or any(cell not in place for cell in goals):
        raise InputError(f"goals: expected different free cells (row, column) of the map, got {list(goals)}")
    states, moves, contexts = len(cells), list(_MOVES.values()), len(goals)

    transition = torch.zeros(states, len(moves), states, dtype=torch.float64)
    for i, (row, column) in enumerate(cells):
        landing = [place.get((row + di, column + dj), i) for di, dj in moves]
        for action in range(len(moves)):
            for direction, j in enumerate(landing):
                transition[i, action, j] += 1 - slip if direction == action else slip / 3
    initial = torch.zeros(contexts, states, dtype=torch.float64)
    initial[:, place[_START]] = 1
    goal = torch.zeros(contexts, states, dtype=torch.float64)
    for context, cell in enumerate(goals):
        goal[context, place[cell]] = 1
    target = torch.zeros(states, dtype=torch.float64)
    target[place[_TARGET]] = 1

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, FourRoomsLeader)
        spent = leader.incentive().abs().sum()
        return (target - price * spent * leader.goal)[..., None].expand(-1, -1, len(moves))

    weights = 0.01 * torch.randn(states + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leader = FourRoomsLeader(goal, transition[None], initial, weights)
    cmdp = ContextualMDP(
        context_probabilities=torch.full((contexts,), 1 / contexts, dtype=torch.float64),
        terminal=goal.bool(),
        context_names=[f"goal {cell}" for cell in goals],
        state_names=[f"cell {cell}" for cell in cells],
        action_names=list(_MOVES),
    )
    objective = ExpectedUtility(TabularUtility(utility), discount=_DISCOUNT, depends_on_leader=True)
    return Problem(leader, objective, ExactFollower(cmdp, temperature, _DISCOUNT, horizon=horizon))
