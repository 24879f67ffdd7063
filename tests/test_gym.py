"""Followers from Gymnasium and Stable-Baselines3: what is paid, what is seen, what is kept, and what is refused."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from align_cbrl.recipes.gym.regulator import BOUND, DISCOUNT, LENGTH, TEMPERATURE, regulator
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from torch import Tensor

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    HPGDConfig,
    InputError,
    Leader,
    PolicyResponse,
    Problem,
    RegressionCritic,
    Rollouts,
    RunStopped,
)
from align_cbrl.gym import Contexts, GymFollower, LeaderReward, NetworkLeader, policy_nodes
from toy_cmdp import LinearSystems, leader_value
from toy_cmdp.environments import LinearEnvironment

SMALL = {
    "policy_kwargs": {"net_arch": [8]},
    "learning_starts": 20,
    "batch_size": 16,
    "buffer_size": 500,
    "train_freq": 10,
    "gradient_steps": 2,
}


def pendulum() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("Pendulum-v1")


class Line(gymnasium.Env[Any, Any]):
    """s' = s + a / 10 from 0; ends beyond `end` where there is one; `wrong` is what it shows at step 3."""

    observation_space = spaces.Box(-5, 5, (1,), np.float32)
    action_space = spaces.Box(-1, 3, (1,), np.float32)

    def __init__(self, end: float = math.inf, wrong: float | None = None, limit: int = 50) -> None:
        self.end, self.wrong, self.limit = end, wrong, limit

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.s, self.t = 0.0, 0
        return np.array([0.0], dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.s, self.t = self.s + float(action[0]) / 10, self.t + 1
        shown = self.wrong if self.wrong is not None and self.t == 3 else self.s
        return np.array([shown], dtype=np.float32), self.s, self.s > self.end, self.t >= self.limit, {}


class Slope(Leader):
    """Pays x s + a + the environment's own, and 10 in context 1."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(x, dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> Tensor:
        steps = rollouts.steps
        inside = self.x * steps["state"][:, :-1, 0] + steps["action"][..., 0] + steps["environment_reward"]
        return inside + 10 * (rollouts.contexts == 1)[:, None]


def small(make: Callable[[], Any] = Line, **changes: Any) -> GymFollower:
    arguments: dict[str, Any] = {"warmup": 60, "steps": 20, "length": 10, "settings": SMALL}
    return GymFollower([make], 0.1, 0.9, **{**arguments, **changes})


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# ------------------------------------------------------------------------------------------------ what is paid


def test_the_leader_pays_for_the_state_before_the_action_and_the_action() -> None:
    led = LeaderReward(Contexts([Line()], [1.0]), Slope(2.0))
    led.reset(seed=0)
    states, paid = [0.0], []
    for action in (1.0, -1.0, 3.0):
        observation, reward, _, _, info = led.step(np.array([action], dtype=np.float32))
        states.append(float(observation[0]))
        paid.append((reward, info["environment_reward"]))
    assert paid[2][0] == pytest.approx(2 * states[2] + 3 + states[3], abs=1e-6)
    assert paid[2][1] == pytest.approx(states[3], abs=1e-6)


def test_the_replay_buffer_is_paid_anew_when_the_leader_has_moved() -> None:
    follower = small()
    leader = Slope(2.0)
    follower.respond(leader, torch.tensor([0]))
    memory = follower.agent.replay_buffer
    count = memory.size()
    before = memory.rewards[:count, 0].copy()
    follower.rollout(torch.tensor([0]), 3, torch.Generator().manual_seed(0))
    assert memory.size() == count + 30  # the agent learns from what the leader has seen
    leader.x.data.fill_(-5.0)
    memory.relabel(leader, follower._world)
    states, actions = memory.observations[: count + 30, 0, 0], 1 + 2 * memory.actions[: count + 30, 0, 0]
    expected = -5 * states + actions + memory.own[: count + 30, 0]
    assert np.allclose(memory.rewards[: count + 30, 0], expected, atol=1e-5)
    leader.x.data.fill_(4.0)
    follower.respond(leader, torch.tensor([0]))
    assert np.allclose(memory.rewards[: count + 30, 0], expected + 9 * states, atol=1e-5)
    assert np.allclose(before, (2 * states + actions)[:count] + memory.own[:count, 0], atol=1e-5)


def test_contexts_are_named_to_agent_and_leader() -> None:
    follower = GymFollower(
        [Line, lambda: Line(end=0.3)], 0.1, 0.9, warmup=60, steps=20, length=12, settings=SMALL, seed=3,
        context_probabilities=[1.0, 3.0],
    )  # fmt: skip
    drawn = follower.sample_contexts(4000, torch.Generator().manual_seed(0)).double().mean()
    assert abs(float(drawn) - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    follower.respond(Slope(), torch.tensor([0, 1]))
    assert follower.agent.observation_space.shape == (3,)
    rollouts = follower.rollout(torch.tensor([0, 1]), 6, torch.Generator().manual_seed(0))
    assert rollouts.contexts.tolist() == [0] * 6 + [1] * 6
    assert rollouts.steps["state"].shape[-1] == 1
    assert bool(rollouts.mask[:6].all())
    assert bool((rollouts.steps["state"][:, 1:, 0] > 0.3).logical_and(rollouts.mask)[6:].any(1).eq(
        ~rollouts.mask[6:].all(1)
    ).all())  # fmt: skip
    memory = follower.agent.replay_buffer
    memory.relabel(Slope(), follower._world)
    count = memory.size()
    own = memory.rewards[:count, 0] - (1 + 2 * memory.actions[:count, 0, 0]) - memory.own[:count, 0]
    assert np.allclose(own, 10 * memory.observations[:count, 0, 2], atol=1e-5)
    nodes, weight = policy_nodes(rollouts)
    assert nodes.shape == (12, rollouts.horizon, 16, 1) and float(weight.sum()) == pytest.approx(1)


def test_a_path_ends_where_its_environment_ends() -> None:
    follower = small(lambda: Line(end=0.2))
    follower.respond(Slope(), torch.tensor([0]))
    rollouts = follower.rollout(torch.tensor([0]), 40, torch.Generator().manual_seed(0))
    state, mask = rollouts.steps["state"][..., 0], rollouts.mask
    over = state[:, 1:] > 0.2
    assert bool(over.any())
    for path in range(40):
        taken = int(mask[path].sum())
        assert not bool(over[path, : taken - 1].any())
        assert bool(over[path, taken - 1]) or taken == rollouts.horizon
        assert bool((state[path, taken:] == state[path, taken]).all())
    memory = follower.agent.replay_buffer
    ended = memory.dones[: memory.size(), 0] == 1
    assert np.array_equal(ended, memory.next_observations[: memory.size(), 0, 0] > 0.2)


def test_a_time_limit_is_no_end() -> None:
    follower = small(lambda: Line(limit=5))
    follower.respond(Slope(), torch.tensor([0]))
    rollouts = follower.rollout(torch.tensor([0]), 2, torch.Generator().manual_seed(0))
    assert rollouts.horizon == 5
    memory = follower.agent.replay_buffer
    count = memory.size()
    assert memory.dones[:count].sum() > 0
    assert np.array_equal(memory.dones[:count], memory.timeouts[:count])


def test_a_new_network_leader_adds_nothing_and_stays_in_its_budget() -> None:
    leader = NetworkLeader(pendulum(), bound=0.5)
    rollouts = Rollouts(
        contexts=torch.zeros(2, dtype=torch.long),
        mask=torch.ones(2, 3, dtype=torch.bool),
        group=torch.arange(6).view(2, 3),
        steps={
            "state": torch.randn(2, 4, 3, dtype=torch.float64),
            "action": torch.randn(2, 3, 1, dtype=torch.float64),
            "environment_reward": torch.randn(2, 3, dtype=torch.float64),
        },
    )
    assert torch.equal(leader.reward(rollouts), rollouts.steps["environment_reward"])
    torch.nn.init.constant_(leader.network[-1].weight, 50.0)
    assert 0.4 < float(leader.added(rollouts).detach().abs().max()) <= 0.5


# -------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("algorithm", ["sac", "ppo"])
def test_the_policy_is_that_of_the_agent(algorithm: Any) -> None:
    settings = SMALL if algorithm == "sac" else {"policy_kwargs": {"net_arch": [8]}, "n_steps": 20, "batch_size": 10}
    follower = small(algorithm=algorithm, settings=settings)
    follower.respond(Slope(), torch.tensor([0]))
    assert isinstance(follower.agent, SAC if algorithm == "sac" else PPO)
    rollouts = follower.rollout(torch.tensor([0]), 1, torch.Generator().manual_seed(0))
    at = rollouts.steps["state"][0, :1].float().numpy()
    torch.manual_seed(0)
    theirs = follower.agent.predict(np.repeat(at, 20_000, 0), deterministic=False)[0]
    nodes, weight = policy_nodes(rollouts)
    ours = float(nodes[0, 0, :, 0] @ weight)
    assert abs(theirs.mean() - ours) < 0.05
    mean, deviation = follower._normal(torch.as_tensor(at))
    drawn = follower._into(mean + deviation * torch.randn(20_000, 1))
    assert abs(float(drawn.mean()) - theirs.mean()) < 4 * theirs.std() * (2 / 20_000) ** 0.5
    assert float(drawn.std()) == pytest.approx(theirs.std(), rel=0.03)


# ---------------------------------------------------------------------------------------------------- resuming


def leader_run(out: Path | None, steps: int) -> HPGD:
    follower = small(pendulum, length=6)
    leader = NetworkLeader(pendulum(), width=4)
    objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["state"][:, 1:, 0], discount=0.9)
    critic = RegressionCritic(lambda rollouts: rollouts.steps["state"], nodes=policy_nodes, pooled=True)
    optimizer = torch.optim.Adam(leader.parameters(), lr=0.1, maximize=True)
    config = HPGDConfig(steps=steps, contexts_per_step=1, group_size=6, progress=False, checkpoint_every=1)
    return HPGD(Problem(leader, objective, follower), optimizer, PolicyResponse(critic), config, out=out)


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    whole = leader_run(None, 4)
    whole.run()
    leader_run(tmp_path, 2).run()
    resumed = leader_run(tmp_path, 4)
    resumed.run(resume=True)
    assert equal(whole.problem.leader.state_dict(), resumed.problem.leader.state_dict())
    assert equal(whole.problem.follower.state_dict(), resumed.problem.follower.state_dict())
    assert [row["objective"] for row in whole.history] == [row["objective"] for row in resumed.history]
    assert [row["environment_steps"] for row in resumed.history] == [60, 116, 172, 228]


def test_the_callers_random_numbers_stay_as_they_are() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    small().respond(Slope(), torch.tensor([0]))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


def test_an_agent_that_diverges_stops_and_is_put_back() -> None:
    follower = small(settings={**SMALL, "learning_rate": 1e30})
    before = follower.state_dict()
    with pytest.raises(RunStopped, match=r"diverged .* 0 and \d+.*learning_rate"):
        follower.respond(Slope(), torch.tensor([0]))
    assert equal(before, follower.state_dict())


def test_a_run_whose_agent_diverges_is_resumed_from_the_last_leader_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = leader_run(tmp_path, 4)
    learn = run.problem.follower.agent.learn

    def failing(*args: Any, **settings: Any) -> None:
        learn(*args, **settings)
        if len(run.history) == 2:
            with torch.no_grad():
                next(run.problem.follower.agent.policy.parameters()).fill_(math.nan)

    monkeypatch.setattr(run.problem.follower.agent, "learn", failing)
    with pytest.raises(RunStopped):
        run.run()
    resumed = leader_run(tmp_path, 4)
    resumed.run(resume=True)
    whole = leader_run(None, 4)
    whole.run()
    assert equal(whole.problem.leader.state_dict(), resumed.problem.leader.state_dict())


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gymnasium.make("MountainCar-v0"), r"continuous actions.*Discrete\(3\).*MountainCarContinuous-v0"),
        (lambda: gymnasium.make("FrozenLake-v1"), r"observations in a Box.*FlattenObservation"),
        (lambda: 3, r"environments\[0\].*gymnasium.Env, got one that makes int"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        small(make)


def test_contexts_of_other_spaces_are_refused() -> None:
    with pytest.raises(InputError, match=r"environments\[1\].*observation_space"):
        GymFollower([Line, pendulum], 0.1, 0.9)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_is_refused_and_nothing_is_lost(wrong: float) -> None:
    follower = small(lambda: Line(wrong=wrong))
    before = follower.state_dict()
    with pytest.raises(InputError, match=r"observation: expected finite numbers.*step 3"):
        follower.respond(Slope(), torch.tensor([0]))
    assert equal(before, follower.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"discount": 1.0}, "discount"),
        ({"settings": {"gamma": 0.5}}, "gamma"),
        ({"settings": {"no_such_setting": 1}}, "no_such_setting"),
        ({"settings": {"n_steps": 3}}, "n_steps=1"),
        ({"settings": {"learning_rate": "fast"}}, "settings"),
        ({"context_probabilities": [0.5, 0.5]}, "context_probabilities"),
        ({"algorithm": "dqn"}, "algorithm"),
        ({"environments": []}, "environments"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GymFollower(**{"environments": [Line], "temperature": 0.1, "discount": 0.9, **changes})


def test_a_leader_that_sets_the_temperature_or_pays_nan_is_refused() -> None:
    class Hot(Slope):
        def follower_temperature(self) -> Tensor:
            return self.x.exp()

    with pytest.raises(InputError, match="Hot: expected a leader that leaves the temperature alone"):
        small().respond(Hot(), torch.tensor([0]))
    with pytest.raises(InputError, match=r"Slope.reward: expected finite rewards, got nan for state \[0.0\]"):
        small().respond(Slope(math.nan), torch.tensor([0]))


def test_without_the_extra_its_name_is_said() -> None:
    code = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "import align_cbrl.gym\n"
        "try: align_cbrl.gym.GymFollower\n"
        "except align_cbrl.InputError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "pip install 'align-cbrl[gym]'" in said


# ------------------------------------------------------------------------------------------- the exact referee


def test_the_linear_environment_is_the_linear_system() -> None:
    """Moments of closed-loop paths against those of `LinearQuadraticFollower`."""
    problem = regulator(torch.zeros(3))
    systems = problem.leader.systems()  # type: ignore[operator]
    assert isinstance(systems, LinearSystems)
    environment = LinearEnvironment(systems, length=6, bound=BOUND)
    _, response = problem.follower.solve(problem.leader)  # type: ignore[attr-defined]
    gain, deviation = response.gain[0].detach().numpy(), float(response.covariance.detach()) ** 0.5
    random_ = np.random.default_rng(0)
    ends, rewards = [], []
    for episode in range(4000):
        state, _ = environment.reset(seed=episode)
        for _ in range(6):
            state, reward, terminated, truncated, _ = environment.step(
                -gain @ state + deviation * random_.standard_normal(1)
            )
        assert truncated and not terminated
        ends.append(state)
        rewards.append(reward)
    problem.follower.respond(problem.leader, torch.tensor([0]))
    rollouts = problem.follower.rollout(torch.zeros(4000, dtype=torch.long), 1, torch.Generator().manual_seed(0))
    theirs = rollouts.steps["state"][:, 6].numpy()
    paid = problem.leader.reward(rollouts)[:, 5].detach().numpy()
    for one, other in ((np.stack(ends), theirs), (np.stack(ends) ** 2, theirs**2), (np.array(rewards), paid)):
        error = (one.var(0) / len(one) + other.var(0) / len(other)) ** 0.5
        assert np.all(np.abs(one.mean(0) - other.mean(0)) <= 4 * error + 1e-6)


@pytest.mark.slow
def test_the_leader_of_sac_gains_most_of_what_there_is_to_gain(tmp_path: Path) -> None:
    """HPGD with SAC in the place of the exact follower; exact values."""
    from align_cbrl.recipes.gym.recipe import Config, ascend, best_known

    known, found = best_known(), ascend(Config(), 0, tmp_path)
    assert found["value"] - known["start"] > 0.8 * (known["best"] - known["start"])


@pytest.mark.slow
def test_the_hypergradient_from_sac_points_where_the_exact_one_does() -> None:
    """Some five minutes; the figures are in docs/gymnasium.md."""
    from align_cbrl.recipes.gym.recipe import Config, cosine

    for x in Config().cosines.leaders:
        assert cosine(Config(), x)["cosine"] > 0.9


def test_the_problem_has_the_gradient_that_is_compared_with() -> None:
    problem = regulator(torch.tensor([0.3, -0.2, 0.4]))
    (value,) = [leader_value(problem)]
    value.backward()
    for i, found in enumerate(problem.leader.x.grad.tolist()):
        values = []
        for step in (1e-5, -1e-5):
            x = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
            x[i] += step
            values.append(leader_value(regulator(x)).item())
        assert found == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)
    assert (DISCOUNT, TEMPERATURE, LENGTH) == (0.8, 0.5, 40)
