"""A fixed set of labelled pairs as an objective, and as a regulariser of another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.objectives.expected import MEAN
from align_cbrl.objectives.preferences import pair_likelihood
from align_cbrl.objectives.wrapping import Wrapping
from align_cbrl.problem import Leader, Objective, Observation, Observed, Term, step_seed
from align_cbrl.rollouts import Rollouts


@checked
class PreferenceData(Objective):
    """How well the leader's reward explains labelled pairs: the mean of log sigma(r_x(chosen) - r_x(rejected)).

    It is what a reward model is trained on (Bradley and Terry). Nothing in it depends on the follower, so that its
    gradient is the direct term alone. Added to another objective by `Regularised` it ties the reward to the labels.

    Each leader step takes `pairs_per_step` pairs, other ones every time. They are scored once for each chunk of the
    rollouts, so let there be about as many pairs as completions in a chunk.

    Args:
        chosen: the preferred answers, N rollouts of one step.
        rejected: the others; row i answers the same prompt as row i of `chosen`.
        pairs_per_step: pairs drawn for a leader step, without replacement; None for all of them.
        seed: of that draw.

    Raises:
        InputError: another number of chosen than rejected answers, more pairs a step than there are, or rollouts of
            several steps.

    Example:
        >>> from align_cbrl import Leader
        >>> class Bonus(Leader):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.x = torch.nn.Parameter(torch.tensor(2.0))
        ...
        ...     def reward(self, rollouts):
        ...         return self.x * rollouts.steps["polite"][:, None]
        >>> def answers(polite):
        ...     return Rollouts.bandit(contexts=torch.arange(2), steps={"polite": torch.tensor(polite)})
        >>> data = PreferenceData(chosen=answers([1.0, 1.0]), rejected=answers([0.0, 1.0]))
        >>> round(data.likelihood(Bonus()).item(), 4)  # the mean of log sigma(2) and log sigma(0)
        -0.41
    """

    is_linear = False
    one_step = True

    def __init__(
        self, chosen: Rollouts, rejected: Rollouts, pairs_per_step: Count | None = None, seed: Whole = 0
    ) -> None:
        if chosen.size != rejected.size or chosen.horizon != 1 or rejected.horizon != 1:
            raise InputError(
                "PreferenceData: expected as many rejected as chosen answers, of one step each, got "
                f"{rejected.size} x {rejected.horizon} and {chosen.size} x {chosen.horizon}"
            )
        if pairs_per_step is not None and not 1 <= pairs_per_step <= chosen.size:
            raise InputError(
                f"PreferenceData.pairs_per_step: expected between 1 and the {chosen.size} pairs that there are, got "
                f"{pairs_per_step}"
            )
        self.chosen, self.rejected = chosen, rejected
        self.pairs_per_step, self.seed = pairs_per_step, seed
        self._step = 0
        self._likelihood = PairLikelihood(self)

    def likelihood(self, leader: Leader) -> Tensor:
        """The mean log-likelihood of this step's pairs: scalar, differentiable in x."""
        chosen, rejected = self.chosen, self.rejected
        if self.pairs_per_step is not None:
            generator = torch.Generator().manual_seed(step_seed(self.seed, self._step))
            drawn = torch.randperm(chosen.size, generator=generator)[: self.pairs_per_step].tolist()
            chosen, rejected = chosen.select(drawn), rejected.select(drawn)
        return pair_likelihood(leader.reward(chosen) - leader.reward(rejected), 1.0).mean()

    def observations(self) -> tuple[Observation, ...]:
        """The likelihood of this step's pairs."""
        return (self._likelihood,)

    def terms(self, observed: Observed) -> list[Term]:
        """The likelihood, the same for every path; no credit, since the policy has no influence on it."""
        if observed.policy is None and observed.samples.horizon != 1:
            raise InputError(
                f"PreferenceData: expected rollouts of one step, got a horizon of {observed.samples.horizon}"
            )
        likelihood = observed[self._likelihood]
        return [Term(likelihood, torch.zeros_like(likelihood).detach(), MEAN)]

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """Go on to other pairs. Metrics: `pair_likelihood`, of the pairs of this step."""
        self._step += 1
        return {"pair_likelihood": observed()[self._likelihood].detach().flatten()[0].item()}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, from which the pairs follow."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._step = state["step"]


@dataclasses.dataclass(frozen=True, eq=False)
class PairLikelihood(Observation):
    """The mean log-likelihood of the labelled pairs of a step, the same for every path."""

    data: PreferenceData
    name: str = "pair likelihood"
    moves: bool = True

    def of(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """The likelihood, expanded to [B, T]."""
        return self.data.likelihood(leader).expand(rollouts.size, rollouts.horizon)


@checked
@dataclasses.dataclass(frozen=True)
class Regularised(Wrapping):
    """An objective plus `weight` times the likelihood of labelled pairs: J(x) + weight * L(x).

    Attributes:
        objective: what the leader wants of the follower, for rollouts of one step.
        pairs: what its reward should also explain.
        weight: > 0, utility per nat of a pair's likelihood.

    Raises:
        InputError: a weight that is not positive, or an objective that is made of labelled pairs itself.
    """

    objective: Objective
    pairs: PreferenceData
    weight: Positive

    def __post_init__(self) -> None:
        if isinstance(self.objective, PreferenceData):
            raise InputError(
                f"Regularised.objective: expected what is wanted of the follower, got {type(self.objective).__name__}"
            )

    @property
    def one_step(self) -> bool:  # type: ignore[override]  # as in the class that it extends
        """True: labelled pairs are answers of one step."""
        return True

    def observations(self) -> tuple[Observation, ...]:
        """Those of the objective, and the likelihood of the pairs."""
        return (*self.objective.observations(), *self.pairs.observations())

    def terms(self, observed: Observed) -> list[Term]:
        """The objective's, and the weighted likelihood."""
        (likelihood,) = self.pairs.terms(observed)
        weighted = dataclasses.replace(likelihood, utility=self.weight * likelihood.utility)
        return [*self.objective.terms(observed), weighted]

    def update(self, observed: Callable[[], Observed]) -> dict[str, float]:
        """Both."""
        return {**self.objective.update(observed), **self.pairs.update(observed)}

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"objective": self.objective.state_dict(), "pairs": self.pairs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.objective.load_state_dict(state["objective"])
        self.pairs.load_state_dict(state["pairs"])
