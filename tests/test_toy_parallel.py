"""Leaders side by side: values, gradients and paths are those of each alone; contexts carry the follower's identity."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_close, assert_unbiased, finite_differences, implicit_gradient

from align_cbrl import CVaR, ExpectedUtility, InputError, PolicyResponse, Problem
from toy_cmdp import (
    ExactCritic,
    ExactFollower,
    expected_policy_response,
    four_rooms,
    leader_value,
    parallel,
    random_cmdp,
)


def test_values_and_gradients_are_those_of_each_alone():
    problems = [
        random_cmdp(seed=s, temperature=t, discount=g) for s, t, g in ((0, 0.5, 0.9), (1, 0.1, 0.7), (2, 1.0, 0.0))
    ]
    both = parallel(problems)
    alone = torch.stack([leader_value(p).detach() for p in problems]).mean()
    assert leader_value(both).item() == pytest.approx(alone.item(), abs=1e-13)
    referee = torch.cat([implicit_gradient(p) for p in problems]) / 3
    assert_close(implicit_gradient(both), referee, 1e-12)
    assert_close(finite_differences(both), referee, 1e-6)
    assert_unbiased(both, PolicyResponse(ExactCritic()), paths=1200)


def test_a_constant_law_is_kept_once():
    problems = [four_rooms(temperature=t, price=b, seed=s) for s, (t, b) in enumerate([(0.001, 1.0), (0.005, 3.0)])]
    both = parallel(problems)
    assert both.leader.tables().transition.shape[0] == 1
    assert both.follower.temperature.tolist() == [0.001, 0.001, 0.005, 0.005]
    assert both.follower.discount == 0.99
    referee = torch.cat([implicit_gradient(p) for p in problems]) / 2
    assert_close(implicit_gradient(both), referee, 1e-9)


def test_each_leader_gets_its_share_of_contexts():
    both = parallel([random_cmdp(seed=s, contexts=c) for s, c in ((0, 2), (1, 3))])
    contexts = both.follower.sample_contexts(40, torch.Generator().manual_seed(0))
    assert int((contexts < 2).sum()) == 20
    with pytest.raises(InputError, match="expected a multiple of the 2 leaders, got 41"):
        both.follower.sample_contexts(41, torch.Generator())


def test_what_cannot_be_put_side_by_side():
    base = random_cmdp()
    for problems, message in [
        ([], "at least one"),
        ([base, random_cmdp(states=3)], r"equal numbers of states, got \[3, 4\]"),
        ([base, random_cmdp(leader_discount=0.5)], r"one discount of the leader's, got \[0.5, 0.8\]"),
        ([Problem(base.leader, CVaR(base.objective, 0.5), base.follower)], "got CVaR"),
    ]:
        with pytest.raises(InputError, match=message):
            parallel(problems)


def population(**numbers):
    base = random_cmdp(seed=7, contexts=3)
    given = {"temperature": 0.5, "discount": 0.9, **numbers}
    return Problem(base.leader, base.objective, ExactFollower(base.follower.cmdp, **given, leader_discount=0.8))


@pytest.mark.parametrize("seed", range(3))
def test_a_population_of_followers(seed):
    generator = torch.Generator().manual_seed(seed)
    problem = population(
        temperature=0.05 + torch.rand(3, generator=generator, dtype=torch.float64),
        discount=0.95 * torch.rand(3, generator=generator, dtype=torch.float64),
    )
    referee = implicit_gradient(problem)
    assert_close(finite_differences(problem), referee, 1e-6)
    assert_close(torch.cat([g.reshape(-1) for g in expected_policy_response(problem)]), referee, 1e-9)
    assert_unbiased(problem, PolicyResponse(ExactCritic()), paths=512)


def test_a_population_of_equals_is_one_follower():
    same = population(
        temperature=torch.full((3,), 0.5, dtype=torch.float64), discount=torch.full((3,), 0.9, dtype=torch.float64)
    )
    assert_close(implicit_gradient(same), implicit_gradient(population()), 1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": torch.tensor([0.1, 0.2])}, r"temperature: expected a number or a tensor \[3\]"),
        (
            {"temperature": torch.tensor([0.1, 0.2, 0.0])},
            "temperature: expected a positive temperature lambda, got 0.0",
        ),
        ({"temperature": torch.tensor([0.1, float("nan"), 0.2])}, "temperature: expected a positive"),
        ({"discount": torch.tensor([0.1, 1.0, 0.2])}, r"discount: expected a discount in \[0, 1\), got 1.0"),
    ],
)
def test_bad_populations(numbers, message):
    with pytest.raises(InputError, match=message):
        population(**numbers)


def test_a_shared_law_equals_its_copies():
    problem = four_rooms(temperature=0.003)
    with torch.no_grad():
        problem.parameters[0].mul_(100)
    referee = implicit_gradient(problem)
    problem.leader.transition = problem.leader.transition.expand(2, -1, -1, -1).contiguous()
    assert_close(implicit_gradient(problem), referee, 1e-9)
    assert isinstance(problem.objective, ExpectedUtility)
