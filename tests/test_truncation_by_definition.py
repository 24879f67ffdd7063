"""Truncated, finite-difference and searching estimators on functions that can be computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import ExpectedUtility, Halving, Leader, Problem, Rollouts, ZerothOrder, successive_halving
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.search import Climb, scatter
from align_cbrl.estimators.truncated import IterativeFollower, gradients_after


class Powers(Leader):
    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> Tensor:
        raise AssertionError("not needed")


class Counting(IterativeFollower):
    """Its state is the number of its iterations, counted in place; paths tell what they were drawn by."""

    def __init__(self) -> None:
        self.temperature, self.discount, self.taken = 1.0, 0.0, torch.zeros(1)

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("not needed")

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        raise AssertionError("not needed")

    def reset(self) -> None:
        self.taken.zero_()

    def iterate(
        self, leader: Leader, contexts: Tensor, iterations: int, generator: torch.Generator
    ) -> dict[str, float]:
        self.taken += iterations
        torch.rand(iterations, generator=generator)
        return {}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        steps = {"drawn": torch.randint(2**40, (len(contexts),), generator=generator), "taken": self.taken.clone()}
        return Rollouts.bandit(contexts=contexts, steps={name: value.expand(1) for name, value in steps.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"].clone()


class Noting(Hypergradient):
    """The number of iterations as the gradient, and what the paths were drawn by."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        assert problem.parameters[0].grad is None
        self.drawn.append(int(rollouts.steps["drawn"][0]))
        problem.parameters[0].grad = float(rollouts.steps["taken"][0]) * torch.ones(2, dtype=torch.float64)
        return {"objective": 0.0}


def counting() -> Problem:
    return Problem(Powers(), ExpectedUtility(lambda leader, rollouts: torch.zeros(1, 1)), Counting())


def test_one_training_is_stopped_on_its_way_and_everything_put_back() -> None:
    problem, estimator = counting(), Noting()
    (x,) = problem.parameters
    x.grad = torch.tensor([7.0, 8.0], dtype=torch.float64)
    levels = gradients_after([2, 8, 16], estimator, problem, torch.zeros(1).long(), torch.Generator().manual_seed(0))
    assert [gradients[0].tolist() for gradients, _ in levels] == [[2.0, 2.0], [8.0, 8.0], [16.0, 16.0]]
    assert len(set(estimator.drawn)) == 1  # the paths share their random numbers
    assert problem.follower.taken.item() == 0  # type: ignore[attr-defined]
    assert x.grad.tolist() == [7.0, 8.0]


@pytest.mark.parametrize("two_sided", [True, False])
def test_differences_of_a_plane_are_its_slope_along_the_directions(two_sided: bool) -> None:
    """Of a linear J, sum_k (g . d_k) d_k / K: averaged over many directions, g."""
    problem = counting()
    slope = torch.tensor([3.0, -0.5], dtype=torch.float64)

    def plane(problem: Problem) -> Tensor:
        return (slope * problem.parameters[0]).sum()

    rollouts = Rollouts.bandit(contexts=torch.zeros(1).long(), steps={})
    for radius in (0.1, 2.0):
        problem.leader.zero_grad()
        estimator = ZerothOrder(radius, directions=500, two_sided=two_sided, value=plane)
        metrics = estimator.backward(problem, rollouts)
        (x,) = problem.parameters
        assert x.grad is not None
        torch.testing.assert_close(x.grad, slope, rtol=0, atol=0.7)  # deviation: |g| sqrt(2 / 500) = 0.19
        if not two_sided:
            assert metrics["objective"] == pytest.approx(4.0)
        assert x.tolist() == [1.0, -2.0]


class Named(Climb):
    """Leaders with a value each; notes how many steps they take at once."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.blocks = torch.tensor(values), [(0, 0)][:0]

    def advance(self, steps: int) -> Tensor:
        self.blocks.append((steps, len(self.values)))
        return self.values

    def keep(self, chosen: Tensor) -> None:
        self.values = self.values[chosen]


def test_values_are_shown_every_so_many_steps_and_at_every_cut() -> None:
    """And every leader's steps are counted, also where a cut would keep more than there are."""
    halving = Halving(steps=25, cuts=((7, 4), (12, 3), (20, 2)))
    for values, winner in (([0.3, 0.9, 0.1], 1), ([0.3, 0.2, 0.9, 0.5, 0.8], 2)):
        climb, seen = Named(values), [0][:0]
        shown: dict[str, Any] = {"every": 5, "on_values": lambda at, _: seen.append(at)}  # noqa: B023
        assert successive_halving(climb, len(values), halving, **shown) == winner
        assert seen == [5, 7, 10, 12, 15, 20, 25]
        assert sum(steps * leaders for steps, leaders in climb.blocks) == halving.cost(len(values))


def test_every_start_of_every_search_is_another() -> None:
    found = []
    for seed, start in ((0, 0), (0, 1), (1, 0), (1, 1)):
        problem = counting()
        scatter(problem, 2.0, seed=seed, start=start)
        found.append(tuple(problem.parameters[0].tolist()))
    assert len(set(found)) == 4
