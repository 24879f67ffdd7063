"""`ExpectedUtility`, the plain objective, and `Mean`, what it makes of the contexts' values."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.functional import discount_powers
from align_cbrl.objectives.observations import Utility, UtilityFunction
from align_cbrl.problem import Evaluation, Leader, Objective, Observation, Observed, Risk, Term, check_discount
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Mean(Risk):
    """The expectation over contexts."""

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """sum_c p_c f_c."""
        return (probabilities * values).sum()

    def estimate(self, term: Term, observed: Observed, discount: float) -> Evaluation:
        """The weighted mean over paths of the discounted sums of the utility."""
        totals = path_totals(term.utility, observed, discount)  # [B]
        weight = observed.samples.path_weight(totals.dtype).to(totals.device)
        return Evaluation(value=(weight * totals).mean(), credit=term.credit.detach())


MEAN = Mean()


class _Unstated(float):
    """A discount that nobody stated: zero, for problems of one step."""


@checked
@dataclasses.dataclass(frozen=True)
class ExpectedUtility(Objective):
    """The expected discounted utility, J = E sum_t gammaF^t u(s_t, a_t) (Thoma et al. 2024).

    Attributes:
        utility_function: maps (leader, rollouts) to utilities [B, T].
        discount: gammaF in [0, 1). It may be left out for problems of one step only; others refuse such an objective.
        depends_on_leader: True when the utility depends on x, which adds the direct term du/dx. A judge's verdict does
            not, and is asked for only once per batch. A utility with a graph to x and False is refused.

    Example:
        >>> from align_cbrl import Rollouts
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"score": torch.tensor([1.0, 3.0])})
        >>> objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> objective.evaluate(None, rollouts).value.item()
        2.0
    """

    utility_function: UtilityFunction
    discount: float = _Unstated()
    depends_on_leader: bool = False

    def __post_init__(self) -> None:
        check_discount("ExpectedUtility.discount", self.discount)

    @property
    def one_step(self) -> bool:  # type: ignore[override]  # a field of the base class
        """Whether no discount was stated."""
        return isinstance(self.discount, _Unstated)

    @property
    def observed_utility(self) -> Utility:
        """The one observation that it is made of."""
        return Utility(self.utility_function, self.depends_on_leader)

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u(s_t, a_t) [B, T]. Raises InputError when the utility function returns another shape."""
        return self.observed_utility.of(leader, rollouts)

    def observations(self) -> tuple[Observation, ...]:
        """The utility."""
        return (self.observed_utility,)

    def terms(self, observed: Observed) -> list[Term]:
        """The mean of the utility, which is its own credit."""
        utility = observed[self.observed_utility]
        return [Term(utility, utility, MEAN)]


def path_totals(utility: Tensor, observed: Observed, discount: float) -> Tensor:
    """The discounted sum of a utility along every path, [B, T] to [B]."""
    mask = observed.samples.mask.to(utility.device)
    powers = discount_powers(discount, utility.shape[1], utility)  # [T]
    return torch.where(mask, utility * powers, torch.zeros_like(utility)).sum(1)


def mean_term(objective: Objective, observed: Observed) -> Term:
    """The terms of an objective that is a mean over contexts, as one.

    Example:
        >>> observed = Observed({}, policy=torch.ones(1, 1, 2))
        >>> class Twice(ExpectedUtility):
        ...     def terms(self, observed):
        ...         one = torch.tensor([[[1.0, 2.0]]])
        ...         return [Term(one, one, MEAN), Term(one, 3 * one, MEAN)]
        >>> mean_term(Twice(lambda leader, rollouts: None), observed).credit
        tensor([[[4., 8.]]])
    """
    first, *others = objective.terms(observed)
    for term in others:
        first = Term(first.utility + term.utility, first.credit + term.credit, MEAN)
    return first
