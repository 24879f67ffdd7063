"""Several language models as one follower: other sizes, families and temperatures, one reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.sampler_evidence import mean_evidence
from align_cbrl.llm.followers.base import LanguageFollower
from align_cbrl.problem import Follower, Leader
from align_cbrl.rollouts import Rollouts

FOLLOWER = "follower"
"""Name of the column of the rollouts' steps that says which member made a completion."""


@checked
class Population(Follower):
    """Followers that best-respond to the same leader, each with its own policy; they do not interact.

    A context carries the follower's identity: prompt p of member i is the context p + i * (number of prompts). Each
    member answers an equal share of the contexts of a leader step. `steps["follower"]`, long [B], is the member's
    number, for objectives that tell them apart.

    Args:
        members: at least one; every one keeps its own schedule, temperature and prompts, as many for each, with the
            same columns.

    Attributes:
        temperature: the members' own; a number, or float64 [C], one for each context, where they differ.

    Raises:
        InputError: no members, or prompts of different number or columns.
    """

    discount: float = 0.0  # one step: nothing follows a completion

    def __init__(self, members: Sequence[LanguageFollower]) -> None:
        if not members:
            raise InputError("Population.members: expected at least one follower, got none")
        self.members = list(members)
        columns = [sorted(member.prompts.column_names) for member in self.members]
        counts = [len(member.prompts) for member in self.members]
        if len(set(counts)) > 1 or any(other != columns[0] for other in columns):
            raise InputError(
                f"Population.members: expected prompts of one number and with the same columns, got {counts} rows and "
                f"columns {columns}"
            )
        if FOLLOWER in columns[0]:
            raise InputError(
                f"Population.members: the prompts have a column {FOLLOWER!r}, which says who answered; rename it"
            )
        self.prompt_count = counts[0]
        temperatures = [member.temperature for member in self.members]
        self.temperature: float | Tensor = temperatures[0]
        if len(set(temperatures)) > 1:
            self.temperature = torch.tensor(temperatures, dtype=torch.float64).repeat_interleave(self.prompt_count)

    @property
    def completions_seen(self) -> int:
        """Completions that the members have been trained on."""
        return sum(getattr(member, "completions_seen", 0) for member in self.members)

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts, equally many for each member and distinct for each. Raises InputError if that fails."""
        share = self._share(count)
        drawn = [member.sample_contexts(share, generator) for member in self.members]
        return torch.cat([rows + i * self.prompt_count for i, rows in enumerate(drawn)])

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Every member responds, in turn. Metrics: the members', numbered, and `follower_steps` of all together."""
        own = [self._own(contexts, i) for i in range(len(self.members))]
        return _joined_metrics(
            [member.respond(leader, contexts[rows] - i * self.prompt_count)
             for i, (member, rows) in enumerate(zip(self.members, own, strict=True))]
        )  # fmt: skip

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Fresh completions, in the order of the contexts."""
        parts, order = [], []
        for i, member in enumerate(self.members):
            rows = self._own(contexts, i)
            if len(rows):
                parts.append((i, member.rollout(contexts[rows] - i * self.prompt_count, group_size, generator)))
                order.append((rows[:, None] * group_size + torch.arange(group_size)).flatten())
        return self._join(parts).select(torch.argsort(torch.cat(order)).tolist())

    def turn(
        self, leader: Leader, step: int, *, contexts_per_step: int, group_size: int, seed: int
    ) -> tuple[Rollouts, dict[str, float]]:
        """See `Follower.turn`: every member takes its own, with the seed plus its number, and the leader sees all."""
        own = self._share(contexts_per_step)
        turns = [
            member.turn(leader, step, contexts_per_step=own, group_size=group_size, seed=seed + i)
            for i, member in enumerate(self.members)
        ]
        joined = self._join([(i, rollouts) for i, (rollouts, _) in enumerate(turns)])
        return joined, _joined_metrics([metrics for _, metrics in turns])

    def leader_stepped(self) -> None:
        """Every member hears of it."""
        for member in self.members:
            member.leader_stepped()

    def sampler_evidence(self) -> dict[str, float]:
        """See `Follower.sampler_evidence`; the mean of the members' stakes."""
        found = [member.sampler_evidence() for member in self.members]
        found = [evidence for evidence in found if evidence]
        return mean_evidence(found) if found else {}

    def state_dict(self) -> dict[str, Any]:
        """The members' states."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises InputError for another number of members."""
        states = state.get("members", [{} for _ in self.members])
        if len(states) != len(self.members):
            raise InputError(f"state: expected {len(self.members)} members, got {len(states)}")
        for member, of_member in zip(self.members, states, strict=True):
            member.load_state_dict(of_member)

    def _share(self, count: int) -> int:
        if count % len(self.members):
            raise InputError(
                f"contexts: expected a number that the population's {len(self.members)} members divide, got {count}"
            )
        return count // len(self.members)

    def _own(self, contexts: Tensor, member: int) -> Tensor:
        """Where member `member`'s contexts stand."""
        return (torch.div(contexts, self.prompt_count, rounding_mode="floor") == member).nonzero()[:, 0]

    def _join(self, parts: Sequence[tuple[int, Rollouts]]) -> Rollouts:
        """The members' rollouts, one below the other, in the population's contexts."""
        columns: dict[str, list[Any]] = {name: [] for name in parts[0][1].steps}
        for _, rollouts in parts:
            for name, values in rollouts.steps.items():
                columns[name].extend(values)
        who = torch.cat([torch.full((rollouts.size,), i) for i, rollouts in parts])
        weighted = any(rollouts.weight is not None for _, rollouts in parts)
        return Rollouts.bandit(
            contexts=torch.cat([rollouts.contexts + i * self.prompt_count for i, rollouts in parts]),
            steps={**columns, FOLLOWER: who},
            log_policy=_column([rollouts.log_policy for _, rollouts in parts]),
            log_prior=_column([rollouts.log_prior for _, rollouts in parts]),
            weight=torch.cat([rollouts.path_weight() for _, rollouts in parts]) if weighted else None,
        )


def _column(values: Sequence[Tensor | None]) -> Tensor:
    """[b, 1] of each member to [B]; every language model gives its log-probabilities."""
    return torch.cat([value[:, 0] for value in values if value is not None])


def _joined_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    numbered = {f"{name}_{i}": value for i, row in enumerate(metrics) for name, value in row.items()}
    steps = [row["follower_steps"] for row in metrics if "follower_steps" in row]
    return {**({"follower_steps": sum(steps)} if steps else {}), **numbered}
