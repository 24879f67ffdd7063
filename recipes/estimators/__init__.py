"""The recipe `estimators`: error and cost of each estimator of the hypergradient at equal environment steps.

Modules:
    study: every estimator on the same paths, against the exact hypergradient
"""
