"""What objectives declare (whether they move with x, how many steps they are for, how many contexts) is checked."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from align_cbrl import (
    Constrained,
    CVaR,
    ExpectedUtility,
    InputError,
    KLPriced,
    MeanVariance,
    PolicyResponse,
    PreferenceLikelihood,
    Problem,
    Rollouts,
    WorstContext,
)
from align_cbrl.functional import leaves_of
from align_cbrl.objectives.expected import MEAN, Mean
from align_cbrl.problem import Term
from toy_cmdp import ExactCritic, TabularUtility, leader_value, random_cmdp

STILL = ExpectedUtility(TabularUtility(lambda leader: torch.ones(2, 4, 3).double()), discount=0.9)
MOVING = ExpectedUtility(TabularUtility(lambda leader: leader.tables().reward), discount=0.9)


class OwnTerm(ExpectedUtility):
    """A term that reaches for the leader behind the observations' back."""

    leader = None

    def terms(self, observed):
        (term,) = super().terms(observed)
        return [term.plus(self.leader.x.sum())]


class OwnRisk(Mean):
    """A risk that does."""

    def __init__(self, leader):
        object.__setattr__(self, "leader", leader)

    def aggregate(self, values, probabilities):
        return super().aggregate(values, probabilities) + self.leader.x.sum()

    def estimate(self, term, observed, discount):
        found = super().estimate(term, observed, discount)
        return dataclasses.replace(found, value=found.value + self.leader.x.sum())


class Risky(ExpectedUtility):
    leader = None

    def terms(self, observed):
        (term,) = super().terms(observed)
        return [Term(term.utility, term.credit, OwnRisk(self.leader))]


WRONG = {
    "utility": MOVING,
    "priced": KLPriced(MOVING, 0.2),
    "cost": Constrained(STILL, cost=MOVING, bound=1.0, rate=0.1, multiplier=0.5),
    "constrained": Constrained(MOVING, cost=STILL, bound=1.0, rate=0.1, multiplier=0.5),
    "cvar": CVaR(MOVING, 0.5),
    "variance of priced": MeanVariance(KLPriced(MOVING, 0.2), 0.3),
    "worst": WorstContext(MOVING, 0.3),
    "term": OwnTerm(STILL.utility_function, 0.9),
    "risk": Risky(STILL.utility_function, 0.9),
}


def problem_and_rollouts(objective, **settings):
    base = random_cmdp(seed=0, **settings)
    if isinstance(objective, OwnTerm | Risky):
        type(objective).leader = base.leader
    problem = Problem(base.leader, objective, base.follower)
    contexts = torch.arange(2).repeat(8)
    problem.follower.respond(problem.leader, contexts)
    return problem, problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WRONG)
def test_what_moves_with_x_and_is_said_not_to_is_refused_by_estimator_and_referee(name):
    problem, rollouts = problem_and_rollouts(WRONG[name])
    with pytest.raises(InputError, match=r"depends on the parameters of RandomLeader.*depends_on_leader=True"):
        PolicyResponse(ExactCritic()).backward(problem, rollouts)
    with pytest.raises(InputError, match=r"depends on the parameters of RandomLeader.*depends_on_leader=True"):
        leader_value(problem)


def test_scores_of_preferences_must_not_move_with_x():
    problem, rollouts = problem_and_rollouts(PreferenceLikelihood(MOVING.utility_function), horizon=1)
    with pytest.raises(InputError, match=r"PreferenceLikelihood.score: it depends on the parameters"):
        leader_value(problem)
    with pytest.raises(InputError, match=r"PreferenceLikelihood.score: it depends on the parameters"):
        problem.objective.observe(problem.leader, rollouts)


def test_a_network_of_the_judge_is_no_part_of_the_leader():
    network = torch.nn.Linear(1, 1).double()
    judge = ExpectedUtility(lambda leader, rollouts: network(rollouts.log_policy[..., None])[..., 0], discount=0.9)
    problem, rollouts = problem_and_rollouts(judge)
    observed = problem.objective.observe(problem.leader, rollouts)
    assert not observed[judge.observed_utility].requires_grad
    asked = []

    def once(leader, rollouts):
        asked.append(torch.is_grad_enabled())
        return network(rollouts.log_policy[..., None])[..., 0]

    ExpectedUtility(once, discount=0.9).observe(problem.leader, rollouts)
    assert asked == [True]


def test_leaves_are_those_of_the_graph():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    value = (x * y.detach()).sum() + (x**2).sum()
    assert [leaf is x for leaf in leaves_of(value, y.detach())] == [True]
    assert leaves_of(x)[0] is x
    assert leaves_of(torch.zeros(1)) == []


def test_many_steps_need_a_stated_discount():
    unstated = ExpectedUtility(TabularUtility(lambda leader: leader.tables().reward), depends_on_leader=True)
    for objective in (unstated, KLPriced(unstated, 0.1), CVaR(unstated, 0.5)):
        problem, rollouts = problem_and_rollouts(objective)
        with pytest.raises(InputError, match=r"expected a problem of one step.*has to be told its discount"):
            leader_value(problem)
        with pytest.raises(InputError, match=r"expected a problem of one step.*has to be told its discount"):
            PolicyResponse(ExactCritic()).backward(problem, rollouts)
    cost = Constrained(dataclasses.replace(unstated, discount=0.0), cost=unstated, bound=1.0, rate=0.1)
    with pytest.raises(InputError, match=r"Constrained: expected a problem of one step"):
        leader_value(problem_and_rollouts(cost)[0])
    stated, _ = problem_and_rollouts(dataclasses.replace(unstated, discount=0.0))
    assert leader_value(stated).isfinite()  # of the first step, if that is asked for
    one_step, rollouts = problem_and_rollouts(unstated, horizon=1)
    assert leader_value(one_step).isfinite()
    PolicyResponse(ExactCritic()).backward(one_step, rollouts)


def test_too_few_contexts_for_a_risk_are_said():
    score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["u"][:, None])

    def evaluate(objective, contexts):
        contexts = torch.tensor(contexts)
        steps = {"u": torch.arange(len(contexts)).double()}
        return objective.evaluate(None, Rollouts.bandit(contexts=contexts, steps=steps)).value.item()

    with pytest.warns(UserWarning, match=r"CVaR: the batch holds 1 context, .* puts 25% of the weight .* at least 4"):
        assert evaluate(CVaR(score, 0.25), [0, 0]) == 0.5  # the mean of its only context
    with pytest.warns(UserWarning, match=r"CVaR: the batch holds 2 contexts, .* puts 44% of the weight"):
        evaluate(CVaR(score, 0.25), [0, 1])
    with pytest.warns(UserWarning, match=r"MeanVariance: the batch holds a single context"):
        evaluate(MeanVariance(score, 0.25), [0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(CVaR(score, 0.25), [0, 1, 2, 3])
        evaluate(CVaR(score, 1.0), [0, 0])
        evaluate(MeanVariance(score, 0.25), [0, 1])
    assert MEAN.aggregate(torch.ones(1), torch.ones(1)) == 1
