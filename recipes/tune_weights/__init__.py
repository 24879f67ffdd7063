"""Tune reward weights, or a reward model's head, so that the policy pleases the judge: HPGD and its rivals.

Modules:
    search: random search and TPE, one RLHF run per trial
"""
