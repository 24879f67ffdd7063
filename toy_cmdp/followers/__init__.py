"""Followers of a table or a linear system: exact, iterative, and trained on samples.

Modules:
    solve: soft value iteration and soft policy iteration
    exact: ExactFollower
    linear_quadratic: LinearQuadraticFollower, exact in linear systems
    riccati: the discrete Riccati equation, batched, with an implicit derivative
    iterative: value iteration, natural policy gradient and soft Q-learning, stopped after any number of iterations
    neural: NeuralSoftQFollower, deep soft Q-learning from samples
"""
