"""Scoring functions: one signature for rewards, judges and costs, and one place where what they return is checked."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError, RunStopped, first_line
from align_cbrl.llm.prompts import check_columns
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.secrets import redact

RETRIES, WAIT = 3, 0.5
"""How often a function that raises is asked again, and the seconds before the first time."""
_LONGEST_WAIT = 600.0  # seconds; where a function asks the run to wait longer, the run is stopped instead
_jitter = random.Random(0)  # for the waiting times only, so that the run's own random numbers stay the same

ScoreFunction = Callable[..., Sequence[float]]
"""f(prompts=..., completions=..., **columns), which returns one number per completion: trl's signature of a reward
function. A function without **columns is called with the arguments that it names only."""


@checked
def score_arguments(rollouts: Rollouts) -> dict[str, list[Any]]:
    """The keyword arguments that a trl reward function expects: prompts, completions, and every other column.

    They are copies: whoever gets them, such as a leader of the user's own, cannot change the rollouts.

    Raises:
        InputError: a column with the name of an argument.
    """
    check_columns([name for name in rollouts.steps if name not in ("completion", "completion_ids")])
    columns = {name: copied(list(value)) for name, value in rollouts.steps.items()}
    return {"prompts": columns.pop("prompt"), "completions": columns.pop("completion"), **columns}


@checked
def call_score_function(function: ScoreFunction, arguments: Mapping[str, Any]) -> Any:
    """What a function returns for the arguments that it takes: all of them if it has **columns, else those it names.

    Every function of rewards, costs or judgements is called here. It gets copies, so that one that changes its
    arguments in place changes neither the batch nor what the next function is asked.

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
    taken = arguments_taken(function, arguments)
    return function(**{name: value if name in OF_TRL else copied(value) for name, value in taken.items()})


def scores_of(name: str, function: ScoreFunction, arguments: Mapping[str, Any]) -> Tensor:
    """The scores of a batch's completions, float64 [B], without gradients.

    Args:
        name: of the function, for messages.
        function: a scoring function, called with the arguments that it takes.
        arguments: `prompts`, `completions`, and every column by its name.

    Raises:
        InputError: as `check_scores`, and for a function that needs a column which the data lack.
        RunStopped: the function raised on every attempt.

    Example:
        >>> def length(completions):
        ...     return [len(text) for text in completions]
        >>> scores_of("length", length, {"prompts": ["a", "b"], "completions": ["yes", "no"]}).tolist()
        [3.0, 2.0]
    """
    with torch.no_grad():
        returned = call_patiently(name, function, arguments)
        return check_scores(name, returned, len(arguments["completions"]))


def scores_of_once(name: str, function: ScoreFunction, arguments: Mapping[str, Any]) -> Tensor:
    """As `scores_of`, with one attempt: for a look at a function before a run.

    Raises:
        InputError: as `scores_of`, and for a function that raises anything.
    """
    with refusing_what_raises(name), torch.no_grad():
        return check_scores(name, call_patiently(name, function, arguments, 0), len(arguments["completions"]))


@contextlib.contextmanager
def refusing_what_raises(name: str) -> Iterator[None]:
    """Turn the end of a run, because a function raised, into an `InputError`: there is no run yet.

    Example:
        >>> with refusing_what_raises("judge"):
        ...     call_patiently("judge", lambda prompts: 1 / 0, {"prompts": ["a"]}, retries=0)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: judge: raised ZeroDivisionError (division by zero) when it was asked before the \
run; see to it that it answers
    """
    try:
        yield
    except RunStopped as error:
        if (cause := error.__cause__) is None:
            raise
        raise InputError(
            f"{name}: raised {type(cause).__name__} ({redact(first_line(cause))}) when it was asked before the run; "
            "see to it that it answers"
        ) from error


def call_patiently(
    name: str, function: ScoreFunction, arguments: Mapping[str, Any], retries: int = RETRIES, wait: float = WAIT
) -> Any:
    """As `call_score_function`, after at most 1 + `retries` attempts, since a function may ask a service.

    Args:
        name: of the function, for messages.
        function: may raise anything; `retry_after` of an exception says how many seconds it wants to be left alone.
        arguments: by name.
        retries: further attempts.
        wait: seconds before the first of them, doubled each time.

    Raises:
        InputError: the function raised it, or needs an argument that there is not; another attempt would not help.
        RunStopped: the function raised on every attempt, or raised RunStopped.
    """
    check_arguments(name, function, arguments)
    for attempt in range(retries + 1):
        try:
            return call_score_function(function, arguments)
        except (InputError, RunStopped):
            raise
        except Exception as error:  # it is user code and may raise anything; the run must survive it
            after = float(getattr(error, "retry_after", None) or 0.0)
            if attempt == retries or after > _LONGEST_WAIT:
                how = f"on all {attempt + 1} attempts" if after <= _LONGEST_WAIT else f"and asks to wait {after:g} s"
                raise RunStopped(
                    f"{name}: raised {type(error).__name__} {how} ({redact(first_line(error))}); the run is saved up "
                    "to its last step; see to it that it answers, and resume"
                ) from error
            # With jitter, so that several runs do not retry at the same time.
            time.sleep(max(after, min(60.0, wait * 2**attempt * _jitter.uniform(0.5, 1.5))))
    raise AssertionError("unreachable: the last attempt returns or raises")


@checked
def check_scores(name: str, scores: Any, count: Count, unit: str = "completion") -> Tensor:
    """What a scoring function returned for `count` completions, or what else the `unit` says, as float64 [count].

    Raises:
        InputError: it returned None, another number of scores, something that is not a number, NaN or infinity. The
            message names the function and the completion.
    """
    if scores is None:
        raise InputError(f"{name}: expected {count} scores, got None; return a list with one number per {unit}")
    scores = listed(name, scores)
    if len(scores) != count:
        raise InputError(f"{name}: expected {count} scores, one per {unit}, got {len(scores)}")
    for i, score in enumerate(scores):
        if not is_number(score):
            raise InputError(f"{name}: expected a finite number for each {unit}, got {score!r} for {unit} {i}")
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


def check_arguments(name: str, function: Callable[..., Any], there: Collection[str]) -> None:
    """Raise `InputError` unless the function can be called with the arguments that are there."""
    if missing := sorted(arguments_needed(function) - set(there)):
        raise InputError(
            f"{name}: takes {', '.join(map(repr, missing))}, which the data do not have; there are {sorted(there)}"
        )


def arguments_needed(function: Callable[..., Any]) -> set[str]:
    """The names without which the function cannot be called.

    Example:
        >>> sorted(arguments_needed(lambda prompts, answer, strict=True, **columns: None))
        ['answer', 'prompts']
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.kind in by_name and p.default is inspect.Parameter.empty}


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
    except (TypeError, OverflowError):  # an integer of more than 308 digits
        return False


def copied(value: Any) -> Any:
    """A copy that shares nothing which can be changed in place: of lists, dictionaries, tensors, arrays, images, ...

    Example:
        >>> batch = [[{"role": "assistant", "content": "yes"}]]
        >>> copied(batch)[0][0].clear()
        >>> batch
        [[{'role': 'assistant', 'content': 'yes'}]]
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return value.copy() if _ATOMS.issuperset(map(type, value)) else [copied(item) for item in value]
    if kind is dict:
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.clone()
    try:
        return copy.deepcopy(value)
    except (TypeError, NotImplementedError, pickle.PickleError):  # an open file, say, or a decoder: not plain data
        return value


_ATOMS = {str, int, float, bool, bytes, type(None)}
"""What cannot be changed in place."""

OF_TRL = {"trainer_state", "log_extra", "log_metric", "environments"}
"""What trl hands to reward functions beside data: its own objects, which are to stay the same."""
