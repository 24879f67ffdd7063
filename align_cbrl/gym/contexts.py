"""`Contexts`: several environments as one, which is told, and tells the agent, in which it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.gym.transitions import check_observation, check_spaces


@checked
class Contexts(gymnasium.Env[Any, Any]):
    """Nature draws an environment at every reset; observations end with its number, one of C entries being 1.

    `reset(options={"context": c})` chooses one. With a single environment nothing is appended.

    Args:
        environments: C of them, with the same spaces.
        probabilities: nature's law, [C], up to a factor.

    Raises:
        InputError: no environment, another number of probabilities, spaces that differ or that `check_spaces` refuses;
            from `reset` and `step`: an observation that is not finite.

    Example:
        >>> both = Contexts([gymnasium.make("Pendulum-v1", g=g) for g in (5.0, 10.0)], [0.5, 0.5])
        >>> observation, info = both.reset(seed=0, options={"context": 1})
        >>> observation[3:].tolist(), info["context"]
        ([0.0, 1.0], 1)
    """

    def __init__(self, environments: Sequence[gymnasium.Env[Any, Any]], probabilities: Sequence[Positive]) -> None:
        if not environments or len(probabilities) != len(environments):
            raise InputError(
                "environments, probabilities: expected at least one environment and as many probabilities, got "
                f"{len(environments)} and {len(probabilities)}"
            )
        first = environments[0]
        for i, environment in enumerate(environments):
            check_spaces(f"environments[{i}]", environment)
            for kind in ("observation_space", "action_space"):
                if getattr(environment, kind).shape != getattr(first, kind).shape:
                    raise InputError(
                        f"environments[{i}]: expected the {kind} of environments[0], {getattr(first, kind)}, got "
                        f"{getattr(environment, kind)}; contexts share one agent"
                    )
        self.environments = list(environments)
        law = np.asarray(probabilities, dtype=np.float64)
        self.probabilities = law / law.sum()
        self.count = len(self.environments)
        more = self.count if self.count > 1 else 0
        seen = first.observation_space
        assert isinstance(seen, spaces.Box)  # as check_spaces has seen
        self.observation_space = spaces.Box(
            np.concatenate([seen.low, np.zeros(more)]).astype(np.float32),
            np.concatenate([seen.high, np.ones(more)]).astype(np.float32),
            dtype=np.float32,
        )
        self.action_space = first.action_space
        self.context = 0
        self._step = 0

    @property
    def states(self) -> int:
        """n, the numbers in an observation without those that name the context."""
        shape = self.environments[0].observation_space.shape
        assert shape is not None
        return int(shape[0])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in the context of `options`, or in one that nature draws."""
        super().reset(seed=seed)
        chosen = (options or {}).get("context")
        if chosen is None:
            chosen = int(self.np_random.choice(self.count, p=self.probabilities))
        self.context, self._step = chosen, 0
        observation, info = self.environments[chosen].reset(seed=int(self.np_random.integers(2**31)))
        return self._seen(observation), {**info, "context": chosen}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A step of the present environment."""
        self._step += 1
        observation, reward, terminated, truncated, info = self.environments[self.context].step(action)
        return self._seen(observation), float(reward), terminated, truncated, {**info, "context": self.context}

    def split(self, observations: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Observations [N, k] as contexts [N] and states [N, n]."""
        named = observations[:, self.states :]
        contexts = named.argmax(1) if self.count > 1 else np.zeros(len(observations), dtype=np.int64)
        return contexts, observations[:, : self.states]

    def close(self) -> None:
        """Close all environments."""
        for environment in self.environments:
            environment.close()

    def _seen(self, observation: Any) -> np.ndarray[Any, Any]:
        check_observation(observation, self._step)
        named = np.zeros(self.count if self.count > 1 else 0)
        if len(named):
            named[self.context] = 1
        return np.concatenate([observation, named]).astype(np.float32)
