"""Docstring writing: signatures of the standard library, a judge that knows PEP 257, a reward model that likes length."""
