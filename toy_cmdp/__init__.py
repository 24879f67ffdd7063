"""Exact tabular contextual MDPs: small worlds in which every gradient is known, to test estimators against.

Modules:
    tables: contextual MDPs as functions of the leader
    environments: linear systems as environments of Gymnasium, imported by itself (extra `gym`)
    followers: solvers and followers
    referee: exact values, gradients and optima
    estimators: estimators that need tables or counts, and published rivals
    problems: the problems
    validate: every gradient route against the referee
"""

from align_cbrl.moved import install
from toy_cmdp.estimators.amd import AMD
from toy_cmdp.estimators.bchg import BCHG, SarsaCritic
from toy_cmdp.estimators.climbs import ExactClimb, SampledClimb
from toy_cmdp.estimators.fitted_system import FittedSystem, SystemMemory
from toy_cmdp.estimators.observed_policy import ObservedPolicyResponse
from toy_cmdp.estimators.plug_in import PlugIn, TransitionMemory
from toy_cmdp.estimators.value_penalty import ValuePenalty
from toy_cmdp.estimators.visit_averaged import VisitAveraged
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.followers.iterative import NaturalPolicyGradient, SoftQLearning, SoftValueIteration
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.followers.neural import NeuralSoftQFollower
from toy_cmdp.followers.solve import SoftSolution, soft_policy_iteration, soft_value_iteration
from toy_cmdp.problems.building import building
from toy_cmdp.problems.discrete_toy import discrete_toy, discrete_toy_value
from toy_cmdp.problems.four_rooms import four_rooms, four_rooms_map
from toy_cmdp.problems.free_rewards import free_rewards
from toy_cmdp.problems.gridworld import gridworld
from toy_cmdp.problems.linear_feedback import FeedbackLeader, FeedbackWorld, lqr
from toy_cmdp.problems.mechanism import mechanism
from toy_cmdp.problems.meta_rl import meta_rl
from toy_cmdp.problems.parallel import parallel
from toy_cmdp.problems.preferences import preferences
from toy_cmdp.problems.principal_agent import principal_agent
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.problems.random_linear import random_linear
from toy_cmdp.problems.stackelberg_game import stackelberg_game
from toy_cmdp.problems.tax_design import tax_design
from toy_cmdp.referee import exact
from toy_cmdp.referee.closed_forms import logit_price, optimal_bonus, optimal_prices, threshold_rewards
from toy_cmdp.referee.exact import (
    ExactCritic,
    ImplicitHypergradient,
    enumerate_paths,
    expected_policy_response,
    leader_value,
)
from toy_cmdp.referee.frozen_policy import PresentCritic, PresentPolicyResponse
from toy_cmdp.referee.metric import exact_metric
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility
from toy_cmdp.tables.linear_systems import (
    BumpUtility,
    LinearLeader,
    LinearSystems,
    MomentUtility,
    QuadraticUtility,
    StructuredLeader,
)
from toy_cmdp.tables.sparse import SparseTransition

__all__ = [
    # tables
    "ContextualMDP",
    "SparseTransition",
    "TabularLeader",
    "TabularUtility",
    "Tables",
    # linear systems
    "LinearSystems",
    "LinearLeader",
    "StructuredLeader",
    "MomentUtility",
    "QuadraticUtility",
    "BumpUtility",
    "FeedbackLeader",
    "FeedbackWorld",
    "LinearQuadraticFollower",
    "lqr",
    "building",
    "random_linear",
    # problems
    "discrete_toy",
    "discrete_toy_value",
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
    "exact_metric",
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
    "FittedSystem",
    "SystemMemory",
    "AMD",
    "BCHG",
    "SarsaCritic",
    "ValuePenalty",
    "VisitAveraged",
    # many starts
    "ExactClimb",
    "SampledClimb",
]

install(__name__)
