"""Worlds: a policy, its data, rewards and a judge; and the bench that trains and measures in any of them.

Modules:
    world: what a world provides, and what a configuration may replace
    docstrings: first lines of docstrings
    replies: answers of a support desk
    bench: one seed's policy, rewards and judge; training and measuring
    check: what is looked at before anything is trained
    annotators: flawed annotators and their preferences
    cache: models that are trained once
"""
