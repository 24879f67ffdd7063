"""Risk over nature's draw: functions of what the policy is worth in every context."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Annotated

import torch
from torch import Tensor

from align_cbrl.checks import NonNegative, Positive, Range, checked
from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.objectives.expected import mean_term, path_totals
from align_cbrl.objectives.wrapping import Wrapping
from align_cbrl.problem import Evaluation, Objective, Observed, Risk, Term


class OverContexts(Wrapping, Risk):
    """A function of what the wrapped objective is worth in each context, instead of its mean.

    The credit of a step is its own credit times the derivative of the function with respect to its context's value,
    divided by the context's probability: the same path counts for more where the function is steeper. On samples a
    context's value is the mean over its paths, and its probability their share; both are consistent, and biased by
    O(1 / paths of the context), since the same sample makes the weight and what is weighted (`CrossFitted` removes it).

    Raises:
        InputError: what is wrapped is a risk over contexts already.
    """

    @property
    def is_mean(self) -> bool:  # type: ignore[override]  # as in the class that it extends
        """False: it is a risk."""
        return False

    def __post_init__(self) -> None:
        if not self.objective.is_mean:
            raise InputError(
                f"{type(self).__name__}.objective: expected a mean over contexts, got "
                f"{type(self.objective).__name__}, which is a risk already, or a function of means over all contexts; "
                "that leaves no value of a context to be weighed"
            )

    def labels(self, observed: Observed) -> Tensor:
        """What each path's value belongs to, long [B]: its context."""
        return observed.samples.contexts

    def terms(self, observed: Observed) -> list[Term]:
        """The wrapped objective's terms as one, of which this is the risk."""
        return [dataclasses.replace(mean_term(self.objective, observed), risk=self)]

    def estimate(self, term: Term, observed: Observed, discount: float) -> Evaluation:
        """Value, and credit [B, T]: the term's credit, weighted by context."""
        rollouts = observed.samples
        totals = path_totals(term.utility, observed, discount)  # [B]
        weight = rollouts.path_weight(totals.dtype).to(totals.device)  # [B]
        groups = Groups.of(self.labels(observed).to(totals.device))
        if not self.is_linear:
            check_equal_groups(type(self).__name__, observed)
        mass = groups.sum(weight)  # [K]
        self._warn_of_few(len(groups.labels))
        if bool((mass == 0).any()):
            raise InputError(
                f"{type(self).__name__}: every path of context {int(groups.labels[mass == 0][0])} has weight zero, so "
                "that its value is unknown"
            )
        probabilities = mass / mass.sum()
        with torch.enable_grad():
            values = groups.sum(weight * totals) / mass
            value = self.aggregate_groups(values, probabilities)
            if not values.requires_grad:
                leaf = values.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(self.aggregate_groups(leaf, probabilities), leaf)
            else:
                (slope,) = torch.autograd.grad(value, values, retain_graph=True)
        importance = slope.detach() / probabilities
        return Evaluation(value=value, credit=term.credit.detach() * importance[groups.place][:, None])

    def _warn_of_few(self, contexts: int) -> None:
        """A batch of a single context has no other to weigh it against: its risk is its mean."""
        if contexts == 1:
            warnings.warn(
                f"{type(self).__name__}: the batch holds a single context, whose risk is its mean: the gradient is "
                "that of the wrapped objective, whatever the risk. Draw more contexts in a step, or remember them: "
                f"CrossFitted({type(self).__name__}(...), memory=...)",
                stacklevel=4,
            )

    def aggregate_groups(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The objective from the values [K] and probabilities [K] of whatever `labels` tells apart."""
        return self.aggregate(values, probabilities)


@checked
@dataclasses.dataclass(frozen=True)
class MeanVariance(OverContexts):
    """The mean over contexts less `aversion` times their variance: E f - kappa Var f, f_c the value in context c.

    Attributes:
        objective: an expectation in every context.
        aversion: kappa >= 0, per unit of utility.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> objective = MeanVariance(ExpectedUtility(lambda leader, rollouts: None), aversion=0.5)
        >>> objective.aggregate(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).item()
        1.5
    """

    objective: Objective
    aversion: NonNegative

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """E f - kappa Var f."""
        mean = (probabilities * values).sum()
        return mean - self.aversion * (probabilities * (values - mean) ** 2).sum()


@checked
@dataclasses.dataclass(frozen=True)
class CVaR(OverContexts):
    """The mean over the worst `share` of nature's draw: the conditional value at risk of f_c (Rockafellar and Uryasev).

    Attributes:
        objective: an expectation in every context.
        share: alpha in (0, 1]; 1 is the mean, and towards 0 it becomes the worst context.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> objective = CVaR(ExpectedUtility(lambda leader, rollouts: None), share=0.5)
        >>> objective.aggregate(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.full((4,), 0.25)).item()
        1.5
    """

    objective: Objective
    share: Annotated[float, Range(0, 1, open="low")]

    def _warn_of_few(self, contexts: int) -> None:
        """A share below 1 / K sees the worst of K contexts alone: nature's rank p with weight K (1 - p)^(K - 1)."""
        if contexts * self.share < 1:
            worst = 1 - (1 - self.share) ** contexts
            warnings.warn(
                f"CVaR: the batch holds {contexts} context{'s' if contexts > 1 else ''}, too few to tell the worst "
                f"{self.share:.0%}: it takes the worst one, which puts {worst:.0%} of the weight on the worst "
                f"{self.share:.0%} of nature's contexts instead of all. Draw at least {math.ceil(1 / self.share)} "
                "contexts in a step, or remember them: CrossFitted(CVaR(...), memory=...)",
                stacklevel=4,
            )

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The mean of the worst contexts, the last of them counted as far as it reaches into the share."""
        order = torch.argsort(values.detach())
        mass = probabilities[order]
        weight = (self.share - (mass.cumsum(0) - mass)).clamp(min=0).minimum(mass) / self.share
        return (weight * values[order]).sum()


@checked
@dataclasses.dataclass(frozen=True)
class EntropicRisk(OverContexts):
    """The entropic certainty equivalent over nature's draw, -(1 / theta) log E exp(-theta f).

    Attributes:
        objective: an expectation in every context.
        aversion: theta > 0, per unit of utility: towards 0 the mean, towards infinity the worst context.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> objective = EntropicRisk(ExpectedUtility(lambda leader, rollouts: None), aversion=2.0)
        >>> round(objective.aggregate(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])).item(), 4)
        0.2831
    """

    objective: Objective
    aversion: Positive

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """-(1 / theta) log E exp(-theta f)."""
        # Normalised again: what the probabilities miss of one by rounding would be divided by theta.
        log_law = torch.log_softmax(probabilities.log(), 0)
        return -torch.logsumexp(log_law - self.aversion * values, 0) / self.aversion


@checked
@dataclasses.dataclass(frozen=True)
class WorstContext(OverContexts):
    """The worst context's value, however rare it is; or a soft minimum.

    Attributes:
        objective: an expectation in every context.
        temperature: tau >= 0, in units of utility. 0 is the minimum, which is not differentiable where two contexts
            are worst; above 0 it is -tau log mean_c exp(-f_c / tau), every context counted once.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> objective = WorstContext(ExpectedUtility(lambda leader, rollouts: None))
        >>> objective.aggregate(torch.tensor([4.0, 1.0]), torch.tensor([0.9, 0.1])).item()
        1.0
    """

    objective: Objective
    temperature: NonNegative = 0.0

    def aggregate(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """The minimum, or the soft one, over contexts that nature may draw."""
        values = values[probabilities > 0]
        if self.temperature == 0:
            return values.min()
        count = torch.tensor(float(len(values)), dtype=values.dtype, device=values.device)
        return -self.temperature * (torch.logsumexp(-values / self.temperature, 0) - count.log())


def check_equal_groups(name: str, observed: Observed) -> None:
    """A value made of pairs is scaled by its group's size; contexts compare only where all groups have one size.

    Raises:
        InputError: groups of several sizes.
    """
    sizes = Groups.of(observed.samples.group[:, 0]).sizes.unique()
    if len(sizes) > 1:
        raise InputError(
            f"{name}: expected groups of one size around an objective of pairs or sets, got {sizes.tolist()}"
        )
