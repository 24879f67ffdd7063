"""The library's own exceptions: what the user handed over, or what a run met, is at fault."""

from __future__ import annotations


class InputError(ValueError):
    """An argument is wrong. The message names it, what was expected, what came, and what to do."""


class RunStopped(RuntimeError):
    """A run ended early for an outside reason (a judge that keeps failing); its last checkpoint can be resumed."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted inside one of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
