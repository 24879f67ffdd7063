"""Natural steps: the leader moves along F^-1 dJ/dx, F being the Fisher metric of the follower's best response."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, checked
from align_cbrl.distributed import gather_rows
from align_cbrl.errors import InputError
from align_cbrl.functional import group_advantage
from align_cbrl.problem import Problem, per_path
from align_cbrl.rollouts import Rollouts

_ROWS = 256  # paths whose gradients are taken at once
_MOST = 8192  # parameters: the metric has their number squared of entries
_COPIES = 1e-8  # smallest eigenvalue of the parameters' correlation, of which the largest possible is their number


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
            anew at every step: give it fewer.
    """

    nats: Positive = 0.3
    ridge: Positive = 0.05
    memory: Count = 64


@dataclasses.dataclass(frozen=True)
class NaturalStep:
    """A step, not yet taken.

    Attributes:
        change: d [n], of all the leader's trainable parameters, one after the other.
        nats: d'(F + ridge) d / 2, at most the bound.
        copies: numbers of two parameters whose gradients are the same up to a factor, or None.
    """

    change: Tensor
    nats: float
    copies: tuple[int, int] | None


def natural_step(
    gradient: Tensor, metric: Tensor, settings: Natural, price: float = 0.0, sampled: Tensor | None = None
) -> NaturalStep:
    """The natural step for a gradient.

    The metric of a policy that has nearly collapsed is nearly zero, and that of few samples smaller still: a step that
    is short in it may go anywhere. The policies that were sampled are broader, so that ridge and bound are taken in
    their metric too.

    Args:
        gradient: dJ/dx [n], in ascent.
        metric: F [n, n], as `response_metric` returns it.
        settings: ridge and bound.
        price: of a nat of divergence in J (`Objective.price_of_a_nat`): with one, steps are at most 1 / price times
            F^-1 g, which is Newton's step for the price. Without one, steps are as long as the bound allows.
        sampled: F of the same paths without their weights [n, n]; None where they have none.

    Raises:
        InputError: no parameter moves the best response although J depends on them.

    Example:
        >>> metric = torch.tensor([[2.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
        >>> gradient = torch.tensor([2.0, 8.0], dtype=torch.float64)
        >>> step = natural_step(gradient, metric, Natural(nats=0.2, ridge=1e-12))
        >>> step.change.round(decimals=9).tolist(), round(step.nats, 9)  # as long in both, F^-1 g = (1, 1)
        ([0.2, 0.2], 0.2)
    """
    sampled = metric if sampled is None else sampled
    diagonal = torch.maximum(metric.diagonal(), sampled.diagonal())
    if not bool((diagonal > 0).any()):
        raise InputError(
            "natural steps: the follower's best response does not depend on the leader's parameters on these samples, "
            "although the objective does; use HPGDConfig(natural=None) for an objective without a response"
        )
    damped = metric + torch.diag(settings.ridge * torch.where(diagonal > 0, diagonal, diagonal.mean()))
    direction = torch.linalg.solve(damped, gradient)
    square = max(float(direction @ damped @ direction), float(direction @ sampled @ direction))
    length = math.sqrt(2 * settings.nats / square)
    if price > 0:
        length = min(length, 1 / price)
    return NaturalStep(length * direction, length**2 * square / 2, _copies(sampled))


def response_metric(problem: Problem, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """F, the Fisher metric of x -> pi*_x, from samples of one step, and the same without their weights.

    Both are [n, n], float64, in nats; without weights it is the metric of the policies that were sampled.

    It is the mean over paths of the covariance within groups of d log pi* = d(r / lambda) + d log prior, estimated as
    the hypergradient estimates its own covariance (`group_advantage`): both are of the same samples and weights.

    Args:
        problem: its leader's trainable parameters are x, n numbers in all.
        rollouts: one step; weighted as samples of pi* where they are not drawn from it. In several processes, this
            rank's part; every rank returns the metric of all.

    Raises:
        InputError: paths of several steps.
    """
    count = sum(p.numel() for p in problem.parameters)
    if count > _MOST:
        raise InputError(
            f"natural steps: expected a leader of at most {_MOST} parameters, whose metric is a matrix, got {count}; "
            "use HPGDConfig(natural=None) (in YAML hpgd.step: gradient), or train fewer of them, such as a head"
        )
    if rollouts.horizon != 1:
        raise InputError(
            f"natural steps: expected rollouts of one step, such as completions, got a horizon of {rollouts.horizon}, "
            "whose metric a critic does not give; use an estimator with a model of the world (toy_cmdp.PlugIn fits "
            "one), or HPGDConfig(natural=None)"
        )
    slope = gather_rows(response_gradients(problem, rollouts))  # [B, n]
    whole = rollouts.over_ranks()
    group = whole.group[:, 0].to(slope.device)

    def covariance(weight: Tensor) -> Tensor:
        metric = (weight[:, None] * group_advantage(slope, group, weight)).T @ slope / whole.size
        return (metric + metric.T) / 2  # which it is but for rounding

    sampled = covariance(slope.new_ones(len(slope)))
    return sampled if whole.weight is None else covariance(whole.path_weight().to(slope)), sampled


def response_gradients(problem: Problem, rollouts: Rollouts) -> Tensor:
    """d(r_x / lambda + log prior_x)/dx of every path of one step, [B, n] float64: d log pi* but for a constant of the
    group.
    """
    parameters = problem.parameters
    rows = []
    for piece in rollouts.chunks(-(-rollouts.size // _ROWS)):
        with torch.enable_grad():
            reward = problem.leader.reward(piece)[:, 0]  # [b]
            temperature = per_path(problem.temperature, piece.contexts)
            value = reward / (temperature.to(reward) if isinstance(temperature, Tensor) else temperature)
            prior = problem.leader.log_prior(piece)
            value = value if prior is None else value + prior[:, 0].to(value)
        if not value.requires_grad:
            rows.append(torch.zeros(piece.size, sum(p.numel() for p in parameters), dtype=torch.float64))
            continue
        each = torch.eye(piece.size, dtype=value.dtype, device=value.device)
        found = torch.autograd.grad(value, parameters, each, is_grads_batched=True, allow_unused=True)
        columns = [
            torch.zeros(piece.size, p.numel(), dtype=torch.float64, device=p.device)
            if slope is None
            else slope.reshape(piece.size, -1).double()
            for p, slope in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def _copies(metric: Tensor) -> tuple[int, int] | None:
    """Two parameters that move the best response alike, where the metric says so by being singular."""
    scale = metric.diagonal().sqrt()
    moving = (scale > 0).nonzero()[:, 0]
    correlation = metric[moving][:, moving] / (scale[moving, None] * scale[moving])
    size = len(moving)
    alike = (correlation.abs() - 2 * torch.eye(size, dtype=metric.dtype, device=metric.device)).flatten()
    if size < 2 or float(alike.max()) < 1 - _COPIES:
        return None
    place = int(alike.argmax())
    return int(moving[place // size]), int(moving[place % size])
