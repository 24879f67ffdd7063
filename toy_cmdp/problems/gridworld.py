"""Gridworlds of any size, with sparse transitions: the problem of `four_rooms` at a million cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, NonNegative, Probability, Range, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility
from toy_cmdp.tables.sparse import SparseTransition

Cell = tuple[int, int]
"""Row and column, counted from zero."""

_MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
_CELLS_A_GOAL = 400  # so that the nearest goal is some ten steps away on a map of any size
_CONTEXTS = 2


class GridworldLeader(TabularLeader):
    """Pays or fines the follower by up to `limit` for acting in a cell, anywhere but in its goals.

    Attributes:
        weights: the parameter w, [S], one for each free cell.
        cells: long [S, 2], row and column of each state.
    """

    goal: Tensor
    target: Tensor
    initial: Tensor
    log_uniform: Tensor
    cells: Tensor

    def __init__(
        self,
        weights: Tensor,
        cells: Tensor,
        transition: SparseTransition,
        goal: Tensor,
        target: Tensor,
        initial: Tensor,
        limit: float,
        price: float,
    ) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.limit = limit
        self.price = price
        self._transition = transition
        actions = transition.shape[2]
        self.register_buffer("cells", cells)
        self.register_buffer("goal", goal)  # [C, S], one in the follower's goals
        self.register_buffer("target", target)  # [S], one where the leader wants the follower to pass
        # Expanded views, which a checkpoint could not be loaded into.
        self.register_buffer("initial", initial, persistent=False)
        uniform = weights.new_full((1, 1, 1), -math.log(actions))
        self.register_buffer("log_uniform", uniform.expand(*goal.shape, actions), persistent=False)

    def incentive(self) -> Tensor:
        """limit * tanh(w), [S]: above zero a payment to the follower, below a fine."""
        return self.limit * torch.tanh(self.weights)

    def tables(self) -> Tables:
        """Reward 1 in a goal and the incentive elsewhere; P, rho and the uniform prior are constant."""
        reward = self.goal + (1 - self.goal) * self.incentive()  # [C, S]
        return Tables(
            reward[..., None].expand_as(self.log_uniform), self._transition, self.initial, log_prior=self.log_uniform
        )

    def utility(self) -> Tensor:
        """1 in a target cell, less price * tanh(w)^2 wherever the follower acts outside its goals, [C, S, A]."""
        upkeep = self.price * torch.tanh(self.weights).square()
        return (self.target - (1 - self.goal) * upkeep)[..., None].expand_as(self.log_uniform)


@checked
def gridworld(
    height: Count = 20,
    width: Count = 20,
    *,
    goals: Sequence[Sequence[Cell]] | None = None,
    targets: Sequence[Cell] | None = None,
    start: Cell | None = None,
    walls: Annotated[float, Range(0, 1, open="high")] = 0.1,
    slip: Probability = 0.2,
    limit: NonNegative = 0.02,
    price: NonNegative = 0.05,
    temperature: float = 0.01,
    discount: float = 0.99,
    seed: Whole = 0,
    horizon: Count | None = None,
) -> Problem:
    """Lead a follower through target cells on its way to the nearest of its goals, on a map of any size.

    The follower moves up, right, down or left, stays where it would hit a wall, and slips into one of the three other
    directions with probability `slip`. Acting in one of its goals pays 1 and ends the episode; the context says which
    goals are its own. Elsewhere it is paid the leader's incentive, limit * tanh(w) of the cell. Its prior is uniform,
    so that walking about is worth nothing by itself. The leader earns 1 for each step that the follower acts in a
    target cell and pays price * tanh(w)^2 for each in a cell with an incentive. gammaF = gamma.

    A table of P is never formed: memory and time grow in proportion to the number of cells.

    Args:
        height: of the map, in cells.
        width: of the map, in cells.
        goals: for each context its goals; contexts are equally likely. By default two contexts, each with one random
            goal per 400 cells, at least one.
        targets: the leader's cells; by default one random cell per 400, at least one.
        start: where episodes begin; by default in a random free cell, all equally likely.
        walls: share of the cells that are walls, drawn at random; goals, targets and the start never are.
        slip: probability of the three other directions, added up.
        limit: largest incentive.
        price: of the largest incentive, to the leader, for each step taken under it.
        temperature: lambda. With the defaults the best response is neither uniform nor nearly deterministic.
        discount: gamma = gammaF.
        seed: of walls, goals, targets and the initial weights, N(0, 0.01^2).
        horizon: longest sampled path; by default discount^T <= 1e-3.

    Returns:
        A problem whose leader is a `GridworldLeader`; its `cells` tells which state is which cell.

    Raises:
        InputError: a size below one or fewer than two cells, cells off the map, no goals or targets, a share of walls
            outside [0, 1), a slip outside [0, 1], a limit or price that is negative or not finite, or a temperature
            or discount out of range.

    Example:
        >>> problem = gridworld(3, 4, goals=[[(0, 3)], [(2, 3)]], targets=[(1, 2)], start=(1, 0), walls=0.0)
        >>> tuple(problem.leader.tables().transition.shape)
        (1, 12, 4, 12)
    """
    if height * width < 2:
        raise InputError("height, width: expected at least two cells, got one")
    check_size(4 * height * width, height=height, width=width)

    generator = torch.Generator().manual_seed(seed)
    count = max(1, height * width // _CELLS_A_GOAL)

    def places(name: str, cells: Iterable[Cell] | None) -> Tensor:
        """The numbers row * width + column of the given cells, or of `count` random ones."""
        if cells is None:
            return torch.randperm(height * width, generator=generator)[:count]
        chosen = list(cells)
        if not chosen:
            raise InputError(f"{name}: expected at least one cell (row, column)")
        for row, column in chosen:
            if not (0 <= row < height and 0 <= column < width):
                raise InputError(f"{name}: expected cells of a {height} x {width} map, got {(row, column)}")
        return torch.tensor([row * width + column for row, column in chosen])

    if goals is not None and len(goals) == 0:
        raise InputError("goals: expected the goals of at least one context")
    own_goals = [places(f"goals of context {c}", g) for c, g in enumerate(goals or [None] * _CONTEXTS)]
    target_places = places("targets", targets)
    kept = [*own_goals, target_places, *([] if start is None else [places("start", [start])])]
    free = torch.rand(height * width, generator=generator) >= walls
    free[torch.cat(kept)] = True

    cells = free.nonzero()[:, 0]  # [S]
    states, contexts = len(cells), len(own_goals)
    state = torch.full((height * width,), -1)
    state[cells] = torch.arange(states)

    def marked(chosen: Tensor) -> Tensor:
        return torch.zeros(states, dtype=torch.float64).index_fill_(0, state[chosen], 1)

    goal = torch.stack([marked(chosen) for chosen in own_goals])  # [C, S]
    uniform = torch.full((1, states), 1 / states, dtype=torch.float64)
    initial = uniform if start is None else marked(kept[-1])[None]
    weights = 0.01 * torch.randn(states, generator=generator, dtype=torch.float64)
    rows, columns = cells // width, cells % width
    leader = GridworldLeader(
        weights,
        torch.stack([rows, columns], 1),
        _transition(state.view(height, width), rows, columns, slip),
        goal,
        marked(target_places),
        initial.expand(contexts, states),
        limit,
        price,
    )

    def utility(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, GridworldLeader)
        return leader.utility()

    cmdp = ContextualMDP(
        context_probabilities=torch.full((contexts,), 1 / contexts, dtype=torch.float64),
        terminal=goal.bool(),
        action_names=list(_MOVES),
    )
    objective = ExpectedUtility(TabularUtility(utility), discount=discount, depends_on_leader=True)
    return Problem(leader, objective, ExactFollower(cmdp, temperature, discount, horizon=horizon))


def _transition(state: Tensor, rows: Tensor, columns: Tensor, slip: float) -> SparseTransition:
    """Four successors of each cell, the same for all actions, and four probabilities of each action, for all cells.

    Args:
        state: long [height, width], the state of each cell, -1 for a wall.
        rows: long [S], of the free cells.
        columns: long [S].
        slip: probability of the three other directions, added up.
    """
    padded = nn.functional.pad(state, (1, 1, 1, 1), value=-1)
    here = state[rows, columns]
    landing = torch.stack([padded[rows + 1 + i, columns + 1 + j] for i, j in _MOVES.values()], 1)  # [S, 4]
    landing = torch.where(landing >= 0, landing, here[:, None])
    moves = len(_MOVES)
    law = torch.full((moves, moves), slip / (moves - 1), dtype=torch.float64).fill_diagonal_(1 - slip)
    size = (len(here), moves, moves)
    return SparseTransition(landing[:, None].expand(size), law.expand(1, *size))
