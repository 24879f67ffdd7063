"""Docstrings for the standard library: a judge that knows PEP 257, and a reward model that likes length."""
