"""A weighted sum of reward functions, whose weights the leader learns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from align_cbrl.checks import Positive, checked
from align_cbrl.distributed import gather_rows
from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.calibration import constant, deviations, within_prompts
from align_cbrl.llm.leaders.correction import Correction
from align_cbrl.llm.leaders.terms import load_term, save_terms
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.scoring import ScoreFunction, score_arguments, scores_of
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.config import nearest

Constraint = Literal["free", "positive", "softmax"]
"""Which weights a mixture allows within its budget; see `RewardMixture`."""

_LEAST_SHARE = (
    0.01  # of the largest one: a softmax weight's gradient is proportional to it, and one at zero never moves
)
_LOWEST_LOGIT = math.log(_LEAST_SHARE)


@checked
class RewardMixture(Correction):
    """A weighted sum of reward functions, x being the weights: r_x = sum_k w_k (f_k - shift_k) / scale_k.

    Each term is standardised once, by `calibrate`, so that weights compare. The weights live in an ellipsoid, those
    whose reward spreads by at most `budget` among one prompt's reference completions: the leader chooses what to
    reward, the budget how much reward there is, and with the temperature how far the follower may leave its reference.

    Three constraints can be put on the weights besides:

    - "free": any sign; x is the weights. A term may turn into its opposite.
    - "positive": w >= 0; x is the weights, cut at zero by `project`.
    - "softmax": w = s softmax(x), with s the sum of the starting weights. Terms share a fixed sum, so only their
      proportions are learned; how much reward there is stays with s, or with a temperature that is learned. The
      standard deviation of a sum is at most the sum of the standard deviations, here s, so s <= budget keeps within the
      budget, and `project` need not scale. No share falls below a hundredth of the largest one, at the start or later:
      the logits, the largest being 0, stay in [log 0.01, 0]. All mass on one of K terms starts at a share of
      1 / (1 + 0.01 (K - 1)), and every term can return.

    Args:
        terms: reward functions by name, called as f(prompts=..., completions=..., **columns); reward models too.
        weights: where the weights start, by name; missing names start at zero. Default: the budget on the first term.
        budget: largest standard deviation of r_x within a prompt of the calibrating rollouts; the largest norm of the
            weights before calibration (their largest sum, for "softmax").
        constraint: "free", "positive" or "softmax".

    Attributes:
        weight: the parameter x, float64 [K], in the order of `terms`; absent for "softmax".
        logits: the parameter x of "softmax", float64 [K].

    Raises:
        InputError: no terms, a weight for an unknown term, a start outside the budget or the constraint, or a budget
            that is not positive.

    Example:
        >>> def short(prompts, completions, **columns):
        ...     return [-float(len(c)) for c in completions]
        >>> mixture = RewardMixture({"short": short}, {"short": 1.0}, budget=2.0)
        >>> mixture.score(["a", "a"], ["b", "bcd"]).tolist()
        [-1.0, -3.0]
    """

    spread_is_sampled: ClassVar[bool] = False

    shift: Tensor
    scale: Tensor
    correlation: Tensor

    def __init__(
        self,
        terms: Mapping[str, ScoreFunction],
        weights: Mapping[str, float] | None = None,
        budget: Positive = 1.0,
        constraint: Constraint = "free",
    ) -> None:
        super().__init__()
        if not terms:
            raise InputError("RewardMixture.terms: expected at least one reward function, got none")
        if constraint not in get_args(Constraint):
            raise InputError(
                f"RewardMixture.constraint: got {constraint!r}; {nearest(str(constraint), get_args(Constraint))}"
            )
        self.terms = dict(terms)
        self.budget, self.constraint = budget, constraint
        start = self._start({next(iter(terms)): budget} if weights is None else weights)
        if constraint == "softmax":
            self.total = float(start.sum())
            self.logits = nn.Parameter((start / start.max()).clamp(min=_LEAST_SHARE).log())
        else:
            self.weight = nn.Parameter(start)
        self.register_buffer("shift", torch.zeros(len(terms), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(len(terms), dtype=torch.float64))
        self.register_buffer("correlation", torch.eye(len(terms), dtype=torch.float64))

    @classmethod
    def of(
        cls, reward_funcs: Sequence[ScoreFunction | str | Path], reward_weights: Sequence[float] | None = None
    ) -> RewardMixture:
        """The mixture that a trl script with these `reward_funcs` and `reward_weights` starts from.

        Its budget is the norm of the weights. Terms have the names of their functions.

        Args:
            reward_funcs: functions, and folders or hub ids of reward models.
            reward_weights: one for each; None: 1 for each, as in trl.

        Raises:
            InputError: another number of weights, weights that are all zero, or a model in memory.

        Example:
            >>> def correct(completions, **columns):
            ...     return [float("4" in text) for text in completions]
            >>> def brevity(completions, **columns):
            ...     return [-float(len(text)) for text in completions]
            >>> RewardMixture.of([correct, brevity], [1.0, 0.5]).weights()
            {'correct': 1.0, 'brevity': 0.5}
        """
        weights = [1.0] * len(reward_funcs) if reward_weights is None else list(reward_weights)
        if len(weights) != len(reward_funcs) or not any(weights):
            raise InputError(
                f"reward_weights: expected one for each of {len(reward_funcs)} reward functions, not all zero, got "
                f"{weights}"
            )
        terms: dict[str, ScoreFunction] = {}
        for function in reward_funcs:
            if isinstance(function, nn.Module):
                raise InputError(
                    f"reward_funcs: expected functions, folders or hub ids, got a {type(function).__name__} in memory; "
                    "save it beside its tokenizer and name the folder"
                )
            is_path = isinstance(function, (str, Path))
            name = Path(str(function)).name if is_path else getattr(function, "__name__", type(function).__name__)
            name = name if name.isidentifier() or is_path else "reward"
            while name in terms:
                name = f"{name}_"
            terms[name] = RewardModel(function) if isinstance(function, (str, Path)) else function
        return cls(terms, dict(zip(terms, weights, strict=True)), budget=math.hypot(*weights))

    def effective_weight(self) -> Tensor:
        """The weights w, float64 [K], differentiable in x."""
        if self.constraint == "softmax":
            return self.total * torch.softmax(self.logits, 0)
        return self.weight

    def fixed_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The scores of the terms as the functions return them, float64 [B, K].

        Raises:
            InputError: a term that returns None, the wrong number of scores, or a score that is not finite.
        """
        arguments = {"prompts": prompts, "completions": completions, **columns}
        return torch.stack([scores_of(name, term, arguments) for name, term in self.terms.items()], dim=1)

    def features(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The standardised terms, float64 [B, K], without gradients."""
        return self._standardised(self.fixed_scores(prompts, completions, **columns))

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B]. Raises InputError as `fixed_scores` does."""
        return self.features(prompts, completions, **columns) @ self.effective_weight()

    def score_from(self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """r_x [B], given the terms' scores."""
        return self._standardised(fixed) @ self.effective_weight()

    def deviation(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """See `Correction.deviation`: as a correction a mixture changes the reward by r_x itself."""
        return self.score(prompts, completions, **columns)

    def deviation_from(
        self, fixed: Tensor, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Tensor:
        """As `deviation`, given the terms' scores."""
        return self.score_from(fixed, prompts, completions, **columns)

    @torch.no_grad()
    def calibrate(self, rollouts: Rollouts) -> None:
        """Standardise every term on these rollouts: mean zero, and mean variance within a prompt's group one.

        The variance is taken within groups since only differences between completions of one prompt move a policy.
        The terms' correlations within groups shape the budget, to which the weights are scaled back.

        A term that never varies there, such as a bonus that no completion of the reference earns, is named in a
        warning: its scale is unknown and stays one, and the budget bounds its weight as if its deviation were one.

        Raises:
            InputError: no prompt has two completions.
        """
        scores = self.fixed_scores(**score_arguments(rollouts))  # [B, K]
        within, freedom = within_prompts(scores, rollouts)
        deviation = deviations(within, freedom)
        still = constant(scores, deviation)
        self.shift.copy_(scores.mean(0))
        self.scale.copy_(torch.where(still, 1.0, deviation))
        scaled = torch.where(still, 0.0, within / self.scale)
        self.correlation.copy_(scaled.T @ scaled / freedom + torch.diag(still.double()))
        if still.any():
            names = ", ".join(repr(name) for name, same in zip(self.terms, still.tolist(), strict=True) if same)
            warnings.warn(
                f"RewardMixture.terms: {names}: the same score for all completions of a prompt among those that the "
                "reward is calibrated on. The scale is therefore unknown and stays 1, the budget "
                f"{self.budget:.4g} bounds the weight, and a policy learns nothing from such a term until its "
                "completions differ in it",
                stacklevel=2,
            )
        self.project()  # correlated terms may exceed together what their weights' norm kept

    @property
    def is_rescaled(self) -> bool:
        """Whether the terms have been given a scale, by `calibrate` or `rescale`."""
        return bool((self.scale != 1).any() or (self.shift != 0).any())

    @torch.no_grad()
    def rescale(self, rollouts: Rollouts) -> None:
        """As `calibrate`, but the reward stays as it is, up to a constant: for one that a policy is trained on already.

        The weights take up the scales of their terms. Their unit becomes such that the whole reward, whose spread
        within a prompt is measured here, spreads by the norm that they had; the budget keeps its meaning relative to
        it. The weights of a softmax, whose sum is fixed, are left alone. In several processes all completions count.

        Args:
            rollouts: completions of the present policy, with this leader's scores in `known` if they are there.

        Raises:
            InputError: no prompt has two completions.

        Example:
            >>> terms = {"short": lambda completions: [-float(len(text)) for text in completions]}
            >>> mixture = RewardMixture(terms, {"short": 1.0})
            >>> steps = {"prompt": ["a", "a"], "completion": ["bc", "bcde"]}
            >>> mixture.rescale(Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps))
            >>> mixture.weights(), mixture.score(["a", "a"], ["b", "bcd"]).diff().item()
            ({'short': 1.0}, -2.0)
        """
        if self.constraint == "softmax":
            return
        own = rollouts.known.get(self)
        scores = gather_rows(self.fixed_scores(**score_arguments(rollouts)) if own is None else own)
        within, freedom = within_prompts(scores, rollouts.over_ranks())
        deviation = deviations(within, freedom)
        still = constant(scores, deviation)
        norm, spread = self.weight.norm(), deviations((within @ self.weight)[:, None], freedom)[0]
        unit = norm / spread if not constant(scores @ self.weight[:, None], spread[None]) else torch.ones_like(norm)
        self.shift.copy_(scores.mean(0))
        self.scale.copy_(torch.where(still, 1.0, deviation * unit))
        self.weight.mul_(self.scale)
        alike = torch.where(still, 0.0, within / deviation)
        self.correlation.copy_(alike.T @ alike / freedom + torch.diag(still.double()))

    @torch.no_grad()
    def spread(self) -> float:
        """Standard deviation of r_x within a prompt of the calibrating rollouts; before that, the weights' norm."""
        weight = self.effective_weight()
        return float((weight @ self.correlation @ weight).clamp(min=0).sqrt())

    def spread_on(self, reference: Rollouts | None) -> float:
        """See `Correction.spread_on`: known from the terms' correlations, so that no completion is scored."""
        return self.spread()

    @torch.no_grad()
    def project(self) -> None:
        """Bring the weights back into the constraint, and scale them back to the budget."""
        if self.constraint == "softmax":
            self.logits.sub_(self.logits.max()).clamp_(min=_LOWEST_LOGIT)
            return
        if self.constraint == "positive":
            self.weight.clamp_(min=0.0)
        spread = self.spread()
        if spread > self.budget * (1 + 1e-9):  # no start is moved by the rounding of its own correlation
            self.weight.mul_(self.budget / spread)

    @property
    def lowest_direction(self) -> float:
        """The least entry of a direction that `aim` tells apart, the largest being 1."""
        return -1.0 if self.constraint == "free" else 0.0

    @torch.no_grad()
    def aim(self, direction: Tensor) -> None:
        """Put the weights on the boundary of the budget, in the direction [K] or the nearest one of the constraint.

        With "positive" and "softmax" entries below zero count as zero; a softmax turns the rest into shares of its sum,
        equal ones where nothing is left. Where terms nearly cancel, no weight becomes more than a thousand budgets.
        """
        aimed = direction.to(self.shift) if self.constraint == "free" else direction.to(self.shift).clamp(min=0.0)
        if self.constraint == "softmax":
            largest = aimed.max()
            self.logits.copy_((aimed / largest).log() if largest > 0 else torch.zeros_like(aimed))
        else:
            size = torch.maximum((aimed @ self.correlation @ aimed).clamp(min=0).sqrt(), 1e-3 * aimed.norm())
            self.weight.copy_(aimed * (self.budget / size if size > 0 else 0.0))
        self.project()

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, scale: float | None = None) -> None:
        """`aim` at the weights that describe labels best: least squares within the constraint.

        Args:
            features: what `features` returned, less the mean of each prompt's group, [N, K].
            labels: likewise, [N].
            scale: reward per unit of label, within the budget; None: as much as the budget allows. A softmax, whose
                weights have a fixed sum, is aimed either way.
        """
        # gelsd: terms that are copies of each other share their weight instead of blowing it up
        aimed = torch.linalg.lstsq(features, labels[:, None], driver="gelsd").solution[:, 0]
        if self.constraint != "free" and (aimed < 0).any():
            aimed = torch.from_numpy(nnls(features.cpu().numpy(), labels.cpu().numpy())[0]).to(labels)
        if scale is None or self.constraint == "softmax":
            self.aim(aimed)
        else:
            self.weight.copy_(scale * aimed)
            self.project()

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale the weights by `factor`. Raises InputError for "softmax", whose sum is fixed."""
        if self.constraint == "softmax":
            raise InputError(
                "RewardMixture.shrink: the weights of a softmax have a fixed sum; use 'free' or 'positive'"
            )
        self.weight.mul_(factor)

    def check_correction_of(self, frozen: ScoreFunction) -> None:
        """Raise `InputError` for "softmax", whose weights cannot be small."""
        if self.constraint == "softmax":
            raise InputError(
                "Shaped.correction: the weights of a softmax have a fixed sum, so its correction cannot be small; "
                "use a mixture of constraint 'free' or 'positive'"
            )

    def weights(self) -> dict[str, float]:
        """The present weights w by name, whatever the constraint."""
        return dict(zip(self.terms, self.effective_weight().tolist(), strict=True))

    def raw_weights(self) -> dict[str, float]:
        """The same in units of the reward functions themselves: trl's `reward_weights` for this reward."""
        return dict(zip(self.terms, (self.effective_weight() / self.scale).tolist(), strict=True))

    def describe(self) -> dict[str, Any]:
        """The weights by name, and the constraint on them."""
        values: dict[str, Any] = {f"weight of {name}": weight for name, weight in self.weights().items()}
        return {**values, "constraint": self.constraint}

    def record(self, path: Path) -> dict[str, Any]:
        """Weights, standardisation and the terms (reward models are copied, functions named by dotted path).

        Raises:
            InputError: a term that is neither a reward model nor an importable function, such as a lambda.
        """
        record = {
            "terms": save_terms(self.terms, path),
            "constraint": self.constraint,
            "weights": self.weights(),
            "budget": self.budget,
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "correlation": self.correlation.tolist(),
        }
        if self.constraint == "softmax":
            record |= {"total": self.total, "logits": self.logits.tolist()}
        return record

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> RewardMixture:
        """See `LanguageLeader.from_record`."""
        terms = {name: load_term(name, term, path) for name, term in record["terms"].items()}
        constraint = record.get("constraint", "free")  # version 0.1 knew no other
        mixture = cls(terms, budget=record["budget"], constraint=constraint)
        moving = "logits" if constraint == "softmax" else "weight"
        values = record["logits"] if constraint == "softmax" else [record["weights"][name] for name in terms]
        if constraint == "softmax":
            mixture.total = record["total"]
        with torch.no_grad():
            getattr(mixture, moving).copy_(torch.tensor(values, dtype=torch.float64))
        for name in ("shift", "scale", "correlation"):
            getattr(mixture, name).copy_(torch.tensor(record[name], dtype=torch.float64))
        return mixture

    def _standardised(self, scores: Tensor) -> Tensor:
        return (scores.to(self.shift.device) - self.shift) / self.scale

    def _start(self, weights: Mapping[str, float]) -> Tensor:
        """The starting weights [K], checked."""
        if unknown := sorted(set(weights) - set(self.terms)):
            raise InputError(f"RewardMixture.weights: no terms named {unknown}; the terms are {list(self.terms)}")
        start = torch.tensor([float(weights.get(name, 0.0)) for name in self.terms], dtype=torch.float64)
        if not torch.isfinite(start).all():
            raise InputError(f"RewardMixture.weights: expected finite numbers, got {dict(weights)}")
        if self.constraint != "free" and (start < 0).any():
            raise InputError(
                f"RewardMixture.weights: expected no negative weight under the constraint {self.constraint!r}, got "
                f"{dict(weights)}; use 'free', or turn the term round"
            )
        if self.constraint == "softmax" and not start.sum() > 0:
            raise InputError("RewardMixture.weights: a softmax shares a positive sum among the terms, got all zero")
        name, size = ("sum", start.sum()) if self.constraint == "softmax" else ("norm", start.norm())
        if size > self.budget * (1 + 1e-9):
            raise InputError(f"RewardMixture.weights: their {name} {size:.4g} exceeds the budget {self.budget:.4g}")
        return start
