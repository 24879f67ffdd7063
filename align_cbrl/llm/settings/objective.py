"""What the leader wants, swapped by one line: `objective: {kind: cvar, share: 0.25}`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from align_cbrl import (
    Constrained,
    CrossFitted,
    CVaR,
    ExpectedUtility,
    KLPriced,
    Leader,
    MeanVariance,
    Objective,
    PreferenceLikelihood,
    Rollouts,
    WorstGroup,
)
from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import PairwiseJudge
from align_cbrl.objectives.observations import UtilityFunction
from align_cbrl.runs.config import nearest

_MEMORY = 64  # contexts: eight steps of eight prompts


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Objective(abc.ABC):
    kind: str = ""

    def __post_init__(self) -> None:
        self.of(ExpectedUtility(_nothing), ExpectedUtility(_nothing))  # raises what the objective itself refuses

    @abc.abstractmethod
    def of(self, score: Objective, cost: Objective) -> Objective:
        """The objective around the expected score, without memory of earlier batches."""

    def build(
        self,
        judge: UtilityFunction | PairwiseJudge,
        costs: Mapping[str, UtilityFunction] | None = None,
        *,
        natural: bool = False,
    ) -> Objective:
        """The objective.

        Args:
            judge: a utility such as `Judge`; or a `PairwiseJudge`, for kind "preference" only.
            costs: utilities by name, of which "constrained" bounds one.
            natural: whether it is climbed by natural steps, which remember whole batches.

        Raises:
            InputError: a judge of pairs with another kind, or a cost that is not among `costs`.
        """
        if isinstance(judge, PairwiseJudge):
            raise InputError(
                f"kind: {self.kind!r} needs a judge that scores completions, got one that compares pairs; use kind "
                "'preference'"
            )
        return self._fitted(self.of(ExpectedUtility(judge), self._cost(costs or {})), natural)

    def _fitted(self, objective: Objective, natural: bool) -> Objective:
        return objective

    def _cost(self, costs: Mapping[str, UtilityFunction]) -> Objective:
        return ExpectedUtility(_nothing)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Priced(_Objective):
    price: NonNegative | None = None

    def _priced(self, score: Objective) -> Objective:
        return score if self.price is None else KLPriced(score, self.price)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Risk(_Priced):
    memory: Whole | None = None

    def _fitted(self, objective: Objective, natural: bool) -> Objective:
        if natural and self.memory:
            raise InputError(
                f"memory: natural steps are taken on all remembered batches, got {self.memory} contexts besides; "
                "remove it, or set hpgd.step: gradient"
            )
        memory = _MEMORY if self.memory is None else self.memory
        return CrossFitted(objective, 0 if natural else memory)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedSettings(_Objective):
    """The judge's mean score."""

    kind: Literal["expected"] = "expected"

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The score itself."""
        return score


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class KLPricedSettings(_Objective):
    """The judge's mean score less a price on divergence from the reference; see `KLPriced`.

    Attributes:
        price: kappa, score per nat.
    """

    kind: Literal["kl_priced"] = "kl_priced"
    price: NonNegative

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The priced score."""
        return KLPriced(score, self.price)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(_Objective):
    """How well the leader's reward explains preferences on pairs of completions; see `PreferenceLikelihood`.

    Attributes:
        scale: of the judge's score in the Bradley-Terry probability of a preference; not with a judge of pairs.
        partners: with how many others of its prompt each completion is paired; null: all.
    """

    kind: Literal["preference"] = "preference"
    scale: Positive | None = None
    partners: Count | None = None

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The likelihood of preferences by the score."""
        assert isinstance(score, ExpectedUtility)
        scale = 1.0 if self.scale is None else self.scale
        return PreferenceLikelihood(score.utility_function, scale=scale, partners=self.partners)

    def build(
        self,
        judge: UtilityFunction | PairwiseJudge,
        costs: Mapping[str, UtilityFunction] | None = None,
        *,
        natural: bool = False,
    ) -> Objective:
        """The objective; a judge of pairs says probabilities, which have no scale."""
        if not isinstance(judge, PairwiseJudge):
            return super().build(judge, costs, natural=natural)
        if self.scale is not None:
            raise InputError("scale: a judge of pairs says probabilities, which have no scale")
        return PreferenceLikelihood(preference=judge, partners=self.partners)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class CVaRSettings(_Risk):
    """The mean score over the worst share of prompts; see `CVaR`.

    Attributes:
        share: of prompts, in (0, 1].
        price: of divergence; null: none.
        memory: how many contexts of earlier steps are remembered beside the batch's own, with hpgd.step: gradient;
            null: 64.
    """

    kind: Literal["cvar"] = "cvar"
    share: float

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The risk."""
        return CVaR(self._priced(score), self.share)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorstGroupSettings(_Risk):
    """The mean score of the worst group of prompts; see `WorstGroup`.

    Attributes:
        column: of the data, with each prompt's group.
        temperature: of a soft minimum over groups, in units of score; 0 is the minimum.
        price: of divergence; null: none.
        memory: how many contexts of earlier steps are remembered beside the batch's own, with hpgd.step: gradient;
            null: 64.
    """

    kind: Literal["worst_group"] = "worst_group"
    column: str
    temperature: NonNegative = 0.0

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The risk."""
        return WorstGroup(self._priced(score), self.column, self.temperature)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanVarianceSettings(_Risk):
    """The mean score less `aversion` times its variance over prompts; see `MeanVariance`.

    Attributes:
        aversion: per unit of score.
        price: of divergence; null: none.
        memory: how many contexts of earlier steps are remembered beside the batch's own, with hpgd.step: gradient;
            null: 64.
    """

    kind: Literal["mean_variance"] = "mean_variance"
    aversion: NonNegative

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The risk."""
        return MeanVariance(self._priced(score), self.aversion)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstrainedSettings(_Priced):
    """The mean score while the mean of a cost is at most a bound; see `Constrained`.

    Attributes:
        cost: name of one of the world's costs.
        bound: largest mean cost allowed.
        rate: of the multiplier's ascent.
        multiplier: where it starts.
        price: of divergence; null: none.
    """

    kind: Literal["constrained"] = "constrained"
    cost: str
    bound: float
    rate: Positive
    multiplier: NonNegative = 0.0

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The Lagrangian."""
        return Constrained(self._priced(score), cost, self.bound, self.rate, self.multiplier)

    def _cost(self, costs: Mapping[str, UtilityFunction]) -> Objective:
        if self.cost not in costs:
            raise InputError(f"cost: there is none named {self.cost!r}; {nearest(self.cost, costs)}")
        return ExpectedUtility(costs[self.cost])


ObjectiveSettings = (
    ExpectedSettings
    | KLPricedSettings
    | PreferenceSettings
    | CVaRSettings
    | WorstGroupSettings
    | MeanVarianceSettings
    | ConstrainedSettings
)
"""What the leader wants, by `kind`."""


def _nothing(leader: Leader, rollouts: Rollouts) -> Tensor:
    """Stands for a judge while settings are checked; never evaluated."""
    return Tensor()
