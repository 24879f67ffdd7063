"""Docstrings for the standard library: a judge that knows PEP 257, and a reward model that likes length.

Modules:
    data: signatures of the standard library
    policy: a small Llama
    judge: a program
    proxy: the flawed reward model
    rewards: reward terms
"""
