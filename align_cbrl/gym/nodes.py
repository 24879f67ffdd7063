"""`policy_nodes`: what a `RegressionCritic` needs to know of an agent's policy, from its rollouts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.rollouts import Rollouts


def white_nodes(size: int) -> tuple[Tensor, Tensor]:
    """Points [N, m] and weights [N], N = 2 m + 1, of a standard normal law: exact for polynomials up to degree three.

    The unscented rule: the centre, and sqrt(3) to either side in every direction (Julier and Uhlmann 1997).

    Example:
        >>> points, weight = white_nodes(2)
        >>> (weight @ points**2).tolist()
        [1.0, 1.0]
    """
    far = 3**0.5 * torch.eye(size)
    weight = torch.full((2 * size + 1,), 1 / 6, dtype=torch.float64)
    weight[0] = 1 - size / 3
    return torch.cat([torch.zeros(1, size), far, -far]), weight


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
    return nodes, white_nodes(nodes.shape[-1])[1]
