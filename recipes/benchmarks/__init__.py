"""Timings, as medians of repeated runs; never part of the tests.

Modules:
    exact_step: an exact leader step on Four Rooms
    sampled_step: a sampled leader step on Four Rooms
    served_reward: rewards over HTTP against the call in process
    gridworld: an exact hypergradient up to a million states
    leader_memory: memory by the size of a tabular leader
    leader_step: a leader step against a follower step
    leader_step_memory: memory of a leader step by its batch
"""
