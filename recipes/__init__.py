"""Runnable recipes: each folder is one experiment, from data to result.

Modules:
    loop: HPGD around trl in one file; read it first
    study: seeds side by side, kept parts, tables, curves, report
    stages: which stage of a seed is under way, and how long it takes
    worlds: policies, data, rewards and judges
    tune_weights: the main job: reward weights, or a reward model's head
    trl_script: somebody's own trl script, without and with a leader
    served_script: the same with its leader in a reward server
    reward_model: a hacked reward model repaired
    overoptimization: the judge against divergence, plain and tuned
    objectives: one policy under six objectives
    population: one reward for several policies
    preference_dataset: preferences without a judge
    lqr: a leader who acts in a regulator's system
    building: air flow and insulation around somebody else's heating
    linear_worlds: what the two share
    gym: agents of Stable-Baselines3 as followers
    kinds: several good answers, or shares of kinds of answers, around trl followers
    variety: several good answers instead of one, against the best refit
    four_rooms: the published table
    tax_design: VAT and income tax
    natural_steps: natural steps against Adam's on either of the two
    principal_agent: contracts against their closed form
    estimators: error and cost of every estimator
    rtq: randomly truncated best responses
    convergence: stationarity against steps and against the follower's error
    refit: weights refitted to the judge by regression
    fine_tuning: small policies and reward models, trained by trl
    statistics: means over seeds with their errors
    benchmarks: timings and memory
"""
