"""`LoggedFollower`: a follower whose completions come from somebody else's logs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.problem import Follower, Leader
from align_cbrl.rollouts import Rollouts


@checked
class LoggedFollower(Follower):
    """A policy of which there are logs only. It cannot be trained: every leader step sees what it once sampled.

    With log-probabilities under policy and reference, HPGD weights the logs as samples of the best response to the
    present leader (`HPGDConfig.correction`, natural steps, replays), as far as weights reach. Without them only the
    first leader step is on samples of the policy that responds to the leader; a later one warns.

    Args:
        rollouts: completions, several for each prompt (`align_cbrl.llm.logs.load_rollouts`).
        temperature: lambda, at which the policy was trained: reward per nat of divergence from its reference.

    Attributes:
        contexts: long [C], the prompts of the logs.

    Raises:
        InputError: rollouts of several steps, weighted ones, or of which no prompt has two completions.

    Example:
        >>> from align_cbrl.llm.logs import completion_rollouts
        >>> logs = completion_rollouts(["a", "a", "b"], ["yes", "no", "no"], {}, torch.tensor([0, 0, 1]))
        >>> follower = LoggedFollower(logs, temperature=0.05)
        >>> follower.rollout(follower.contexts, 8, torch.Generator()).steps["completion"]
        ['yes', 'no']
    """

    temperature: float
    discount: float = 0.0

    def __init__(self, rollouts: Rollouts, temperature: Positive) -> None:
        if rollouts.horizon != 1 or rollouts.weight is not None:
            raise InputError("LoggedFollower.rollouts: expected completions as they were sampled, of one step")
        groups = Groups.of(rollouts.group[:, 0])
        kept = (groups.sizes > 1)[groups.place]
        if not bool(kept.any()):
            raise InputError(
                "LoggedFollower.rollouts: expected several completions of a prompt, which the leader compares, got one "
                "of each; log every completion of a prompt, with equal text under prompt"
            )
        self.rollouts = rollouts.select(kept.nonzero()[:, 0].tolist())
        self.temperature = temperature
        self.contexts = self.rollouts.contexts.unique()
        self._responses = 0

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` distinct prompts of the logs, uniformly; all of them, where there are no more."""
        return self.contexts[torch.randperm(len(self.contexts), generator=generator)[:count]]

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Nothing can be trained; says so where a leader step needs that."""
        self._responses += 1
        if self._responses == 2 and self.rollouts.log_policy is None:
            warnings.warn(
                "LoggedFollower: a policy of which there are logs only cannot be trained, and without "
                "log-probabilities they cannot be weighted: leader steps after the first are on completions for an "
                "earlier reward; log log_policy and log_prior, or take one step and sample anew",
                stacklevel=2,
            )
        return {}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """The logged completions of the contexts; of larger groups, `group_size` at random."""
        groups = Groups.of(self.rollouts.group[:, 0])
        wanted = torch.isin(self.rollouts.contexts, contexts)
        order = torch.randperm(self.rollouts.size, generator=generator)
        taken = [0] * groups.count
        rows = []
        for row in order.tolist():
            number = int(groups.place[row])
            if bool(wanted[row]) and taken[number] < group_size:
                taken[number] += 1
                rows.append(row)
        picked = self.rollouts.select(sorted(rows))
        return Rollouts(
            contexts=picked.contexts,
            mask=picked.mask,
            group=picked.group,
            steps=picked.steps,
            log_policy=picked.log_policy,
            log_prior=picked.log_prior,
            known=picked.known,
        )
