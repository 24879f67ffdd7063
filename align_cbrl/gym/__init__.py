"""Followers from Gymnasium and Stable-Baselines3, for the leaders and estimators of this library (extra `gym`).

An environment's reward is replaced by the leader's, an agent of Stable-Baselines3 responds to it, and its paths become
`Rollouts`. Importing this package imports neither; the first use of one of its names does.

Modules:
    follower: GymFollower, an agent that goes on learning between leader steps
    leaders: NetworkLeader, a bonus or penalty that is a network over states and actions
    nodes: policy_nodes, the agent's policy for a RegressionCritic
    contexts: Contexts, several environments as one
    reward: LeaderReward, an environment in which the leader pays, and a replay buffer that follows it
    transitions: transitions as rollouts, and what is refused of an environment
"""

import importlib
from typing import TYPE_CHECKING, Any

from align_cbrl.errors import InputError

if TYPE_CHECKING:
    from align_cbrl.gym.contexts import Contexts
    from align_cbrl.gym.follower import GymFollower
    from align_cbrl.gym.leaders import NetworkLeader
    from align_cbrl.gym.nodes import policy_nodes
    from align_cbrl.gym.reward import LeaderReward

_HOMES = {
    "GymFollower": "follower",
    "NetworkLeader": "leaders",
    "policy_nodes": "nodes",
    "Contexts": "contexts",
    "LeaderReward": "reward",
}

__all__ = ["GymFollower", "NetworkLeader", "policy_nodes", "Contexts", "LeaderReward"]


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ImportError as error:
        raise InputError(
            f"align_cbrl.gym.{name} needs gymnasium and stable-baselines3: pip install 'align-cbrl[gym]'"
        ) from error
    return getattr(module, name)
