"""Docstrings for the standard library: a judge that knows PEP 257, and a reward model that likes length.

Modules:
    data: signatures of the standard library
    shipped: a policy and a reward model that come with this world
    pretrain: how these were made
    policy: a small Llama
    judge: a program
    proxy: the flawed reward model
    rewards: reward terms
"""

from .data import load_docstrings
from .shipped import POLICY, PROXY

__all__ = ["POLICY", "PROXY", "load_docstrings"]
