"""A regulator whose target and prices a leader sets: linear, so that an agent's gradients have an exact referee."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from align_cbrl import ExpectedUtility, Problem
from toy_cmdp import LinearLeader, LinearQuadraticFollower, LinearSystems, QuadraticUtility

LENGTH = 40
"""Steps of a path; 0.8^40 is 1.3e-4."""
BOUND = 2.5
"""Of the agent's action; the exact response hardly ever leaves it: its standard deviation is 0.46."""
NAMES = ("log position price", "log speed price", "target")
DISCOUNT, TEMPERATURE = 0.8, 0.5


class PriceLeader(LinearLeader):
    """Prices distance from a target, and speed: the follower pays q_1 (position - target)^2 + q_2 speed^2 + u^2.

    The state is (position, speed, 1), the follower accelerates.

    Attributes:
        x: (log q_1, log q_2, target).
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.double())

    def describe(self) -> dict[str, float]:
        """Its parameters, which HPGD writes into every step's metrics."""
        return dict(zip(NAMES, self.x.tolist(), strict=True))

    def systems(self) -> LinearSystems:
        """See `LinearLeader.systems`."""
        near, slow, target = self.x[0].exp(), self.x[1].exp(), self.x[2]
        zero = torch.zeros_like(near)
        cost = torch.stack(
            [
                torch.stack([near, zero, -near * target]),
                torch.stack([zero, slow, zero]),
                torch.stack([-near * target, zero, near * target**2]),
            ]
        )
        return LinearSystems(
            dynamics=_constant([0.9, 0.3, 0], [0, 0.8, 0], [0, 0, 1]),
            control=_constant([0], [0.3], [0]),
            noise=_constant([0.01, 0, 0], [0, 0.01, 0], [0, 0, 0]),
            state_cost=cost[None],
            action_cost=_constant([1]),
            initial_mean=_constant(0, 0, 1),
            initial_covariance=_constant([0.25, 0, 0], [0, 0.25, 0], [0, 0, 0]),
        )


def regulator(x: Tensor) -> Problem:
    """The leader wants the position at 1, and pays -((position - 1)^2 + 0.3 speed^2 + 0.2 u^2) a step.

    Args:
        x: the leader's parameters, [3].

    Example:
        >>> from toy_cmdp import leader_value
        >>> leader_value(regulator(torch.zeros(3))) < leader_value(regulator(torch.ones(3)))
        tensor(True)
    """
    wanted = _constant([1, 0, -1, 0], [0, 0.3, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0.2])
    utility = QuadraticUtility(lambda leader: wanted, horizon=LENGTH)
    follower = LinearQuadraticFollower(torch.ones(1), TEMPERATURE, DISCOUNT, horizon=LENGTH)
    return Problem(PriceLeader(x), ExpectedUtility(utility, discount=DISCOUNT), follower)


def _constant(*rows: object) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)
