"""Objectives: what the leader wants of the best response.

    observations     what an objective may need to know of every step
    expected         ExpectedUtility, the plain objective, and the mean over contexts
    wrapping         the base of objectives that are made of another one
    priced           KLPriced: a price on leaving the prior
    constrained      Constrained: a bound on an expected cost
    risk             MeanVariance, CVaR, EntropicRisk, WorstContext: risk over contexts
    worst_group      WorstGroup: the worst group of contexts, by a column of the data
    cross_fitted     CrossFitted: a risk from small batches, with a memory
    set_utility      SetUtility: what k answers to one prompt are worth together
    set_scores       PassAt, BestOf, Distinct, SetFunction: such scores of sets
    function_of_means  FunctionOfMeans: target shares, F1, a harmonic mean, a ratio
    preferences      PreferenceLikelihood: pairs of the follower's own answers
    preference_data  PreferenceData, Regularised: a fixed set of labelled pairs

An objective declares its `observations` and makes `terms` of them; J is the sum of the terms. Wrappers compose in any
order, or refuse by name what makes no sense (a risk of a risk).
"""

from align_cbrl.objectives.constrained import Constrained
from align_cbrl.objectives.cross_fitted import CrossFitted
from align_cbrl.objectives.expected import MEAN, ExpectedUtility, Mean
from align_cbrl.objectives.function_of_means import FunctionOfMeans, f1, harmonic_mean, ratio, target_shares
from align_cbrl.objectives.observations import GroupLabel, LogRatio, Reward, Utility
from align_cbrl.objectives.preference_data import PreferenceData, Regularised
from align_cbrl.objectives.preferences import PreferenceLikelihood, pair_likelihood
from align_cbrl.objectives.priced import KLPriced
from align_cbrl.objectives.risk import CVaR, EntropicRisk, MeanVariance, OverContexts, WorstContext
from align_cbrl.objectives.set_scores import BestOf, Distinct, PassAt, SetFunction, SetScore
from align_cbrl.objectives.set_utility import SetUtility
from align_cbrl.objectives.worst_group import WorstGroup
from align_cbrl.objectives.wrapping import Wrapping

__all__ = [
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
    "SetScore",
    "PassAt",
    "BestOf",
    "Distinct",
    "SetFunction",
    "FunctionOfMeans",
    "target_shares",
    "f1",
    "harmonic_mean",
    "ratio",
    "PreferenceLikelihood",
    "pair_likelihood",
    "PreferenceData",
    "Regularised",
    "Wrapping",
    "OverContexts",
    "Mean",
    "MEAN",
    "Utility",
    "LogRatio",
    "Reward",
    "GroupLabel",
]
