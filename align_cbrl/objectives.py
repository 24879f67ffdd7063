"""Objectives: what the leader wants of the best response."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.functional import discount_powers
from align_cbrl.problem import Evaluation, Leader, Objective, check_discount
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class ExpectedUtility(Objective):
    """The expected discounted utility, J = E sum_t gammaF^t u(s_t, a_t) (Thoma et al. 2024).

    Attributes:
        utility_function: maps (leader, rollouts) to utilities [B, T].
        discount: gammaF in [0, 1); irrelevant for rollouts of one step.
        depends_on_leader: True when the utility depends on x, which adds the direct term du/dx.

    Example:
        >>> from align_cbrl import Rollouts
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"score": torch.tensor([1.0, 3.0])})
        >>> objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> objective.summarize(objective.utility(None, rollouts), rollouts).value.item()
        2.0
    """

    utility_function: Callable[[Leader, Rollouts], Tensor]
    discount: float = 0.0
    depends_on_leader: bool = False

    def __post_init__(self) -> None:
        check_discount("ExpectedUtility.discount", self.discount)

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u(s_t, a_t) [B, T]. Raises InputError when the utility function returns another shape."""
        utility = self.utility_function(leader, rollouts)
        if tuple(utility.shape) != tuple(rollouts.mask.shape):
            raise InputError(
                f"utility: expected shape {tuple(rollouts.mask.shape)} (paths, steps), got {tuple(utility.shape)}"
            )
        return utility

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """The weighted mean of the discounted sums; the credit is the utility itself."""
        mask = rollouts.mask.to(utility.device)
        powers = discount_powers(self.discount, rollouts.horizon, utility)  # [T]
        totals = torch.where(mask, utility * powers, torch.zeros_like(utility)).sum(1)  # [B]
        value = (rollouts.path_weight(utility.dtype).to(utility.device) * totals).mean()
        return Evaluation(value=value, credit=utility.detach())


@dataclasses.dataclass(frozen=True)
class KLPriced(Objective):
    """Another objective less a price for leaving the prior: u - kappa log(pi / prior), per step.

    It is a budget for leaders whose power has none: without one, a leader buys utility with unlimited divergence
    (theory: trap 4).

    Attributes:
        objective: the objective to price.
        price: kappa >= 0, utility per nat.
    """

    objective: Objective
    price: float

    def __post_init__(self) -> None:
        if not (0 <= self.price < float("inf")):
            raise InputError(f"KLPriced.price: expected a finite number >= 0, got {self.price}")

    @property
    def discount(self) -> float:  # type: ignore[override]  # a field of the base class, inherited from what is priced
        """The priced objective's gammaF."""
        return self.objective.discount

    @property
    def depends_on_leader(self) -> bool:  # type: ignore[override]  # as above
        """Whether the priced objective's utility depends on the leader; a prior that does is seen to by direct_term."""
        return self.objective.depends_on_leader

    def direct_term(self, leader: Leader, rollouts: Rollouts, weight: Tensor) -> Tensor | None:
        """The priced objective's own, plus kappa log prior where the leader moves the prior."""
        direct = self.objective.direct_term(leader, rollouts, weight)
        log_prior = leader.log_prior(rollouts)
        if log_prior is None or self.price == 0:
            return direct
        priced = (
            self.price
            * torch.where(rollouts.mask.to(log_prior.device), weight * log_prior, torch.zeros_like(log_prior)).sum()
        )
        return priced if direct is None else direct + priced

    def utility(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u - kappa (log pi - log prior) [B, T]. Raises InputError when Rollouts lack the log-probabilities."""
        if rollouts.log_policy is None or rollouts.log_prior is None:
            raise InputError("KLPriced: expected rollouts with log_policy and log_prior; this follower provides none")
        utility = self.objective.utility(leader, rollouts)
        moved = leader.log_prior(rollouts)
        log_prior = rollouts.log_prior if moved is None else moved
        divergence = (rollouts.log_policy - log_prior).to(utility.device, utility.dtype)
        return utility - self.price * torch.where(
            rollouts.mask.to(divergence.device), divergence, torch.zeros_like(divergence)
        )

    def summarize(self, utility: Tensor, rollouts: Rollouts) -> Evaluation:
        """As the priced objective summarizes."""
        return self.objective.summarize(utility, rollouts)
