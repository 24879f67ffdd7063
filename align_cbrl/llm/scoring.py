"""Scoring functions: one signature for rewards, judges and costs, and one place where what they return is checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.rollouts import Rollouts

ScoreFunction = Callable[..., Sequence[float]]
"""f(prompts=..., completions=..., **columns) -> one number a completion: trl's signature of a reward function.

A function without **columns gets only the arguments that it names."""


def score_arguments(rollouts: Rollouts) -> dict[str, list[Any]]:
    """The keyword arguments that a trl reward function expects: prompts, completions, and every other column."""
    columns = {name: list(value) for name, value in rollouts.steps.items() if name not in ("prompt", "completion")}
    return {"prompts": list(rollouts.steps["prompt"]), "completions": list(rollouts.steps["completion"]), **columns}


def call_score_function(function: ScoreFunction, arguments: Mapping[str, Any]) -> Any:
    """Call with the arguments that the function takes: all of them if it has **columns, else those it names.

    Args:
        function: a scoring function.
        arguments: `prompts`, `completions`, and every column by its name.
    """
    return function(**arguments_taken(function, arguments))


def scores_of(name: str, function: ScoreFunction, arguments: Mapping[str, Any]) -> Tensor:
    """The scores of a batch's completions, float64 [B], without gradients.

    Args:
        name: of the function, for messages.
        function: a scoring function, called with the arguments that it takes.
        arguments: `prompts`, `completions`, and every column by its name.

    Raises:
        InputError: as `check_scores`.

    Example:
        >>> def length(completions):
        ...     return [len(text) for text in completions]
        >>> scores_of("length", length, {"prompts": ["a", "b"], "completions": ["yes", "no"]}).tolist()
        [3.0, 2.0]
    """
    with torch.no_grad():
        return check_scores(name, call_score_function(function, arguments), len(arguments["completions"]))


def check_scores(name: str, scores: Any, count: int) -> Tensor:
    """`scores` as float64 [count].

    Raises:
        InputError: None, another length, something that is not a number, or NaN or infinity (which completion).
    """
    if scores is None:
        raise InputError(f"{name}: expected {count} scores, got None; return a list with one number a completion")
    scores = listed(name, scores)
    if len(scores) != count:
        raise InputError(f"{name}: expected {count} scores, one a completion, got {len(scores)}")
    for i, score in enumerate(scores):
        if not is_number(score):
            raise InputError(f"{name}: expected a finite number for each completion, got {score!r} for completion {i}")
    return torch.tensor([float(s) for s in scores], dtype=torch.float64)


def arguments_taken(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes: all with **columns, else the ones it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, say: it has no signature to read
        return dict(arguments)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def listed(name: str, scores: Any) -> list[Any]:
    """`scores` as a list. Raises InputError unless it is a tensor or a sequence of numbers."""
    if isinstance(scores, Tensor):
        return list(scores.detach().flatten().tolist())
    if isinstance(scores, (str, bytes, Mapping)) or not hasattr(scores, "__iter__"):
        raise InputError(f"{name}: expected a list with one number a completion, got {scores!r:.80}")
    return list(scores)


def is_number(score: Any) -> bool:
    """Whether `score` is a finite number."""
    try:
        return not isinstance(score, (str, bytes)) and math.isfinite(score)
    except TypeError:
        return False
