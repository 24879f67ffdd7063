"""Random linear systems in which the leader's parameters move everything at once: a test of every term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Positive, Range, Whole, checked
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.linear_systems import (
    BumpUtility,
    Horizon,
    LinearLeader,
    LinearSystems,
    MomentUtility,
    QuadraticUtility,
)

_STEP = 0.1  # how far one unit of x moves an entry


class RandomLinearLeader(LinearLeader):
    """Moves dynamics, control, noise, both costs, the first state's law and the temperature.

    Attributes:
        x: the parameter, [D].
    """

    def __init__(
        self, contexts: int, states: int, actions: int, parameters: int, temperature: float, seed: int
    ) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self.x = nn.Parameter(0.5 * self._normal(parameters))
        a = self._normal(contexts, states, states)
        self._dynamics = self._moved(0.9 * a / torch.linalg.eigvals(a).abs().amax(-1)[:, None, None])
        self._control = self._moved(self._normal(contexts, states, actions))
        self._start = self._moved(self._normal(contexts, states))
        self._roots = {
            name: self._moved(scale * self._normal(contexts, size, size))
            for name, size, scale in (
                ("noise", states, 0.3),
                ("state_cost", states, 1.0),
                ("action_cost", actions, 1.0),
                ("initial_covariance", states, 0.5),
                ("utility", states + actions, 0.3),
            )
        }
        self._log_temperature = self._moved(torch.tensor(temperature, dtype=torch.float64).log())
        del self._generator

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def _moved(self, base: Tensor) -> Callable[[], Tensor]:
        """x to base + a random linear function of x."""
        slope = _STEP * self._normal(*base.shape, len(self.x))
        return lambda: base + slope @ self.x

    def square(self, name: str) -> Tensor:
        """A positive definite matrix in every context: a root times its transpose, and a tenth of the unit."""
        root = self._roots[name]()
        return root @ root.mT + 0.1 * torch.eye(root.shape[-1], dtype=root.dtype)

    def systems(self) -> LinearSystems:
        """See `LinearLeader.systems`."""
        return LinearSystems(
            dynamics=self._dynamics(),
            control=self._control(),
            noise=self.square("noise"),
            state_cost=self.square("state_cost"),
            action_cost=self.square("action_cost"),
            initial_mean=self._start(),
            initial_covariance=self.square("initial_covariance"),
        )

    def follower_temperature(self) -> Tensor:
        """lambda."""
        return self._log_temperature().exp()


@checked
def random_linear(
    *,
    utility: Literal["quadratic", "bump"] = "quadratic",
    contexts: Count = 2,
    states: Count = 3,
    actions: Count = 2,
    parameters: Count = 5,
    horizon: Horizon = 12,
    temperature: Positive = 0.3,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.8,
    leader_discount: Annotated[float, Range(0, 1)] = 0.9,
    seed: Whole = 0,
) -> Problem:
    """Systems of random matrices, of spectral radius about 0.9 without control.

    Args:
        utility: "quadratic", a random form that moves with x, or "bump", around a point of the first state and action.
        contexts: C, each a system of its own; nature draws them with unequal probabilities.
        states: n.
        actions: m.
        parameters: length of x.
        horizon: steps that the leader counts.
        temperature: lambda at x = 0.
        discount: gamma.
        leader_discount: gammaF; 1 for the undiscounted sum.
        seed: of everything.

    Raises:
        InputError: numbers out of range.

    Example:
        >>> tuple(random_linear().leader.systems().control.shape)
        (2, 3, 2)
    """
    width = states + actions
    check_size(contexts * width**2 * parameters, contexts=contexts, states=states, actions=actions)
    undiscounted = discount if leader_discount == 1 else None
    earned: MomentUtility
    if utility == "bump":
        centre, wide = torch.tensor([0.5, -0.5]), torch.tensor([0.8, 0.6])
        earned = BumpUtility([0, states], centre, wide, horizon=horizon, undiscounted=undiscounted)
    else:
        earned = QuadraticUtility(_form, horizon=horizon, undiscounted=undiscounted)
    objective = ExpectedUtility(
        earned, discount=discount if undiscounted else leader_discount, depends_on_leader=utility == "quadratic"
    )
    nature = torch.arange(1, contexts + 1, dtype=torch.float64)
    follower = LinearQuadraticFollower(nature / nature.sum(), temperature, discount, horizon=horizon)
    leader = RandomLinearLeader(contexts, states, actions, parameters, temperature, seed)
    return Problem(leader, objective, follower)


def _form(leader: LinearLeader) -> Tensor:
    assert isinstance(leader, RandomLinearLeader)
    return leader.square("utility")
