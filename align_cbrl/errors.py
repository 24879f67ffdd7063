"""The library's own exceptions: what the user handed over, or what a run met, is at fault."""

from __future__ import annotations

import math


class InputError(ValueError):
    """An argument is wrong. The message names it, what was expected, what came, and what to do."""


class RunStopped(RuntimeError):
    """A run ended early for an outside reason (a judge that keeps failing); its last checkpoint can be resumed."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted inside one of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_number(name: str, value: float, *, low: float = -math.inf, low_included: bool = False) -> None:
    """Raise `InputError` unless `value` is a finite number above `low`, or equal to it where that is `low_included`.

    Example:
        >>> check_number("price", 0.0, low=0, low_included=True)
        >>> check_number("price", -1.0, low=0, low_included=True)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: price: expected a finite number >= 0, got -1.0
    """
    # Written so that a NaN fails it.
    if not (low < value < math.inf or (low_included and value == low)):
        bound = "" if low == -math.inf else f" {'>=' if low_included else '>'} {low:g}"
        raise InputError(f"{name}: expected a finite number{bound}, got {value}")
