"""`NetworkLeader`: a bounded bonus or penalty, a small network over states and actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from align_cbrl.checks import Positive, Range, Whole, checked
from align_cbrl.gym.transitions import check_spaces
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts


def environment_reward(rollouts: Rollouts) -> Tensor:
    """The environment's own reward, [B, T]."""
    reward: Tensor = rollouts.steps["environment_reward"]
    return reward


@checked
class NetworkLeader(Leader):
    """r_x(s, a) = base + bound tanh(network(s, a)); the network's last layer starts at zero, so that x adds nothing.

    Attributes:
        network: two layers; its parameters are x. Entries with finite bounds in the environment's spaces enter on the
            scale of these, others as they are.

    Args:
        environment: whose states and actions the network sees.
        base: what the follower earns besides, [B, T] of rollouts; the environment's own reward by default.
        bound: of what is added, on either side: the leader's budget.
        width: of the hidden layer.
        actions: whether the network sees actions too, or states alone.
        seed: of the first weights.

    Raises:
        InputError: an environment without a vector of observations and a bounded box of actions.

    Example:
        >>> leader = NetworkLeader(gymnasium.make("Pendulum-v1"), bound=2.0)
        >>> sum(p.numel() for p in leader.parameters())
        193
    """

    def __init__(
        self,
        environment: gymnasium.Env[Any, Any],
        *,
        base: Callable[[Rollouts], Tensor] = environment_reward,
        bound: Positive = 1.0,
        width: Annotated[int, Range(1, 10_000)] = 32,
        actions: bool = True,
        seed: Whole = 0,
    ) -> None:
        super().__init__()
        check_spaces("environment", environment)
        spaces = [environment.observation_space, *([environment.action_space] if actions else [])]
        low, high = (np.concatenate([getattr(space, end) for space in spaces]) for end in ("low", "high"))
        known = np.isfinite(low) & np.isfinite(high)
        centre = np.where(known, (low + high) / 2, 0.0)
        size = np.where(known & (high > low), (high - low) / 2, 1.0)
        self._centre, self._size = torch.as_tensor(centre).double(), torch.as_tensor(size).double()
        self._base, self._actions = base, actions
        self.bound = bound
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden, out = nn.Linear(len(low), width), nn.Linear(width, 1)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.network = nn.Sequential(hidden, nn.Tanh(), out).double()

    def reward(self, rollouts: Rollouts) -> Tensor:
        """See `Leader.reward`."""
        return self._base(rollouts) + self.added(rollouts)

    def added(self, rollouts: Rollouts) -> Tensor:
        """What x adds to the base, [B, T]."""
        seen = rollouts.steps["state"][:, :-1]
        if self._actions:
            seen = torch.cat([seen, rollouts.steps["action"]], -1)
        added: Tensor = self.bound * torch.tanh(self.network((seen - self._centre) / self._size)[..., 0])
        return added
