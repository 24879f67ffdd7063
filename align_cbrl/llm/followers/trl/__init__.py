"""The only files that touch trl's private methods.

Modules:
    observed: what all trainers share, and what is relied upon in trl
    settings: which fields of trl's configurations may be set
    rloo: RLOO
    grpo: GRPO with the KL in the reward
"""
