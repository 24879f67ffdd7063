"""Rewards that stay as they are, plus something small that the leader learns: a correction, or a limit on length."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.base import LanguageLeader, load_leader, write_record
from align_cbrl.llm.leaders.calibration import deviation_within_prompts, within_prompts
from align_cbrl.llm.leaders.mixture import RewardMixture
from align_cbrl.llm.leaders.reward_model import RewardModelLeader
from align_cbrl.llm.leaders.terms import load_term, save_terms
from align_cbrl.llm.scoring import ScoreFunction, call_score_function, check_scores, score_arguments
from align_cbrl.rollouts import Rollouts


class _FrozenPlus(LanguageLeader):
    """r_x = strength * (f - shift) / scale + correction_x, with f frozen; subclasses say what the correction is."""

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

    def frozen_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The standardised frozen reward, float64 [B], without gradients."""
        arguments = {"prompts": prompts, "completions": completions, **columns}
        with torch.no_grad():
            scores = check_scores("frozen", call_score_function(self.frozen, arguments), len(completions))
        return self.strength * (scores.to(self.shift.device) - self.shift) / self.scale

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]."""
        correction = self.correction_score(prompts, completions, **columns)
        return self.frozen_score(prompts, completions, **columns).to(correction.device) + correction

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the frozen reward: mean zero, mean variance within a prompt's group one.

        Raises:
            InputError: no prompt has two completions, or the reward gives all completions of each prompt the same.
        """
        self.shift.zero_()
        self.scale.fill_(1.0)
        arguments = score_arguments(rollouts)
        scores = check_scores("frozen", call_score_function(self.frozen, arguments), rollouts.size)
        self.scale.fill_(deviation_within_prompts("frozen", scores, rollouts))
        self.shift.copy_(scores.mean())

    def _frozen_record(self, path: Path) -> dict[str, Any]:
        path.mkdir(parents=True, exist_ok=True)
        return {
            "frozen": save_terms({"frozen": self.frozen}, path)["frozen"],
            "strength": self.strength,
            "shift": self.shift.item(),
            "scale": self.scale.item(),
        }

    def _restore(self, record: Mapping[str, Any]) -> None:
        self.shift.fill_(record["shift"])
        self.scale.fill_(record["scale"])


class Shaped(_FrozenPlus):
    """A frozen reward plus a small learned correction: r_x = strength * (f - shift) / scale + correction_x.

    The correction is a leader itself. Of a `RewardMixture` it is the weighted sum of its standardised terms. Of a
    `RewardModelLeader` it is how much that model's score has changed since the start, so that it begins at zero
    whatever the model says; a head or an adapter, since with all parameters nothing would be small.

    The budget bounds the standard deviation of the correction within a prompt of the calibrating rollouts, on which
    the frozen reward has `strength`. A mixture's is known from its terms' correlations. For a reward model
    the calibrating completions are kept, and scored twice at every projection: choose a few hundred at most. Budgets
    of the correction's own hold as well.

    Args:
        frozen: a reward function, or a reward model that the leader must not touch.
        correction: a mixture whose weights start at or near zero, or a reward-model leader of "head" or "lora".
        strength: reward per standard deviation of the frozen reward within a prompt.
        budget: largest standard deviation of the correction within a prompt.

    Raises:
        InputError: a softmax mixture or a leader of all parameters, a model that would be frozen and trained at once,
            or a budget that is not positive.

    Example:
        >>> def score(prompts, completions, **columns):
        ...     return [float(len(c)) for c in completions]
        >>> def loud(prompts, completions, **columns):
        ...     return [float(c.isupper()) for c in completions]
        >>> shaped = Shaped(score, RewardMixture({"loud": loud}, {"loud": -0.25}), budget=0.5)
        >>> shaped.score(["a", "a"], ["b", "BCD"]).tolist()
        [1.0, 2.75]
    """

    def __init__(
        self,
        frozen: ScoreFunction,
        correction: RewardMixture | RewardModelLeader,
        strength: float = 1.0,
        budget: float = 0.5,
    ) -> None:
        super().__init__(frozen, strength)
        if not (0 < budget < float("inf")):
            raise InputError(f"Shaped.budget: expected a positive number, got {budget}")
        if isinstance(correction, RewardMixture):
            if correction.constraint == "softmax":
                raise InputError(
                    "Shaped.correction: the weights of a softmax have a fixed sum, so its correction cannot be small; "
                    "use a mixture of constraint 'free' or 'positive'"
                )
        elif isinstance(correction, RewardModelLeader):
            if correction.trainable == "all":
                raise InputError(
                    "Shaped.correction: a reward model all of whose parameters move is no small correction; use "
                    "trainable='head' or 'lora', or a RewardModelLeader alone"
                )
            if correction.reward_model is frozen:
                raise InputError(
                    "Shaped.frozen: the correction trains this very model, so it would not be frozen; load it twice, "
                    "RewardModel(path) for each"
                )
        else:
            raise InputError(
                f"Shaped.correction: expected a RewardMixture or a RewardModelLeader, got {type(correction).__name__}"
            )
        self.correction, self.budget = correction, budget
        self._reference: dict[str, list[Any]] | None = None  # prompts, completions and group, for a reward model

    def correction_score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The correction [B], differentiable in x."""
        if isinstance(self.correction, RewardModelLeader):
            return self.correction.deviation(prompts, completions)
        return self.correction.score(prompts, completions, **columns)

    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise the frozen reward and the correction; raises InputError as both do."""
        super().calibrate(rollouts)
        self.correction.calibrate(rollouts)
        if isinstance(self.correction, RewardModelLeader):
            arguments = score_arguments(rollouts)
            self._reference = {
                "prompts": arguments["prompts"],
                "completions": arguments["completions"],
                "group": rollouts.group[:, 0].tolist(),
            }

    @torch.no_grad()
    def spread(self) -> float:
        """Standard deviation of the correction within a prompt of the calibrating rollouts.

        Raises:
            InputError: the correction is a reward model and `calibrate` has not been called.
        """
        if isinstance(self.correction, RewardMixture):
            return self.correction.spread()
        if self._reference is None:
            raise InputError("Shaped: the correction's spread is measured on rollouts; call calibrate(rollouts) first")
        scores = self.correction.deviation(self._reference["prompts"], self._reference["completions"]).double().cpu()
        rollouts = Rollouts.bandit(contexts=torch.tensor(self._reference["group"]), steps={})
        within, freedom = within_prompts(scores, rollouts)
        return float((within.pow(2).sum() / freedom).sqrt())

    @torch.no_grad()
    def project(self) -> None:
        """Shrink the correction to its budgets.

        The spread of an adapter's correction is not quite proportional to B: it is measured again until it fits.
        """
        self.correction.project()
        while (spread := self.spread()) > self.budget * (1 + 1e-6):
            self.correction.shrink(self.budget / spread)

    def describe(self) -> dict[str, Any]:
        """The frozen reward's strength, and what the correction says of itself."""
        return {"strength of the frozen reward": self.strength, **self.correction.describe()}

    def save_pretrained(self, path: str | Path) -> None:
        """Write the frozen reward, the correction (a folder of its own) and what its budget is measured on.

        Raises:
            InputError: a reward function that cannot be imported again, such as a lambda.
        """
        path = Path(path)
        record = self._frozen_record(path)
        self.correction.save_pretrained(path / "correction")
        if self._reference is not None:
            (path / "reference.json").write_text(json.dumps(self._reference) + "\n", encoding="utf-8")
        write_record(self, path, {**record, "budget": self.budget, "correction": "correction"})

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> Shaped:
        """The leader that `save_pretrained` wrote; called by `load_leader`."""
        correction = load_leader(path / "correction")
        assert isinstance(correction, (RewardMixture, RewardModelLeader))
        frozen = load_term("frozen", record["frozen"], path)
        leader = cls(frozen, correction, record["strength"], record["budget"])
        leader._restore(record)
        if isinstance(correction, RewardModelLeader) and (file := path / "reference.json").is_file():
            leader._reference = json.loads(file.read_text(encoding="utf-8"))
        return leader


class LengthShaping(_FrozenPlus):
    """A frozen reward, and a learned charge on length beyond a target in standard deviations of length.

        r = strength * (f - shift) / scale - w * width * softplus((length / s - target / s) / width)

    The length is in tokens where the column `completion_ids` is given, as trl gives it, else in characters. s is its
    standard deviation within a prompt of the calibrating rollouts. The excess, width * softplus(. / width), is a
    smooth max(0, length - target) / s: nearly nothing below the target, and one more reward unit w per standard
    deviation beyond it. w may turn negative, where the leader wants longer completions.

    The excess grows by at most one per standard deviation, so its own standard deviation is at most one, and
    |w| <= budget bounds that of the charge. A target that is learned stays among the lengths seen in calibration:
    beyond them nothing would be charged, and no gradient would lead back.

    Args:
        frozen: a reward function, or a reward model.
        target: the length beyond which is charged, in tokens or characters; where it starts, if it is learned.
        weight: where w starts.
        learn_target: whether the target is a parameter besides w.
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
        width: float = 0.25,
        strength: float = 1.0,
        budget: float = 1.0,
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
        """The length beyond which is charged, in tokens or characters."""
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

    def save_pretrained(self, path: str | Path) -> None:
        """Write the frozen reward, the weight and the target.

        Raises:
            InputError: a reward function that cannot be imported again, such as a lambda.
        """
        path = Path(path)
        record = self._frozen_record(path)
        for name in ("weight", "scaled_target", "length_scale"):
            record[name] = getattr(self, name).item()
        bounds = None if self.unit is None else self.target_bounds.tolist()
        settings = {name: getattr(self, name) for name in ("learn_target", "width", "budget", "unit")}
        write_record(self, path, {**record, **settings, "target_bounds": bounds})

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> LengthShaping:
        """The leader that `save_pretrained` wrote; called by `load_leader`."""
        settings = {name: record[name] for name in ("weight", "learn_target", "width", "strength", "budget")}
        leader = cls(load_term("frozen", record["frozen"], path), target=1.0, **settings)
        leader._restore(record)
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
        return torch.tensor([float(_characters(completion)) for completion in completions], dtype=torch.float64)


def _characters(completion: Any) -> int:
    """Characters of a text, or of all messages of a conversation's end."""
    if isinstance(completion, str):
        return len(completion)
    return sum(len(message.get("content") or "") for message in completion)
