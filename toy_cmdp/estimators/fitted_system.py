"""`FittedSystem`: the implicit gradient in linear systems that are fitted to the paths."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.linear_quadratic import require_normal
from toy_cmdp.problems.linear_feedback import FeedbackLeader, FeedbackWorld
from toy_cmdp.referee.exact import leader_value
from toy_cmdp.tables.linear_systems import pairs


@checked
@dataclasses.dataclass(frozen=True)
class FittedSystem(Hypergradient):
    """For a leader who acts by feedback: least squares for A, B and C, and the exact gradient in what they make.

    What `PlugIn` is for tables. The leader knows its own feedback, the follower's costs and its own utility; dynamics,
    noise and the law of the first state come from the paths. It needs no score, so that a leader who hardly trembles is
    no harder than another, and where the dynamics have no noise, one batch says everything.

    Raises:
        InputError: from `backward`: a leader that is no `FeedbackLeader`, a context without paths, fewer steps in one
            than numbers in state and action, or a fitted system without a stabilising solution.

    Example:
        >>> from toy_cmdp import lqr
        >>> problem = lqr()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0]), 4, torch.Generator().manual_seed(0))
        >>> sorted(FittedSystem().backward(problem, rollouts))
        ['gradient_norm', 'objective', 'residual']
    """

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; `objective` is J in the fitted systems, `residual` their noise (root mean)."""
        leader = problem.leader
        if not isinstance(leader, FeedbackLeader):
            raise InputError(f"leader: FittedSystem expected a FeedbackLeader, got {type(leader).__name__}")
        with torch.no_grad():
            world = fitted_world(leader, rollouts, require_normal(problem.follower).contexts)
        model = FeedbackLeader(leader.gain.detach(), world, leader.variance)
        model.gain = leader.gain  # the same parameter
        value = leader_value(dataclasses.replace(problem, leader=model))
        norm = accumulate(problem, torch.autograd.grad(value, problem.parameters, allow_unused=True))
        residual = world.noise.diagonal(dim1=-2, dim2=-1).mean().sqrt()
        return {"objective": value.item(), "gradient_norm": norm, "residual": float(residual)}


def fitted_world(leader: FeedbackLeader, rollouts: Rollouts, contexts: int) -> FeedbackWorld:
    """The leader's world with what nature gives estimated from the paths; the follower's costs are known."""
    known, size = leader.world, leader.gain.shape[1]
    found: dict[str, list[Tensor]] = {name: [] for name in _ESTIMATED}
    for context in range(contexts):
        mine = rollouts.contexts == context
        pair = pairs(rollouts)[mine].flatten(0, 1)  # x, a and u
        after = rollouts.steps["state"][mine][:, 1:, :size].flatten(0, 1)
        first = rollouts.steps["state"][mine][:, 0, :size]
        if len(pair) < pair.shape[1]:
            raise InputError(
                f"rollouts: FittedSystem expected at least {pair.shape[1]} steps in context {context}, got {len(pair)}"
            )
        law = torch.linalg.lstsq(pair, after).solution.T  # [n, d]
        off = after - pair @ law.T
        spread = first - first.mean(0)
        pieces = law.tensor_split([size, size + leader.gain.shape[0]], 1)
        for name, value in zip(
            _ESTIMATED,
            (*pieces, off.T @ off / len(off), first.mean(0), spread.T @ spread / len(first)),
            strict=True,
        ):
            found[name].append(value)
    return dataclasses.replace(known, **{name: torch.stack(values) for name, values in found.items()})


_ESTIMATED = ("dynamics", "push", "control", "noise", "initial_mean", "initial_covariance")
