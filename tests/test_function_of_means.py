"""Functions of means: against finite differences of the exact J, on tables and on samples; memory, and bad input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import enumerated_gradient, finite_differences, implicit_gradient, relative_error
from torch import Tensor

from align_cbrl import (
    Constrained,
    CrossFitted,
    CVaR,
    ExpectedUtility,
    FunctionOfMeans,
    InputError,
    KLPriced,
    Objective,
    PassAt,
    PolicyResponse,
    Problem,
    Rollouts,
    SetUtility,
)
from align_cbrl.objectives import f1, harmonic_mean, ratio, target_shares
from align_cbrl.problem import Evaluation
from toy_cmdp import TabularUtility, leader_value, preferences, random_cmdp
from toy_cmdp.referee.exact import ExactCritic, context_values, exact_world, expected_policy_response

H: dict[str, Callable[[Tensor], Tensor]] = {
    "target_shares": target_shares([0.5, 0.2, 0.3]),
    "f1": f1,
    "harmonic_mean": harmonic_mean,
    "ratio": ratio,
}


def column(name: str) -> ExpectedUtility:
    return ExpectedUtility(lambda leader, rollouts: rollouts.steps[name][:, None])


def on_table(table: Callable[[Any], Tensor], *, discount: float | None = None, moves: bool = False) -> ExpectedUtility:
    if discount is None:
        return ExpectedUtility(TabularUtility(table), depends_on_leader=moves)
    return ExpectedUtility(TabularUtility(table), discount, moves)


def means_of(name: str, score: TabularUtility) -> list[Objective]:
    """Utilities for which h makes sense, on the preference problem's six answers; those of `ratio` move with x."""
    answer = torch.arange(6)
    if name == "target_shares":
        return [on_table(lambda leader, i=i: (answer % 3 == i).double().expand(4, 1, 6)) for i in range(3)]
    if name == "f1":
        true, called = answer < 3, answer % 2 == 0
        return [on_table(lambda leader, c=c: c.double().expand(4, 1, 6)) for c in (true & called, called, true)]
    if name == "harmonic_mean":
        return [on_table(lambda leader: leader.score.exp()), SetUtility(PassAt(score), 3)]
    moving = on_table(lambda leader: 1 + (0.3 * leader.x[0] * leader.score) ** 2, moves=True)
    return [on_table(lambda leader: leader.score.exp()), moving]


def answers(name: str) -> Problem:
    """Four prompts, each with a follower of its own."""
    temperature = torch.tensor([0.7, 1.0, 1.5, 2.0], dtype=torch.float64)
    return preferences(
        objective=lambda score: FunctionOfMeans(H[name], means_of(name, score)), temperature=temperature, seed=3
    )


def of_paths(horizon: int | None = None) -> Problem:
    """A function of two discounted sums along paths of several steps; the first moves with x."""
    base = random_cmdp(seed=5, horizon=horizon)
    assert isinstance(base.objective, ExpectedUtility)
    inner = base.objective.utility_function.table
    positive = on_table(lambda leader: 3 + inner(leader), discount=base.objective.discount, moves=True)
    shape = base.leader.tables().reward.shape  # type: ignore[operator]
    fixed = 2 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = on_table(lambda leader: fixed, discount=base.objective.discount)
    return dataclasses.replace(base, objective=FunctionOfMeans(harmonic_mean, [positive, still]))


@pytest.mark.parametrize("name", [*H, "paths"])
def test_exact_gradients_are_those_of_finite_differences(name: str) -> None:
    problem = of_paths() if name == "paths" else answers(name)
    implicit = implicit_gradient(problem)
    assert relative_error(finite_differences(problem), implicit) <= 1e-6
    expected = torch.cat([g.reshape(-1) for g in expected_policy_response(problem)])
    assert relative_error(expected, implicit) <= 1e-9
    assert exact_world(problem).objective.item() == pytest.approx(leader_value(problem).item(), rel=1e-12)


@pytest.mark.parametrize("name", [*(name for name in H if name != "harmonic_mean"), "paths"])
def test_samples_that_hold_every_path_give_the_exact_gradient(name: str) -> None:
    """By the credit that the batch's means give, not by the referee's: the direct term, too."""

    class OwnCredit(ExactCritic):
        """Exact for a bandit, from the batch's own credit."""

        def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Any:
            exact = super().evaluate(problem, rollouts, credit)
            if rollouts.horizon > 1:
                return exact
            mass = torch.zeros(4, dtype=torch.float64).index_add(0, rollouts.contexts, rollouts.path_weight())
            mean = torch.zeros(4, dtype=torch.float64)
            mean = mean.index_add(0, rollouts.contexts, rollouts.path_weight() * credit[:, 0]) / mass
            return dataclasses.replace(exact, advantage=credit - mean[rollouts.contexts][:, None])

    problem, horizon = (of_paths(3), 3) if name == "paths" else (answers(name), 1)
    found = enumerated_gradient(problem, horizon, PolicyResponse(OwnCredit()))
    assert relative_error(found, implicit_gradient(problem)) <= 1e-9
    assert relative_error(found, finite_differences(problem)) <= 1e-6


def batch(first: list[float], second: list[float]) -> Rollouts:
    steps = {"a": torch.tensor(first, dtype=torch.float64), "b": torch.tensor(second, dtype=torch.float64)}
    return Rollouts.bandit(contexts=torch.arange(len(first)), steps=steps)


def evaluated(objective: Objective, rollouts: Rollouts) -> Evaluation:
    return objective.evaluate(None, rollouts)  # type: ignore[arg-type]  # nothing here asks for the leader


def test_slopes_are_taken_at_the_means_of_batch_and_memory() -> None:
    objective = FunctionOfMeans(ratio, [column("a"), column("b")], memory=5)
    early, late = batch([1.0, 3.0], [4.0, 4.0]), batch([6.0, 6.0, 6.0], [1.0, 2.0, 3.0])
    assert evaluated(objective, early).value.item() == 0.5
    objective.update(lambda: None)  # type: ignore[arg-type, return-value]
    both = evaluated(objective, late)
    a, b = (2 * 2 + 3 * 6) / 5, (2 * 4 + 3 * 2) / 5  # by the contexts of each
    assert both.value.item() == pytest.approx(a / b)
    wanted = [u / b - a / b**2 * v for u, v in zip([6.0] * 3, [1.0, 2.0, 3.0], strict=True)]
    assert both.credit[:, 0].tolist() == pytest.approx(wanted)

    resumed = FunctionOfMeans(ratio, [column("a"), column("b")], memory=5)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(evaluated(resumed, late).credit, both.credit)
    for _ in range(2):  # two batches of three contexts are more than five
        evaluated(objective, late)
        objective.update(lambda: None)  # type: ignore[arg-type, return-value]
    assert objective.state_dict()["contexts"] == [3]
    forgetful = FunctionOfMeans(ratio, [column("a"), column("b")])
    evaluated(forgetful, early)
    forgetful.update(lambda: None)  # type: ignore[arg-type, return-value]
    assert evaluated(forgetful, late).value.item() == 3.0


def test_a_memory_keeps_a_class_that_one_batch_lacks() -> None:
    objective = FunctionOfMeans(target_shares([0.25, 0.75]), [column("a"), column("b")], memory=8)
    evaluated(objective, batch([1.0, 0.0], [0.0, 1.0]))
    objective.update(lambda: None)  # type: ignore[arg-type, return-value]
    found = evaluated(objective, batch([0.0, 0.0], [1.0, 1.0]))
    assert found.value.item() == pytest.approx(0.0, abs=1e-12)
    assert found.credit[:, 0].tolist() == pytest.approx([1.0, 1.0])  # slopes 0.25 / 0.25 and 0.75 / 0.75


def test_a_price_is_not_inside_the_function() -> None:
    rollouts = dataclasses.replace(
        batch([1.0, 3.0], [4.0, 4.0]),
        log_policy=torch.tensor([[-0.5], [-1.0]]).double(),
        log_prior=torch.tensor([[-1.5], [-1.0]]).double(),
    )
    priced = KLPriced(FunctionOfMeans(ratio, [column("a"), column("b")]), price=0.1)
    leader = type("Still", (), {"log_prior": lambda self, rollouts: None, "parameters": lambda self: []})()
    found = priced.evaluate(leader, rollouts)
    assert found.value.item() == pytest.approx(0.5 - 0.1 * 0.5)
    assert found.credit[:, 0].tolist() == pytest.approx([1 / 4 - 2 / 16 * 4 - 0.1, 3 / 4 - 2 / 16 * 4])


RATIO = FunctionOfMeans(ratio, [column("a"), column("b")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: target_shares([0.3, 0.05]), r"expected shares that sum to one, got \[0.3, 0.05\] with sum 0.35"),
        (lambda: target_shares([1.2, -0.2]), r"shares\[1\]: expected a finite number >= 0, got -0.2"),
        (lambda: FunctionOfMeans(ratio, []), "FunctionOfMeans.utilities: expected at least one"),
        (lambda: FunctionOfMeans(ratio, [CVaR(column("a"), 0.5)]), r"utilities\[0\]: expected a mean over contexts"),
        (lambda: FunctionOfMeans(ratio, [RATIO, column("a")]), r"utilities\[0\]: .* got FunctionOfMeans"),
        (
            lambda: FunctionOfMeans(ratio, [column("a"), ExpectedUtility(column("a").utility_function, 0.5)]),
            r"expected one discount, got \[0.0, 0.5\]",
        ),
        (lambda: CVaR(RATIO, 0.5), "CVaR.objective: expected a mean over contexts, got FunctionOfMeans"),
        (lambda: CVaR(KLPriced(RATIO, 0.1), 0.5), "got KLPriced, .* or a function of means over all contexts"),
        (lambda: CrossFitted(RATIO), "CrossFitted.objective: expected a risk over contexts"),
        (lambda: Constrained(column("a"), RATIO, 0.0, 0.1), "Constrained.cost: expected a mean over contexts"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


OUTSIDE = torch.nn.Parameter(torch.tensor(2.0).double())


@pytest.mark.parametrize(
    ("h", "rows", "message"),
    [
        (target_shares([0.5, 0.5]), ([0.0, 0.0], [1.0, 1.0]), r"finite value and slope at the present means, got -inf"),
        (ratio, ([1.0, 1.0], [0.0, 0.0]), r"got inf and \[inf, -inf\] at \[1.0, 0.0\]; a class that"),
        (lambda m: m.sqrt().sum(), ([0.0, 0.0], [1.0, 1.0]), r"got 1 and \[inf, 0.5\]"),
        (target_shares([0.5, 0.5]), ([1.0, 1.0], [1.0, 0.0]), r"each completion is in one, got shares \[1.0, 0.5\]"),
        (f1, ([1.0, 1.0], [1.0, 0.0]), "f1: expected the means of 3 utilities, got 2"),
        (lambda m: m, ([1.0, 1.0], [1.0, 0.0]), "FunctionOfMeans.h: expected a scalar of 2 means"),
        (lambda m: OUTSIDE * m.sum(), ([1.0, 1.0], [1.0, 0.0]), "depends on parameters other than through the means"),
    ],
)
def test_bad_functions(h: Callable[[Tensor], Tensor], rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluated(FunctionOfMeans(h, [column("a"), column("b")]), batch(*rows))


def test_a_table_refuses_an_infinite_slope_and_a_value_in_a_context() -> None:
    nobody = [on_table(lambda leader, v=v: torch.full((4, 1, 6), v).double()) for v in (0.0, 1.0)]
    problem = preferences(objective=lambda score: FunctionOfMeans(target_shares([0.5, 0.5]), nobody))
    with pytest.raises(InputError, match="finite value and slope at the present means"):
        leader_value(problem)
    with pytest.raises(InputError, match="has no value in a single one"):
        context_values(answers("f1"))
    assert math.isfinite(leader_value(answers("f1")).item())
