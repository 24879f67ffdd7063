"""`LearnedBeta`: a leader that also sets the follower's temperature, which RLHF calls beta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.base import LanguageLeader, load_leader
from align_cbrl.rollouts import Rollouts


@checked
class LearnedBeta(LanguageLeader):
    """Another leader's reward, and beta, the price of a nat of divergence from the reference, beside its parameters.

    The best response depends on reward divided by beta only, so that its hypergradient comes out of the same backward
    pass (docs/derivation.md, section 5). Where the reward has a free scale of its own, beta and that scale do the same
    work: then freeze one of them, or give the reward a budget and beta the bounds.

    Args:
        leader: the reward; its parameters, those that require gradients, stay the leader's.
        beta: where it starts.
        low: the smallest beta allowed, > 0.
        high: the largest beta allowed. Bounds keep the leader from buying utility with unlimited divergence; a price on
            divergence (`KLPriced`) can do that as well.

    Attributes:
        log_beta: the parameter, float64, a scalar.

    Raises:
        InputError: bounds that are not 0 < low < high, or a start outside them.

    Example:
        >>> from align_cbrl.llm import RewardMixture
        >>> def short(prompts, completions, **columns):
        ...     return [-float(len(c)) for c in completions]
        >>> leader = LearnedBeta(RewardMixture({"short": short}), beta=0.5, low=0.1, high=2.0)
        >>> round(leader.beta, 6), round(leader.follower_temperature().item(), 6)
        (0.5, 0.5)
        >>> leader.score(["a"], ["bcd"]).tolist()
        [-3.0]
    """

    def __init__(self, leader: LanguageLeader, beta: Positive, *, low: Positive, high: Positive) -> None:
        super().__init__()
        if not (0 < low < high < float("inf")):
            raise InputError(f"LearnedBeta: expected bounds 0 < low < high, got low={low}, high={high}")
        if not (low <= beta <= high):
            raise InputError(f"LearnedBeta.beta: expected a number in [{low}, {high}], got {beta}")
        self.leader = leader
        self.low, self.high = low, high
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta), dtype=torch.float64))

    @property
    def beta(self) -> float:
        """The present temperature."""
        return float(self.log_beta.detach().exp())

    def follower_temperature(self) -> Tensor:
        """Beta, a scalar, differentiable in `log_beta`."""
        return self.log_beta.exp()

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The wrapped leader's r_x [B]."""
        return self.leader.score(prompts, completions, **columns)

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor | None:
        """What is fixed of the wrapped leader's reward."""
        return self.leader.fixed_scores(prompts, completions, **columns)

    def score_from(self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The wrapped leader's r_x [B], given its `fixed_scores`."""
        return self.leader.score_from(fixed, prompts, completions, **columns)

    def first_order(self, rollouts: Rollouts) -> Tensor | None:
        """See `Leader.first_order`: of the wrapped leader's reward, which beta does not move."""
        return self.leader.first_order(rollouts)

    def describe(self) -> dict[str, Any]:
        """What the wrapped leader has learned, and beta."""
        return {**self.leader.describe(), "beta": self.beta}

    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the wrapped leader."""
        self.leader.calibrate(rollouts)

    @torch.no_grad()
    def project(self) -> None:
        """Beta back into its bounds, and the wrapped leader into its budget."""
        self.log_beta.clamp_(math.log(self.low), math.log(self.high))
        self.leader.project()

    def record(self, path: Path) -> dict[str, Any]:
        """Beta and its bounds; the wrapped leader is saved to the folder `leader` inside."""
        self.leader.save_pretrained(path / "leader")
        return {"beta": self.beta, "low": self.low, "high": self.high}

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> LearnedBeta:
        """See `LanguageLeader.from_record`."""
        return cls(load_leader(path / "leader"), record["beta"], low=record["low"], high=record["high"])
