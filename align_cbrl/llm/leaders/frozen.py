"""Leaders whose reward is a frozen one plus something learned."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.leaders.calibration import deviation_within_prompts
from align_cbrl.llm.leaders.terms import load_term, save_terms
from align_cbrl.llm.scoring import ScoreFunction, score_arguments, scores_of
from align_cbrl.rollouts import Rollouts


class FrozenPlus(LanguageLeader):
    """r_x = strength * (f - shift) / scale + correction_x, where f is frozen. Subclasses define the correction.

    Args:
        frozen: the reward function f, which may be a reward model.
        strength: reward per standard deviation of f within a prompt, once the leader is calibrated.

    Raises:
        InputError: a negative strength.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, frozen: ScoreFunction, strength: float) -> None:
        super().__init__()
        if not (0 <= strength < float("inf")):
            raise InputError(f"{type(self).__name__}.strength: expected a number >= 0, got {strength}")
        self.frozen, self.strength = frozen, strength
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    @abc.abstractmethod
    def correction_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """What is added to the frozen reward: [B], differentiable in x."""

    def correction_from(
        self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Tensor:
        """As `correction_score`, given what a subclass has added to the frozen score in `fixed_scores`, [B, K]."""
        return self.correction_score(prompts, completions, **columns)

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """f of the completions as the function returns it, float64 [B, 1]."""
        arguments = {"prompts": prompts, "completions": completions, **columns}
        return scores_of("frozen", self.frozen, arguments)[:, None]

    def frozen_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The standardised frozen reward, strength * (f - shift) / scale: float64 [B], without gradients."""
        return self._standardised(FrozenPlus.fixed_scores(self, prompts, completions, **columns)[:, 0])

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]."""
        return self.score_from(self.fixed_scores(prompts, completions, **columns), prompts, completions, **columns)

    def score_from(self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B], given `fixed_scores`."""
        correction = self.correction_from(fixed[:, 1:], prompts, completions, **columns)
        return self._standardised(fixed[:, 0]).to(correction.device) + correction

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the frozen reward: mean zero, and mean variance one within the group of a prompt.

        Raises:
            InputError: no prompt has two completions, or the reward gives all completions of each prompt the same.
        """
        scores = scores_of("frozen", self.frozen, score_arguments(rollouts))
        self.scale.fill_(deviation_within_prompts("frozen", scores, rollouts))
        self.shift.copy_(scores.mean())

    def record(self, path: Path) -> dict[str, Any]:
        """The frozen reward and its standardisation; see `LanguageLeader.record`."""
        return {
            "frozen": save_terms({"frozen": self.frozen}, path)["frozen"],
            "strength": self.strength,
            "shift": self.shift.item(),
            "scale": self.scale.item(),
        }

    @staticmethod
    def _load_frozen(path: Path, record: Mapping[str, Any]) -> ScoreFunction:
        return load_term("frozen", record["frozen"], path)

    def _restore_standardisation(self, record: Mapping[str, Any]) -> None:
        self.shift.fill_(record["shift"])
        self.scale.fill_(record["scale"])

    def _standardised(self, scores: Tensor) -> Tensor:
        return self.strength * (scores.to(self.shift.device) - self.shift) / self.scale
