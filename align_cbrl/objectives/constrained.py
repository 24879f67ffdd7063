"""`Constrained`: a bound on an expected cost, by dual ascent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from align_cbrl.checks import NonNegative, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives.expected import MEAN, mean_term
from align_cbrl.objectives.wrapping import Wrapping
from align_cbrl.problem import Objective, Observation, Observed, Term


@checked
@dataclasses.dataclass
class Constrained(Wrapping):
    """Maximise an objective subject to E sum_t gammaF^t c(s_t, a_t) <= bound, by ascent in the dual.

    The leader climbs the Lagrangian J_u - mu (J_c - bound). After every leader step the multiplier follows the
    constraint, mu <- max(0, mu + rate (J_c - bound)), J_c estimated from the step's own rollouts.

    The bound is on the expected cost, whatever the objective is: around a risk over contexts, the risk is of the
    objective alone. Inside one, each context counts with its own Lagrangian.

    Attributes:
        objective: J_u.
        cost: what is bounded, a mean over contexts, J_c, with the same discount as the objective.
        bound: the largest expected cost allowed.
        rate: of the multiplier, in units of utility per unit of cost squared and step.
        multiplier: mu >= 0, the price of a unit of cost; where it starts, and where it is.

    Raises:
        InputError: a cost that is a risk over contexts or has another discount, or numbers out of range.

    Example:
        >>> from align_cbrl import ExpectedUtility, Rollouts
        >>> scores = {"score": torch.tensor([1.0, 3.0]), "length": torch.tensor([4.0, 8.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=scores)
        >>> score = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> length = ExpectedUtility(lambda leader, rollouts: rollouts.steps["length"][:, None])
        >>> objective = Constrained(score, cost=length, bound=5.0, rate=0.5)
        >>> objective.update(lambda: objective.observe(None, rollouts))
        {'constraint': 6.0, 'multiplier': 0.5}
        >>> objective.evaluate(None, rollouts).value.item()  # 2 - 0.5 (6 - 5)
        1.5
    """

    objective: Objective
    cost: Objective
    bound: float
    rate: Positive
    multiplier: NonNegative = 0.0

    def __post_init__(self) -> None:
        if not self.cost.is_mean:
            raise InputError(
                f"Constrained.cost: expected a mean over contexts, whose expectation is bounded, got "
                f"{type(self.cost).__name__}"
            )
        if self.cost.discount != self.objective.discount:
            raise InputError(
                f"Constrained.cost: expected the objective's discount {self.objective.discount}, "
                f"got {self.cost.discount}; both are sums over the same paths"
            )

    @property
    def is_linear(self) -> bool:  # type: ignore[override]  # as in the class that it extends
        """Whether the credits of objective and cost are their utilities."""
        return self.objective.is_linear and self.cost.is_linear

    @property
    def one_step(self) -> bool:  # type: ignore[override]  # as above
        """Whether objective or cost is for problems of one step only."""
        return self.objective.one_step or self.cost.one_step

    @property
    def constant(self) -> float:
        """The objective's own, and mu times what the bound leaves for the cost."""
        return self.objective.constant + self.multiplier * (self.bound - self.cost.constant)

    def observations(self) -> tuple[Observation, ...]:
        """Those of the objective and of the cost."""
        return (*self.objective.observations(), *self.cost.observations())

    def terms(self, observed: Observed) -> list[Term]:
        """The objective's, and the mean of -mu c."""
        cost = mean_term(self.cost, observed)
        return [
            *self.objective.terms(observed),
            Term(-self.multiplier * cost.utility, -self.multiplier * cost.credit, MEAN),
        ]

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """One step of dual ascent. Metrics: `constraint`, the estimated cost, and `multiplier`."""
        metrics = {**self.objective.update(observed), **self.cost.update(observed)}
        with torch.no_grad():
            cost = self.cost.summarize(observed()).value.item()
        if cost != cost:
            raise InputError("Constrained.cost: expected a finite cost, got NaN; the multiplier was left as it is")
        self.multiplier = max(0.0, self.multiplier + self.rate * (cost - self.bound))
        return {**metrics, "constraint": cost, "multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """The multiplier, and what the wrapped objective keeps."""
        return {"multiplier": self.multiplier, "objective": self.objective.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.multiplier = state["multiplier"]
        self.objective.load_state_dict(state["objective"])
