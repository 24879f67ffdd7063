"""align-cbrl: incentive alignment by contextual bilevel reinforcement learning.

A leader sets incentives x, chance draws a context, and a follower trains its own policy to best-respond; `HPGD` ascends
what the leader wants through that best response, from the follower's samples only. The same estimator serves exact
tabular problems (`toy_cmdp`) and language models (`align_cbrl.llm`). Importing this package imports nothing heavy; the
first use of one of its names imports torch.

Modules:
    problem: the contracts: Leader, Observation, Objective, Critic, Follower, and the Problem they form
    rollouts: Rollouts, everything that passes from the follower to the leader
    functional: pure tensor mathematics: eligibility trace, group advantage, tilting, best-response gap
    groups: sums, means and extremes over groups of rows, such as the completions of one prompt
    plain: values of a user's data as JSON holds them
    objectives: what the leader can maximise
    estimators: hypergradients, critics, certificate, replay, search
    hpgd: HPGD, the loop
    distributed: several processes: what is gathered, summed and written
    runs: configuration, checkpoints, metrics, run folders, reports
    gym: agents of Stable-Baselines3 in environments of Gymnasium as followers
    llm: language models as followers, their leaders and judges
    recipes: the built-in jobs
    cli: the command line
    identity: what a function or a model is, by its content
    errors: InputError, RunStopped, CheckpointError
    checks: what enters a public constructor: its type, finiteness and range
    moved: names of 0.1.0 that still work in 0.2.0, with a FutureWarning
"""

import importlib
from typing import TYPE_CHECKING, Any

from align_cbrl.moved import install

if TYPE_CHECKING:
    from align_cbrl.errors import CheckpointError, InputError, RunStopped
    from align_cbrl.estimators.baselines import DirectOnly, Myopic
    from align_cbrl.estimators.certificate import Certificate, certify
    from align_cbrl.estimators.critics import FittedCritic, GroupCritic
    from align_cbrl.estimators.geometric import GradientEstimator
    from align_cbrl.estimators.hypergradient import Hypergradient
    from align_cbrl.estimators.natural import Natural
    from align_cbrl.estimators.policy_response import PolicyResponse
    from align_cbrl.estimators.regression_critic import DrawnNodes, NormalNodes, RegressionCritic
    from align_cbrl.estimators.search import Climb, Halving, exchange_ascent, successive_halving
    from align_cbrl.estimators.step_response import StepResponse
    from align_cbrl.estimators.truncated import IterativeFollower, RandomlyTruncated, Truncated
    from align_cbrl.estimators.zeroth_order import ZerothOrder
    from align_cbrl.hpgd import HPGD, HPGDConfig
    from align_cbrl.objectives import (
        BestOf,
        Constrained,
        CrossFitted,
        CVaR,
        Distinct,
        EntropicRisk,
        ExpectedUtility,
        FunctionOfMeans,
        KLPriced,
        MeanVariance,
        PassAt,
        PreferenceData,
        PreferenceLikelihood,
        Regularised,
        SetFunction,
        SetUtility,
        WorstContext,
        WorstGroup,
    )
    from align_cbrl.problem import (
        Critic,
        Critique,
        Evaluation,
        Follower,
        Joint,
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

_HOMES = """
    errors estimators.baselines estimators.certificate estimators.critics estimators.geometric
    estimators.hypergradient estimators.natural estimators.policy_response estimators.regression_critic
    estimators.search estimators.step_response estimators.truncated estimators.zeroth_order hpgd objectives problem
    rollouts
""".split()
"""The modules that the names above come from."""

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
    "Joint",
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
    "SetUtility",
    "PassAt",
    "BestOf",
    "Distinct",
    "SetFunction",
    "FunctionOfMeans",
    "PreferenceLikelihood",
    "PreferenceData",
    "Regularised",
    # how its gradient is estimated
    "Hypergradient",
    "PolicyResponse",
    "StepResponse",
    "GradientEstimator",
    "RandomlyTruncated",
    "Truncated",
    "ZerothOrder",
    "Myopic",
    "DirectOnly",
    "GroupCritic",
    "FittedCritic",
    "RegressionCritic",
    "NormalNodes",
    "DrawnNodes",
    # the loop
    "HPGD",
    "HPGDConfig",
    "Natural",
    # how close the follower is
    "Certificate",
    "certify",
    # many starts
    "Climb",
    "Halving",
    "successive_halving",
    "exchange_ascent",
    # what can go wrong
    "InputError",
    "RunStopped",
    "CheckpointError",
]


def __getattr__(name: str) -> Any:
    """What is exported, imported when the first of these names is asked for: `align-cbrl --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in _HOMES:
        module = vars(importlib.import_module(f"{__name__}.{home}"))
        globals().update({exported: module[exported] for exported in __all__ if exported in module})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install(__name__)
