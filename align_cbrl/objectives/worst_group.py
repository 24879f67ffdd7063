"""The worst group of contexts, where the data say which group a context belongs to."""

from __future__ import annotations

import dataclasses
import zlib

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.objectives.all import OverContexts, WorstContext
from align_cbrl.problem import Leader, Objective
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

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The wrapped utility, and beside it the number of each path's group: [B, 2]."""
        if self.column not in rollouts.steps or rollouts.horizon != 1:
            raise InputError(
                f"WorstGroup.column: expected completions with a column {self.column!r}, which names each prompt's "
                f"group; the columns are {sorted(rollouts.steps)}"
            )
        utility = self.objective.utility(leader, rollouts)
        groups = rollouts.steps[self.column]
        names = groups.tolist() if isinstance(groups, Tensor) else groups
        # 24 bits, which every type of utility holds; the number is the same in all processes and after a restart.
        numbers = [zlib.crc32(str(name).encode()) >> 8 for name in names]
        return torch.cat([utility, utility.new_tensor(numbers)[:, None]], 1)

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The wrapped objective's own."""
        return self.objective.direct_term(leader, rollouts, weight[:, :1])

    def labels(self, utility: Tensor, rollouts: Rollouts) -> list[int]:
        """The number of each path's group, [B]."""
        return [int(number) for number in utility[:, 1].tolist()]

    def risk(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The minimum over groups, or the soft one, from the groups' values and probabilities."""
        return WorstContext(self.objective, self.temperature).aggregate(values, probabilities)

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """Refused: the contexts' values alone do not say which group each belongs to."""
        raise InputError("WorstGroup: its groups are a column of sampled data, so it has no exact value on a table")
