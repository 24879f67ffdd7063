"""A frozen reward plus a small learned correction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import NonNegative, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.base import load_leader
from align_cbrl.llm.leaders.correction import Correction
from align_cbrl.llm.leaders.frozen import FrozenPlus
from align_cbrl.llm.scoring import ScoreFunction, score_arguments
from align_cbrl.rollouts import Rollouts

_MOST_SHRINKS = 1000  # a few suffice where the spread is nearly proportional; a user's own correction may not shrink


@checked
class Shaped(FrozenPlus):
    """A frozen reward plus a small learned correction: r_x = strength * (f - shift) / scale + correction_x.

    The correction is a leader itself, of a subclass of `Correction`. For a `RewardMixture` it is the weighted sum of
    the standardised terms. For a `RewardModelLeader` it is the change of that model's score since the start, so that it
    begins at zero whatever the model says. Only a head or an adapter may be trained: with all parameters the correction
    would not be small.

    The budget bounds the standard deviation of the correction within a prompt of the calibrating rollouts, on which
    the frozen reward has the standard deviation `strength`. A mixture's spread follows from the correlations of its
    terms. For a reward model the calibrating completions are kept, and scored twice at every projection: choose a few
    hundred at most. The correction's own budget holds as well.

    Args:
        frozen: a reward function, or a reward model that the leader does not train.
        correction: a mixture whose weights start at or near zero, or a leader that trains a reward model's "head" or
            "lora".
        strength: reward per standard deviation of the frozen reward within a prompt.
        budget: largest standard deviation of the correction within a prompt.

    Raises:
        InputError: a softmax mixture, or a leader that trains all parameters of a reward model; a model that would be
            frozen and trained at once; a budget that is not positive.

    Example:
        >>> from align_cbrl.llm import RewardMixture
        >>> def score(prompts, completions, **columns):
        ...     return [float(len(c)) for c in completions]
        >>> def loud(prompts, completions, **columns):
        ...     return [float(c.isupper()) for c in completions]
        >>> shaped = Shaped(score, RewardMixture({"loud": loud}, {"loud": -0.25}), budget=0.5)
        >>> shaped.score(["a", "a"], ["b", "BCD"]).tolist()
        [1.0, 2.75]
    """

    def __init__(
        self, frozen: ScoreFunction, correction: Correction, strength: NonNegative = 1.0, budget: Positive = 0.5
    ) -> None:
        super().__init__(frozen, strength)
        if not isinstance(correction, Correction):
            raise InputError(
                "Shaped.correction: expected a RewardMixture, a RewardModelLeader, or another subclass of Correction, "
                f"got {type(correction).__name__}"
            )
        correction.check_correction_of(frozen)
        self.correction, self.budget = correction, budget
        self._reference: Rollouts | None = None  # the calibrating completions, where the spread is measured on them

    def correction_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The correction [B], differentiable in x."""
        return self.correction.deviation(prompts, completions, **columns)

    def correction_from(
        self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Tensor:
        """The correction [B], given the correction's own `fixed_scores`."""
        return self.correction.deviation_from(fixed, prompts, completions, **columns)

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The frozen reward and what is fixed of the correction, float64 [B, 1 + K]."""
        frozen = super().fixed_scores(prompts, completions, **columns)
        fixed = self.correction.fixed_scores(prompts, completions, **columns)
        return frozen if fixed is None else torch.cat([frozen, fixed.to(frozen)], dim=1)

    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the frozen reward and the correction; raises InputError as both do."""
        super().calibrate(rollouts)
        self.correction.calibrate(rollouts)
        if self.correction.spread_is_sampled:
            arguments = score_arguments(rollouts)
            self._reference = _reference(arguments["prompts"], arguments["completions"], rollouts.group[:, 0].tolist())

    def spread(self) -> float:
        """Standard deviation of the correction within a prompt of the calibrating rollouts.

        Raises:
            InputError: the spread is measured on completions, and `calibrate` has not been called.
        """
        return self.correction.spread_on(self._reference)

    @torch.no_grad()
    def project(self) -> None:
        """Shrink the correction to its budgets.

        The spread of an adapter's correction is not quite proportional to B, so it is measured again until it fits.

        Raises:
            InputError: the correction's `shrink` does not bring its spread down.
        """
        self.correction.project()
        for _ in range(_MOST_SHRINKS):
            if not (spread := self.spread()) > self.budget * (1 + 1e-6):
                return
            self.correction.shrink(self.budget / spread)
        raise InputError(
            f"Shaped.correction: after {_MOST_SHRINKS} calls of {type(self.correction).__name__}.shrink its spread is "
            f"still {self.spread():.4g}, above the budget {self.budget:.4g}; shrink(factor) has to scale the learned "
            "change of the reward by about the factor"
        )

    def describe(self) -> dict[str, Any]:
        """The strength of the frozen reward, and what the correction describes."""
        return {"strength of the frozen reward": self.strength, **self.correction.describe()}

    def record(self, path: Path) -> dict[str, Any]:
        """The frozen reward, the correction (in a folder of its own) and the completions its budget is measured on."""
        self.correction.save_pretrained(path / "correction")
        if self._reference is not None:
            columns = {"prompts": self._reference.steps["prompt"], "completions": self._reference.steps["completion"]}
            reference = {**columns, "group": self._reference.contexts.tolist()}
            (path / "reference.json").write_text(json.dumps(reference) + "\n", encoding="utf-8")
        return {**super().record(path), "budget": self.budget, "correction": "correction"}

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> Shaped:
        """See `LanguageLeader.from_record`."""
        correction: Any = load_leader(path / "correction")  # checked when the leader is made
        leader = cls(cls._load_frozen(path, record), correction, record["strength"], record["budget"])
        leader._restore_standardisation(record)
        if leader.correction.spread_is_sampled and (file := path / "reference.json").is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            leader._reference = _reference(saved["prompts"], saved["completions"], saved["group"])
        return leader


def _reference(prompts: list[Any], completions: list[Any], group: list[int]) -> Rollouts:
    return Rollouts.bandit(contexts=torch.tensor(group), steps={"prompt": prompts, "completion": completions})
