"""Scoring functions: one signature for rewards, judges and costs, and one place where what they return is checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.rollouts import Rollouts

ScoreFunction = Callable[..., Sequence[float]]
"""f(prompts=..., completions=..., **columns), which returns one number per completion: trl's signature of a reward
function. A function without **columns is called with the arguments that it names only."""


@checked
def score_arguments(rollouts: Rollouts) -> dict[str, list[Any]]:
    """The keyword arguments that a trl reward function expects: prompts, completions, and every other column."""
    columns = {name: list(value) for name, value in rollouts.steps.items() if name not in ("prompt", "completion")}
    return {"prompts": list(rollouts.steps["prompt"]), "completions": list(rollouts.steps["completion"]), **columns}


@checked
def call_score_function(function: ScoreFunction, arguments: Mapping[str, Any]) -> Any:
    """What a function returns for the arguments that it takes: all of them if it has **columns, else those it names.

    Every function of rewards, costs or judgements is called here. It gets copies of lists, dictionaries and tensors,
    so that one that changes its arguments in place changes neither the batch nor what the next function is asked.

    Args:
        function: a scoring function, or one that compares pairs.
        arguments: by name, such as `prompts`, `completions`, and every column of the data.

    Example:
        >>> def careless(prompts, completions):
        ...     return [len(completions.pop()) for _ in prompts]
        >>> batch = {"prompts": ["a", "b"], "completions": ["yes", "no"]}
        >>> call_score_function(careless, batch), batch["completions"]
        ([2, 3], ['yes', 'no'])
    """
    return function(**{name: _copied(value) for name, value in arguments_taken(function, arguments).items()})


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


@checked
def check_scores(name: str, scores: Any, count: Count) -> Tensor:
    """What a scoring function returned for `count` completions, as float64 [count].

    Raises:
        InputError: it returned None, another number of scores, something that is not a number, NaN or infinity. The
            message names the function and the completion.
    """
    if scores is None:
        raise InputError(f"{name}: expected {count} scores, got None; return a list with one number per completion")
    scores = listed(name, scores)
    if len(scores) != count:
        raise InputError(f"{name}: expected {count} scores, one per completion, got {len(scores)}")
    for i, score in enumerate(scores):
        if not is_number(score):
            raise InputError(f"{name}: expected a finite number for each completion, got {score!r} for completion {i}")
    return torch.tensor([float(s) for s in scores], dtype=torch.float64)


def arguments_taken(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes: all of them if it has **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, say: it has no signature to read
        return dict(arguments)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def listed(name: str, scores: Any) -> list[Any]:
    """`scores` as a list. Raises InputError unless they are a tensor or a sequence."""
    if isinstance(scores, Tensor):
        return list(scores.detach().flatten().tolist())
    if isinstance(scores, (str, bytes, Mapping)) or not hasattr(scores, "__iter__"):
        raise InputError(f"{name}: expected a list with one number per completion, got {scores!r:.80}")
    return list(scores)


def is_number(score: Any) -> bool:
    """Whether `score` is a finite number."""
    try:
        return not isinstance(score, (str, bytes)) and math.isfinite(score)
    except TypeError:
        return False


def _copied(value: Any) -> Any:
    # Not copy.deepcopy: trl passes its own state among the columns, which is to stay the same object.
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value
