"""An objective's observations of a batch: computed in chunks, gathered over processes, and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from align_cbrl.distributed import gather_together, together
from align_cbrl.problem import Evaluation, Leader, Objective, Observation, Observed, Problem, require_still
from align_cbrl.rollouts import Rollouts, check_finite

Weights = Mapping[Observation, Tensor]
"""Derivatives of a scalar with respect to the observations that it was made of, [B, T] each."""


def observe(problem: Problem, rollouts: Rollouts, chunks: int = 1) -> Observed:
    """The objective's observations of these paths, without graph, computed in chunks to bound memory.

    In several processes these are the observations of this rank's own paths.

    Raises:
        InputError: an observation that is NaN or infinite, or what the observation itself refuses.
    """
    with torch.no_grad(), together("computing the utilities"):
        pieces = [problem.objective.observe(problem.leader, piece).values for piece in rollouts.chunks(chunks)]
        values = {o: torch.cat([piece[o] for piece in pieces]) for o in pieces[0]}
        for observation, value in values.items():
            if value.is_floating_point():
                check_finite(observation.name, value, rollouts)
    return Observed(values, rollouts)


def of_all_ranks(observed: Observed) -> Observed:
    """The observations of all processes' paths; in one process, what was given."""
    gathered = gather_together(list(observed.values.values()))
    return Observed(dict(zip(observed.values, gathered, strict=True)), observed.samples.over_ranks())


def influence(objective: Objective, observed: Observed, leader: Leader | None = None) -> tuple[Evaluation, Weights]:
    """The objective's value and credit, and how the value depends on each observation.

    Raises:
        InputError: terms or a risk that depend on the parameters of `leader` other than through observations.

    Example:
        >>> from align_cbrl import ExpectedUtility
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"score": torch.tensor([1.0, 3.0])})
        >>> objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> _, weights = influence(objective, objective.observe(None, rollouts))
        >>> [weight.flatten().tolist() for weight in weights.values()]
        [[0.5, 0.5]]
    """
    leaves = _leaves(observed)
    with torch.enable_grad():
        evaluation = objective.summarize(leaves)
    require_still(f"{type(objective).__name__}: its terms or risk", leader, evaluation.value)
    return evaluation, _derivatives(evaluation.value, leaves)


def derivatives(function: Callable[[Observed], Tensor], observed: Observed) -> Weights:
    """The derivatives of a scalar function of the observations with respect to each of them."""
    leaves = _leaves(observed)
    with torch.enable_grad():
        return _derivatives(function(leaves), leaves)


def direct_term(leader: Leader, rollouts: Rollouts, weights: Weights) -> Tensor | None:
    """The sum of weight times observation over steps, differentiable in x; None where none moves with x.

    Its gradient is that of the objective at a fixed policy.

    Args:
        leader: moves the observations.
        rollouts: the paths, or a chunk of them.
        weights: the value's derivative with respect to each observation of these paths.
    """
    total: Tensor | None = None
    for observation, weight in weights.items():
        if not observation.moves:
            continue
        value = observation.of(leader, rollouts)
        if not value.requires_grad:
            continue
        part = (_masked(weight, rollouts).to(value) * value).sum()
        total = part if total is None else total + part
    return total


def _leaves(observed: Observed) -> Observed:
    values = {
        o: value.detach().requires_grad_(True) if value.is_floating_point() else value
        for o, value in observed.values.items()
    }
    return Observed(values, observed.rollouts, observed.policy)


def _derivatives(value: Tensor, leaves: Observed) -> Weights:
    moving = {o: leaf for o, leaf in leaves.values.items() if leaf.requires_grad}
    # What is made of verdicts and kinds alone does not depend on any number that could move.
    needed = list(moving.values())
    gradients = torch.autograd.grad(value, needed, allow_unused=True) if value.requires_grad else [None] * len(needed)
    return {
        o: torch.zeros_like(leaf) if gradient is None else gradient
        for (o, leaf), gradient in zip(moving.items(), gradients, strict=True)
    }


def _masked(value: Tensor, rollouts: Rollouts) -> Tensor:
    return torch.where(rollouts.mask.to(value.device), value, torch.zeros_like(value))
