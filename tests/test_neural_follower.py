"""The neural follower comes close to the Boltzmann response, from sampled transitions only, and repeats itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import HPGD, FittedCritic, HPGDConfig, InputError, PolicyResponse, Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.followers.neural import NeuralSoftQFollower
from toy_cmdp.followers.solve import continuation
from toy_cmdp.problems.four_rooms import four_rooms
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.problems.tax_design import TaxLeader, tax_design
from toy_cmdp.tables.cmdp import ContextualMDP
from toy_cmdp.tables.transition import policy_system


def cmdp_of(problem: Problem) -> ContextualMDP:
    assert isinstance(problem.follower, ExactFollower)
    return problem.follower.cmdp


def divergence(problem: Problem, follower: NeuralSoftQFollower) -> float:
    """KL(pi || pi*) in nats, averaged over the policy's own discounted occupancy."""
    cmdp = cmdp_of(problem)
    tables, best = ExactFollower(cmdp, follower.temperature, follower.discount, horizon=1).solve(problem.leader)
    tables = tables.detach()
    log_policy = follower._log_policy(tables)
    system = policy_system(tables.transition, continuation(cmdp, follower.discount, log_policy) * log_policy.exp())
    occupancy = system.solve(tables.initial, transpose=True)
    per_state = (log_policy.exp() * (log_policy - best.log_policy)).sum(-1)
    per_context = (occupancy * per_state).sum(-1) / occupancy.sum(-1)
    return float((cmdp.context_probabilities * per_context).sum())


def trained(
    problem: Problem, temperature: float | Tensor, discount: float | Tensor, **options: Any
) -> NeuralSoftQFollower:
    follower = NeuralSoftQFollower(cmdp_of(problem), temperature, discount, horizon=5, **options)
    follower.respond(problem.leader, torch.arange(2))
    return follower


@pytest.mark.parametrize("population", [False, True], ids=["one", "population"])
def test_it_reaches_the_best_response_of_a_random_problem(population: bool) -> None:
    problem = random_cmdp(seed=3)
    temperature: float | Tensor = torch.tensor([0.3, 1.0]) if population else 0.5
    discount: float | Tensor = torch.tensor([0.8, 0.5]) if population else 0.8
    untrained = trained(problem, temperature, discount, updates=1)
    follower = trained(problem, temperature, discount, updates=400, environments=64, tries=3, hidden=32)
    assert divergence(problem, untrained) > 0.05
    assert divergence(problem, follower) < 3e-4


def test_action_features_are_seen() -> None:
    problem = random_cmdp(seed=3)
    options: dict[str, Any] = {"updates": 400, "environments": 64, "tries": 3, "hidden": 32}
    follower = trained(
        problem, 0.5, 0.8, action_features=torch.eye(3), features=torch.eye(4).expand(2, 4, 4), **options
    )
    assert divergence(problem, follower) < 0.005


def test_it_tracks_a_leader_that_moves() -> None:
    """A warm start needs a fraction of the updates."""
    problem = random_cmdp(seed=3)
    options: dict[str, Any] = {"environments": 64, "tries": 3, "hidden": 32}
    follower = trained(problem, 0.5, 0.8, updates=50, first_updates=400, **options)
    with torch.no_grad():
        problem.parameters[0].add_(0.3)
    stale = divergence(problem, follower)
    assert follower.respond(problem.leader, torch.arange(2))["updates"] == 50
    cold = trained(problem, 0.5, 0.8, updates=50, **options)
    assert divergence(problem, follower) < min(0.5 * stale, 0.1 * divergence(problem, cold))


@pytest.mark.slow
def test_it_finds_its_way_through_four_rooms() -> None:
    problem = four_rooms(temperature=0.02)
    options: dict[str, Any] = {"environments": 64, "tries": 4, "draws": 4, "hidden": 128, "exploration": 0.3}
    follower = trained(problem, 0.02, 0.99, updates=1600, target_rate=0.1, **options)
    assert divergence(problem, follower) < 0.04


@pytest.mark.slow
def test_it_solves_the_households_problem() -> None:
    problem = tax_design(0.3, grid=41)
    assert isinstance(problem.leader, TaxLeader)
    assets = problem.leader.assets
    bumps = [(-60, 20), (-30, 15), (-15, 8), (-5, 5), (0, 4), (5, 5), (10, 5), (15, 8), (30, 15), (60, 20)]
    columns = [torch.exp(-0.5 * ((assets - centre) / width) ** 2) for centre, width in bumps]
    features = torch.stack([*columns, assets / 100, torch.relu(assets) / 50], -1).expand(2, -1, -1)
    follower = trained(problem, 0.3, 0.9, features=features, environments=128, updates=2000)
    assert divergence(problem, follower) < 0.1


def test_what_it_learns_from_are_samples() -> None:
    """With a single draw of a single action the Bellman error is that of the sampled next states, not zero."""
    problem = random_cmdp(seed=3)
    options: dict[str, Any] = {"environments": 256, "hidden": 32, "first_updates": 400, "updates": 50}
    errors = {}
    for draws in (1, 16):
        follower = trained(problem, 0.5, 0.8, tries=1, draws=draws, **options)
        errors[draws] = follower.respond(problem.leader, torch.arange(2))["bellman_error"]
    assert errors[1] / errors[16] > 2.5  # 4, but for what is left to learn


def test_equal_seeds_give_equal_policies_and_a_resumed_run_goes_on() -> None:
    problem = random_cmdp(seed=3)
    contexts = torch.arange(2)
    options: dict[str, Any] = {"environments": 16, "hidden": 8, "updates": 5, "horizon": 5}

    def fresh(seed: int = 0) -> NeuralSoftQFollower:
        return NeuralSoftQFollower(cmdp_of(problem), 0.5, 0.8, seed=seed, **options)

    def policy(follower: NeuralSoftQFollower) -> Tensor:
        return follower._log_policy(problem.leader.tables().detach())

    whole, parts, other = fresh(), fresh(), fresh(1)
    for follower in (whole, parts, other):
        follower.respond(problem.leader, contexts)
    assert torch.equal(policy(whole), policy(parts))
    assert not torch.equal(policy(whole), policy(other))
    resumed = fresh()
    resumed.load_state_dict(parts.state_dict())
    state = parts.state_dict()
    parts.respond(problem.leader, contexts)  # what was handed out must not move with it
    again = fresh()
    again.load_state_dict(state)
    for follower in (whole, resumed, again):
        follower.respond(problem.leader, contexts)
    assert torch.equal(policy(whole), policy(resumed))
    assert torch.equal(policy(whole), policy(again))
    fresh().load_state_dict(fresh().state_dict())


def test_hpgd_learns_from_its_paths_and_resumes(tmp_path: Path) -> None:
    def weights(out: Path, steps: list[int]) -> Tensor:
        for number in steps:
            exact = random_cmdp(seed=3)
            cmdp = cmdp_of(exact)
            follower = NeuralSoftQFollower(cmdp, 0.5, 0.8, updates=3, environments=16, hidden=8, horizon=5)
            problem = dataclasses.replace(exact, follower=follower)
            optimizer = torch.optim.Adam(problem.parameters, lr=0.1, maximize=True)
            config = HPGDConfig(steps=number, contexts_per_step=8, group_size=1, checkpoint_every=1, progress=False)
            HPGD(problem, optimizer, PolicyResponse(FittedCritic(cmdp.cell)), config, out).run(resume=True)
        return problem.parameters[0].detach()

    assert torch.equal(weights(tmp_path / "whole", [4]), weights(tmp_path / "parts", [2, 4]))


def test_rollouts_have_the_exact_followers_form() -> None:
    problem = random_cmdp(seed=3)
    follower = trained(problem, 0.5, 0.8, updates=2, environments=8)
    problem.follower.respond(problem.leader, torch.arange(2))
    ours, referees = (f.rollout(torch.tensor([0, 1]), 3, torch.Generator()) for f in (follower, problem.follower))
    assert ours.steps.keys() == referees.steps.keys()
    assert ours.steps["log_policy_all"].dtype == torch.float64
    tables = problem.leader.tables().detach()
    expected = follower._log_policy(tables)[ours.contexts[:, None], ours.steps["state"][:, :-1]]
    assert torch.equal(ours.steps["log_policy_all"], expected)


def test_what_is_wrong_is_named() -> None:
    problem = random_cmdp(seed=3)
    cmdp = cmdp_of(problem)
    wrong: list[dict[str, Any]] = [
        {"updates": 0},
        {"first_updates": 0},
        {"environments": 0},
        {"tries": 0},
        {"draws": 0},
        {"hidden": 0},
        {"horizon": 0},
        {"learning_rate": 0.0},
        {"target_rate": 0.0},
        {"heat": 0.5},
        {"exploration": 1.5},
        {"leader_discount": 1.0},
        {"features": torch.zeros(2, 3, 1)},
        {"features": torch.full((2, 4, 1), float("nan"))},
        {"action_features": torch.zeros(3)},
    ]
    for options in wrong:
        with pytest.raises(InputError, match=rf"^(NeuralSoftQFollower\.)?{next(iter(options))}: expected"):
            NeuralSoftQFollower(cmdp, 0.5, 0.9, **options)
    for arguments, name in (((0.0, 0.9), "temperature"), ((0.5, 1.0), "discount"), ((0.5, torch.ones(3)), "discount")):
        with pytest.raises(InputError, match=rf"^{name}"):
            NeuralSoftQFollower(cmdp, *arguments)
    with pytest.raises(InputError, match=r"^action_features: expected a row for each of the leader's 3 actions"):
        trained(problem, 0.5, 0.9, action_features=torch.zeros(2, 1))
    follower = NeuralSoftQFollower(cmdp, 0.5, 0.9, updates=1, environments=4)
    with pytest.raises(InputError, match="no policy yet"):
        follower.rollout(torch.tensor([0]), 1, torch.Generator())
    follower.respond(problem.leader, torch.arange(2))
    with pytest.raises(InputError, match=r"^contexts"):
        follower.rollout(torch.tensor([2]), 1, torch.Generator())
    with pytest.raises(InputError, match=r"^group_size"):
        follower.rollout(torch.tensor([0]), 0, torch.Generator())
    with pytest.raises(InputError, match="belongs to another follower"):
        NeuralSoftQFollower(cmdp, 0.5, 0.9, hidden=8).load_state_dict(follower.state_dict())
