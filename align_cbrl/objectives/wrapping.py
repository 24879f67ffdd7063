"""`Wrapping`: an objective made of another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align_cbrl.problem import Objective, Observation, Observed, Term


class Wrapping(Objective):
    """An objective made of another one, to which it leaves whatever it does not override.

    Attributes:
        objective: what is wrapped.
    """

    objective: Objective

    @property
    def discount(self) -> float:  # type: ignore[override]  # a field of the base class, here that of what is wrapped
        """The wrapped objective's gammaF."""
        return self.objective.discount

    @property
    def is_mean(self) -> bool:  # type: ignore[override]  # as above
        """Whether the wrapped objective is a mean over contexts."""
        return self.objective.is_mean

    @property
    def is_linear(self) -> bool:  # type: ignore[override]  # as above
        """Whether the wrapped objective's credit is its utility."""
        return self.objective.is_linear

    @property
    def one_step(self) -> bool:  # type: ignore[override]  # as above
        """Whether the wrapped objective is for problems of one step only."""
        return self.objective.one_step

    @property
    def remembers(self) -> bool:  # type: ignore[override]  # as above
        """Whether the wrapped objective keeps values of earlier batches."""
        return self.objective.remembers

    @property
    def constant(self) -> float:
        """The wrapped objective's."""
        return self.objective.constant

    @property
    def price_of_a_nat(self) -> float:
        """The wrapped objective's."""
        return self.objective.price_of_a_nat

    def observations(self) -> tuple[Observation, ...]:
        """The wrapped objective's."""
        return self.objective.observations()

    def terms(self, observed: Observed) -> list[Term]:
        """The wrapped objective's."""
        return self.objective.terms(observed)

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """The wrapped objective's."""
        return self.objective.update(observed)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped objective's."""
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the wrapped objective's."""
        self.objective.load_state_dict(state)
