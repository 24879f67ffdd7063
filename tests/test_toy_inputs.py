"""Every bad input is refused by name, and every message is tested."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from align_cbrl.errors import InputError
from align_cbrl.estimators.critics import FittedCritic
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Follower, Leader, Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp import (
    ContextualMDP,
    ExactFollower,
    TabularLeader,
    TabularUtility,
    enumerate_paths,
    expected_policy_response,
    four_rooms,
    leader_value,
    random_cmdp,
)
from toy_cmdp.problems.four_rooms import GOALS
from toy_cmdp.tables.cmdp import gather_steps
from toy_cmdp.validate import validate


class Altered(TabularLeader):
    """A leader whose tables were tampered with."""

    def __init__(self, leader, **changes):
        super().__init__()
        self.leader, self.changes = leader, changes

    def utility(self):
        return self.leader.utility()

    def tables(self):
        tables = self.leader.tables()
        return dataclasses.replace(
            tables, **{name: change(getattr(tables, name).clone()) for name, change in self.changes.items()}
        )


def put(index, value):
    def change(table):
        table = table.detach()
        table[index] = value
        return table

    return change


def altered(**changes):
    problem = random_cmdp()
    objective = ExpectedUtility(TabularUtility(lambda leader: leader.utility()), discount=0.8, depends_on_leader=True)
    return Problem(Altered(problem.leader, **changes), objective, problem.follower)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": put((1, 2, 0), torch.nan)}, r"reward: expected finite numbers, got nan in context 1, state 2"),
        ({"reward": put((0, 3, 1), torch.inf)}, r"reward: expected finite numbers, got inf in context 0, state 3"),
        ({"reward": lambda t: t[:, :3]}, r"reward: expected shape \(2, 4, 3\) .*got \(2, 3, 3\)"),
        (
            {"transition": put((1, 2, 0, 3), 2.0)},
            r"transition: .*sum to one, got sum .* in context 1, state 2, action 0",
        ),
        ({"transition": put((1, 2, 0, 3), -0.1)}, r"transition: .*got -0.1 in context 1, state 2, action 0 to state 3"),
        ({"transition": put((0, 0, 1, 2), torch.nan)}, r"transition: .*got nan in context 0, state 0, action 1"),
        ({"transition": lambda t: t[..., :2]}, r"transition: expected shape \(2, 4, 3, 4\) .*got \(2, 4, 3, 2\)"),
        ({"initial": put((1, 0), 5.0)}, r"initial: expected probabilities that sum to one, got sum .* in context 1$"),
        ({"initial": put((1, 3), -1.0)}, r"initial: expected probabilities, got -1.0 in context 1, state 3"),
        ({"initial": lambda t: t[:1]}, r"initial: expected shape \(2, 4\)"),
        ({"log_prior": put((0, 1, 2), -torch.inf)}, r"log_prior: .*full support\), got -inf in context 0, state 1"),
        ({"log_prior": put((0, 1, 2), torch.nan)}, r"log_prior: .*got nan in context 0, state 1, action 2"),
        ({"log_prior": torch.zeros_like}, r"log_prior: .*got sum 3.0 in context 0, state 0; pass log_prior=None"),
        ({"log_prior": lambda t: t[..., :1]}, r"log_prior: expected shape \(2, 4, 3\)"),
        ({"transition": lambda t: t.float()}, r"transition: expected all tables in one floating-point dtype"),
    ],
)
def test_bad_tables_are_named(changes, message):
    problem = altered(**changes)
    for route in (leader_value, expected_policy_response):
        with pytest.raises(InputError, match=message):
            route(problem)
    with pytest.raises(InputError, match=message):
        problem.follower.respond(problem.leader, torch.tensor([0]))


def test_names_appear_in_messages():
    problem = four_rooms()
    with torch.no_grad():
        problem.leader.get_buffer("transition")[0, 0, 0] = -0.5
    with pytest.raises(InputError, match=r"context 0 \(goal \(1, 9\)\), state 0 \(cell \(1, 1\)\), action 0 \(up\)"):
        leader_value(problem)


@pytest.mark.parametrize("goals", [(), ((0, 0),), ((1, 9), (1, 9)), ((1, 9), (13, 1)), (1, 9), ("1, 9",)])
def test_goals_are_different_free_cells(goals):
    with pytest.raises(InputError, match=r"goals(\[0\])?: expected"):
        four_rooms(goals=goals)


def test_two_goals_are_the_mean_of_one_and_one():
    both = leader_value(four_rooms(temperature=0.005, price=3.0)).item()
    alone = [leader_value(four_rooms(temperature=0.005, price=3.0, goals=(goal,))).item() for goal in GOALS]
    assert both == pytest.approx(sum(alone) / 2, abs=1e-12)


def test_a_constant_table_is_checked_once_and_again_when_it_changes():
    problem = four_rooms()
    leader_value(problem)
    transition = problem.leader.get_buffer("transition")
    with torch.no_grad():
        transition[0, 0, 0] = 0
    with pytest.raises(InputError, match=r"transition: .*got sum 0.0"):
        leader_value(problem)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (put((1, 2, 0), torch.nan), "utility: expected finite numbers, got nan in context 1, state 2, action 0"),
        (lambda t: t[0], r"utility: expected shape \(2, 4, 3\) \(C, S, A\), got \(4, 3\)"),
    ],
)
def test_bad_utilities(table, message):
    problem = random_cmdp()
    objective = ExpectedUtility(TabularUtility(lambda leader: table(leader.utility().clone())), discount=0.8)
    with pytest.raises(InputError, match=message):
        leader_value(Problem(problem.leader, objective, problem.follower))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_probabilities": torch.zeros(2)}, "total is zero"),
        ({"context_probabilities": torch.tensor([0.5, 0.4])}, r"sum to one, got .* with sum 0.8999"),
        ({"context_probabilities": torch.tensor([1.5, -0.5])}, "expected non-negative numbers"),
        ({"context_probabilities": torch.tensor([torch.nan, 1.0])}, "expected non-negative numbers"),
        ({"context_probabilities": torch.ones(1, 1)}, r"expected shape \[C\]"),
        ({"terminal": torch.zeros(2, 3)}, r"terminal: expected a bool tensor \[2, S\], got torch.float32"),
        ({"terminal": torch.zeros(3, 3, dtype=torch.bool)}, r"terminal: expected a bool tensor \[2, S\]"),
        ({"state_names": ["a"]}, "state_names: expected 3 names, got 1"),
        ({"context_names": ["a"]}, "context_names: expected 2 names, got 1"),
    ],
)
def test_bad_cmdps(fields, message):
    good = {"context_probabilities": torch.tensor([0.5, 0.5]), "terminal": torch.zeros(2, 3, dtype=torch.bool)}
    with pytest.raises(InputError, match=message):
        ContextualMDP(**{**good, **fields})


def test_bad_action_names():
    problem = random_cmdp()
    cmdp = dataclasses.replace(problem.follower.cmdp, action_names=["only one"])
    with pytest.raises(InputError, match="action_names: expected 3 names, got 1"):
        cmdp.check(problem.leader.tables())


def test_bad_followers():
    cmdp = random_cmdp().follower.cmdp
    for arguments, message in [
        ({"temperature": 0.0}, "temperature: expected a positive"),
        ({"temperature": -1.0}, "temperature: expected a positive"),
        ({"discount": 1.0}, "discount: expected a discount in"),
        ({"leader_discount": -0.1}, r"leader_discount: expected a finite number >= 0 and < 1, got -0.1"),
        ({"horizon": 0}, "horizon: expected a whole number >= 1, got 0"),
    ]:
        with pytest.raises(InputError, match=message):
            ExactFollower(cmdp, **{"temperature": 0.5, "discount": 0.9, **arguments})


def test_bad_rollouts():
    problem, generator = random_cmdp(), torch.Generator()
    follower = problem.follower
    with pytest.raises(InputError, match=r"call respond\(leader, contexts\) first"):
        follower.rollout(torch.tensor([0]), 1, generator)
    follower.respond(problem.leader, torch.tensor([0]))
    with pytest.raises(InputError, match="group_size: expected at least 1, got 0"):
        follower.rollout(torch.tensor([0]), 0, generator)
    for contexts in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([], dtype=torch.long)):
        with pytest.raises(InputError, match=r"contexts: expected numbers in \[0, 2\)"):
            follower.rollout(contexts, 1, generator)
    with pytest.raises(InputError, match=r"value: expected shape \(2, 4\), got \(1, 1\); the state belongs"):
        follower.load_state_dict({"value": torch.zeros(1, 1)})
    foreign = Rollouts.bandit(contexts=torch.tensor([0]), steps={"completion": ["yes"]})
    with pytest.raises(InputError, match=r"rollouts.steps: expected \"state\" .*got \['completion'\]"):
        gather_steps(torch.zeros(2, 4, 3), foreign)


class Opaque(Leader):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(1))

    def reward(self, rollouts):
        return self.x.expand(rollouts.mask.shape)


def test_problems_that_are_not_tabular():
    problem = random_cmdp()
    with pytest.raises(InputError, match="leader: expected a TabularLeader, got Opaque"):
        leader_value(dataclasses.replace(problem, leader=Opaque()))
    with pytest.raises(InputError, match="leader: expected a TabularLeader, got Opaque"):
        problem.follower.respond(Opaque(), torch.tensor([0]))
    objective = ExpectedUtility(lambda leader, rollouts: rollouts.mask.double())
    with pytest.raises(InputError, match="objective: the exact route takes a TabularUtility, got <function"):
        leader_value(dataclasses.replace(problem, objective=objective))

    class Foreign(Follower):
        temperature, discount = 1.0, 0.0

        def sample_contexts(self, count, generator):
            raise NotImplementedError

        respond = rollout = sample_contexts

    with pytest.raises(InputError, match="follower: expected an ExactFollower, got Foreign"):
        leader_value(dataclasses.replace(problem, follower=Foreign()))


def test_enumeration_needs_an_end():
    with pytest.raises(InputError, match="some episodes are not over after horizon = 2 steps"):
        enumerate_paths(random_cmdp(states=2, actions=2), 2)
    with pytest.raises(InputError, match="more than 10 paths"):
        enumerate_paths(random_cmdp(horizon=3), 3, max_paths=10)


def test_bad_builders_and_validation():
    with pytest.raises(InputError, match="states: expected a whole number >= 1, got 0"):
        random_cmdp(states=0)
    with pytest.raises(InputError, match="horizon: expected a whole number >= 1, got 0"):
        random_cmdp(horizon=0)
    with pytest.raises(InputError, match=r"price: expected a finite number >= 0, got -1.0"):
        random_cmdp(price=-1.0)
    with pytest.raises(InputError, match="unknown problem 'nowhere'; known are four_rooms"):
        validate(["nowhere"])
    with pytest.raises(InputError, match="at least 2 repetitions and paths, got 1 and 1024"):
        validate(["layered"], repetitions=1)
    with pytest.raises(InputError, match=r"FittedCritic.folds"):
        FittedCritic(random_cmdp().follower.cmdp.cell, folds=1)
