"""The recipe `estimators`: error and cost of each estimator of the hypergradient at equal environment steps."""
