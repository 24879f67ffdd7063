"""`LinearEnvironment`: a linear system as an environment of Gymnasium, for agents that know nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from toy_cmdp.tables.linear_systems import LinearSystems

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise InputError("toy_cmdp.environments needs gymnasium: pip install 'align-cbrl[gym]'") from error


@checked
class LinearEnvironment(gymnasium.Env[Any, Any]):
    """s' = A s + B u + noise of one context; its own reward is the follower's, -(s'Qs + u'Ru), of `systems`.

    Every `length` steps it is cut (truncated), as by a time limit. Actions are bounded, which an exact response is not:
    choose a bound that it hardly ever reaches.

    Args:
        systems: of which the numbers are taken, without their graph.
        context: which of them.
        length: steps of an episode.
        bound: of every entry of the action, on either side.

    Raises:
        InputError: systems that `LinearSystems.check` refuses, a context that there is not.

    Example:
        >>> from toy_cmdp import building
        >>> environment = LinearEnvironment(building().leader.systems(), length=100, bound=20.0)
        >>> observation, _ = environment.reset(seed=0)
        >>> observation.shape, environment.step(environment.action_space.sample())[0].shape
        ((4,), (4,))
    """

    def __init__(self, systems: LinearSystems, context: Whole = 0, *, length: Count, bound: Positive) -> None:
        systems = systems.detach()
        systems.check()
        if context >= systems.contexts:
            raise InputError(f"context: expected a number in [0, {systems.contexts}), got {context}")
        self._joint = systems.joint[context].numpy()
        self._cost = systems.cost[context].numpy()
        self._noise = _root(systems.noise[context])
        self._first = systems.initial_mean[context].numpy()
        self._spread = _root(systems.initial_covariance[context])
        self.length = length
        self.observation_space = spaces.Box(-np.inf, np.inf, (systems.states,), np.float32)
        self.action_space = spaces.Box(-bound, bound, (systems.actions,), np.float32)
        self._state = self._first
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw the first state."""
        super().reset(seed=seed)
        self._step = 0
        self._state = self._first + self._spread @ self.np_random.standard_normal(len(self._first))
        return self._state.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The next state."""
        pair = np.concatenate([self._state, np.asarray(action, dtype=np.float64)])
        reward = -float(pair @ self._cost @ pair)
        self._state = self._joint @ pair + self._noise @ self.np_random.standard_normal(len(self._state))
        self._step += 1
        return self._state.astype(np.float32), reward, False, self._step >= self.length, {}


def _root(covariance: torch.Tensor) -> np.ndarray[Any, Any]:
    """A square root of a covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root: np.ndarray[Any, Any] = (vectors * values.clamp(min=0).sqrt()).numpy()
    return root
