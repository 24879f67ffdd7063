"""Free rewards: a leader whose only limit is a bound on every reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.tables.arguments import check_size, finite_tensor
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


class FreeRewardsLeader(TabularLeader):
    """A reward of its own for every action of every context; `project` brings them back between the bounds.

    Attributes:
        rewards: the parameter, r_x, [C, A].
        utility: [C, A], what the leader gains from an action.
    """

    utility: Tensor
    transition: Tensor
    initial: Tensor

    def __init__(self, rewards: Tensor, bounds: tuple[float, float], utility: Tensor) -> None:
        super().__init__()
        self.rewards = nn.Parameter(rewards)
        self._bounds = bounds
        contexts, actions = utility.shape
        self.register_buffer("utility", utility)
        self.register_buffer("transition", torch.ones(1, 1, actions, 1, dtype=torch.float64))
        self.register_buffer("initial", torch.ones(contexts, 1, dtype=torch.float64))

    def project(self) -> None:
        """Rewards out of bounds are set to the bound."""
        with torch.no_grad():
            self.rewards.clamp_(*self._bounds)

    def tables(self) -> Tables:
        """One state, which ends the episode; entropy regularisation."""
        return Tables(self.rewards[:, None], self.transition, self.initial)


@checked
def free_rewards(
    *,
    utility: Any = None,
    contexts: Count = 3,
    actions: Count = 6,
    bounds: tuple[float, float] = (0.0, 1.0),
    temperature: float | Tensor = 0.5,
    seed: Whole = 0,
) -> Problem:
    """One decision per context, and a leader that sets each action's reward freely within `bounds`.

    Without bounds it would have no optimum: rewards grow until the follower takes the best action for certain.

    Args:
        utility: [C, A]; by default N(0, 1) for `contexts` x `actions`.
        contexts: C, where no utility is given.
        actions: A, likewise.
        bounds: (lowest, highest) reward.
        temperature: lambda, a number or one for each context, [C].
        seed: of the utility and of the initial rewards, uniform between the bounds.

    Raises:
        InputError: sizes below one, a utility that is not finite or no matrix, bounds in the wrong order, a
            temperature that is not positive.

    Example:
        >>> tuple(free_rewards(contexts=2, actions=4).leader.rewards.shape)
        (2, 4)
    """
    check_bounds(bounds)
    check_size(contexts * actions, contexts=contexts, actions=actions)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(contexts, actions, generator=generator, dtype=torch.float64)
    gain = finite_tensor("utility", drawn if utility is None else utility, ("C", "A"))
    count = len(gain)
    low, high = bounds
    start = low + (high - low) * torch.rand(gain.shape, generator=generator, dtype=torch.float64)
    leader = FreeRewardsLeader(start, bounds, gain)

    def table(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, FreeRewardsLeader)
        return leader.utility[:, None]

    nature = torch.full((count,), 1 / count, dtype=torch.float64)
    cmdp = ContextualMDP(nature, torch.ones(count, 1, dtype=torch.bool))
    return Problem(leader, ExpectedUtility(TabularUtility(table)), ExactFollower(cmdp, temperature, 0.0))


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise `InputError` unless `bounds` are two finite numbers, the lower first."""
    finite_tensor("bounds", bounds, (2,))
    if not bounds[0] < bounds[1]:
        raise InputError(f"bounds: expected (lowest, highest) reward in that order, got {bounds}")
