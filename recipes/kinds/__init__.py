"""Which kinds of answers a policy gives: several good ones instead of one, or shares of kinds at their targets.

Modules:
    threshold: a rival's reward, for being good enough
"""
