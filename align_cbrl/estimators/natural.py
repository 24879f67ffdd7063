"""Natural steps: the leader moves along F^-1 dJ/dx, F being the Fisher metric of the follower's best response."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from align_cbrl.checks import Count, Positive, checked
from align_cbrl.estimators.metric import Metric, is_large
from align_cbrl.problem import Problem

_MEMORY, _MEMORY_OF_LARGE = 64, 4  # batches


@checked
@dataclasses.dataclass(frozen=True)
class Natural:
    """How natural steps are taken: x <- x + c F^-1 g on all remembered batches, g the hypergradient.

    F = E Cov(d log pi*, d log pi*) / 1 is the metric of x -> pi*_x, in nats: the divergence between the best responses
    before and after a step d is d'F d / 2 to second order. For one step d log pi* = dr / lambda (+ d log prior), less
    its mean over the prompt's completions. F^-1 g is then lambda times the coefficients of a regression of the
    objective's credit on the reward's own gradient within prompts, so that for the mean score less a price on nats,
    with c = 1 / price, one step is the refit of the reward to the judge (docs/derivation.md).

    Attributes:
        nats: the longest step, d'F d / 2: how far the follower's best response moves at most, which is what the
            follower has to catch up with.
        ridge: added to the metric's diagonal, relative to it: the metric is estimated from few samples, and singular
            where terms are copies of each other, which then share a weight.
        memory: newest batches that every step uses, each weighted as samples of the present best response. What was
            judged once is used that often. A leader without fixed features (`Leader.fixed_features`) scores all of them
            anew at every step. None: 64, and 4 for a leader of more than 8192 parameters, whose metric is known by
            its products alone (`ProductMetric`).
    """

    nats: Positive = 0.3
    ridge: Positive = 0.05
    memory: Count | None = None

    def remembered(self, problem: Problem) -> int:
        """How many batches a step uses."""
        return self.memory or (_MEMORY_OF_LARGE if is_large(problem) else _MEMORY)


@dataclasses.dataclass(frozen=True)
class NaturalStep:
    """A step, not yet taken.

    Attributes:
        change: d [n], of all the leader's trainable parameters, one after the other.
        nats: d'(F + D) d / 2, D the damping, at most the bound.
        copies: numbers of two parameters whose gradients are the same up to a factor, or None.
    """

    change: Tensor
    nats: float
    copies: tuple[int, int] | None


def natural_step(gradient: Tensor, metric: Metric, settings: Natural, price: float = 0.0) -> NaturalStep:
    """The natural step for a gradient.

    The metric of a policy that has nearly collapsed is nearly zero, and that of few samples smaller still: a step that
    is short in it may go anywhere. The policies that were sampled are broader, so that ridge and bound are taken in
    their metric too.

    Args:
        gradient: dJ/dx [n], in ascent.
        metric: F, as `Hypergradient.metric` returns it.
        settings: ridge and bound.
        price: of a nat of divergence in J (`Objective.price_of_a_nat`): with one, steps are at most 1 / price times
            F^-1 g, which is Newton's step for the price. Without one, steps are as long as the bound allows.

    Raises:
        InputError: no parameter moves the best response although J depends on them.

    Example:
        >>> import torch
        >>> from align_cbrl.estimators.metric import MatrixMetric
        >>> metric = MatrixMetric(torch.tensor([[2.0, 0.0], [0.0, 8.0]], dtype=torch.float64))
        >>> gradient = torch.tensor([2.0, 8.0], dtype=torch.float64)
        >>> step = natural_step(gradient, metric, Natural(nats=0.2, ridge=1e-12))
        >>> step.change.round(decimals=9).tolist(), round(step.nats, 9)  # as long in both, F^-1 g = (1, 1)
        ([0.2, 0.2], 0.2)
    """
    direction = metric.solve(gradient, settings.ridge)
    length = math.sqrt(2 * settings.nats / direction.square)
    if price > 0:
        length = min(length, 1 / price)
    return NaturalStep(length * direction.value, length**2 * direction.square / 2, metric.copies())
