"""Sampling, resuming, and the conventions of tabular rollouts."""

from __future__ import annotations

import pytest
import torch

from toy_cmdp import ExactCritic, enumerate_paths, four_rooms, four_rooms_map, random_cmdp
from toy_cmdp.followers.exact import default_horizon
from toy_cmdp.referee.exact import context_values, exact_world, leader_value


def sample(problem, count=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contexts = problem.follower.sample_contexts(count, generator)
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, generator)


def test_rollout_conventions():
    problem = random_cmdp(horizon=3, states=2)
    rollouts = sample(problem, 50)
    state, action = rollouts.steps["state"], rollouts.steps["action"]
    assert rollouts.mask.shape == action.shape == (50, 3) and state.shape == (50, 4)
    assert (state[:, -1] == -1).all() and rollouts.steps["ended"].all()
    assert (state[:, :3] // 2 == torch.arange(3)).all()  # one state of each layer
    chosen = rollouts.steps["log_policy_all"].gather(-1, action[..., None])[..., 0]
    assert torch.equal(chosen, rollouts.log_policy)
    later = rollouts.group[:, 1:].reshape(-1)
    assert len(later.unique()) == len(later)
    first = problem.follower.cmdp.cell(rollouts)[:, 0]
    assert torch.equal(rollouts.group[:, 0], first) and first.max() < later.min()


def test_rollouts_cut_at_the_horizon_keep_their_last_state():
    problem = random_cmdp()
    rollouts = sample(problem, 20)
    assert rollouts.horizon == default_horizon(0.9) == 66
    assert not rollouts.steps["ended"].any() and (rollouts.steps["state"] >= 0).all()
    assert default_horizon(0.99) == 688 and default_horizon(0.0) == 1


def test_groups_repeat_contexts():
    problem = four_rooms()
    problem.follower.respond(problem.leader, torch.tensor([0]))
    rollouts = problem.follower.rollout(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
    assert rollouts.contexts.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(rollouts.group[:, 0].unique()) == 2


def test_samples_follow_the_exact_law():
    problem = random_cmdp(horizon=3, states=2, actions=2, seed=5)
    exact = enumerate_paths(problem, 3)
    drawn = sample(problem, 40_000)
    for name in ("state", "action"):
        expected = (exact.weight[:, None] * exact.steps[name]).mean(0)
        got = drawn.steps[name].double()
        error = (got.mean(0) - expected).abs() / (got.std(0) / 200).clamp(min=1e-12)
        assert error.max() < 4
    assert (drawn.contexts.double().mean() - problem.follower.cmdp.context_probabilities[1]).abs() < 0.01


def test_path_returns_average_to_the_exact_value():
    problem = four_rooms(temperature=0.005)
    rollouts = sample(problem, 4000)
    utility = problem.objective.utility(problem.leader, rollouts)
    totals = (utility * 0.99 ** torch.arange(rollouts.horizon)).sum(1)
    error = totals.mean() - leader_value(problem)
    assert error.abs() < 4 * totals.std() / 4000**0.5


def test_the_same_seed_gives_the_same_paths():
    a, b = sample(random_cmdp(), seed=7), sample(random_cmdp(), seed=7)
    assert torch.equal(a.steps["state"], b.steps["state"]) and torch.equal(a.log_policy, b.log_policy)


def test_resuming_is_bit_identical():
    def step(problem, seed):
        rollouts = sample(problem, 20, seed)
        with torch.no_grad():
            problem.parameters[0].add_(0.1 * torch.randn(105, generator=torch.Generator().manual_seed(seed)))
        return rollouts

    whole = four_rooms()
    for seed in range(3):
        step(whole, seed)
    leader, follower = {k: v.clone() for k, v in whole.leader.state_dict().items()}, whole.follower.state_dict()
    leader_value(whole)  # looking at J must not disturb the run
    resumed = four_rooms()
    resumed.leader.load_state_dict(leader)
    resumed.follower.load_state_dict(follower)
    for seed in range(3, 5):
        a, b = step(whole, seed), step(resumed, seed)
        assert torch.equal(a.log_policy, b.log_policy) and torch.equal(a.steps["state"], b.steps["state"])
    assert torch.equal(whole.follower.state_dict()["value"], resumed.follower.state_dict()["value"])
    fresh = random_cmdp().follower
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.state_dict() == {"value": None}


def test_exact_critic_reads_the_tables():
    problem = random_cmdp(horizon=3, states=2, seed=1)
    rollouts = sample(problem, 30)
    critique = ExactCritic().evaluate(problem, rollouts, torch.zeros(30, 3, dtype=torch.float64))
    world = exact_world(problem)
    c, s, a = int(rollouts.contexts[4]), int(rollouts.steps["state"][4, 1]), int(rollouts.steps["action"][4, 1])
    assert critique.advantage[4, 1] == world.advantage[c, s, a]
    assert critique.value[4, 1] == world.value[c, s] and critique.soft_value[4, 1] == world.solution.value[c, s]
    assert (critique.value[:, -1] == 0).all() and (critique.soft_value[:, -1] == 0).all()
    mean = (problem.follower.cmdp.context_probabilities * context_values(problem)).sum()
    assert mean.item() == pytest.approx(leader_value(problem).item(), abs=1e-14)


def test_leader_scores_without_gradients_as_with():
    problem = random_cmdp(seed=3)
    rollouts = sample(problem, 10)
    with torch.no_grad():
        quiet = problem.leader.log_transition(rollouts)
    loud = problem.leader.log_transition(rollouts)
    assert quiet is not None and not quiet.requires_grad and loud.requires_grad
    assert torch.equal(quiet, loud)
    rooms = four_rooms()
    paths = sample(rooms, 10)
    assert (
        rooms.leader.log_transition(paths) is rooms.leader.log_initial(paths) is rooms.leader.log_prior(paths) is None
    )


def test_the_map():
    cells = four_rooms_map()
    assert len(cells) == 104 and cells == tuple(sorted(cells))
    for cell in ((4, 1), (8, 4), (1, 9), (11, 11)):
        assert cell in cells
    problem = four_rooms()
    moves = problem.leader.get_buffer("transition")[0]
    start = cells.index((4, 1))
    assert moves[start, 1, cells.index((4, 2))].item() == pytest.approx(0.56)
    assert moves[start, 1, start].item() == pytest.approx(0.44 / 3)  # left is a wall
    assert problem.leader.weights.shape == (105,) and problem.leader.weights.std().item() == pytest.approx(
        0.01, rel=0.2
    )
