"""Docstring writing: a leader tunes reward weights so that a language model pleases a judge."""
