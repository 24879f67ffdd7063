"""What the leader wants, as values of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
from align_cbrl.errors import InputError
from align_cbrl.llm import PairwiseJudge
from align_cbrl.runs.config import nearest

Utility = Callable[[Leader, Rollouts], Tensor]

Kind = Literal["expected", "kl_priced", "preference", "cvar", "worst_group", "mean_variance", "constrained"]

# The fields of each kind: those it needs, and those it may have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "expected": ((), ()),
    "kl_priced": (("price",), ()),
    "preference": ((), ("scale", "partners")),
    "cvar": (("share",), ("price", "memory")),
    "worst_group": (("column",), ("temperature", "price", "memory")),
    "mean_variance": (("aversion",), ("price", "memory")),
    "constrained": (("cost", "bound", "rate"), ("multiplier", "price")),
}
_MEMORY = 64  # contexts: eight steps of eight prompts


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What the leader wants, swapped by one line: `objective: {kind: cvar, share: 0.25}`.

    | kind | the leader maximises | needs | may have |
    |---|---|---|---|
    | expected | the judge's mean score | | |
    | kl_priced | the same less `price` a nat of divergence from the reference | price | |
    | preference | how well its reward explains preferences on pairs of completions | | scale, partners |
    | cvar | the mean score over the worst `share` of prompts | share | price, memory |
    | worst_group | the mean score of the worst group that `column` names | column | temperature, price, memory |
    | mean_variance | the mean less `aversion` times the variance over prompts | aversion | price, memory |
    | constrained | the mean score while the mean of `cost` is at most `bound` | cost, bound, rate | multiplier, price |

    Attributes:
        kind: see the table.
        price: kappa, score per nat.
        scale: of the judge's score in the Bradley-Terry probability of a preference; default 1.
        partners: with how many others of its prompt each completion is paired; default all.
        share: of prompts, in (0, 1].
        column: of the data, with each prompt's group.
        temperature: of a soft minimum over groups, in units of score; default 0, the minimum.
        aversion: per unit of score.
        memory: how many contexts of earlier steps are remembered beside the batch's own; default 64.
        cost: name of the cost, one of those given to `build`.
        bound: largest mean cost allowed.
        rate: of the multiplier's ascent.
        multiplier: where it starts; default 0.

    Raises:
        InputError: a field that the kind needs is missing, or one is given that it does not have.

    Example:
        >>> ObjectiveSettings("cvar", share=0.25).build(lambda leader, rollouts: None).objective.share
        0.25
    """

    kind: Kind = "expected"
    price: float | None = None
    scale: float | None = None
    partners: int | None = None
    share: float | None = None
    column: str | None = None
    temperature: float | None = None
    aversion: float | None = None
    memory: int | None = None
    cost: str | None = None
    bound: float | None = None
    rate: float | None = None
    multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise InputError(f"kind: got {self.kind!r}; {nearest(str(self.kind), _FIELDS)}")
        needed, possible = _FIELDS[self.kind]
        given = [f.name for f in dataclasses.fields(self) if f.name != "kind" and getattr(self, f.name) is not None]
        for name in given:
            if name not in needed + possible:
                raise InputError(f"{name}: kind {self.kind!r} has no such field; {nearest(name, needed + possible)}")
        if missing := [name for name in needed if name not in given]:
            raise InputError(f"{', '.join(missing)}: needed by kind {self.kind!r}")

        def nothing(leader: Leader, rollouts: Rollouts) -> Tensor:
            return Tensor()

        self.build(nothing, {str(self.cost): nothing})  # raises what the objective itself refuses

    def build(self, judge: Utility | PairwiseJudge, costs: Mapping[str, Utility] | None = None) -> Objective:
        """The objective.

        Args:
            judge: a utility such as `Judge`; or a `PairwiseJudge`, for kind "preference" only.
            costs: utilities by name, of which "constrained" bounds one.

        Raises:
            InputError: a judge of pairs with another kind, a cost that is not among `costs`, or a number that the
                objective refuses.
        """
        if self.kind == "preference":
            if isinstance(judge, PairwiseJudge):
                if self.scale is not None:
                    raise InputError("scale: a judge of pairs says probabilities, which have no scale")
                return PreferenceLikelihood(preference=judge, partners=self.partners)
            return PreferenceLikelihood(judge, scale=1.0 if self.scale is None else self.scale, partners=self.partners)
        if isinstance(judge, PairwiseJudge):
            raise InputError(
                f"kind: {self.kind!r} needs a judge that scores completions, got one that compares pairs; use kind "
                "'preference'"
            )
        objective: Objective = ExpectedUtility(judge)
        if self.price is not None:
            objective = KLPriced(objective, self.price)
        memory = _MEMORY if self.memory is None else self.memory
        if self.kind == "cvar":
            return CrossFitted(CVaR(objective, _given(self.share)), memory)
        if self.kind == "worst_group":
            return CrossFitted(WorstGroup(objective, str(self.column), self.temperature or 0.0), memory)
        if self.kind == "mean_variance":
            return CrossFitted(MeanVariance(objective, _given(self.aversion)), memory)
        if self.kind == "constrained":
            costs = costs or {}
            if self.cost not in costs:
                raise InputError(f"cost: there is none named {self.cost!r}; {nearest(str(self.cost), costs)}")
            cost = ExpectedUtility(costs[str(self.cost)])
            return Constrained(objective, cost, _given(self.bound), _given(self.rate), self.multiplier or 0.0)
        return objective


def _given(value: float | None) -> float:
    assert value is not None  # __post_init__ saw to it
    return value
