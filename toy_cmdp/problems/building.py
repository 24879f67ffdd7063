"""Air flows and insulation of a building whose heating is run by somebody else.

Kudo et al., "Sample-Efficient Hypergradient Estimation for Decentralized Bi-Level Reinforcement Learning", ICAPS 2026
(arXiv 2603.14867).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, Positive, Range, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.tables.arguments import finite_tensor
from toy_cmdp.tables.linear_systems import LinearLeader, LinearSystems, QuadraticUtility

_ZONES, _UNITS = 4, 2
_FLOW = ((1, 0.05, 0, 0.05), (0.03, 1, 0.04, 0), (0, 0.04, 1, 0.06), (0.05, 0, 0.03, 1))
_HEATING = ((0.1, 0), (0.6, 0), (0, 0.55), (0, 0.3))
_DRIFT = (0.04, 0.03, 0.06, 0.05)
_COST = (8.0, 1.0, 5.0, 6.0)


class BuildingLeader(LinearLeader):
    """Chooses insulation and air flow, each in [0, 1].

    Attributes:
        insulation: a parameter, [4], l of every zone.
        airflow: a parameter, [4], a of the link between zones i and i + 1, in a circle.
    """

    flow: Tensor
    heating: Tensor
    drift: Tensor
    cost: Tensor

    def __init__(self, insulation: Tensor, airflow: Tensor, noise: float, spread: float) -> None:
        super().__init__()
        self.insulation, self.airflow = nn.Parameter(insulation), nn.Parameter(airflow)
        self._noise, self._spread = noise, spread
        for name, table in (("flow", _FLOW), ("heating", _HEATING), ("drift", _DRIFT), ("cost", _COST)):
            self.register_buffer(name, torch.tensor(table, dtype=torch.float64))

    def systems(self) -> LinearSystems:
        """A zone exchanges with its neighbours what the flow between them lets through, and drifts the less insulated."""
        unit = torch.eye(_ZONES, dtype=torch.float64)
        link = torch.diag(self.airflow).roll(1, 1)  # entry (i, i + 1)
        exchange = self.flow * (link + link.mT)
        diagonal = 1 + self.drift * (1 - self.insulation) - exchange.sum(-1)
        return LinearSystems(
            dynamics=(exchange + torch.diag(diagonal))[None],
            control=self.heating[None],
            noise=self._noise**2 * unit[None],
            state_cost=torch.diag(self.cost)[None],
            action_cost=0.01 * torch.eye(_UNITS, dtype=torch.float64)[None],
            initial_mean=torch.zeros(1, _ZONES, dtype=torch.float64),
            initial_covariance=self._spread**2 * unit[None],
        )

    def project(self) -> None:
        """Back to [0, 1]."""
        with torch.no_grad():
            self.insulation.clamp_(0, 1)
            self.airflow.clamp_(0, 1)


@checked
def building(
    *,
    insulation: Any = (0.5,) * _ZONES,
    airflow: Any = (0.5,) * _ZONES,
    horizon: Count = 100,
    temperature: Positive = 0.1,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.9,
    leader_discount: Annotated[float, Range(0, 1)] = 0.9,
    noise: Positive = 0.02,
) -> Problem:
    """Four zones and two heating units; the leader wants even temperatures for little energy.

    The follower runs the units so as to keep every zone at zero, with its own weights. The leader pays the variance of
    the temperatures over the zones, 0.5 |u|^2, and 0.1 for the squares of insulation and air flow each, at every step.

    Args:
        insulation, airflow: [4], at the start, in [0, 1].
        horizon: steps that the leader counts.
        temperature: lambda.
        discount: gamma.
        leader_discount: gammaF; 1 for the undiscounted sum.
        noise: standard deviation.

    Raises:
        InputError: settings of another shape or outside [0, 1], numbers out of range.

    Example:
        >>> from toy_cmdp import leader_value
        >>> round(leader_value(building()).item(), 1)
        -262.0
    """
    starts = {}
    for name, given in (("insulation", insulation), ("airflow", airflow)):
        starts[name] = finite_tensor(name, given, (_ZONES,))
        if bool(((starts[name] < 0) | (starts[name] > 1)).any()):
            raise InputError(f"{name}: expected numbers in [0, 1], got {starts[name].tolist()}")
    centring = torch.eye(_ZONES, dtype=torch.float64) - 1 / _ZONES
    form = torch.zeros(1, _ZONES + _UNITS, _ZONES + _UNITS, dtype=torch.float64)
    form[0, :_ZONES, :_ZONES] = centring / _ZONES
    form[0, _ZONES:, _ZONES:] = 0.5 * torch.eye(_UNITS, dtype=torch.float64)

    def charge(leader: LinearLeader) -> Tensor:
        assert isinstance(leader, BuildingLeader)
        return 0.1 * (leader.insulation.square().sum() + leader.airflow.square().sum())[None]

    utility = QuadraticUtility(
        lambda leader: form, charge, horizon=horizon, undiscounted=discount if leader_discount == 1 else None
    )
    objective = ExpectedUtility(
        utility, discount=discount if leader_discount == 1 else leader_discount, depends_on_leader=True
    )
    follower = LinearQuadraticFollower(torch.ones(1, dtype=torch.float64), temperature, discount, horizon=horizon)
    return Problem(BuildingLeader(**starts, noise=noise, spread=5.0), objective, follower)
