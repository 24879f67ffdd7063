"""`GymFollower`: an agent of Stable-Baselines3 in an environment of Gymnasium, as a follower."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from torch import Tensor

from align_cbrl.checks import Count, Discount, Positive, Whole, checked
from align_cbrl.errors import InputError, RunStopped, first_line
from align_cbrl.gym.contexts import Contexts
from align_cbrl.gym.nodes import NODES, white_nodes
from align_cbrl.gym.reward import OWN, LeaderReward, LedReplay
from align_cbrl.problem import Follower, Leader, step_seed
from align_cbrl.rollouts import Rollouts

Make = Callable[[], gymnasium.Env[Any, Any]]
"""Makes an environment."""

_OURS = {
    "device",
    "ent_coef",
    "env",
    "gamma",
    "optimize_memory_usage",
    "policy",
    "replay_buffer_class",
    "seed",
    "use_sde",
}
"""Arguments of the agents that are no user's."""


@checked
class GymFollower(Follower):
    """Learns by SAC or PPO what the leader pays for, goes on from where it was after a leader step, and is observed.

    SAC at a fixed entropy coefficient maximises E sum gamma^t (r + lambda H(pi)), so that its fixed point is the
    Boltzmann response at the temperature lambda, within its policies: normal ones, independent in every direction of
    the action, squashed into the box. After a leader step its replay buffer is paid anew by the leader, so that all it
    has ever seen serves the new response. PPO's entropy bonus is no part of its returns: it is paid for the present
    state alone, so that PPO does not seek states in which it may be random, and its fixed point is no Boltzmann
    response but for short horizons (docs/gymnasium.md).

    An episode that is over by the environment's own rules is worth nothing afterwards; one that is cut by a time limit
    goes on, for the agent. Rollouts end at either.

    Args:
        environments: make one environment a context, with the same spaces. Each is made several times.
        temperature: lambda, the entropy coefficient, in units of the reward.
        discount: gamma.
        algorithm: "sac" or "ppo".
        warmup: environment steps before the first leader step. PPO takes whole batches of its n_steps, at least one.
        steps: environment steps before every further leader step; likewise.
        length: steps of a path at most.
        context_probabilities: nature's law; all alike by default.
        settings: of the agent's constructor, such as learning_rate, policy_kwargs, gradient_steps.
        seed: of the agent and its environments.

    Attributes:
        agent: the `SAC` or `PPO`.
        environment_steps: of training and of rollouts, so far.

    Raises:
        InputError: environments that `Contexts` refuses, a law of another length, settings that this class sets or
            that the agent does not take; from `respond`: a leader that sets the temperature, rewards and observations
            that are not finite.
        RunStopped: from `respond`: the agent diverged. It is put back to where it was before.

    Example:
        >>> from align_cbrl.gym import NetworkLeader
        >>> make = lambda: gymnasium.make("Pendulum-v1")
        >>> follower = GymFollower([make], temperature=0.1, discount=0.9, warmup=120, steps=10, length=5)
        >>> _ = follower.respond(NetworkLeader(make()), torch.tensor([0]))
        >>> rollouts = follower.rollout(torch.tensor([0]), 2, torch.Generator().manual_seed(0))
        >>> tuple(rollouts.steps["state"].shape), tuple(rollouts.steps["action"].shape), follower.environment_steps
        ((2, 6, 3), (2, 5, 1), 130)
    """

    def __init__(
        self,
        environments: Sequence[Make],
        temperature: Positive,
        discount: Discount,
        *,
        algorithm: Literal["sac", "ppo"] = "sac",
        warmup: Count = 10_000,
        steps: Count = 1_000,
        length: Count = 200,
        context_probabilities: Sequence[Positive] | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: Whole = 0,
    ) -> None:
        if not environments:
            raise InputError("environments: expected at least one, got none")
        law = [1.0] * len(environments) if context_probabilities is None else list(context_probabilities)
        if len(law) != len(environments):
            raise InputError(
                f"context_probabilities: expected {len(environments)} numbers, one an environment, got {len(law)}"
            )
        self.environments, self.settings = list(environments), dict(settings or {})
        self.temperature, self.discount = temperature, discount
        self.algorithm, self.warmup, self.steps, self.length, self.seed = algorithm, warmup, steps, length, seed
        self.context_probabilities = torch.tensor(law, dtype=torch.float64) / sum(law)
        if own := sorted(_OURS & set(self.settings)):
            raise InputError(f"settings: expected none of {sorted(_OURS)}, which GymFollower sets itself, got {own}")
        if algorithm == "sac" and self.settings.get("n_steps", 1) != 1:
            raise InputError(
                f"settings: expected n_steps=1 for SAC, since rewards are paid anew one by one, got "
                f"{self.settings['n_steps']!r}"
            )
        self._world = self._made()
        self._copies: list[Contexts] = []
        self._led = LeaderReward(self._world, _Nobody())
        with _own_randomness():
            self.agent = self._new_agent()
        self._rolled = 0

    def _new_agent(self) -> Any:
        ours: dict[str, Any] = {
            "ent_coef": self.temperature,
            "gamma": self.discount,
            "seed": step_seed(self.seed, 0) % 2**32,
        }
        kind: Any = PPO
        if self.algorithm == "sac":
            kind, ours["replay_buffer_class"] = SAC, LedReplay
        else:
            # Standardised advantages would make the coefficient one in units that change from batch to batch.
            ours["normalize_advantage"] = False
        try:
            return kind("MlpPolicy", self._led, device="cpu", **{**ours, **self.settings})
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(f"settings: {kind.__name__} does not take {self.settings}: {first_line(error)}") from error

    def _made(self) -> Contexts:
        made = [make() for make in self.environments]
        for i, environment in enumerate(made):
            if not isinstance(environment, gymnasium.Env):
                raise InputError(
                    f"environments[{i}]: expected a function that makes a gymnasium.Env, got one that makes "
                    f"{type(environment).__name__}"
                )
        return Contexts(made, self.context_probabilities.tolist())

    @property
    def environment_steps(self) -> int:
        """Of training and of rollouts, so far."""
        return int(self.agent.num_timesteps) + self._rolled

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts by nature's law, long [count]."""
        return torch.multinomial(self.context_probabilities, count, replacement=True, generator=generator)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Learn for `steps` (`warmup`, the first time) environment steps, in all contexts as nature draws them.

        What happens is a function of the agent, its replay buffer, `seed` and the steps taken so far: every turn begins
        new episodes, and no state of an environment or of a random generator outlives it.

        Returns:
            `environment_steps`; and what the agent's logger holds, such as `critic_loss`.
        """
        if leader.follower_temperature() is not None:
            raise InputError(
                f"{type(leader).__name__}: expected a leader that leaves the temperature alone, since the agent's "
                "entropy coefficient is fixed; drop follower_temperature"
            )
        agent, before = self.agent, self._parameters()
        self._led.leader = leader
        seed = step_seed(self.seed, agent.num_timesteps) % 2**32
        with _own_randomness():
            agent.set_random_seed(seed)
            agent.set_env(agent.get_env(), force_reset=True)
            if self.algorithm == "sac":
                agent.replay_buffer.relabel(leader, self._world)
            try:
                agent.learn(self.warmup if agent.num_timesteps == 0 else self.steps, reset_num_timesteps=False)
                failure = None
            except Exception as error:  # to be judged below: an agent of NaN fails anywhere
                failure = error
        diverged = not all(bool(torch.isfinite(p).all()) for p in agent.policy.parameters())
        if failure is not None or diverged:
            at = agent.num_timesteps
            self._restore(before)
            if not diverged and failure is not None:
                raise failure
            raise RunStopped(
                f"the agent diverged between its environment steps {agent.num_timesteps} and {at}: its networks hold "
                "numbers that are not finite; it is back at the former. Resume with a smaller learning_rate in "
                "settings, a smaller bound of the leader's rewards, or a lower discount"
            ) from failure
        logged = {k.removeprefix("train/"): float(v) for k, v in agent.logger.name_to_value.items() if "loss" in k}
        return {"environment_steps": float(self.environment_steps), **logged}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Paths of the present policy, as it is random; SAC learns from them too, in its next response.

        `steps` hold "state" [B, T + 1, n] (observations, without the context), "action" [B, T, m],
        "environment_reward" [B, T], and the policy as "action_nodes" [B, T, N, m] (`policy_nodes`). After the end
        of a path they repeat its last state, and are zero.

        Raises:
            InputError: contexts out of range, a group size below one, an observation that is not finite.
        """
        count = len(self.environments)
        if group_size < 1:
            raise InputError(f"group_size: expected at least 1, got {group_size}")
        if contexts.numel() == 0 or not bool(((contexts >= 0) & (contexts < count)).all()):
            raise InputError(f"contexts: expected numbers in [0, {count}), got {contexts.tolist()}")
        contexts = contexts.repeat_interleave(group_size)
        size, length, actions = len(contexts), self.length, self._world.action_space.shape[0]
        while len(self._copies) < size:
            self._copies.append(self._made())
        seeds = torch.randint(2**31, (size,), generator=generator).tolist()
        worlds = self._copies[:size]
        seen = np.stack(
            [
                world.reset(seed=seed, options={"context": context})[0]
                for world, seed, context in zip(worlds, seeds, contexts.tolist(), strict=True)
            ]
        )
        states, taken = np.zeros((size, length + 1, self._world.states)), np.zeros((size, length, actions))
        own, mask = np.zeros((size, length)), np.zeros((size, length), dtype=bool)
        nodes = np.zeros((size, length, NODES, actions))
        states[:, 0] = seen[:, : self._world.states]
        going = np.arange(size)
        for t in range(length):
            mean, deviation = self._normal(torch.as_tensor(seen[going]))
            white = torch.randn(mean.shape, generator=generator)
            action = self._into(mean + deviation * white).numpy()
            points = white_nodes(actions, seed=int(torch.randint(2**31, (), generator=generator)))
            nodes[going, t] = self._into(mean[:, None] + deviation[:, None] * points).numpy()
            states[:, t + 1] = states[:, t]
            still = []
            for row, i in enumerate(going.tolist()):
                observation, own[i, t], terminated, truncated, _ = worlds[i].step(action[row])
                mask[i, t], taken[i, t] = True, action[row]
                if self.algorithm == "sac":
                    told = {OWN: own[i, t], "TimeLimit.truncated": truncated and not terminated}
                    scaled = self.agent.policy.scale_action(action[row])
                    self.agent.replay_buffer.add(seen[i], observation, scaled, 0.0, terminated or truncated, [told])
                seen[i], states[i, t + 1] = observation, observation[: self._world.states]
                if not (terminated or truncated):
                    still.append(i)
            going = np.array(still, dtype=np.int64)
            if not still:
                break
        longest = int(mask.sum(1).max())
        self._rolled += int(mask.sum())
        return Rollouts(
            contexts=contexts,
            mask=torch.as_tensor(mask[:, :longest]),
            group=torch.arange(size * longest).view(size, longest),
            steps={
                "state": torch.as_tensor(states[:, : longest + 1]),
                "action": torch.as_tensor(taken[:, :longest]),
                "action_nodes": torch.as_tensor(nodes[:, :longest]),
                "environment_reward": torch.as_tensor(own[:, :longest]),
            },
            density=True,
        )

    def _normal(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the policy before it is brought into the box, [N, m]."""
        with torch.no_grad():
            if self.algorithm == "sac":
                mean, log_deviation, _ = self.agent.actor.get_action_dist_params(observations)
                return mean, log_deviation.exp()
            law = self.agent.policy.get_distribution(observations).distribution
            return law.mean, law.stddev

    def _into(self, raw: Tensor) -> Tensor:
        """What the agent's environment is given for a draw of the normal law: squashed by SAC, clipped by PPO."""
        low, high = (torch.as_tensor(getattr(self._world.action_space, end)) for end in ("low", "high"))
        if self.algorithm == "sac":
            return low + (torch.tanh(raw) + 1) / 2 * (high - low)
        return torch.minimum(torch.maximum(raw, low), high)

    def _parameters(self) -> dict[str, Any]:
        """Networks, optimizers and counters; copies."""
        agent = self.agent
        held = {name: _copied(value) for name, value in agent.get_parameters().items()}
        place = (agent.replay_buffer.pos, agent.replay_buffer.full) if self.algorithm == "sac" else (0, False)
        return {
            "agent": held,
            "timesteps": int(agent.num_timesteps),
            "updates": int(agent._n_updates),
            "position": int(place[0]),
            "full": bool(place[1]),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        agent = self.agent
        agent.set_parameters(state["agent"], exact_match=True, device="cpu")
        agent.num_timesteps, agent._n_updates = state["timesteps"], state["updates"]
        if self.algorithm == "sac":
            agent.replay_buffer.pos, agent.replay_buffer.full = state["position"], state["full"]

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, counters, and what is in the replay buffer: a resumed run repeats itself exactly."""
        state = {**self._parameters(), "rolled": self._rolled}
        if self.algorithm == "sac":
            memory = self.agent.replay_buffer
            state["replay"] = {name: torch.tensor(getattr(memory, name)[: memory.size()]) for name in _REPLAY}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._restore(state)
        self._rolled = state["rolled"]
        for name, value in state.get("replay", {}).items():
            getattr(self.agent.replay_buffer, name)[: len(value)] = value.numpy()


_REPLAY = ("observations", "next_observations", "actions", "rewards", "own", "dones", "timeouts")


class _Nobody(Leader):
    """Stands for the leader until there is one."""

    def reward(self, rollouts: Rollouts) -> Tensor:
        raise InputError("respond: the follower has no leader yet; call respond(leader, contexts)")


def _copied(value: Any) -> Any:
    """A state dictionary with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Stable-Baselines3 seeds and uses the global generators of Python, numpy and torch: the caller's are put back."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
