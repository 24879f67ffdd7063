"""Exact tabular contextual MDPs: small worlds in which every gradient is known, to test estimators against."""

from toy_cmdp import exact
from toy_cmdp.closed_forms import logit_price, optimal_bonus, optimal_prices, threshold_rewards
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
from toy_cmdp.free_rewards import free_rewards
from toy_cmdp.frozen_policy import PresentCritic, PresentPolicyResponse
from toy_cmdp.gridworld import gridworld
from toy_cmdp.iterative import NaturalPolicyGradient, SoftQLearning, SoftValueIteration
from toy_cmdp.mechanism import mechanism
from toy_cmdp.meta_rl import meta_rl
from toy_cmdp.neural_follower import NeuralSoftQFollower
from toy_cmdp.observed_policy import ObservedPolicyResponse
from toy_cmdp.parallel import parallel
from toy_cmdp.plug_in import PlugIn, TransitionMemory
from toy_cmdp.preferences import preferences
from toy_cmdp.principal_agent import principal_agent
from toy_cmdp.random_cmdp import random_cmdp
from toy_cmdp.rivals import AMD, BCHG, SarsaCritic, ValuePenalty, VisitAveraged
from toy_cmdp.search import ExactClimb, SampledClimb
from toy_cmdp.solve import SoftSolution, soft_policy_iteration, soft_value_iteration
from toy_cmdp.sparse import SparseTransition
from toy_cmdp.stackelberg_game import stackelberg_game
from toy_cmdp.tax_design import tax_design

__all__ = [
    # tables
    "ContextualMDP",
    "SparseTransition",
    "TabularLeader",
    "TabularUtility",
    "Tables",
    # problems
    "four_rooms",
    "four_rooms_map",
    "free_rewards",
    "gridworld",
    "mechanism",
    "meta_rl",
    "preferences",
    "principal_agent",
    "random_cmdp",
    "stackelberg_game",
    "tax_design",
    "parallel",
    # the referee
    "exact",
    "ExactCritic",
    "ImplicitHypergradient",
    "enumerate_paths",
    "expected_policy_response",
    "leader_value",
    "PresentCritic",
    "PresentPolicyResponse",
    "logit_price",
    "optimal_bonus",
    "optimal_prices",
    "threshold_rewards",
    # solvers and followers
    "SoftSolution",
    "soft_policy_iteration",
    "soft_value_iteration",
    "ExactFollower",
    "SoftValueIteration",
    "NaturalPolicyGradient",
    "SoftQLearning",
    "NeuralSoftQFollower",
    # estimators
    "PlugIn",
    "TransitionMemory",
    "ObservedPolicyResponse",
    "AMD",
    "BCHG",
    "SarsaCritic",
    "ValuePenalty",
    "VisitAveraged",
    # many starts
    "ExactClimb",
    "SampledClimb",
]
