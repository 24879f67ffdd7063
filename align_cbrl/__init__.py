"""align-cbrl: incentive alignment by contextual bilevel reinforcement learning.

A leader sets incentives x, chance draws a context, and a follower trains its own policy to best-respond; `HPGD` ascends
what the leader wants through that best response, from the follower's samples only. The same estimator serves exact
tabular problems (`toy_cmdp`) and language models (`align_cbrl.llm`). Importing this package imports torch only.
"""

from align_cbrl.errors import CheckpointError, InputError, RunStopped
from align_cbrl.estimators.baselines import DirectOnly, Myopic
from align_cbrl.estimators.certificate import Certificate, certify
from align_cbrl.estimators.critics import FittedCritic, GroupCritic
from align_cbrl.estimators.geometric import GradientEstimator
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.estimators.search import Climb, Halving, successive_halving
from align_cbrl.estimators.truncated import IterativeFollower, RandomlyTruncated, Truncated
from align_cbrl.estimators.zeroth_order import ZerothOrder
from align_cbrl.hpgd import HPGD, HPGDConfig
from align_cbrl.moved import install
from align_cbrl.objectives import (
    Constrained,
    CrossFitted,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    KLPriced,
    MeanVariance,
    PreferenceData,
    PreferenceLikelihood,
    Regularised,
    WorstContext,
    WorstGroup,
)
from align_cbrl.problem import (
    Critic,
    Critique,
    Evaluation,
    Follower,
    Leader,
    Objective,
    Observation,
    Observed,
    Problem,
    Risk,
    Term,
)
from align_cbrl.rollouts import Rollouts

__version__ = "0.2.0"

__all__ = [
    # what passes between the two worlds
    "Rollouts",
    # the contracts
    "Leader",
    "Objective",
    "Observation",
    "Observed",
    "Term",
    "Risk",
    "Evaluation",
    "Follower",
    "IterativeFollower",
    "Critic",
    "Critique",
    "Problem",
    # what the leader wants
    "ExpectedUtility",
    "KLPriced",
    "Constrained",
    "MeanVariance",
    "CVaR",
    "EntropicRisk",
    "WorstContext",
    "WorstGroup",
    "CrossFitted",
    "PreferenceLikelihood",
    "PreferenceData",
    "Regularised",
    # how its gradient is estimated
    "Hypergradient",
    "PolicyResponse",
    "GradientEstimator",
    "RandomlyTruncated",
    "Truncated",
    "ZerothOrder",
    "Myopic",
    "DirectOnly",
    "GroupCritic",
    "FittedCritic",
    # the loop
    "HPGD",
    "HPGDConfig",
    # how close the follower is
    "Certificate",
    "certify",
    # many starts
    "Climb",
    "Halving",
    "successive_halving",
    # what can go wrong
    "InputError",
    "RunStopped",
    "CheckpointError",
]

install(__name__)
