"""Gridworlds: every exact gradient route, dense tables, sampled gradients, and bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from oracles import assert_close, assert_unbiased, finite_differences, implicit_gradient

from align_cbrl import ExpectedUtility, InputError, PolicyResponse, Problem
from toy_cmdp import ExactCritic, ExactFollower, expected_policy_response, leader_value
from toy_cmdp.problems.gridworld import GridworldLeader, gridworld
from toy_cmdp.tables import sparse
from toy_cmdp.tables.cmdp import Tables, TabularLeader, TabularUtility

_SMALL: dict[str, dict[str, Any]] = {
    "default": {"height": 5, "width": 6},
    "cold": {"height": 6, "width": 5, "temperature": 0.002, "start": (0, 0)},
    "three_contexts": {
        "height": 4,
        "width": 7,
        "goals": [[(0, 0)], [(3, 6)], [(1, 1), (2, 2)]],
        "walls": 0.3,
        "slip": 0.5,
    },
}


def _spread(**options: Any) -> Problem:
    """At weights N(0, 1), where every cell's incentive is worth something."""
    problem = gridworld(**options)
    with torch.no_grad():
        problem.parameters[0].mul_(100)
    return problem


@pytest.mark.parametrize("name", _SMALL)
@pytest.mark.parametrize("iterative", [False, True])
def test_exact_gradients_agree(name: str, iterative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if iterative:
        monkeypatch.setattr(sparse, "_DIRECT_STATES", 0)
    problem = _spread(**_SMALL[name])
    referee = implicit_gradient(problem)
    assert_close(finite_differences(problem), referee, 1e-6)
    assert_close(torch.cat([g.flatten() for g in expected_policy_response(problem)]), referee, 1e-9)


class _Dense(TabularLeader):
    """The same world through dense tables."""

    def __init__(self, inner: GridworldLeader) -> None:
        super().__init__()
        self.inner = inner

    def tables(self) -> Tables:
        tables = self.inner.tables()
        assert isinstance(tables.transition, sparse.SparseTransition)
        return dataclasses.replace(tables, transition=tables.transition.to_dense())


def test_dense_tables_agree() -> None:
    problem = _spread(height=6, width=6)
    leader, follower = problem.leader, problem.follower
    assert isinstance(leader, GridworldLeader) and isinstance(follower, ExactFollower)
    dense = Problem(
        _Dense(leader),
        ExpectedUtility(
            TabularUtility(lambda _: leader.utility()), discount=problem.objective.discount, depends_on_leader=True
        ),
        ExactFollower(follower.cmdp, follower.temperature, follower.discount),
    )
    torch.testing.assert_close(leader_value(problem), leader_value(dense), rtol=1e-12, atol=0)
    assert_close(implicit_gradient(problem), implicit_gradient(dense), 1e-11)


def test_sampled_gradients_are_unbiased() -> None:
    problem = _spread(height=4, width=4, goals=[[(0, 3)], [(3, 3)]], targets=[(2, 1)], start=(0, 0), temperature=0.05)
    assert_unbiased(problem, PolicyResponse(ExactCritic()), repetitions=20, paths=256)


def test_moves() -> None:
    problem = gridworld(2, 2, goals=[[(1, 1)]], targets=[(0, 1)], start=(0, 0), walls=0.0, slip=0.3)
    leader = problem.leader
    assert isinstance(leader, GridworldLeader)
    tables = leader.tables()
    assert isinstance(tables.transition, sparse.SparseTransition)
    dense = tables.transition.to_dense()[0]  # [S, A, S]
    # In the corner (0, 0), up, right, down and left end in it, (0, 1), (1, 0) and it.
    torch.testing.assert_close(dense[0, 0], torch.tensor([0.8, 0.1, 0.1, 0.0], dtype=torch.float64))
    torch.testing.assert_close(dense[0, 1], torch.tensor([0.2, 0.7, 0.1, 0.0], dtype=torch.float64))
    torch.testing.assert_close(dense[0, 2], torch.tensor([0.2, 0.1, 0.7, 0.0], dtype=torch.float64))
    torch.testing.assert_close(tables.reward[0, 3], torch.ones(4, dtype=torch.float64))
    incentive = 0.02 * torch.tanh(leader.weights)
    torch.testing.assert_close(tables.reward[0, :3, 0], incentive[:3])
    upkeep = 0.05 * torch.tanh(leader.weights) ** 2
    torch.testing.assert_close(
        leader.utility()[0, :, 0], torch.stack([-upkeep[0], 1 - upkeep[1], -upkeep[2], 0 * upkeep[3]])
    )
    assert tables.initial.tolist() == [[1, 0, 0, 0]]


def test_random_maps() -> None:
    problem, again, other = gridworld(30, 41, seed=1), gridworld(30, 41, seed=1), gridworld(30, 41, seed=2)
    leader = problem.leader
    assert isinstance(leader, GridworldLeader)
    assert torch.equal(leader.cells, again.leader.get_buffer("cells"))
    assert not torch.equal(leader.cells, other.leader.get_buffer("cells"))
    assert 0.85 < len(leader.cells) / (30 * 41) < 0.95
    assert leader.goal.sum(1).tolist() == [3, 3] and leader.target.sum() == 3
    leader.load_state_dict({name: value.clone() for name, value in leader.state_dict().items()})
    assert isinstance(problem.follower, ExactFollower)
    log_policy = problem.follower.solve(leader)[1].log_policy
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    assert 0.3 < entropy / math.log(4) < 0.9  # neither uniform nor deterministic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height: expected a whole number >= 1, got 0"),
        ({"height": 1, "width": 1}, "expected at least two cells"),
        ({"goals": []}, "goals: expected the goals of at least one context"),
        ({"goals": [[(0, 0)], []]}, "goals of context 1: expected at least one cell"),
        ({"goals": [[(0, 20)]]}, r"goals of context 0: expected cells of a 20 x 20 map, got \(0, 20\)"),
        ({"targets": []}, "targets: expected at least one cell"),
        ({"targets": [(-1, 0)]}, r"targets: expected cells of a 20 x 20 map, got \(-1, 0\)"),
        ({"start": (20, 0)}, r"start: expected cells of a 20 x 20 map, got \(20, 0\)"),
        ({"walls": 1.0}, "walls: expected a finite number >= 0 and < 1, got 1.0"),
        ({"walls": float("nan")}, "walls: expected a finite number >= 0 and < 1, got nan"),
        ({"slip": 1.1}, "slip: expected a finite number >= 0 and <= 1, got 1.1"),
        ({"limit": -1.0}, "limit: expected a finite number >= 0, got -1.0"),
        ({"price": float("inf")}, "price: expected a finite number"),
        ({"temperature": 0.0}, "temperature"),
        ({"discount": 1.0}, "discount"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gridworld(**options)
