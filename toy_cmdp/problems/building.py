"""Air flows and insulation of a building whose heating is run by somebody else.

Kudo et al., "Sample-Efficient Hypergradient Estimation for Decentralized Bi-Level Reinforcement Learning", ICAPS 2026
(arXiv 2603.14867).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Positive, Range, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.tables.arguments import finite_tensor
from toy_cmdp.tables.linear_systems import Horizon, LinearLeader, LinearSystems, QuadraticUtility, StructuredLeader

_ZONES, _UNITS = 4, 2
_FLOW = ((0, 0.05, 0, 0.05), (0.03, 0, 0.04, 0), (0, 0.04, 0, 0.06), (0.05, 0, 0.03, 0))
_HEATING = ((0.1, 0), (0.6, 0), (0, 0.55), (0, 0.3))
_DRIFT = (0.04, 0.03, 0.06, 0.05)
_COST = (8.0, 1.0, 5.0, 6.0)
_SPREAD = 5.0  # standard deviation of the first temperatures
_NEIGHBOURS = ([0, 0, 1, 1, 2, 2, 3, 3], [1, 3, 0, 2, 1, 3, 0, 2])


class BuildingLeader(StructuredLeader):
    """Chooses insulation and air flow, each in [0, 1].

    Attributes:
        insulation: a parameter, [4], l of every zone.
        airflow: a parameter, [4], a of the link between zones i and i + 1, in a circle.
        flow: [4, 4], what a zone exchanges with another where all flows between them.
        drift: [4], of a zone without insulation.
        heating: [4, 2], what the units do to the zones.
    """

    flow: Tensor
    drift: Tensor
    heating: Tensor
    noise: Tensor
    initial_mean: Tensor
    initial_covariance: Tensor
    cost: Tensor

    def __init__(self, insulation: Tensor, airflow: Tensor, **world: Tensor) -> None:
        super().__init__()
        self.insulation, self.airflow = nn.Parameter(insulation), nn.Parameter(airflow)
        for name, table in world.items():
            self.register_buffer(name, table)
        self.register_buffer("cost", torch.diag(torch.tensor(_COST, dtype=torch.float64)))

    def systems(self) -> LinearSystems:
        """A zone exchanges with its neighbours what the flow between them lets through, and drifts if uninsulated."""
        link = torch.diag(self.airflow).roll(1, 1)  # entry (i, i + 1)
        exchange = self.flow * (link + link.mT)
        diagonal = 1 + self.drift * (1 - self.insulation) - exchange.sum(-1)
        return LinearSystems(
            dynamics=(exchange + torch.diag(diagonal))[None],
            control=self.heating[None],
            noise=self.noise[None],
            state_cost=self.cost[None],
            action_cost=0.01 * torch.eye(_UNITS, dtype=torch.float64)[None],
            initial_mean=self.initial_mean[None],
            initial_covariance=self.initial_covariance[None],
        )

    def nature(self) -> Tensor:
        """The exchanges of neighbours, the drifts and the entries of B, [1, 20]."""
        return torch.cat([self.flow[_NEIGHBOURS], self.drift, self.heating.flatten()])[None]

    def supposing(
        self, numbers: Tensor, noise: Tensor, initial_mean: Tensor, initial_covariance: Tensor
    ) -> BuildingLeader:
        """See `StructuredLeader.supposing`."""
        exchange, drift, heating = numbers[0].tensor_split([2 * _ZONES, 3 * _ZONES])
        flow = torch.zeros_like(self.flow)
        flow[_NEIGHBOURS] = exchange
        other = BuildingLeader(
            self.insulation.detach(),
            self.airflow.detach(),
            flow=flow,
            drift=drift,
            heating=heating.view(_ZONES, _UNITS),
            noise=noise[0],
            initial_mean=initial_mean[0],
            initial_covariance=initial_covariance[0],
        )
        other.insulation, other.airflow = self.insulation, self.airflow  # the same parameters
        return other

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
    horizon: Horizon = 100,
    temperature: Positive = 0.1,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.9,
    leader_discount: Annotated[float, Range(0, 1)] = 0.9,
    noise: Annotated[float, Range(0, 1e6, open="low")] = 0.02,
) -> Problem:
    """Four zones and two heating units; the leader wants even temperatures for little energy.

    The follower runs the units so as to keep every zone at zero, with its own weights. The leader pays the variance of
    the temperatures over the zones, 0.5 |u|^2, and 0.1 for the squares of insulation and air flow each, at every step.

    Args:
        insulation: [4], at the start, in [0, 1].
        airflow: likewise.
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
    unit = torch.eye(_ZONES, dtype=torch.float64)
    leader = BuildingLeader(
        **starts,
        flow=torch.tensor(_FLOW, dtype=torch.float64),
        drift=torch.tensor(_DRIFT, dtype=torch.float64),
        heating=torch.tensor(_HEATING, dtype=torch.float64),
        noise=float(noise) ** 2 * unit,
        initial_mean=torch.zeros(_ZONES, dtype=torch.float64),
        initial_covariance=_SPREAD**2 * unit,
    )
    return Problem(leader, objective, follower)
