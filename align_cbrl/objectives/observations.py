"""Observations: what objectives may need to know of every step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.plain import plain
from align_cbrl.problem import Leader, Observation
from align_cbrl.rollouts import Rollouts

UtilityFunction = Callable[[Leader, Rollouts], Tensor]
"""Maps (leader, rollouts) to utilities [B, T]: a `Judge`, a `TabularUtility`, or a function of one's own."""


@checked
@dataclasses.dataclass(frozen=True, eq=False)
class Utility(Observation):
    """What a utility function says of every step.

    Two utilities are equal when their functions are the same object, so that one judge is asked once however many parts
    of an objective refer to it.

    Attributes:
        function: maps (leader, rollouts) to [B, T].
        moves: whether its values depend on the leader's parameters.
        name: used in messages.

    Example:
        >>> def length(leader, rollouts):
        ...     return rollouts.steps["length"][:, None]
        >>> Utility(length) == Utility(length), Utility(length) == Utility(length, moves=True)
        (True, False)
    """

    function: UtilityFunction
    moves: bool = False
    name: str = "utility"
    lasting: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lasting", not self.moves)  # what does not move stays the same for the same paths

    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u(s_t, a_t) [B, T]. Raises InputError when the function returns another shape."""
        utility = self.function(leader, rollouts)
        if tuple(utility.shape) != tuple(rollouts.mask.shape):
            raise InputError(
                f"{self.name}: expected shape {tuple(rollouts.mask.shape)} (paths, steps), got {tuple(utility.shape)}"
            )
        return utility

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Utility) and self.function is other.function and self.moves == other.moves

    def __hash__(self) -> int:
        return hash((id(self.function), self.moves))


@checked
@dataclasses.dataclass(frozen=True)
class LogRatio(Observation):
    """log pi(a|s) - log prior(a|s) in nats, zero where no step was taken; it moves where the leader moves the prior."""

    name: str = "log_ratio"
    moves: bool = True

    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The log-ratio [B, T]. Raises InputError when the rollouts lack log-probabilities."""
        if rollouts.log_policy is None or rollouts.log_prior is None:
            raise InputError("KLPriced: expected rollouts with log_policy and log_prior; this follower provides none")
        moved = leader.log_prior(rollouts)
        ratio = rollouts.log_policy - (rollouts.log_prior if moved is None else moved)
        return torch.where(rollouts.mask.to(ratio.device), ratio, torch.zeros_like(ratio))


@checked
@dataclasses.dataclass(frozen=True)
class Reward(Observation):
    """The follower's reward r_x [B, T], for objectives that are about the reward itself."""

    name: str = "reward"
    moves: bool = True

    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """r_x(s_t, a_t) [B, T]."""
        return leader.reward(rollouts)


@checked
@dataclasses.dataclass(frozen=True)
class GroupLabel(Observation):
    """A number for the name that a column of the data gives to each path's context, long [B, T].

    Numbers are 63 bits of a cryptographic hash of the name: the same in all processes and after a restart, and never
    equal for different names in practice. Names may be of any type, and are equal as Python's values are: "1" is not 1,
    1.0 is, and rows without a name, None or NaN, are groups of their own.

    Attributes:
        column: of `Rollouts.steps`, one name a path.

    Raises:
        InputError: names of a type of which nothing but the type is known.

    Example:
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 1, 2]), steps={"topic": ["law", "art", "law"]})
        >>> labels = GroupLabel("topic").of(None, rollouts)[:, 0]
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[1])
        (True, False)
    """

    column: str
    name: str = "group label"
    lasting: bool = True

    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The labels [B, T]. Raises InputError when the data have no such column."""
        if self.column not in rollouts.steps:
            raise InputError(
                f"WorstGroup.column: expected completions with a column {self.column!r}, which names each prompt's "
                f"group; the columns are {sorted(rollouts.steps)}"
            )
        names = rollouts.steps[self.column]
        names = names.tolist() if isinstance(names, Tensor) else names
        numbers = [number_of(name, "WorstGroup.column: expected names of groups") for name in names]
        return torch.tensor(numbers)[:, None].expand(-1, rollouts.horizon)  # [B] -> [B, T]


def number_of(name: Any, expected: str) -> int:
    """A number for a name of any type, as `GroupLabel` describes; `expected` is what is said where there is none.

    Raises:
        InputError: a name of a type of which nothing but the type is known.

    Example:
        >>> number_of(1.0, "names") == number_of(1, "names"), number_of("1", "names") == number_of(1, "names")
        (True, False)
    """

    def nameless(value: Any) -> Any:
        raise InputError(f"{expected}, got a {type(value).__name__}: {value!r:.60}")

    value = plain(name, nameless)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    kind = "text" if isinstance(name, str) else "value"  # a date is not the text that it is written as
    text = json.dumps([kind, value], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
