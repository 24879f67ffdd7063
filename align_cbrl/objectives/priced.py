"""`KLPriced`: a price on leaving the prior."""

from __future__ import annotations

import dataclasses

from align_cbrl.checks import NonNegative, checked
from align_cbrl.objectives.observations import LogRatio
from align_cbrl.objectives.wrapping import Wrapping
from align_cbrl.problem import Objective, Observation, Observed, Term

_LOG_RATIO = LogRatio()


@checked
@dataclasses.dataclass(frozen=True)
class KLPriced(Wrapping):
    """Another objective less a price for leaving the prior: u - kappa log(pi / prior), per step.

    It is a budget for leaders whose power has none: without one, a leader buys utility with unlimited divergence
    (docs/derivation.md). The price is charged on the utility of every step. So inside or outside a risk over contexts
    makes no difference: both are the risk of the priced utility.

    Attributes:
        objective: the objective to price.
        price: kappa >= 0, utility per nat.

    Raises:
        InputError: a negative price; rollouts without log-probabilities, when it is evaluated.
    """

    objective: Objective
    price: NonNegative

    @property
    def price_of_a_nat(self) -> float:
        """The price, and that of the priced objective."""
        return self.price + self.objective.price_of_a_nat

    def observations(self) -> tuple[Observation, ...]:
        """Those of the priced objective, and the log-ratio to the prior."""
        return (*self.objective.observations(), _LOG_RATIO)

    def terms(self, observed: Observed) -> list[Term]:
        """The priced objective's, less the price in the first."""
        first, *others = self.objective.terms(observed)
        price = -self.price * observed[_LOG_RATIO].to(first.utility)
        return [first.plus(price), *others]
