"""The worst group of contexts, where the data say which group a context belongs to."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from align_cbrl.checks import NonNegative, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives.observations import GroupLabel
from align_cbrl.objectives.risk import OverContexts, WorstContext
from align_cbrl.problem import Objective, Observation, Observed


@checked
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
        >>> from align_cbrl import ExpectedUtility, Rollouts
        >>> import torch
        >>> steps = {"score": torch.tensor([1.0, 3.0, 0.5]), "topic": ["law", "art", "law"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 1, 2]), steps=steps)
        >>> score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> WorstGroup(score, "topic").evaluate(None, rollouts).value.item()
        0.75
    """

    objective: Objective
    column: str
    temperature: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        WorstContext(self.objective, self.temperature)  # which checks the temperature

    def observations(self) -> tuple[Observation, ...]:
        """Those of the wrapped objective, and each path's group."""
        return (*self.objective.observations(), GroupLabel(self.column))

    def labels(self, observed: Observed) -> Tensor:
        """The label of each path's group, long [B]."""
        return observed[GroupLabel(self.column)][:, 0]

    def aggregate_groups(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The minimum over groups, or the soft one, from the groups' values and probabilities."""
        return WorstContext(self.objective, self.temperature).aggregate(values, probabilities)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """Refused: the contexts' values alone do not say which group each belongs to."""
        raise InputError("WorstGroup: its groups are a column of sampled data, so it has no exact value on a table")
