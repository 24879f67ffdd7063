"""Many leaders of linear systems in one problem, solved as one batch: what `parallel` does for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from align_cbrl.errors import InputError
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem, require_fixed_temperature
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower, require_normal
from toy_cmdp.tables.linear_systems import LinearLeader, LinearSystems, MomentUtility, require_linear


class ParallelLinearLeaders(LinearLeader):
    """L leaders side by side, the contexts of one after those of another.

    Attributes:
        leaders: the leaders themselves; their parameters are this leader's.
    """

    leaders: nn.ModuleList

    def __init__(self, leaders: Sequence[LinearLeader]) -> None:
        super().__init__()
        self.leaders = nn.ModuleList(leaders)

    def members(self) -> list[LinearLeader]:
        """The leaders, in order."""
        return [leader for leader in self.leaders if isinstance(leader, LinearLeader)]

    def systems(self) -> LinearSystems:
        """All leaders' systems, one after the other."""
        each = [leader.systems() for leader in self.members()]
        names = [field.name for field in dataclasses.fields(LinearSystems)]
        return LinearSystems(*(torch.cat([getattr(systems, name) for systems in each]) for name in names))

    def project(self) -> None:
        """Every leader's own budget."""
        for leader in self.members():
            leader.project()


class ParallelUtility(MomentUtility):
    """Each leader's own utility in its own contexts."""

    def __init__(self, utilities: Sequence[MomentUtility], counts: Sequence[int]) -> None:
        super().__init__(utilities[0].horizon)
        self.weight = utilities[0].weight
        self._utilities = list(utilities)
        self._counts = torch.tensor(counts)

    def mean(self, leader: LinearLeader, contexts: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """See `MomentUtility.mean`."""
        assert isinstance(leader, ParallelLinearLeaders)
        ends = self._counts.cumsum(0)
        owner = torch.searchsorted(ends, contexts, right=True)
        total = mean.new_zeros(mean.shape[:2])
        for number, (member, utility) in enumerate(zip(leader.members(), self._utilities, strict=True)):
            (rows,) = (owner == number).nonzero(as_tuple=True)
            own = contexts[rows] - (ends[number] - self._counts[number])
            spread = covariance if len(covariance) == 1 else covariance[rows]
            total = total.index_add(0, rows, utility.mean(member, own, mean[rows], spread))
        return total


def parallel_linear(problems: Sequence[Problem]) -> Problem:
    """One problem whose value is the mean of the given ones' values; see `parallel`, which calls it.

    Raises:
        InputError: problems that cannot be put side by side: other objectives than `ExpectedUtility` of a
            `MomentUtility`, or horizons, discounts or temperatures that differ.
    """
    followers = [require_normal(problem.follower) for problem in problems]
    utilities = []
    for problem in problems:
        objective = problem.objective
        if not isinstance(objective, ExpectedUtility) or not isinstance(objective.utility_function, MomentUtility):
            raise InputError(
                f"problems: expected ExpectedUtility of a MomentUtility in each, got {type(objective).__name__}"
            )
        require_fixed_temperature(problem, "parallel")
        utilities.append(objective.utility_function)
    first = problems[0]
    for problem, follower, utility in zip(problems, followers, utilities, strict=True):
        same = {
            "objective.discount": problem.objective.discount == first.objective.discount,
            "follower.discount": torch.equal(*map(torch.as_tensor, (follower.discount, followers[0].discount))),
            "follower.temperature": torch.equal(
                *map(torch.as_tensor, (follower.temperature, followers[0].temperature))
            ),
            "horizon": torch.equal(utility.weight, utilities[0].weight),
        }
        for name, equal in same.items():
            if not equal:
                raise InputError(f"problems: expected one {name} in all linear problems, got several")
        if isinstance(follower.discount, Tensor) or isinstance(follower.temperature, Tensor):
            raise InputError("problems: expected one temperature and discount for all contexts of a linear problem")
    leader = ParallelLinearLeaders([require_linear(problem.leader) for problem in problems])
    objective = ExpectedUtility(
        ParallelUtility(utilities, [follower.contexts for follower in followers]),
        discount=first.objective.discount,
        depends_on_leader=any(
            problem.objective.depends_on_leader
            for problem in problems
            if isinstance(problem.objective, ExpectedUtility)
        ),
    )
    nature = torch.cat([follower.context_probabilities for follower in followers]) / len(problems)
    follower = LinearQuadraticFollower(
        nature, followers[0].temperature, followers[0].discount, horizon=followers[0].horizon
    )
    return Problem(leader, objective, follower)
