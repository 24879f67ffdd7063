"""`policy_nodes`: what a `RegressionCritic` needs to know of an agent's policy, from its rollouts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.rollouts import Rollouts

NODES = 16
"""Actions that stand for the policy in a state."""


def white_nodes(size: int, seed: int) -> Tensor:
    """Points [N, m] of a standard normal law, all of the same weight: scrambled Sobol points through its quantiles.

    A squashed policy may be next to a coin toss between the ends of the box, of which a rule that is exact for
    polynomials knows nothing; averages over these points are off by little, and by nothing on average over seeds.

    Example:
        >>> points = white_nodes(2, seed=0)
        >>> tuple(points.shape), bool((points.mean(0).abs() < 0.1).all())
        ((16, 2), True)
    """
    even = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(NODES, dtype=torch.float64)
    return torch.special.ndtri(even.clamp(1e-9, 1 - 1e-9)).float()


@checked
def policy_nodes(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Actions [B, T, N, m] that stand for an agent's policy at every step, and their weights [N].

    For `RegressionCritic(nodes=policy_nodes)`, on rollouts of a `GymFollower`.

    Raises:
        InputError: rollouts of another follower.
    """
    if "action_nodes" not in rollouts.steps:
        raise InputError(
            f'rollouts.steps: policy_nodes expected "action_nodes" of a GymFollower, got {sorted(rollouts.steps)}; for '
            "another follower use NormalNodes or DrawnNodes"
        )
    nodes: Tensor = rollouts.steps["action_nodes"]
    return nodes, torch.full((nodes.shape[2],), 1 / nodes.shape[2]).to(nodes)
