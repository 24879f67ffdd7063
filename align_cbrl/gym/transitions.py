"""Transitions of an environment as `Rollouts`, and what is refused of an environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts


def transition_rewards(
    leader: Leader, contexts: Any, state: Any, action: Any, next_state: Any, own: Any
) -> np.ndarray[Any, Any]:
    """What the leader pays for N transitions, [N] float32, without a graph.

    Args:
        leader: asked once, for paths of one step.
        contexts: [N].
        state: [N, n].
        action: [N, m].
        next_state: [N, n].
        own: [N], the environment's own rewards.

    Raises:
        InputError: rewards of another shape, or one that is not finite.
    """
    numbers = torch.as_tensor(contexts, dtype=torch.long)
    rollouts = Rollouts(
        contexts=numbers,
        mask=torch.ones(len(numbers), 1, dtype=torch.bool),
        group=torch.arange(len(numbers))[:, None],
        steps={
            "state": torch.stack([_double(state), _double(next_state)], 1),
            "action": _double(action)[:, None],
            "environment_reward": _double(own)[:, None],
        },
    )
    with torch.no_grad():
        reward = leader.reward(rollouts)
    if tuple(reward.shape) != (len(numbers), 1):
        raise InputError(
            f"{type(leader).__name__}.reward: expected shape [B, T] = [{len(numbers)}, 1], got {list(reward.shape)}"
        )
    if not bool(torch.isfinite(reward).all()):
        i = int((~torch.isfinite(reward[:, 0])).nonzero()[0])
        raise InputError(
            f"{type(leader).__name__}.reward: expected finite rewards, got {float(reward[i, 0])} for state "
            f"{np.asarray(state)[i].tolist()} and action {np.asarray(action)[i].tolist()}"
        )
    return reward[:, 0].numpy().astype(np.float32)


def check_spaces(name: str, environment: gymnasium.Env[Any, Any]) -> None:
    """Raise `InputError` unless observations are a vector and actions a box of finite bounds."""
    seen, done = environment.observation_space, environment.action_space
    if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
        raise InputError(
            f"{name}: expected observations in a Box of shape [n], got {seen}; wrap the environment in "
            "gymnasium.wrappers.FlattenObservation"
        )
    if not isinstance(done, spaces.Box) or len(done.shape) != 1:
        raise InputError(
            f"{name}: expected continuous actions, a Box of shape [m], got {done}; SAC has no policy for it. Choose an "
            "environment with continuous actions (MountainCarContinuous-v0 instead of MountainCar-v0); finitely many "
            "states and actions are a table (toy_cmdp)"
        )
    if not (np.isfinite(done.low).all() and np.isfinite(done.high).all()):
        raise InputError(
            f"{name}: expected actions between finite bounds, got {done}; wrap the environment in "
            "gymnasium.wrappers.ClipAction or RescaleAction"
        )


def check_observation(observation: Any, step: int) -> None:
    """Raise `InputError` for an observation with NaN or infinite entries."""
    bad = np.flatnonzero(~np.isfinite(observation))
    if len(bad):
        raise InputError(
            f"observation: expected finite numbers, got {observation[bad[0]]} in entry {bad[0]} at step {step} of an "
            "episode; the environment left its range: bound its states, or end the episode there (terminated)"
        )


def _double(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)
