"""The worst group of contexts, where the data say which group a context belongs to."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.objectives import OverContexts, WorstContext
from align_cbrl.problem import Objective
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class WorstGroup(OverContexts):
    """The value of the worst group of contexts, such as the topic on which the answers are worst; or a soft minimum.

    A group's value is the mean over its contexts, by their share of the batch. On its own it sees the groups that the
    batch holds, and a batch without the worst group asks for something else; `CrossFitted` with a memory remembers
    the others.

    Attributes:
        objective: an expectation in every context.
        column: of the prompts' data, which names each prompt's group.
        temperature: of the minimum, as for `WorstContext`.

    Raises:
        InputError: there is no such column; or the exact route of a table is asked, which has no columns.

    Example:
        >>> import torch
        >>> from align_cbrl import ExpectedUtility
        >>> steps = {"score": torch.tensor([1.0, 3.0, 0.5]), "topic": ["law", "art", "law"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 1, 2]), steps=steps)
        >>> score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> WorstGroup(score, "topic").evaluate(None, rollouts).value.item()
        0.75
    """

    objective: Objective
    column: str
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        WorstContext(self.objective, self.temperature)  # which checks the temperature

    def labels(self, rollouts: Rollouts) -> list[Any]:
        """The group of each path's context, [B]."""
        if self.column not in rollouts.steps:
            raise InputError(
                f"WorstGroup.column: the data have no column {self.column!r}, which names each prompt's group; there "
                f"are {sorted(rollouts.steps)}"
            )
        groups = rollouts.steps[self.column]
        return groups.tolist() if isinstance(groups, Tensor) else list(groups)

    def risk(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The minimum over groups, or the soft one, from the groups' values and probabilities."""
        return WorstContext(self.objective, self.temperature).aggregate(values, probabilities)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """Refused: the contexts' values alone do not say which group each belongs to."""
        raise InputError("WorstGroup: its groups are a column of sampled data, so it has no exact value on a table")
