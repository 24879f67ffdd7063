"""The only files that touch trl's private methods.

Modules:
    observed: what all trainers share, and what is relied upon in trl
    rloo: RLOO
    grpo: GRPO with the KL in the reward
"""
