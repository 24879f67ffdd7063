"""Objectives and the referee against their definitions; each test notices a fault that was put in by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import (
    Constrained,
    CrossFitted,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    Leader,
    MeanVariance,
    PreferenceData,
    PreferenceLikelihood,
    Problem,
    Regularised,
    Rollouts,
    WorstContext,
)
from align_cbrl.objectives import LogRatio, Utility
from align_cbrl.objectives.preferences import pair_likelihood
from align_cbrl.problem import Objective, Observed
from toy_cmdp import ContextualMDP, ExactFollower, Tables, TabularLeader, leader_value, preferences, random_cmdp
from toy_cmdp.estimators.plug_in import PlugIn, TransitionMemory
from toy_cmdp.followers.solve import soft_policy_iteration, soft_value_iteration
from toy_cmdp.referee.closed_forms import optimal_bonus
from toy_cmdp.referee.exact import context_values, exact_world, expected_policy_response
from toy_cmdp.validate import finite_differences, implicit_gradient

SCORE = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"])


def scored(scores: Sequence[float], contexts: Sequence[int], weight: Sequence[float] | None = None) -> Rollouts:
    """Paths of one step with a score each; weights have mean one within a context."""
    return Rollouts.bandit(
        contexts=torch.tensor(contexts),
        steps={"score": torch.tensor(scores, dtype=torch.float64)[:, None]},
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
    )


def slope(objective: Objective, rollouts: Rollouts) -> Tensor:
    """The derivative of the value with respect to every path's utility [B]: the direct term's weights."""
    observed = objective.observe(None, rollouts)  # type: ignore[arg-type]  # no observation here asks for the leader
    leaves = {o: value.detach().requires_grad_(True) for o, value in observed.values.items()}
    value = objective.summarize(Observed(leaves, rollouts)).value
    (found,) = torch.autograd.grad(value, list(leaves.values()))
    return found[:, 0]


def evaluated(objective: Objective, rollouts: Rollouts) -> float:
    return float(objective.evaluate(None, rollouts).value)  # type: ignore[arg-type]


# ---- a price that is never negative ----


def test_a_bound_that_does_not_bind_costs_nothing() -> None:
    """The multiplier stays at zero far below the bound, and falls to zero, not below, from above."""
    cost = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"] / 10)
    rollouts = scored([1.0, 3.0], [0, 0])
    for start in (0.0, 0.3):
        objective = Constrained(SCORE, cost, bound=5.0, rate=1.0, multiplier=start)
        for _ in range(3):
            found = objective.update(lambda: objective.observe(None, rollouts))  # type: ignore[arg-type]  # noqa: B023
        assert objective.multiplier == found["multiplier"] == 0
        assert evaluated(objective, rollouts) == 2.0


# ---- what is after the end of a path, and what weighs nothing ----


def test_what_is_said_after_the_end_of_a_path_does_not_count() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    table = torch.tensor([[1.0, 2.0, 4.0], [8.0, 100.0, 100.0]], dtype=torch.float64)
    rollouts = Rollouts(
        torch.zeros(2, dtype=torch.long), mask, torch.arange(6).view(2, 3), {"score": table},
        log_policy=-table / 8, log_prior=-table / 4,
    )  # fmt: skip
    objective = ExpectedUtility(SCORE.utility_function, discount=0.5)
    assert evaluated(objective, rollouts) == (1 + 1 + 1 + 8) / 2
    ratio = LogRatio().of(NoPrior(), rollouts)
    assert ratio.tolist() == [[0.125, 0.25, 0.5], [1.0, 0.0, 0.0]]


class NoPrior(Leader):
    def reward(self, rollouts: Rollouts) -> Tensor:
        raise AssertionError("not needed")


@pytest.mark.parametrize("aversion", [None, 0.0])
def test_values_are_weighted_means(aversion: float | None) -> None:
    objective: Objective = SCORE if aversion is None else MeanVariance(SCORE, aversion)
    rollouts = scored([1.0, 3.0, 2.0, 6.0], [0, 0, 1, 1], [0.5, 1.5, 2.0, 0.0])
    assert evaluated(objective, rollouts) == pytest.approx((0.5 * 1 + 1.5 * 3 + 2 * 2) / 4, rel=1e-12)
    torch.testing.assert_close(slope(objective, rollouts), rollouts.path_weight() / 4)


def test_only_what_does_not_move_lasts() -> None:
    """A replayed batch may keep a judge's scores, never a utility that depends on the leader."""
    still, moving = Utility(SCORE.utility_function), Utility(SCORE.utility_function, moves=True)
    values = {still: torch.zeros(1, 1), moving: torch.ones(1, 1)}
    assert list(Observed(values, scored([0.0], [0])).lasting) == [still]


# ---- cross-fitting ----


def test_the_direct_term_of_a_cross_fitted_mean_is_that_of_the_mean() -> None:
    """Without aversion the risk is the mean, whose slope is one: every path weighs its share."""
    weight = [0.5, 1.5, 0.5, 1.5, 2.0, 0.25, 0.75]
    rollouts = scored([1.0, 3.0, 2.0, 6.0, 0.0, 4.0, 5.0], [0, 0, 0, 0, 1, 1, 1], weight)
    torch.testing.assert_close(slope(CrossFitted(MeanVariance(SCORE, 0.0)), rollouts), rollouts.path_weight() / 7)


def test_a_remembered_context_counts_as_much_as_a_present_one() -> None:
    objective = CrossFitted(MeanVariance(SCORE, 0.0), memory=4)
    first = scored([float(c) for c in range(4) for _ in range(3)], [c for c in range(4) for _ in range(3)])
    assert evaluated(objective, first) == pytest.approx(1.5)
    objective.update(lambda: objective.observe(None, first))  # type: ignore[arg-type]
    later = scored([float(c) for c in (10, 20) for _ in range(3)], [c for c in (4, 5) for _ in range(3)])
    assert evaluated(objective, later) == pytest.approx((0 + 1 + 2 + 3 + 10 + 20) / 6)
    objective.update(lambda: objective.observe(None, later))  # type: ignore[arg-type]
    assert [value for _, value, _ in objective._past] == [2, 3, 10, 20]  # the oldest are forgotten


# ---- pairs ----


class Rewarded(Leader):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> Tensor:
        return self.scale * rollouts.steps["reward"][:, None]


def test_weighted_pairs_count_by_the_product_of_their_weights() -> None:
    """Two groups of different sizes; the mean over groups of the weighted mean over their pairs."""
    generator = torch.Generator().manual_seed(3)
    contexts = [0, 0, 0, 1, 1, 1, 1]
    weight = [1.5, 0.5, 1.0, 2.0, 0.5, 1.0, 0.5]
    score, reward = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    rollouts = dataclasses.replace(
        scored(score.tolist(), contexts, weight),
        steps={"score": score[:, None], "reward": reward},
    )
    objective = PreferenceLikelihood(SCORE.utility_function, scale=0.7)
    found = objective.evaluate(Rewarded(), rollouts)

    # The mean over paths of a group's utilities is the group's share of the paths, so groups count alike.
    groups, credits = [], [0.0] * 7
    for rows in ([0, 1, 2], [3, 4, 5, 6]):
        total = mass = 0.0
        for i in rows:
            of_i = against = 0.0
            for j in rows:
                if i != j:
                    preferred = torch.sigmoid((score[i] - score[j]) / 0.7)
                    likelihood = float(pair_likelihood(reward[i] - reward[j], preferred))
                    of_i, against = of_i + weight[j] * likelihood, against + weight[j]
            total, mass = total + weight[i] * of_i, mass + weight[i] * against
            credits[i] = 2 * (len(rows) - 1) / (len(rows) - 2) * of_i / against
        groups.append(total / mass)
    assert float(found.value.detach()) == pytest.approx(sum(groups) / 2, rel=1e-12)
    assert found.credit[:, 0].tolist() == pytest.approx(credits, rel=1e-12)


def test_a_judge_of_pairs_is_asked_once_about_each_and_believed_both_ways() -> None:
    """Six answers on a ring, four partners each: all but the one opposite; the second of a pair has the rest."""
    asked: list[tuple[int, int]] = []

    def preference(rollouts: Rollouts, first: Tensor, second: Tensor) -> Tensor:
        asked.extend(zip(first.tolist(), second.tolist(), strict=True))
        return torch.full((len(first),), 0.9, dtype=torch.float64)

    reward = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4, 2.0], dtype=torch.float64)
    rollouts = dataclasses.replace(scored([0.0] * 6, [0] * 6), steps={"reward": reward})
    objective = PreferenceLikelihood(preference=preference, partners=4)
    found = objective.evaluate(Rewarded(), rollouts)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6) if j - i != 3]
    assert sorted(asked) == pairs and len(pairs) == 6 * 4 / 2
    each = [float(pair_likelihood(reward[i] - reward[j], 0.9)) for i, j in pairs]
    assert float(found.value.detach()) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_pairs_under_a_policy_are_differentiated_in_both_of_their_answers() -> None:
    problem = preferences(seed=3, objective=PreferenceLikelihood)
    (found,) = expected_policy_response(problem)
    torch.testing.assert_close(found, implicit_gradient(problem).view_as(found), rtol=1e-8, atol=1e-11)


def test_labelled_pairs_count_by_their_weight() -> None:
    answers = [
        dataclasses.replace(scored([0.0], [0]), steps={"reward": torch.tensor([r]).double()}) for r in (2.0, 0.5)
    ]
    data = PreferenceData(answers[0], answers[1])
    rollouts = scored([1.0, 3.0], [0, 0])
    found = Regularised(SCORE, data, weight=0.25).evaluate(Rewarded(), rollouts)
    assert float(found.value.detach()) == pytest.approx(2 - 0.25 * math.log1p(math.exp(-1.5)), rel=1e-12)
    assert found.credit[:, 0].tolist() == [1.0, 3.0]  # pairs say nothing about the policy


class MovedPrior(NoPrior):
    def log_prior(self, rollouts: Rollouts) -> Tensor:
        return torch.full(rollouts.mask.shape, -3.0, dtype=torch.float64)


def test_the_log_ratio_is_to_the_prior_that_the_leader_has_moved() -> None:
    prior = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    rollouts = Rollouts.bandit(contexts=torch.zeros(2).long(), steps={}, log_policy=2 * prior, log_prior=prior)
    assert LogRatio().of(NoPrior(), rollouts)[:, 0].tolist() == [-1.0, -2.0]
    assert LogRatio().of(MovedPrior(), rollouts)[:, 0].tolist() == [1.0, -1.0]


# ---- contexts that nature never draws ----


RISKS = [MeanVariance, CVaR, EntropicRisk, WorstContext]


def risk(kind: Any, objective: Objective) -> Objective:
    return kind(objective, 0.0 if kind is WorstContext else 0.4)  # type: ignore[no-any-return]


class Cut(TabularLeader):
    """The tables of the first contexts alone."""

    def __init__(self, inner: TabularLeader, contexts: int) -> None:
        super().__init__()
        self.inner, self.contexts = inner, contexts

    def tables(self) -> Tables:
        found = self.inner.tables()
        assert isinstance(found.transition, Tensor) and found.log_prior is not None
        tables = (found.reward, found.transition, found.initial, found.log_prior)
        return Tables(*(table[: self.contexts] for table in tables))


@pytest.mark.parametrize("kind", [None, *RISKS])
def test_a_context_of_probability_zero_changes_nothing(kind: Any) -> None:
    """Three contexts, the last of them impossible and the worst by far, against the first two alone."""
    inner = random_cmdp(seed=2, contexts=3)
    law = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64)
    assert isinstance(inner.leader, TabularLeader) and isinstance(inner.objective, ExpectedUtility)
    found = []
    for contexts in (2, 3):
        leader = Cut(inner.leader, contexts)
        table = _utility_of(inner, contexts)
        objective: Objective = ExpectedUtility(table, inner.objective.discount, True)
        objective = objective if kind is None else risk(kind, objective)
        cmdp = ContextualMDP(law[:contexts], torch.zeros(contexts, 4, dtype=torch.bool))
        problem = Problem(leader, objective, ExactFollower(cmdp, 0.5, 0.9, leader_discount=0.8))
        world = exact_world(problem)
        assert torch.isfinite(world.utility).all() and torch.isfinite(world.advantage).all()
        response = torch.cat([g.reshape(-1) for g in expected_policy_response(problem, world)])
        found.append((leader_value(problem).detach(), implicit_gradient(problem), response))
    for two, three in zip(*found, strict=True):
        assert torch.isfinite(three).all()
        torch.testing.assert_close(three, two, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[1][2], rtol=1e-8, atol=1e-11)


def _utility_of(inner: Problem, contexts: int) -> Any:
    function = inner.objective.utility_function  # type: ignore[attr-defined]

    def table(leader: TabularLeader) -> Tensor:
        assert isinstance(leader, Cut)
        utility: Tensor = function.table(leader.inner)[:contexts]
        return torch.cat([utility[:2], utility[2:] - 50])

    return type(function)(table)


def test_what_a_risk_is_taken_of_has_no_part_of_the_terms_beside_it() -> None:
    """Contexts are worth what all terms of a mean add up to; of a risk, what it is taken of."""
    plain = random_cmdp(seed=4, contexts=3)
    worth = context_values(plain)

    def of(objective: Objective) -> Tensor:
        return context_values(dataclasses.replace(plain, objective=objective))

    cost: dict[str, Any] = {"cost": plain.objective, "bound": 1.0, "rate": 1.0, "multiplier": 0.25}
    torch.testing.assert_close(of(Constrained(plain.objective, **cost)), 0.75 * worth)
    for kind in RISKS:
        torch.testing.assert_close(of(Constrained(risk(kind, plain.objective), **cost)), worth)
        torch.testing.assert_close(of(risk(kind, Constrained(plain.objective, **cost))), 0.75 * worth)


# ---- the plug-in: nature over the contexts that were drawn, and starts that are not known ----


class OnlyRewards(TabularLeader):
    """Another leader's tables, of which only the reward moves."""

    def __init__(self, inner: TabularLeader) -> None:
        super().__init__()
        self.inner, self.fixed = inner, inner.tables().detach()

    def tables(self) -> Tables:
        return dataclasses.replace(self.fixed, reward=self.inner.tables().reward)


def only_rewards(seed: int, contexts: int, law: Tensor | None = None) -> tuple[Problem, TransitionMemory]:
    """The problem, and a memory in which its transitions are known."""
    inner = random_cmdp(seed=seed, contexts=contexts)
    assert isinstance(inner.leader, TabularLeader) and isinstance(inner.follower, ExactFollower)
    leader = OnlyRewards(inner.leader)
    function = inner.objective.utility_function  # type: ignore[attr-defined]
    utility = type(function)(lambda leader: function.table(leader.inner))
    cmdp = inner.follower.cmdp
    cmdp = cmdp if law is None else ContextualMDP(law, cmdp.terminal)
    follower = ExactFollower(cmdp, 0.5, 0.9, leader_discount=0.8)
    memory = TransitionMemory()
    transition = leader.fixed.transition
    assert isinstance(transition, Tensor)
    memory.counts = 1e12 * transition
    return Problem(leader, ExpectedUtility(utility, inner.objective.discount, True), follower), memory


def drawn(problem: Problem, contexts: Tensor, seed: int) -> Rollouts:
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(seed))


def test_nature_is_the_law_of_the_contexts_that_were_drawn() -> None:
    """Of three contexts the batch lacks the last: the estimate is that of a nature that cannot draw it."""
    found = []
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    for nature in (law, torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)):
        problem, memory = only_rewards(3, 3, nature)
        cmdp = problem.follower.cmdp  # type: ignore[attr-defined]
        rollouts = drawn(problem, torch.arange(2).repeat(40), 0)
        metrics = PlugIn(cmdp, memory=memory).backward(problem, rollouts)
        found.append((metrics["objective"], problem.parameters[0].grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-11)


def test_starts_that_are_not_known_widen_the_interval() -> None:
    """Transitions known, starts drawn: the standard error is the deviation of the estimate over batches."""
    problem, memory = only_rewards(5, 1)
    estimator = PlugIn(problem.follower.cmdp, memory=memory)  # type: ignore[attr-defined]
    direction = torch.tensor([[1.0, -1.0, 0.5, 0.0, 2.0]], dtype=torch.float64)
    contexts = torch.zeros(60, dtype=torch.long)
    found = [estimator.project(problem, drawn(problem, contexts, seed), direction) for seed in range(150)]
    estimates = torch.cat([projection.estimate for projection in found])
    errors = torch.cat([projection.standard_error for projection in found])
    assert torch.isfinite(errors).all()
    assert float(errors.mean() / estimates.std()) == pytest.approx(1, abs=0.25)  # 150 deviations: 6 %


# ---- solvers and closed forms ----


def test_value_iteration_stops_by_the_error_and_not_by_the_residual() -> None:
    """At a discount of .99 the error is up to 99 times the residual."""
    problem = random_cmdp(seed=0)
    cmdp, tables = problem.follower.cmdp, problem.leader.tables()  # type: ignore[attr-defined, operator]
    for tolerance in (1e-3, 1e-6):
        rough = soft_value_iteration(cmdp, tables, temperature=0.5, discount=0.99, tolerance=tolerance)
        exact = soft_policy_iteration(cmdp, tables, temperature=0.5, discount=0.99)
        scale = float(exact.q.abs().max()) + 0.5
        assert float((rough.value - exact.value).abs().max()) <= tolerance * scale


def test_followers_of_whom_one_alone_shares_the_leaders_discount() -> None:
    inner = random_cmdp(seed=6, leader_discount=0.8)
    cmdp = inner.follower.cmdp  # type: ignore[attr-defined]
    discount = torch.tensor([0.8, 0.5], dtype=torch.float64)
    follower = ExactFollower(cmdp, 0.5, discount, leader_discount=0.8)
    problem = Problem(inner.leader, inner.objective, follower)
    exact, differences = implicit_gradient(problem), finite_differences(problem)
    assert float((exact - differences).norm() / differences.norm()) < 1e-6


@pytest.mark.parametrize("success", [(0.0, 0.9), (0.1, 0.9), (0.5, 0.6), (0.3, 0.8)])
@pytest.mark.parametrize("cost", [0.0, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5])
def test_the_best_bonus_over_a_grid(success: tuple[float, float], cost: float, temperature: float) -> None:
    """No bonus at all may be better than the local maximum beyond, and the bisection must not start below it."""
    low, high = success
    bonus, profit = optimal_bonus(success, cost, temperature=temperature)
    grid = torch.linspace(0, 2, 40_001, dtype=torch.float64)
    effort = torch.sigmoid((grid * (high - low) - cost) / temperature)
    profits = (low + (high - low) * effort) * (1 - grid)
    assert profit == pytest.approx(float(profits.max()), abs=1e-7)
    assert bonus == pytest.approx(float(grid[profits.argmax()]), abs=1e-3) or math.isclose(
        float(profits[(grid - bonus).abs().argmin()]), float(profits.max()), abs_tol=1e-7
    )


# ---- a cost that is more than a mean of its utility ----


def test_the_lagrangian_of_a_cost_with_a_constant_and_a_credit_of_its_own() -> None:
    """J_u - mu (J_c - bound), where J_c is itself a Lagrangian, or made of pairs."""
    rollouts = dataclasses.replace(
        scored([1.0, 3.0, 2.0, 6.0], [0, 0, 0, 0]),
        steps={
            "score": torch.tensor([[1.0], [3.0], [2.0], [6.0]], dtype=torch.float64),
            "reward": torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64),
        },
    )
    inner = Constrained(SCORE, SCORE, bound=7.0, rate=1.0, multiplier=0.5)
    pairs = PreferenceLikelihood(SCORE.utility_function, scale=2.0)
    for cost in (inner, pairs):
        objective = Constrained(SCORE, cost, bound=0.4, rate=1.0, multiplier=0.25)
        found, of_cost, plain = (o.evaluate(Rewarded(), rollouts) for o in (objective, cost, SCORE))
        value, of_u, of_c = (float(part.value.detach()) for part in (found, plain, of_cost))
        assert value == pytest.approx(of_u - 0.25 * (of_c - 0.4), rel=1e-12)
        torch.testing.assert_close(found.credit, plain.credit - 0.25 * of_cost.credit)
    assert not torch.allclose(of_cost.credit, of_cost.credit.mean())
