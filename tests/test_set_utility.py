"""Objectives of sets: the credit's exact expectation over all groups that can be drawn, closed forms, and bad input.

J and its derivative are computed from first principles, by a loop over all k-tuples of answers and finite differences.
Expectations are exact: a batch holds every group that can be drawn, as a decision point of its own whose paths are
weighted by the probability of the group.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import (
    HPGD,
    BestOf,
    CrossFitted,
    Distinct,
    Follower,
    HPGDConfig,
    InputError,
    Leader,
    MeanVariance,
    Objective,
    PassAt,
    PolicyResponse,
    PreferenceLikelihood,
    Problem,
    Rollouts,
    SetFunction,
    SetUtility,
)
from align_cbrl.objectives.set_scores import SetScore, subsets_of
from align_cbrl.problem import Observed, Term
from toy_cmdp import TabularUtility, leader_value, preferences
from toy_cmdp.referee.exact import expected_policy_response
from toy_cmdp.validate import finite_differences, implicit_gradient

ANSWERS, TEMPERATURE = 3, 0.7
FEATURES = torch.tensor([[0.3, -1.0], [1.1, 0.4], [-0.6, 0.9]], dtype=torch.float64)  # of the answers
SCORE = torch.tensor([0.2, 0.9, -0.4], dtype=torch.float64)
KIND = torch.tensor([7, 3, 7])
START = torch.tensor([0.5, -0.3], dtype=torch.float64)


def of_answer(table: Tensor) -> Callable[[Any, Rollouts], Tensor]:
    return lambda leader, rollouts: table[rollouts.steps["answer"]][:, None]


def said(rollouts: Rollouts, sets: Tensor) -> Tensor:
    """A judge of sets: the product of the scores, from a look at the answers themselves."""
    return SCORE[rollouts.steps["answer"]][sets].prod(-1)


def spread(scores: Tensor) -> Tensor:
    return scores.amax(-1) * scores.amin(-1) + scores.sum(-1) ** 2


def good_kinds(answers: Sequence[int]) -> float:
    return float(len({int(KIND[a]) for a in answers if SCORE[a] >= 0}))


# What the library is told, and the score of a tuple of answers by its definition.
SCORES: dict[str, tuple[Any, Callable[[Sequence[int]], float]]] = {
    "pass": (PassAt(of_answer(SCORE), least=0.1), lambda y: float(any(SCORE[a] >= 0.1 for a in y))),
    "best": (BestOf(of_answer(SCORE)), lambda y: max(float(SCORE[a]) for a in y)),
    "distinct": (Distinct(of_answer(KIND)), lambda y: float(len({int(KIND[a]) for a in y}))),
    "distinct good": (Distinct(of_answer(KIND), of_answer(SCORE), least=0.0), good_kinds),
    "function": (SetFunction(spread, of_answer(SCORE)), lambda y: float(spread(SCORE[list(y)]))),
    "judge of sets": (said, lambda y: float(SCORE[list(y)].prod())),
}


class Rewards(Leader):
    """Two parameters, three answers."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(x.clone())

    def reward(self, rollouts: Rollouts) -> Tensor:
        return (FEATURES @ self.x)[rollouts.steps["answer"]][:, None]


def policy_at(x: Tensor) -> Tensor:
    return torch.softmax(FEATURES @ x / TEMPERATURE, -1)


def exact(g: Callable[[Sequence[int]], float], size: int, x: Tensor) -> float:
    """E g(Y_1, ..., Y_k), tuple by tuple."""
    policy = policy_at(x).tolist()
    tuples = itertools.product(range(ANSWERS), repeat=size)
    return sum(math.prod(policy[a] for a in y) * g(y) for y in tuples)


def slope(value: Callable[[Tensor], float], x: Tensor, step: float = 1e-5) -> Tensor:
    found = []
    for i in range(len(x)):
        change = torch.zeros_like(x)
        change[i] = step
        found.append((value(x + change) - value(x - change)) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


def all_groups(group: int, sampled: Tensor, weight: Callable[[Tensor], Tensor] | None = None) -> Rollouts:
    """Every group of answers that `sampled` may draw, weighted by its probability.

    Args:
        group: its size, G.
        sampled: [A], the policy that it is drawn from.
        weight: maps the groups' answers [N, G] to importance weights [N, G], of any scale.
    """
    answers = torch.tensor(list(itertools.product(range(ANSWERS), repeat=group)))  # [N, G]
    probability = sampled[answers].prod(1)  # [N]
    within = torch.ones(answers.shape, dtype=torch.float64) if weight is None else weight(answers)
    within = within / within.mean(1, keepdim=True)
    return Rollouts(
        contexts=torch.zeros(answers.numel(), dtype=torch.long),
        mask=torch.ones(answers.numel(), 1, dtype=torch.bool),
        group=torch.arange(len(answers)).repeat_interleave(group)[:, None],
        steps={"answer": answers.flatten()},
        log_policy=sampled.log()[answers.flatten()][:, None],
        log_prior=torch.full((answers.numel(), 1), -math.log(ANSWERS), dtype=torch.float64),
        weight=(within * probability[:, None] * len(answers)).flatten(),
    )


def expectation(objective: Objective, rollouts: Rollouts, x: Tensor = START) -> tuple[float, Tensor]:
    """Of the value and of the gradient that PolicyResponse computes with a GroupCritic."""
    leader = Rewards(x)
    follower: Any = type("Fixed", (), {"temperature": TEMPERATURE, "discount": 0.0})()
    row = PolicyResponse(chunks=2).backward(Problem(leader, objective, follower), rollouts)
    assert leader.x.grad is not None
    return row["objective"], leader.x.grad


def assert_exact(found: tuple[float, Tensor], value: float, gradient: Tensor, tolerance: float = 1e-6) -> None:
    assert abs(found[0] - value) <= 1e-9
    error = float((found[1] - gradient).norm() / gradient.norm().clamp(min=1e-3))  # one answer is of one kind, always
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_expected_gradient_is_the_derivative_of_the_exact_value(name: str, size: int) -> None:
    score, g = SCORES[name]
    gradient = slope(lambda x: exact(g, size, x), START)
    for group in range(size + 1, 6):
        found = expectation(SetUtility(score, size), all_groups(group, policy_at(START)))
        assert_exact(found, exact(g, size, START), gradient)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_weights_that_do_not_depend_on_the_answers_leave_it_unbiased(name: str, size: int) -> None:
    score, g = SCORES[name]
    gradient = slope(lambda x: exact(g, size, x), START)
    fixed = torch.tensor([0.3, 2.0, 1.0, 0.05, 1.7], dtype=torch.float64)
    rollouts = all_groups(5, policy_at(START), lambda answers: fixed.expand(answers.shape))
    assert_exact(expectation(SetUtility(score, size), rollouts), exact(g, size, START), gradient)


@pytest.mark.parametrize("name", ["function", "judge of sets"])
def test_a_sample_of_sets_in_which_all_are_equally_often_is_unbiased(name: str) -> None:
    score, g = SCORES[name]
    gradient = slope(lambda x: exact(g, 3, x), START)
    for weight in (None, lambda answers: torch.tensor([0.3, 2.0, 1.0, 0.5, 1.7]).double().expand(answers.shape)):
        rollouts = all_groups(5, policy_at(START), weight)
        found = expectation(SetUtility(score, 3, subsets=5), rollouts)  # 5 of 10
        assert_exact(found, exact(g, 3, START), gradient)


@pytest.mark.parametrize("name", ["best", "judge of sets"])
def test_importance_weights_are_consistent_and_stale_credit_is_not(name: str) -> None:
    """Groups drawn from another policy, weighted to the best response, as replays are: the bias falls as one over the
    group. With the credit that the batch had before it was weighted, it stays."""
    score, g = SCORES[name]
    gradient, value = slope(lambda x: exact(g, 2, x), START), exact(g, 2, START)
    sampled = policy_at(START + torch.tensor([0.2, 0.2]))
    ratio = policy_at(START) / sampled

    class Stale(SetUtility):
        def terms(self, observed: Observed) -> list[Term]:
            before = dataclasses.replace(observed.samples, weight=None)
            return super().terms(Observed(observed.values, before))

    fresh, stale = [], []
    for group in (4, 8):
        rollouts = all_groups(group, sampled, lambda answers: ratio[answers])
        for found, make in ((fresh, SetUtility), (stale, Stale)):
            worth, estimate = expectation(make(score, 2), rollouts)
            found.append((abs(worth - value), float((estimate - gradient).norm() / gradient.norm())))
    print(name, "fresh", fresh, "stale", stale)
    assert fresh[1][0] < 0.6 * fresh[0][0] and fresh[1][1] < 0.7 * fresh[0][1]
    assert stale[1][1] > 0.8 * stale[0][1] and stale[1][1] > 3 * fresh[1][1]


def test_replays_make_the_credit_anew_from_remembered_scores() -> None:
    """HPGD remembers scores of completions with a batch, and of a replay computes what its weights make of them."""
    seen: list[tuple[Tensor, Tensor]] = []
    asked: list[int] = []

    def judge(leader: Any, rollouts: Rollouts) -> Tensor:
        asked.append(rollouts.size)
        return SCORE[rollouts.steps["answer"]][:, None]

    class Watched(SetUtility):
        def terms(self, observed: Observed) -> list[Term]:
            terms = super().terms(observed)
            seen.append((observed.samples.path_weight().clone(), terms[0].credit[:, 0].clone()))
            return terms

    objective = Watched(BestOf(judge), size=2)
    assert [o.name for o in objective.observations() if o.lasting] == ["BestOf.score"]
    leader = Rewards(START)
    optimizer = torch.optim.SGD(leader.parameters(), lr=2.0, maximize=True)
    config = HPGDConfig(steps=1, contexts_per_step=1, group_size=9, replays=3, max_gradient_norm=None, progress=False)
    HPGD(Problem(leader, objective, ExactResponse()), optimizer, config=config).run()
    assert asked == [9] and len(seen) == 4
    answer = ExactResponse.answers
    for weight, credit in seen[1:]:
        assert float((weight - 1).abs().max()) > 0.05  # the leader has moved
        share = weight / weight.sum()
        by_definition, apart = torch.zeros(9, dtype=torch.float64), 1.0
        for i in range(9):
            mass = {j: float(weight[j]) for j in range(9) if j != i}
            total = sum(mass.values())
            best = {j: max(float(SCORE[answer[i]]), float(SCORE[answer[j]])) for j in mass}
            by_definition[i] = sum(m * best[j] for j, m in mass.items()) / total
            apart -= float(share[i] * (share[i] + sum(share[j] * m / total for j, m in mass.items())))
        factor = 2 * (1 - float((share**2).sum())) / apart
        torch.testing.assert_close(credit, factor * by_definition)


class ExactResponse(Follower):
    """Samples of the best response itself."""

    temperature, discount = TEMPERATURE, 0.0
    answers = torch.empty(0)

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(count, dtype=torch.long)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        self.policy = policy_at(leader.x.detach())  # type: ignore[operator]
        return {}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        answer = torch.multinomial(self.policy, group_size, replacement=True, generator=generator)
        type(self).answers = answer
        return Rollouts.bandit(
            contexts=contexts.repeat_interleave(group_size),
            steps={"answer": answer},
            log_policy=self.policy.log()[answer],
            log_prior=torch.full((group_size,), -math.log(ANSWERS), dtype=torch.float64),
        )


def test_a_replay_asks_a_judge_of_sets_nothing_new() -> None:
    """Which sets of a group are scored depends on its size alone, so that a replay finds all of them in the cache."""
    asked: list[set[tuple[int, ...]]] = []

    def judge(rollouts: Rollouts, sets: Tensor) -> Tensor:
        if len(sets) == 12:  # without those that are asked about in another order
            asked.append({tuple(row) for row in sets.tolist()})
        return said(rollouts, sets)

    leader = Rewards(START)
    optimizer = torch.optim.SGD(leader.parameters(), lr=0.5, maximize=True)
    config = HPGDConfig(steps=1, contexts_per_step=1, group_size=9, replays=3, progress=False)
    objective = SetUtility(judge, size=3, subsets=12)
    HPGD(Problem(leader, objective, ExactResponse()), optimizer, config=config).run()
    assert len(asked) == 4 and all(sets == asked[0] for sets in asked) and len(asked[0]) == 12
    assert not torch.equal(leader.x.detach(), START)


def test_the_expectation_would_notice_a_wrong_factor() -> None:
    class Unscaled(SetUtility):
        def terms(self, observed: Observed) -> list[Term]:
            (term,) = super().terms(observed)
            return [dataclasses.replace(term, credit=(5 - 3) / (5 - 1) * term.credit)]

    score, g = SCORES["best"]
    gradient = slope(lambda x: exact(g, 3, x), START)
    _, found = expectation(Unscaled(score, 3), all_groups(5, policy_at(START)))
    assert float((found - gradient).norm() / gradient.norm()) == pytest.approx(0.5, abs=1e-6)


# ---- closed forms ----


def enumerated(score: SetScore, g: Callable[[Sequence[int]], float], size: int) -> Objective:
    """The same score, set by set."""

    def one_by_one(rollouts: Rollouts, sets: Tensor) -> Tensor:
        answers = rollouts.steps["answer"][sets]
        return torch.tensor([g(row) for row in answers.tolist()], dtype=torch.float64)

    return SetUtility(one_by_one, size, subsets=10_000)


@pytest.mark.parametrize("name", ["pass", "best", "distinct", "distinct good"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_closed_forms_are_what_enumeration_gives(name: str, size: int) -> None:
    """On groups of two sizes, with weights; also where a few completions have nearly all of the weight."""
    generator = torch.Generator().manual_seed(size)
    sizes = [7, 7, 5]
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    answer = torch.randint(ANSWERS, (sum(sizes),), generator=generator)
    score, g = SCORES[name]
    for sharp in (0.5, 8.0):
        weight = (sharp * torch.randn(len(answer), generator=generator, dtype=torch.float64)).exp()
        weight = weight / weight.mean()
        rollouts = Rollouts(group, torch.ones(len(answer), 1).bool(), group[:, None], {"answer": answer}, weight=weight)
        closed = SetUtility(score, size).evaluate(Rewards(START), rollouts)
        by_sets = enumerated(score, g, size).evaluate(Rewards(START), rollouts)
        torch.testing.assert_close(closed.value, by_sets.value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(closed.credit, by_sets.credit, rtol=1e-6 if sharp > 1 else 1e-10, atol=1e-9)


def test_where_no_answer_is_good_there_are_none() -> None:
    found = SetUtility(Distinct(of_answer(KIND), of_answer(SCORE), least=5.0), 2).evaluate(
        Rewards(START), group_of(0, 1, 2)
    )
    assert found.value.item() == 0.0 and bool((found.credit == 0).all())


def test_the_credit_without_weights_is_the_formula() -> None:
    answer = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    rollouts = Rollouts.bandit(contexts=torch.zeros(7, dtype=torch.long), steps={"answer": answer})
    score, g = SCORES["best"]
    credit = SetUtility(score, 3).evaluate(Rewards(START), rollouts).credit[:, 0]
    for i in range(7):
        holding = [g([int(answer[j]) for j in s]) for s in itertools.combinations(range(7), 3) if i in s]
        assert credit[i].item() == pytest.approx(3 * 6 / 4 * sum(holding) / len(holding), rel=1e-12)


def test_a_group_whose_weight_lies_on_one_set_says_nothing() -> None:
    """There is nobody left to compare it with, and no other completion's weight is blown up instead."""
    answer = torch.tensor([0, 1, 2, 1, 0])
    weight = torch.tensor([2.5, 2.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    rollouts = Rollouts.bandit(contexts=torch.zeros(5, dtype=torch.long), steps={"answer": answer}, weight=weight)
    for name in ("best", "function"):
        score, g = SCORES[name]
        value, gradient = expectation(SetUtility(score, 2), rollouts)
        assert value == pytest.approx(g([0, 1])) and bool((gradient == 0).all())
        value, gradient = expectation(SetUtility(score, 3), rollouts)  # nobody's weight makes up for the third
        assert value == pytest.approx((g([0, 1, 2]) + g([0, 1, 1]) + g([0, 1, 0])) / 3) and bool((gradient == 0).all())


@pytest.mark.parametrize(
    ("group", "size", "most"), [(8, 4, 64), (8, 4, 2), (7, 3, 20), (5, 4, 5), (9, 6, 3), (16, 4, 99)]
)
def test_each_completion_is_in_equally_many_sets(group: int, size: int, most: int) -> None:
    sets = subsets_of(group, size, most)
    assert 0 < len(sets) <= most and len(set(sets.flatten().bincount(minlength=group).tolist())) == 1
    assert all(len(set(row)) == size for row in sets.tolist())
    assert torch.equal(sets, subsets_of(group, size, most))


# ---- bad input ----


def group_of(*answers: int) -> Rollouts:
    contexts = torch.zeros(len(answers), dtype=torch.long)
    return Rollouts.bandit(contexts=contexts, steps={"answer": torch.tensor(answers)})


@pytest.mark.parametrize(
    ("score", "size", "subsets", "message"),
    [
        (BestOf(of_answer(SCORE)), 5, 256, r"sets of 5 need groups of at least 6 completions a prompt, got one of 5"),
        (said, 3, 4, r"SetUtility.subsets: expected at least 5, with which each of a group's 5 completions"),
        (lambda r, sets: SCORE[r.steps["answer"]][sets][:, 0], 2, 256, "does not depend on the order of a set"),
        (lambda r, sets: SCORE[r.steps["answer"]][sets][:, 1], 3, 256, "SetUtility.score: expected a score that does"),
        (SetFunction(lambda s: s[..., 0], of_answer(SCORE)), 2, 256, "SetFunction.function: expected a score"),
        (lambda r, sets: torch.full((len(sets),), math.nan), 2, 256, "a finite number for each set, got nan for set 0"),
        (lambda r, sets: torch.zeros(len(sets) + 1), 2, 256, r"10 scores, one for each set, got shape \(11,\)"),
        (lambda r, sets: [0.0] * len(sets), 2, 256, "expected 10 scores, one for each set, got a list"),
        (BestOf(lambda leader, r: torch.zeros(2)), 2, 256, r"BestOf.score: expected shape \(5, 1\)"),
    ],
)
def test_bad_scores_of_sets(score: Any, size: int, subsets: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SetUtility(score, size, subsets).evaluate(Rewards(START), group_of(0, 1, 2, 2, 1))


def test_the_exact_value_of_many_tuples_is_refused() -> None:
    problem = preferences(responses=101, objective=lambda score: SetUtility(SetFunction(spread, score), 3))
    with pytest.raises(InputError, match=r"all draws of 3 among 101 actions, .* at most 1,000,000, got 1,030,301"):
        leader_value(problem)
    assert math.isfinite(leader_value(dataclasses.replace(problem, objective=best_of(problem, 3))).item())
    judged = dataclasses.replace(problem, objective=SetUtility(said, 3))
    with pytest.raises(InputError, match="a judge of sets has no table"):
        leader_value(judged)


# ---- tables ----


def score_of(problem: Problem) -> TabularUtility:
    return problem.objective.score.score  # type: ignore[attr-defined]


def best_of(problem: Problem, size: int) -> SetUtility:
    return SetUtility(BestOf(score_of(problem)), size)


def kinds(leader: Any) -> Tensor:
    return (torch.arange(6) % 4).double().expand(4, 1, 6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_tables_are_exact(size: int) -> None:
    """The referee's gradient against finite differences, and closed forms against the enumeration of all tuples."""
    temperature = torch.tensor([0.3, 0.5, 0.8, 1.2], dtype=torch.float64)  # a population: one follower a prompt
    problem = preferences(
        objective=lambda score: SetUtility(SetFunction(spread, score), size), temperature=temperature, seed=2
    )
    score, kind = score_of(problem), TabularUtility(kinds)
    pairs: list[tuple[Any, Any]] = [
        (BestOf(score), SetFunction(lambda s: s.amax(-1), score)),
        (PassAt(score, 0.3), SetFunction(lambda s: (s >= 0.3).any(-1).double(), score)),
        (Distinct(kind), SetFunction(different, kind)),
        (Distinct(kind, score, 0.3), SetFunction(different, TabularUtility(both))),
    ]
    for closed, by_tuples in pairs:
        one, other = (dataclasses.replace(problem, objective=SetUtility(g, size)) for g in (closed, by_tuples))
        assert leader_value(one).item() == pytest.approx(leader_value(other).item(), rel=1e-12)
        implicit = implicit_gradient(one)
        torch.testing.assert_close(implicit, implicit_gradient(other), rtol=1e-9, atol=1e-12)
        assert float((finite_differences(one) - implicit).norm()) <= 1e-6 * float(implicit.norm().clamp(min=1e-3))
        expected = torch.cat([g.reshape(-1) for g in expected_policy_response(one)])
        torch.testing.assert_close(expected, implicit, rtol=1e-9, atol=1e-12)
    implicit = implicit_gradient(problem)
    assert float((finite_differences(problem) - implicit).norm() / implicit.norm()) <= 1e-6


def different(kind: Tensor) -> Tensor:
    return torch.stack([(kind == k).any(-1) for k in range(4)]).double().sum(0)


def both(leader: Any) -> Tensor:
    """A kind, less 10 where the answer is no good."""
    return kinds(leader) - 10 * (leader.score < 0.3).double()


# ---- risks ----


@pytest.mark.parametrize("name", ["best", "judge of sets", "pairs"])
def test_a_risk_of_sets_or_pairs_is_remembered_but_not_cross_fitted(name: str) -> None:
    """Three prompts: the slope is that of the risk at their values, whatever completions these are made of."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(3).repeat_interleave(5)
    rollouts = Rollouts.bandit(contexts=prompt, steps={"answer": torch.randint(3, (15,), generator=generator)})
    pairs = PreferenceLikelihood(of_answer(SCORE), scale=0.5)
    sets: Objective = pairs if name == "pairs" else SetUtility(SCORES[name][0], 3)
    plain = expectation(MeanVariance(sets, 0.6), rollouts)
    fitted = CrossFitted(MeanVariance(sets, 0.6), memory=3)
    found = expectation(fitted, rollouts)
    assert found[0] == pytest.approx(plain[0]) and plain[1].norm() > 1e-3
    torch.testing.assert_close(found[1], plain[1])

    values = [expectation(sets, rollouts.select(slice(5 * c, 5 * c + 5)))[0] for c in range(3)]
    variance = sum((v - sum(values) / 3) ** 2 for v in values) / 3
    assert plain[0] == pytest.approx(sum(values) / 3 - 0.6 * variance)
    fitted.update(lambda: None)  # type: ignore[arg-type, return-value]
    assert fitted.state_dict()["values"] == pytest.approx(values)
