"""A frozen reward with a learned charge on length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import NonNegative, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.conversations import answer_text
from align_cbrl.llm.leaders.calibration import deviation_within_prompts
from align_cbrl.llm.leaders.frozen import FrozenPlus
from align_cbrl.llm.scoring import ScoreFunction, score_arguments
from align_cbrl.rollouts import Rollouts


@checked
class LengthShaping(FrozenPlus):
    """A frozen reward, less a learned charge for length beyond a target.

        r = strength * (f - shift) / scale - w * width * softplus((length / s - target / s) / width)

    The length is in tokens where the column `completion_ids` is given, as trl gives it, and in characters otherwise.
    s is its standard deviation within a prompt of the calibrating rollouts. The excess, width * softplus(. / width), is
    a smooth max(0, length - target) / s: nearly zero below the target, and growing by one for each standard deviation
    beyond it. The weight w may become negative, where the leader wants longer completions.

    Since the excess grows by at most one per standard deviation of length, its own standard deviation is at most one,
    and |w| <= budget bounds that of the charge. A target that is learned stays among the lengths seen in calibration:
    beyond them nothing would be charged, and no gradient would lead back.

    Args:
        frozen: a reward function, or a reward model.
        target: the length above which completions are charged, in tokens or characters; its starting value, if it is
            learned.
        weight: the starting value of w.
        learn_target: whether the target is a parameter too.
        width: of the bend at the target, in standard deviations of length.
        strength: reward per standard deviation of the frozen reward within a prompt.
        budget: largest |w|, hence largest standard deviation of the charge within a prompt.

    Attributes:
        weight: the parameter w, float64 scalar.
        scaled_target: target / s, float64 scalar; a parameter with `learn_target`.
        unit: "tokens" or "characters" once calibrated, None before.

    Raises:
        InputError: a target, width or budget that is not positive, or a weight beyond the budget.

    Example:
        >>> def zero(prompts, completions, **columns):
        ...     return [0.0] * len(completions)
        >>> shaped = LengthShaping(zero, target=3, weight=1.0, width=0.01)
        >>> shaped.score(["a", "a"], ["b", "bcdef"]).round(decimals=6).abs().tolist()
        [0.0, 2.0]
    """

    length_scale: Tensor
    target_bounds: Tensor

    def __init__(
        self,
        frozen: ScoreFunction,
        target: float,
        weight: float = 0.0,
        learn_target: bool = False,
        width: Positive = 0.25,
        strength: NonNegative = 1.0,
        budget: Positive = 1.0,
    ) -> None:
        super().__init__(frozen, strength)
        for name, value in (("target", target), ("width", width), ("budget", budget)):
            if not (0 < value < float("inf")):
                raise InputError(f"LengthShaping.{name}: expected a positive number, got {value}")
        if not abs(weight) <= budget:
            raise InputError(f"LengthShaping.weight: expected at most the budget {budget} in size, got {weight}")
        self.width, self.budget, self.learn_target = width, budget, learn_target
        self.unit: str | None = None
        self.weight = nn.Parameter(torch.tensor(float(weight), dtype=torch.float64))
        self.scaled_target = nn.Parameter(torch.tensor(float(target), dtype=torch.float64), requires_grad=learn_target)
        self.register_buffer("length_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("target_bounds", torch.tensor([0.0, float("inf")], dtype=torch.float64))

    @property
    def target(self) -> float:
        """The length above which completions are charged, in tokens or characters."""
        return float(self.scaled_target.detach() * self.length_scale)

    def correction_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The charge, -w * excess [B], differentiable in w and the target."""
        lengths = self._lengths(completions, columns).to(self.weight.device)
        excess = self.width * nn.functional.softplus((lengths / self.length_scale - self.scaled_target) / self.width)
        return -self.weight * excess

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the frozen reward, and set the unit, the scale of length and the bounds of a learned target.

        Raises:
            InputError: as the frozen reward's calibration; or all completions of each prompt are equally long.
        """
        super().calibrate(rollouts)
        arguments = score_arguments(rollouts)
        self.unit = "tokens" if arguments.get("completion_ids") is not None else "characters"
        lengths = self._lengths(arguments["completions"], arguments)
        target = self.target
        self.length_scale.fill_(deviation_within_prompts("length", lengths, rollouts))
        self.scaled_target.fill_(target / float(self.length_scale))
        self.target_bounds.copy_(torch.stack([lengths.min(), lengths.max()]))

    @torch.no_grad()
    def project(self) -> None:
        """Cut w to the budget, and a learned target to the lengths seen in calibration."""
        self.weight.clamp_(-self.budget, self.budget)
        if self.learn_target:
            low, high = (self.target_bounds / self.length_scale).tolist()
            self.scaled_target.clamp_(low, high)

    def describe(self) -> dict[str, Any]:
        """Weight, target and strength."""
        target = f"{self.target:.6g} {self.unit or ''}{' (learned)' if self.learn_target else ''}"
        return {"weight": self.weight.item(), "target": target, "strength of the frozen reward": self.strength}

    def record(self, path: Path) -> dict[str, Any]:
        """The frozen reward, the weight and the target."""
        return {
            **super().record(path),
            **{name: getattr(self, name).item() for name in ("weight", "scaled_target", "length_scale")},
            **{name: getattr(self, name) for name in ("learn_target", "width", "budget", "unit")},
            "target_bounds": None if self.unit is None else self.target_bounds.tolist(),
        }

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> LengthShaping:
        """See `LanguageLeader.from_record`."""
        settings = {name: record[name] for name in ("weight", "learn_target", "width", "strength", "budget")}
        leader = cls(cls._load_frozen(path, record), target=1.0, **settings)
        leader._restore_standardisation(record)
        leader.unit = record["unit"]
        with torch.no_grad():
            leader.scaled_target.fill_(record["scaled_target"])
            leader.length_scale.fill_(record["length_scale"])
            if record["target_bounds"] is not None:
                leader.target_bounds.copy_(torch.tensor(record["target_bounds"], dtype=torch.float64))
        return leader

    def _lengths(self, completions: Sequence[Any], columns: Mapping[str, Any]) -> Tensor:
        """Tokens or characters of each completion, float64 [B]."""
        ids = columns.get("completion_ids")
        if ids is None and self.unit == "tokens":
            raise InputError(
                "LengthShaping: was calibrated on lengths in tokens and got completions without completion_ids; pass "
                "them, as trl does, or calibrate on rollouts without that column"
            )
        if ids is not None and self.unit != "characters":
            return torch.tensor([float(len(row)) for row in ids], dtype=torch.float64)
        return torch.tensor([float(len(answer_text(completion))) for completion in completions], dtype=torch.float64)
