"""The contract of leaders that may correct a frozen reward: they start at no change, and can be made smaller."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.leaders.calibration import deviations, within_prompts
from align_cbrl.llm.scoring import ScoreFunction, score_arguments
from align_cbrl.rollouts import Rollouts


class Correction(LanguageLeader):
    """A leader whose change of the reward can be measured and scaled down, as `Shaped` needs of its correction.

    Attributes:
        spread_is_sampled: whether `spread_on` has to score completions, which a saved correction then needs.
    """

    spread_is_sampled: ClassVar[bool] = True

    @abc.abstractmethod
    def deviation(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The change of the reward that has been learned: [B], differentiable in x."""

    def deviation_from(
        self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Tensor:
        """As `deviation`, given the leader's `fixed_scores` of the completions, [B, 0] where it has none."""
        return self.deviation(prompts, completions, **columns)

    @abc.abstractmethod
    def shrink(self, factor: float) -> None:
        """Scale the change by `factor` in [0, 1], at least approximately."""

    @abc.abstractmethod
    def check_correction_of(self, frozen: ScoreFunction) -> None:
        """Raise `InputError` unless this leader can be a small correction of the reward `frozen`."""

    @torch.no_grad()
    def spread_on(self, reference: Rollouts | None) -> float:
        """Standard deviation of the change within a prompt of the calibrating rollouts `reference`.

        Raises:
            InputError: the rollouts are needed, and there are none.
        """
        if reference is None:
            raise InputError("Shaped: the correction's spread is measured on rollouts; call calibrate(rollouts) first")
        change = self.deviation(**score_arguments(reference)).double().cpu()
        within, freedom = within_prompts(change, reference)
        return float(deviations(within[:, None], freedom))
