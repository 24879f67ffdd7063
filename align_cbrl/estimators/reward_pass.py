"""One pass through the leader for a whole replay: the reward that weights the samples is then differentiated."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.problem import Leader, Problem
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class _RewardOf:
    """The key under which `Rollouts.known` holds a leader's reward [B, T] with its graph."""

    leader: Leader


def with_reward(problem: Problem, rollouts: Rollouts) -> Rollouts:
    """The paths with the leader's reward at its present parameters, and its graph, in `known`.

    It is worth nothing once the parameters have moved, and is good for one backward pass (`let_go`).

    Raises:
        InputError: what the leader's reward refuses.

    Example:
        >>> import toy_cmdp
        >>> problem = toy_cmdp.preferences(seed=0)
        >>> _ = problem.follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = problem.follower.rollout(torch.arange(2), 4, torch.Generator().manual_seed(0))
        >>> rollouts = with_reward(problem, rollouts)
        >>> reward_of(problem.leader, rollouts).requires_grad
        True
    """
    with torch.enable_grad():
        reward = problem.leader.reward(rollouts).clone()  # no view of another tensor, which could not be let go
    return rollouts.knowing({_RewardOf(problem.leader): reward})


def reward_of(leader: Leader, rollouts: Rollouts) -> Tensor:
    """r_x [B, T]: what `with_reward` has left, else by asking the leader."""
    known = rollouts.known.get(_RewardOf(leader))
    if known is None or (torch.is_grad_enabled() and not known.requires_grad):
        return leader.reward(rollouts)
    return known


def let_go(leader: Leader, rollouts: Rollouts) -> None:
    """Give up the graph that `with_reward` has left, which holds the activations of the whole batch."""
    known = rollouts.known.get(_RewardOf(leader))
    if known is not None:
        known.detach_()
