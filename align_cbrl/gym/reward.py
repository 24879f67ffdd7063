"""`LeaderReward`: an environment in which the leader pays, and a memory whose rewards follow the leader."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from align_cbrl.checks import checked
from align_cbrl.gym.contexts import Contexts
from align_cbrl.gym.transitions import transition_rewards
from align_cbrl.problem import Leader

OWN = "environment_reward"
"""In a step's info: the reward of the environment itself."""


@checked
class LeaderReward(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Replaces the environment's reward by the leader's, which may contain it (`steps["environment_reward"]`).

    Args:
        environment: what is wrapped.
        leader: who pays; may be replaced at any time.

    Raises:
        InputError: from `step`: a reward that is not finite.

    Example:
        >>> from align_cbrl.gym import NetworkLeader
        >>> leader = NetworkLeader(gymnasium.make("Pendulum-v1"))
        >>> led = LeaderReward(Contexts([gymnasium.make("Pendulum-v1")], [1.0]), leader)
        >>> _ = led.reset(seed=0)
        >>> _, reward, _, _, info = led.step(led.action_space.sample())
        >>> abs(reward - info["environment_reward"]) < 1e-5  # a new leader adds nothing
        True
    """

    def __init__(self, environment: Contexts, leader: Leader) -> None:
        super().__init__(environment)
        self.leader = leader
        self._contexts = environment
        self._before = np.zeros(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._before, info = self.env.reset(seed=seed, options=options)
        return self._before, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """A step that the leader pays for; its info holds the environment's own reward."""
        observation, own, terminated, truncated, info = self.env.step(action)
        contexts, states = self._contexts.split(np.stack([self._before, observation]))
        reward = transition_rewards(self.leader, contexts[:1], states[:1], action[None], states[1:], [own])
        self._before = observation
        return observation, float(reward[0]), terminated, truncated, {**info, OWN: float(own)}


class LedReplay(ReplayBuffer):
    """Stable-Baselines3's replay buffer, which also keeps the environment's own rewards.

    Transitions stay true when the leader moves; only what is paid for them does not. `relabel` pays anew.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.own = np.zeros_like(self.rewards)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        """Keep a transition."""
        self.own[self.pos] = [info[OWN] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)

    def relabel(self, leader: Leader, environment: Contexts) -> None:
        """Put the leader's present rewards in the place of those it paid when the transitions were made."""
        count = self.size()
        if not count:
            return
        contexts, states = environment.split(self.observations[:count, 0])
        _, following = environment.split(self.next_observations[:count, 0])
        low, high = environment.action_space.low, environment.action_space.high
        actions = low + (self.actions[:count, 0] + 1) / 2 * (high - low)
        self.rewards[:count, 0] = transition_rewards(leader, contexts, states, actions, following, self.own[:count, 0])
