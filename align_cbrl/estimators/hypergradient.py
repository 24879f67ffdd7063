"""Hypergradients: the leader's gradient through the follower's best response, from the follower's samples only."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.estimators.metric import Metric, response_metric
from align_cbrl.problem import Leader, Problem
from align_cbrl.rollouts import Rollouts, check_finite


class Hypergradient(abc.ABC):
    """Fills the leader's `.grad` with an estimate of dJ/dx, the direction of *ascent*.

    Attributes:
        over_ranks: whether, in a run of several processes, each of which has a part of the rollouts, `backward` leaves
            every rank with the gradient on all of them.
        observes: whether `backward` evaluates the objective on the rollouts that it is given; others have a model, or
            draw paths of their own.
        best_response: whether it goes through the follower's best response, whose distance can then be certified.
        chunks: into how many pieces it cuts the paths to bound memory; 1 when it does not.
    """

    over_ranks: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    best_response: ClassVar[bool] = True
    chunks: int = 1

    @abc.abstractmethod
    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """Add the estimate to `.grad` of the leader's parameters, and return metrics.

        Metrics: `objective` (the estimated J), `gradient_norm` (of all parameters together).
        """

    def metric(self, problem: Problem, rollouts: Rollouts) -> Metric:
        """The Fisher metric F of x -> pi*_x that a natural step divides by, and that of the policies that were sampled.

        Default: those of samples of one step (`response_metric`), whatever the estimator.
        """
        return response_metric(problem, rollouts, self.chunks)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of earlier steps; the same types as `Follower.state_dict`. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def accumulate(problem: Problem, gradients: Sequence[Tensor | None]) -> float:
    """Add gradients to `.grad`, one for each of `problem.parameters`, and return their norm; None stands for zero.

    Example:
        >>> import torch
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> accumulate(problem, [3 * torch.ones(5, dtype=torch.float64)]) == 45**0.5, problem.leader.x.grad.tolist()
        (True, [3.0, 3.0, 3.0, 3.0, 3.0])
    """
    squares = 0.0
    for parameter, gradient in zip(problem.parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            squares += float(gradient.double().pow(2).sum())
    return math.sqrt(squares)


def check_reward(leader: Leader, reward: Tensor, rollouts: Rollouts) -> None:
    """Raise `InputError` unless a leader's reward is [B, T] and finite wherever a step was taken."""
    name = type(leader).__name__
    if tuple(reward.shape) != tuple(rollouts.mask.shape):
        raise InputError(
            f"{name}.reward: expected shape {tuple(rollouts.mask.shape)} (paths, steps), got {tuple(reward.shape)}"
        )
    check_finite(f"{name}.reward", reward, rollouts)
