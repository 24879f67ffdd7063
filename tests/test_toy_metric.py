"""Metrics of tables: the exact one against finite differences of the best response, and those of estimators with a
model against the exact one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy_cmdp
from align_cbrl import (
    HPGD,
    ExpectedUtility,
    FittedCritic,
    HPGDConfig,
    InputError,
    Natural,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.metric import MatrixMetric
from toy_cmdp import ExactFollower, PlugIn, Tables, TabularLeader, TabularUtility, exact_metric
from toy_cmdp.estimators.observed_policy import ObservedPolicyResponse
from toy_cmdp.estimators.plug_in import TransitionMemory
from toy_cmdp.followers.iterative import SoftValueIteration
from toy_cmdp.problems.discrete_toy import discrete_toy
from toy_cmdp.problems.random_cmdp import RandomLeader
from toy_cmdp.problems.tax_design import tax_design
from toy_cmdp.referee.exact import exact_world
from toy_cmdp.referee.frozen_policy import PresentPolicyResponse
from toy_cmdp.tables.sparse import SparseTransition


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
        law = law.to_dense() if isinstance(law, SparseTransition) else law
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


class HeatedLeader(RandomLeader):
    """Sets the temperature by a parameter of its own, and by x, which moves everything else as well."""

    log_beta: nn.Parameter

    def follower_temperature(self) -> Tensor:
        return torch.exp(self.log_beta + 0.3 * torch.tanh(self.x[0]))


def heated(seed: int) -> Problem:
    problem = everything_moving(seed)
    problem.leader.__class__ = HeatedLeader
    problem.leader.log_beta = nn.Parameter(torch.tensor(-0.9, dtype=torch.float64))
    return problem


def two_followers(seed: int) -> Problem:
    problem = everything_moving(seed)
    temperature, discount = torch.tensor([0.4, 0.9]).double(), torch.tensor([0.9, 0.7]).double()
    follower: Any = problem.follower
    return dataclasses.replace(problem, follower=ExactFollower(follower.cmdp, temperature, discount))


@pytest.mark.parametrize(
    "make",
    [
        everything_moving,
        two_followers,
        lambda seed: toy_cmdp.preferences(seed=seed),
        heated,  # lambda moves, too
        lambda seed: tax_design(grid=21, temperature=0.1 * (1 + seed)),  # a law along a line
        lambda seed: discrete_toy(horizon=3, temperature=0.5, discount=0.8, seed=seed),  # a sparse law, which moves
    ],
    ids=["everything", "two followers", "preferences", "temperature", "line", "sparse"],
)
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


# Estimators with a model


class FrozenLaw(TabularLeader):
    """A random leader's reward; P and the prior stay as they are, and P is unknown to an estimator. One first state."""

    def __init__(self, inner: TabularLeader) -> None:
        super().__init__()
        fixed = inner.tables().detach()
        first = torch.zeros_like(fixed.initial)
        first[:, 0] = 1
        self.inner, self.fixed = inner, dataclasses.replace(fixed, initial=first)

    def tables(self) -> Tables:
        return dataclasses.replace(self.fixed, reward=self.inner.tables().reward)


def unknown_law(seed: int) -> Problem:
    problem = toy_cmdp.random_cmdp(seed=seed)
    leader: Any = problem.leader
    objective: Any = problem.objective
    utility = TabularUtility(lambda outer: leader.utility())
    return Problem(FrozenLaw(leader), ExpectedUtility(utility, objective.discount, True), problem.follower)


def paths(problem: Problem, count: int, seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    contexts = problem.follower.sample_contexts(count, generator)
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, generator)


def plug_in(problem: Problem, **settings: Any) -> PlugIn:
    follower: Any = problem.follower
    return PlugIn(follower.cmdp, **settings)


def matrix(estimator: Hypergradient, problem: Problem, rollouts: Rollouts) -> torch.Tensor:
    """The metric that an estimator with a model forms, of the policy that the paths were sampled from."""
    metric = estimator.metric(problem, rollouts)
    assert isinstance(metric, MatrixMetric) and metric.sampled is None
    return metric.matrix


@pytest.mark.parametrize("make", [everything_moving, two_followers])
@pytest.mark.parametrize("seed", range(3))
def test_the_plug_in_s_metric_is_exact_where_the_leader_knows_the_law(make: Any, seed: int) -> None:
    """Against differences of the best response; with lambda or the leader's discount 5 % off it is another matrix."""
    problem = make(seed)
    rollouts = paths(problem, 50)
    expected = by_differences(problem)
    found = matrix(plug_in(problem, damping=0.5, shrinkage=1.0), problem, rollouts)
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())
    follower: Any = problem.follower
    hotter = ExactFollower(follower.cmdp, 1.05 * torch.as_tensor(follower.temperature), follower.discount)
    objective: Any = problem.objective
    nearer = dataclasses.replace(objective, discount=0.95 * objective.discount)
    for other in (dataclasses.replace(problem, follower=hotter), dataclasses.replace(problem, objective=nearer)):
        assert float((exact_metric(other) - expected).norm()) > 0.02 * float(expected.norm())


def test_the_plug_in_s_metric_is_exact_with_endless_data() -> None:
    problem = unknown_law(3)
    memory = TransitionMemory()
    memory.counts = 1e12 * problem.leader.tables().transition  # type: ignore[attr-defined]
    found = matrix(plug_in(problem, memory=memory), problem, paths(problem, 50))
    expected = exact_metric(problem)
    assert float((found - expected).norm()) < 1e-9 * float(expected.norm())


def test_the_plug_in_s_metric_converges() -> None:
    """Errors halve where paths quadruple; mean of 16 batches, and far from a metric with lambda 5 % off."""
    problem = unknown_law(2)
    expected = exact_metric(problem)
    whiten = torch.linalg.inv(torch.linalg.cholesky(expected))
    errors, bias = [], []
    for count in (25, 100, 400):
        ratios = []
        for seed in range(16):
            found = matrix(plug_in(problem), problem, paths(problem, count, seed))
            ratios.append(whiten @ found @ whiten.T - torch.eye(len(expected)).double())
        errors.append(float(torch.stack(ratios).pow(2).sum((1, 2)).mean().sqrt()))
        traces = torch.stack([r.diagonal().mean() for r in ratios])
        bias.append((float(traces.mean()), float(traces.std()) / math.sqrt(len(traces))))
    print([(f"{e:.3f}", f"{b:.4f} +- {s:.4f}") for e, (b, s) in zip(errors, bias, strict=True)])
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]
    mean, error = bias[-1]
    assert abs(mean) < 3.5 * error + 0.01
    assert error < 0.01
    assert abs((1 + mean) / 1.05**2 - 1) > 5 * error + 0.01  # the test can fail


def test_the_metric_of_a_batch_that_is_remembered_counts_it_once() -> None:
    problem = unknown_law(1)
    estimator, rollouts = plug_in(problem), paths(problem, 20)
    estimator.backward(problem, paths(problem, 20, seed=1))
    before = matrix(estimator, problem, rollouts)
    estimator.backward(problem, rollouts)
    assert torch.equal(matrix(estimator, problem, rollouts), before)
    assert not torch.allclose(matrix(plug_in(problem), problem, rollouts), before)  # the earlier batch counts


def test_metrics_at_a_policy_that_is_seen_or_known() -> None:
    problem = toy_cmdp.random_cmdp(seed=0)
    follower: Any = problem.follower
    expected = exact_metric(problem)
    observed = ObservedPolicyResponse(follower.cmdp, torch.arange(4.0))
    assert torch.allclose(matrix(observed, problem, paths(problem, 50)), expected, rtol=1e-9)
    iterative = SoftValueIteration(follower.cmdp, follower.temperature, follower.discount, iterations=300)
    trained = dataclasses.replace(problem, follower=iterative)
    contexts = torch.tensor([0, 1])
    iterative.respond(trained.leader, contexts)
    rollouts = iterative.rollout(contexts, 1, torch.Generator().manual_seed(0))
    nature = torch.tensor([0.5, 0.5]).double()
    even = dataclasses.replace(follower.cmdp, context_probabilities=nature)
    expected = exact_metric(
        dataclasses.replace(problem, follower=ExactFollower(even, follower.temperature, follower.discount))
    )
    assert torch.allclose(matrix(PresentPolicyResponse(), trained, rollouts), expected, rtol=1e-9)


def test_a_critic_alone_gives_no_metric_of_paths() -> None:
    problem = toy_cmdp.random_cmdp(seed=0)
    follower: Any = problem.follower
    with pytest.raises(InputError, match=r"natural steps: expected rollouts of one step.*PlugIn"):
        PolicyResponse(FittedCritic(follower.cmdp.cell)).metric(problem, paths(problem, 8))


def test_natural_steps_climb_from_samples() -> None:
    """20 paths a step, of an unknown law: at least half of what exact natural steps gain."""
    gains = []
    estimators: list[Any] = [plug_in, lambda problem: toy_cmdp.ImplicitHypergradient()]
    for estimator in estimators:
        problem = unknown_law(1)
        config = HPGDConfig(steps=15, contexts_per_step=20, group_size=1, progress=False, natural=Natural(nats=0.1))
        start = toy_cmdp.leader_value(problem).item()
        HPGD(problem, None, estimator(problem), config).run()
        gains.append(toy_cmdp.leader_value(problem).item() - start)
    assert gains[0] > 0.5 * gains[1] > 0
