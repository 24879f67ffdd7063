"""The exact metric of tables: against finite differences of the best response, with everything moving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toy_cmdp
from align_cbrl import HPGD, HPGDConfig, Natural, Problem
from toy_cmdp.referee.exact import exact_world


def by_differences(problem: Problem, step: float = 1e-4) -> Tensor:
    """sum p d pi (d log pi)(d log pi)^T, d log pi by central differences."""
    follower: Any = problem.follower

    def log_policy() -> Tensor:
        return exact_world(problem).solution.log_policy

    world = exact_world(problem)
    with torch.no_grad():
        columns = []
        for parameter in problem.parameters:
            flat = parameter.view(-1)
            for i in range(flat.numel()):
                start = float(flat[i])
                sides = []
                for sign in (1, -1):
                    flat[i] = start + sign * step
                    sides.append(log_policy())
                flat[i] = start
                columns.append((sides[0] - sides[1]) / (2 * step))
        slope = torch.stack(columns).flatten(1)
        go_on = (~follower.cmdp.terminal)[..., None].double() * problem.objective.discount
        tables = world.tables.detach()
        law: Any = tables.transition
        mass = tables.initial.clone()
        total = torch.zeros_like(mass)
        for _ in range(400):
            total += mass
            moved = (go_on * mass[..., None] * world.policy)[..., None] * law
            mass = moved.sum((1, 2))
        weight = follower.cmdp.context_probabilities[:, None, None] * total[..., None] * world.policy
    return (slope * weight.flatten()) @ slope.T


def everything_moving(seed: int) -> Problem:
    return toy_cmdp.random_cmdp(seed=seed)


@pytest.mark.parametrize("make", [everything_moving, lambda seed: toy_cmdp.preferences(seed=seed)])
@pytest.mark.parametrize("seed", range(3))
def test_the_metric_is_that_of_the_best_response(make: Any, seed: int) -> None:
    problem = make(seed)
    with torch.no_grad():
        for parameter in problem.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).double()
    found, expected = toy_cmdp.exact_metric(problem), by_differences(problem)
    assert float(found.norm()) > 1e-3
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    assert not torch.allclose(1.01 * found, expected, rtol=1e-3)  # the test can fail


def test_natural_steps_climb_a_table_exactly() -> None:
    """Within a budget of steps in which Adam is still on its way."""
    values = {}
    for name in ("natural", "adam"):
        problem = toy_cmdp.random_cmdp(seed=1)
        config = HPGDConfig(steps=15, contexts_per_step=1, group_size=1, progress=False,
                            natural=Natural(nats=0.2, ridge=1e-6) if name == "natural" else None)  # fmt: skip
        adam = None if name == "natural" else torch.optim.Adam(problem.parameters, lr=0.05, maximize=True)
        start = toy_cmdp.leader_value(problem).item()
        HPGD(problem, adam, toy_cmdp.ImplicitHypergradient(), config).run()
        values[name] = toy_cmdp.leader_value(problem).item() - start
    assert values["natural"] > 1.2 * values["adam"] > 0
