"""Estimators of the hypergradient from the follower's paths, and what tells how good they are.

Modules:
    hypergradient: the base class of all estimators
    policy_response: PolicyResponse, HPGD's estimator, in one backward pass
    step_response: StepResponse, through a trainer's next step where there is no best response
    observing: an objective's observations of a batch: in chunks, gathered over processes, differentiated
    critics: GroupCritic and FittedCritic
    regression_critic: RegressionCritic, for continuous states and actions
    regression: what it regresses with: ridge regression on features, a small network
    baselines: DirectOnly and Myopic, biased baselines
    geometric: GradientEstimator, the paper's estimator with random horizons
    truncated: Truncated and RandomlyTruncated (RT-Q), for followers that are stopped early
    zeroth_order: ZerothOrder, finite differences of the leader's value
    certificate: Certificate, the estimated divergence of the follower from its best response
    sampler_evidence: SamplerEvidence, whether completions are samples of the policy at all
    shortage: what there is to do when memory runs out
    degenerate: completions whose group contributes no gradient
    metric: the Fisher metric of the best response, as a matrix or by its products alone
    natural: Natural, steps in that metric
    replay: remembered batches, reweighted and used again
    reward_pass: one forward pass of the leader for a replay's weights and gradient
    search: successive halving over many starts
    random_numbers: reproducible random numbers for estimators that draw
"""
