"""Estimators that need tables or counts: the plug-in, published rivals, and climbs from many starts.

Modules:
    plug_in: PlugIn, the expectation of PolicyResponse in a fitted model
    fitted_system: FittedSystem, the same for linear systems
    observed_policy: ObservedPolicyResponse, at the observed policy in the leader's own model
    visit_averaged: VisitAveraged, the authors' code
    bchg: BCHG and its critics
    amd: AMD, Bellman sweeps over the whole model
    value_penalty: ValuePenalty, a penalty on the follower's regret
    visits: averages over visits, shared by two rivals
    climbs: leaders that ascend side by side, for successive halving
"""
