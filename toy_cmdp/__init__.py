"""Exact tabular contextual MDPs: small worlds in which every gradient is known, to test estimators against."""

from toy_cmdp import exact
from toy_cmdp.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility
from toy_cmdp.exact import (
    ExactCritic,
    ImplicitHypergradient,
    enumerate_paths,
    expected_policy_response,
    leader_value,
)
from toy_cmdp.follower import ExactFollower
from toy_cmdp.four_rooms import four_rooms, four_rooms_map
from toy_cmdp.parallel import parallel
from toy_cmdp.random_cmdp import random_cmdp
from toy_cmdp.solve import SoftSolution, soft_policy_iteration, soft_value_iteration
from toy_cmdp.sparse import SparseTransition

__all__ = [
    "ContextualMDP",
    "ExactCritic",
    "ExactFollower",
    "ImplicitHypergradient",
    "SoftSolution",
    "SparseTransition",
    "Tables",
    "TabularLeader",
    "TabularUtility",
    "enumerate_paths",
    "exact",
    "expected_policy_response",
    "four_rooms",
    "four_rooms_map",
    "leader_value",
    "parallel",
    "random_cmdp",
    "soft_policy_iteration",
    "soft_value_iteration",
]
