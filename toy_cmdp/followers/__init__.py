"""Followers of a table: exact, iterative, and trained on samples.

Modules:
    solve: soft value iteration and soft policy iteration
    exact: ExactFollower
    iterative: value iteration, natural policy gradient and soft Q-learning, stopped after any number of iterations
    neural: NeuralSoftQFollower, deep soft Q-learning from samples
"""
