"""Linear systems: the Riccati solver, exact gradients, paths, the published worlds, and what is refused."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

import toy_cmdp
from align_cbrl import PolicyResponse, Problem, ZerothOrder
from align_cbrl.estimators.regression_critic import RegressionCritic
from toy_cmdp import expected_policy_response, leader_value
from toy_cmdp.followers.riccati import lyapunov, riccati
from toy_cmdp.validate import estimate, finite_differences, implicit_gradient, sample_gradients


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def expected(problem: Problem) -> Tensor:
    return torch.cat([g.reshape(-1) for g in expected_policy_response(problem)])


def random_problem(seed: int) -> Problem:
    """Everything moves: dynamics, control, noise, costs, first state, temperature; utilities of both kinds in turn."""
    utility = "bump" if seed % 2 else "quadratic"
    return toy_cmdp.random_linear(seed=seed, utility=utility, leader_discount=1.0 if seed % 3 == 0 else 0.9)


WORLDS = {
    "lqr": lambda: toy_cmdp.lqr(gain=[[-9.0, -9.5]]),
    "lqr discounted": lambda: toy_cmdp.lqr(gain=[[-9.0, -9.5]], leader_discount=0.9),
    "building": toy_cmdp.building,
    "discrete_toy": toy_cmdp.discrete_toy,
    **{f"random {seed}": lambda seed=seed: random_problem(seed) for seed in range(10)},
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_implicit_gradient_is_that_of_central_differences_and_of_the_expected_estimator(name: str) -> None:
    problem = WORLDS[name]()
    exact = implicit_gradient(problem)
    assert relative(finite_differences(problem), exact) < 1e-6
    assert relative(expected(problem), exact) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_riccati_solution_is_scipys(seed: int) -> None:
    systems = random_problem(seed).leader.systems().detach()  # type: ignore[operator]
    gamma = torch.tensor([0.99, 0.6], dtype=torch.float64)
    found = riccati(systems, gamma)
    for c in range(2):
        root = math.sqrt(gamma[c])
        reference = scipy.linalg.solve_discrete_are(
            root * systems.dynamics[c].numpy(),
            root * systems.control[c].numpy(),
            systems.state_cost[c].numpy(),
            systems.action_cost[c].numpy(),
        )
        assert relative(found[c], torch.tensor(reference)) < 1e-11


def test_lyapunov_is_the_sum_of_powers() -> None:
    loop = torch.tensor([[[0.5, 0.3], [-0.2, 0.7]]], dtype=torch.float64)
    source = torch.eye(2, dtype=torch.float64)[None]
    total = sum(torch.linalg.matrix_power(loop, k) @ source @ torch.linalg.matrix_power(loop, k).mT for k in range(200))
    assert torch.allclose(lyapunov(loop, source), total, atol=1e-13)


@pytest.mark.parametrize("name", ["lqr", "building", "random 1"])
def test_the_value_is_the_mean_of_sampled_paths(name: str) -> None:
    problem = WORLDS[name]()
    generator = torch.Generator().manual_seed(0)
    contexts = problem.follower.sample_contexts(4000, generator)
    problem.follower.respond(problem.leader, contexts)
    rollouts = problem.follower.rollout(contexts, 1, generator)
    with torch.no_grad():
        utility = problem.objective.utility(problem.leader, rollouts)  # type: ignore[attr-defined]
        exact = leader_value(problem)
    totals = (utility * problem.objective.discount ** torch.arange(rollouts.horizon, dtype=torch.float64)).sum(1)
    assert abs(totals.mean() - exact) < 4 * totals.std() / 4000**0.5


@pytest.mark.parametrize("name", ["lqr", "building", "random 0", "random 1", "random 2"])
def test_sampled_gradients_are_within_four_standard_errors(name: str) -> None:
    problem = WORLDS[name]()
    exact = implicit_gradient(problem)
    found = sample_gradients(problem, PolicyResponse(toy_cmdp.ExactCritic()), repetitions=12, paths=500, seed=0)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())
    assert float(error.norm() / exact.norm()) < 0.5  # and says something


def test_an_estimator_from_samples_alone_knows_nothing_that_the_paths_do_not_say() -> None:
    problem = toy_cmdp.building()
    exact = implicit_gradient(problem)
    critic = RegressionCritic(lambda rollouts: rollouts.steps["state"])
    found = sample_gradients(problem, PolicyResponse(critic), repetitions=12, paths=500, seed=0)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())
    assert float(torch.cosine_similarity(found.mean(0), exact, dim=0)) > 0.95


def test_a_fitted_system_without_noise_is_the_system() -> None:
    problem = toy_cmdp.lqr(gain=[[-9.0, -9.5]])
    exact = implicit_gradient(problem)
    problem.follower.respond(problem.leader, torch.tensor([0]))
    rollouts = problem.follower.rollout(torch.tensor([0]), 2, torch.Generator().manual_seed(0))
    assert relative(estimate(problem, toy_cmdp.FittedSystem(), rollouts), exact) < 1e-6


def test_zeroth_order_takes_linear_systems() -> None:
    problem = random_problem(0)
    exact = implicit_gradient(problem)
    generator = torch.Generator().manual_seed(0)
    problem.follower.respond(problem.leader, torch.arange(2))
    rollouts = problem.follower.rollout(torch.arange(2), 1, generator)
    found = estimate(problem, ZerothOrder(1e-4, directions=400, value=leader_value), rollouts)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9
