"""Hypergradients around a follower that is stopped early: `Truncated`, and `RandomlyTruncated` (RT-Q)."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from align_cbrl.checks import Count, Range, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.random_numbers import generator_for
from align_cbrl.problem import Follower, Leader, Problem
from align_cbrl.rollouts import Rollouts

_LARGEST_SEED = 2**62

Levels = Annotated[int, Range(1, 61)]
"""The number of levels of RT-Q, whose last takes 2^(K + 1) iterations."""


class IterativeFollower(Follower):
    """A follower whose training can be stopped after any number of iterations, observed, and continued.

    `state_dict` holds all that the next iteration depends on, so that training from a stored state can be repeated.
    """

    @abc.abstractmethod
    def reset(self) -> None:
        """Back to the untrained policy."""

    @abc.abstractmethod
    def iterate(
        self, leader: Leader, contexts: Tensor, iterations: int, generator: torch.Generator
    ) -> dict[str, float]:
        """Train for `iterations` more (zero is allowed); returns metrics.

        All randomness comes from `generator`, in such an order that n iterations followed by m are n + m iterations.
        """


@checked
class Truncated(Hypergradient):
    """The hypergradient of another estimator after a fixed number of the follower's iterations.

    The follower trains from the state in which it is found, in the contexts of the rollouts; the estimator sees
    `group_size` paths of its own for each of them, and the follower is left as it was found. What is estimated is the
    gradient formula at the policy of a follower that is not at its best response: the bias falls with the iterations.

    Args:
        estimator: applied to fresh paths of the trained policy.
        iterations: at least 1.
        seed: of the follower's training and of the paths, together with the leader's parameters and the rollouts.
        group_size: paths for each context; at least 2 for `GroupCritic` where the contexts differ.

    Raises:
        InputError: fewer than 1 iteration or path; a follower that is not an `IterativeFollower`.

    Example:
        >>> from toy_cmdp.referee.frozen_policy import PresentPolicyResponse
        >>> from toy_cmdp.followers.iterative import SoftValueIteration
        >>> from toy_cmdp import random_cmdp
        >>> known = random_cmdp()
        >>> follower = SoftValueIteration(known.follower.cmdp, 0.5, 0.9, iterations=0)
        >>> problem = Problem(known.leader, known.objective, follower)
        >>> _ = follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = follower.rollout(torch.arange(2), 1, torch.Generator().manual_seed(0))
        >>> Truncated(PresentPolicyResponse(), 8).backward(problem, rollouts)["lower_iterations"]
        8.0
    """

    def __init__(self, estimator: Hypergradient, iterations: Count, seed: Whole = 0, group_size: Count = 1) -> None:
        self.estimator = estimator
        self.iterations = iterations
        self.seed = seed
        self.group_size = group_size

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; metrics of the estimator, and `lower_iterations`."""
        generator = generator_for(problem, rollouts, self.seed)
        stops = [self.iterations]
        [(gradients, metrics)] = gradients_after(
            stops, self.estimator, problem, rollouts.contexts, generator, self.group_size
        )
        norm = accumulate(problem, gradients)
        return {**metrics, "gradient_norm": norm, "lower_iterations": float(self.iterations)}


@checked
class RandomlyTruncated(Hypergradient):
    """RT-Q: the expectation of `Truncated` at 2^{K+1} iterations, for about 2 K iterations in the mean.

    A level k in {1, ..., K} is drawn with p_k proportional to 2^-k, and with g_l the gradient after 2^l iterations

        g_1 + (g_{k+1} - g_k) / p_k

    is returned, the three sharing contexts, start and random numbers: of the follower's training, whose first 2^k
    iterations are therefore the same ones, and of the paths. The sum telescopes,
    E = g_1 + sum_k (g_{k+1} - g_k) = g_{K+1}; one training run of 2^{k+1} iterations is stopped up to three times, so
    that sum_k p_k 2^{k+1} = 2 K / (1 - 2^-K) iterations are expected. The variance that it adds,
    sum_k E|g_{k+1} - g_k|^2 / p_k and what g_1 shares with it, is O(K) where E|g_{k+1} - g_k|^2 = O(2^-k) (Thoma et
    al. 2024, algorithm RT-Q; docs/rtq.md).

    Args:
        estimator: applied to fresh paths of the policy at each level.
        max_level: K, at least 1.
        seed: of the level, of the follower's training and of the paths, together with the leader's parameters and the
            rollouts.
        group_size: paths for each of the rollouts' contexts; at least 2 for `GroupCritic` where the contexts differ.

    Attributes:
        probabilities: [K], p_1, ..., p_K.

    Raises:
        InputError: K or the group size below 1; a follower that is not an `IterativeFollower`.

    Example:
        >>> from toy_cmdp.referee.frozen_policy import PresentPolicyResponse
        >>> rtq = RandomlyTruncated(PresentPolicyResponse(), max_level=2)
        >>> [round(p, 3) for p in rtq.probabilities.tolist()], round(rtq.expected_iterations, 3)
        ([0.667, 0.333], 5.333)
    """

    def __init__(self, estimator: Hypergradient, max_level: Levels, seed: Whole = 0, group_size: Count = 1) -> None:
        self.estimator = estimator
        self.max_level = max_level
        self.seed = seed
        self.group_size = group_size
        weights = 0.5 ** torch.arange(1, max_level + 1, dtype=torch.float64)
        self.probabilities = weights / weights.sum()

    @property
    def expected_iterations(self) -> float:
        """The expected number of the follower's iterations, 2 K / (1 - 2^-K)."""
        return 2 * self.max_level / (1 - 0.5**self.max_level)

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`.

        Metrics: `objective`, combined as the gradients are; `gradient_norm`, `level`, and `lower_iterations`.
        """
        generator = generator_for(problem, rollouts, self.seed)
        level = 1 + int(torch.multinomial(self.probabilities, 1, generator=generator))
        return self.backward_at(level, problem, rollouts, generator)

    def backward_at(
        self, level: int, problem: Problem, rollouts: Rollouts, generator: torch.Generator
    ) -> dict[str, float]:
        """The same with a given k instead of a drawn one, for exact expectations over k."""
        stops = sorted({2, 2**level, 2 ** (level + 1)})
        results = gradients_after(stops, self.estimator, problem, rollouts.contexts, generator, self.group_size)
        (first, base), (near, coarse), (far, fine) = results[0], results[-2], results[-1]
        weight = 1 / float(self.probabilities[level - 1])
        norm = accumulate(problem, [g1 + weight * (g3 - g2) for g1, g2, g3 in zip(first, near, far, strict=True)])
        return {
            "objective": base["objective"] + weight * (fine["objective"] - coarse["objective"]),
            "gradient_norm": norm,
            "level": float(level),
            "lower_iterations": float(stops[-1]),
        }


Level = tuple[list[Tensor], dict[str, float]]


def gradients_after(
    stops: Sequence[int],
    estimator: Hypergradient,
    problem: Problem,
    contexts: Tensor,
    generator: torch.Generator,
    group_size: int = 1,
) -> list[Level]:
    """The estimator's gradients and metrics after each number of iterations, ascending, of one training run."""
    follower = problem.follower
    if not isinstance(follower, IterativeFollower):
        raise InputError(
            f"follower: expected an IterativeFollower, which can be stopped early, got {type(follower).__name__}"
        )
    seeds = torch.randint(_LARGEST_SEED, (2,), generator=generator).tolist()
    training = torch.Generator().manual_seed(seeds[0])
    start = copy.deepcopy(follower.state_dict())  # a network's state is its weights themselves, which training moves
    kept = [p.grad for p in problem.parameters]
    done, levels = 0, []
    try:
        for stop in stops:
            follower.iterate(problem.leader, contexts, stop - done, training)
            done = stop
            paths = follower.rollout(contexts, group_size, torch.Generator().manual_seed(seeds[1]))
            for parameter in problem.parameters:
                parameter.grad = None
            metrics = estimator.backward(problem, paths)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters]
            levels.append((gradients, metrics))
    finally:
        follower.load_state_dict(start)
        for parameter, gradient in zip(problem.parameters, kept, strict=True):
            parameter.grad = gradient
    return levels
