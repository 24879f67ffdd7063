"""The recipe `gym`: agents of Stable-Baselines3 as followers, against an exact referee and in Pendulum-v1.

Modules:
    regulator: a linear system with a leader, whose gradients are exact
    swing_up: Pendulum-v1 with a sparse objective, and a leader who shapes its reward
"""
