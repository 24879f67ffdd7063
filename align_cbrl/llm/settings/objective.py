"""What the leader wants, swapped by one line: `objective: {kind: cvar, share: 0.25}`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from align_cbrl import (
    BestOf,
    Constrained,
    CrossFitted,
    CVaR,
    Distinct,
    ExpectedUtility,
    FunctionOfMeans,
    KLPriced,
    Leader,
    MeanVariance,
    Objective,
    PassAt,
    PreferenceLikelihood,
    Rollouts,
    SetUtility,
    WorstGroup,
)
from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import AnswerKind, PairwiseJudge, SetJudge
from align_cbrl.objectives import SetScore, harmonic_mean, ratio, target_shares
from align_cbrl.objectives.observations import UtilityFunction
from align_cbrl.runs.config import nearest
from align_cbrl.runs.imports import load_object

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
        judge: UtilityFunction | PairwiseJudge | SetJudge,
        costs: Mapping[str, UtilityFunction] | None = None,
        *,
        natural: bool = False,
    ) -> Objective:
        """The objective.

        Args:
            judge: a utility such as `Judge`; or a `PairwiseJudge`, for kind "preference" only, or a `SetJudge`, for
                kind "set" only.
            costs: utilities by name, of which "constrained" bounds one and "means" takes one.
            natural: whether it is climbed by natural steps, which remember whole batches.

        Raises:
            InputError: a judge of pairs or of sets with another kind, or a cost that is not among `costs`.
        """
        if isinstance(judge, (PairwiseJudge, SetJudge)):
            return self._of_several(judge)
        return self._fitted(self.of(ExpectedUtility(judge), self._cost(costs or {})), natural)

    def _of_several(self, judge: PairwiseJudge | SetJudge) -> Objective:
        """The objective of a judge that looks at several completions at once."""
        pairs = isinstance(judge, PairwiseJudge)
        does = "compares pairs; use kind 'preference'" if pairs else "scores sets; use kind 'set'"
        raise InputError(f"kind: {self.kind!r} needs a judge that scores completions, got one that {does}")

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
class _Remembering(_Priced):
    memory: Whole | None = None

    def _remembered(self, natural: bool) -> int:
        if natural and self.memory:
            raise InputError(
                f"memory: natural steps are taken on all remembered batches, got {self.memory} contexts besides; "
                "remove it, or set hpgd.step: gradient"
            )
        return 0 if natural else _MEMORY if self.memory is None else self.memory


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Risk(_Remembering):
    def _fitted(self, objective: Objective, natural: bool) -> Objective:
        return CrossFitted(objective, self._remembered(natural))


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfMeans(_Remembering):
    def _fitted(self, objective: Objective, natural: bool) -> Objective:
        means = objective.objective if isinstance(objective, KLPriced) else objective
        assert isinstance(means, FunctionOfMeans)
        means.memory = self._remembered(natural)
        return objective


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

    def _of_several(self, judge: PairwiseJudge | SetJudge) -> Objective:
        """A judge of pairs says probabilities, which have no scale."""
        if not isinstance(judge, PairwiseJudge):
            return super()._of_several(judge)
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
        return _named(self.cost, costs)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSettings(_Priced):
    """What several completions of a prompt are worth together; see `SetUtility`.

    Attributes:
        size: k, how many; `group_size` has to be larger.
        score: pass: whether any of them passes. best: the highest score. distinct: the number of kinds of answers
            among those that pass. null: what a judge of sets says.
        least: the judge's score from which on a completion passes; null, for distinct: all do.
        answer: for distinct, the function that names the kind of answer that each completion is:
            `package.module.function` or `file.py:function`.
        subsets: the most sets of a prompt that a judge of sets is asked about.
        price: of divergence; null: none.
    """

    kind: Literal["set"] = "set"
    size: Count
    score: Literal["pass", "best", "distinct"] | None = None
    least: float | None = None
    answer: str | None = None
    subsets: Count = 256

    def __post_init__(self) -> None:
        if (self.score == "distinct") != (self.answer is not None):
            raise InputError("answer: expected with score distinct, which needs it, and with no other")
        if self.least is not None and self.score not in ("pass", "distinct"):
            raise InputError("least: expected with score pass or distinct, where completions pass or do not")

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The mean over sets, by the score of single completions."""
        assert isinstance(score, ExpectedUtility)
        return self._priced(SetUtility(self._score(score.utility_function), self.size, self.subsets))

    def _of_several(self, judge: PairwiseJudge | SetJudge) -> Objective:
        """A judge of sets says what they are worth."""
        if not isinstance(judge, SetJudge):
            return super()._of_several(judge)
        if self.score is not None:
            raise InputError(f"score: a judge of sets says what they are worth, got {self.score!r}; leave it out")
        return self._priced(SetUtility(judge, self.size, self.subsets))

    def _score(self, score: UtilityFunction) -> SetScore:
        if self.score == "best":
            return BestOf(score)
        if self.score == "pass":
            return PassAt(score) if self.least is None else PassAt(score, self.least)
        if self.score is None:
            raise InputError("score: expected pass, best or distinct, of a judge that scores single completions")
        kind = _kind_of(self.answer)
        return Distinct(kind) if self.least is None else Distinct(kind, score, self.least)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetSettings(_OfMeans):
    """Shares of kinds of answers that should hit a target, -KL(target || shares); see `FunctionOfMeans`.

    The judge is not asked: all that counts is what kinds of answers there are.

    Attributes:
        answer: the function that names the kind of answer that each completion is: `package.module.function` or
            `file.py:function`.
        shares: the targets, by the names that it gives; they sum to one.
        price: of divergence; null: none.
        memory: how many contexts of earlier steps are remembered beside the batch's own, with hpgd.step: gradient;
            null: 64.
    """

    kind: Literal["targets"] = "targets"
    answer: str
    shares: dict[str, NonNegative]

    def __post_init__(self) -> None:
        target_shares(list(self.shares.values()))

    def of(self, score: Objective, cost: Objective) -> Objective:
        """How near the shares are to their targets."""
        shares = _kind_of(self.answer).shares(list(self.shares))
        return self._priced(FunctionOfMeans(target_shares(list(self.shares.values())), shares))


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeansSettings(_OfMeans):
    """A function of the judge's mean score and the mean of a cost; see `FunctionOfMeans`.

    Attributes:
        function: harmonic_mean, of two scores that both should be high; ratio, the score per unit of cost.
        cost: name of one of the world's costs.
        price: of divergence; null: none.
        memory: how many contexts of earlier steps are remembered beside the batch's own, with hpgd.step: gradient;
            null: 64.
    """

    kind: Literal["means"] = "means"
    function: Literal["harmonic_mean", "ratio"]
    cost: str

    def of(self, score: Objective, cost: Objective) -> Objective:
        """The function of both means."""
        h = harmonic_mean if self.function == "harmonic_mean" else ratio
        return self._priced(FunctionOfMeans(h, [score, cost]))

    def _cost(self, costs: Mapping[str, UtilityFunction]) -> Objective:
        return _named(self.cost, costs)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSettings(_Objective):
    """An objective of one's own, around the judge's score.

    Attributes:
        function: called with the score, an `Objective`, and the arguments; returns the objective that the leader
            climbs: `package.module.function` or `file.py:function`. A class of objectives will do.
        arguments: of the function, by name.
    """

    kind: Literal["function"] = "function"
    function: str
    arguments: dict[str, bool | float | str] = dataclasses.field(default_factory=dict)

    def of(self, score: Objective, cost: Objective) -> Objective:
        """What the function makes of the score."""
        function = load_object(self.function)
        if not callable(function):
            raise InputError(f"function: expected one that takes the score, got {function!r:.60}")
        try:
            made = function(score, **self.arguments)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"function: {self.function} failed on the score and {self.arguments}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, Objective):
            raise InputError(f"function: expected {self.function} to return an Objective, got {type(made).__name__}")
        return made


ObjectiveSettings = (
    ExpectedSettings
    | KLPricedSettings
    | PreferenceSettings
    | CVaRSettings
    | WorstGroupSettings
    | MeanVarianceSettings
    | ConstrainedSettings
    | SetSettings
    | TargetSettings
    | MeansSettings
    | OwnSettings
)
"""What the leader wants, by `kind`."""


def _named(cost: str, costs: Mapping[str, UtilityFunction]) -> Objective:
    if cost not in costs:
        raise InputError(f"cost: there is none named {cost!r}; {nearest(cost, costs)}")
    return ExpectedUtility(costs[cost])


def _kind_of(answer: str | None) -> AnswerKind:
    function = load_object(answer or "")
    if not callable(function):
        raise InputError(f"answer: expected a function, got {function!r:.60}")
    return AnswerKind(function, name=f"answer {answer}")


def _nothing(leader: Leader, rollouts: Rollouts) -> Tensor:
    """Stands for a judge while settings are checked; never evaluated."""
    return Tensor()
