"""Judges: what a leader can be told to want, as a utility of completions."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError, RunStopped
from align_cbrl.llm.completions import score_arguments
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

ScoreFunction = Callable[..., Sequence[float]]
"""f(prompts=..., completions=..., **columns) -> one number a completion: trl's signature of a reward function.

A function without **columns gets only the arguments that it names."""


def call_score_function(function: ScoreFunction, arguments: Mapping[str, Any]) -> Any:
    """Call with the arguments that the function takes: all of them if it has **columns, else those it names.

    Args:
        function: a scoring function.
        arguments: `prompts`, `completions`, and every column by its name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, say: it has no signature to read
        return function(**arguments)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return function(**arguments)
    names = {p.name for p in parameters}
    return function(**{name: value for name, value in arguments.items() if name in names})


def check_scores(name: str, scores: Any, count: int) -> Tensor:
    """`scores` as float64 [count].

    Raises:
        InputError: None, another length, something that is not a number, or NaN or infinity (which completion).
    """
    if scores is None:
        raise InputError(f"{name}: expected {count} scores, got None; return a list with one number a completion")
    if isinstance(scores, Tensor):
        scores = scores.detach().flatten().tolist()
    scores = list(scores)
    if len(scores) != count:
        raise InputError(f"{name}: expected {count} scores, one a completion, got {len(scores)}")
    for i, score in enumerate(scores):
        if isinstance(score, str) or score is None or not math.isfinite(score):
            raise InputError(f"{name}: expected a finite number for each completion, got {score!r} for completion {i}")
    return torch.tensor([float(s) for s in scores], dtype=torch.float64)


class Judge:
    """The utility of a completion is what a judge says of it; a function for `ExpectedUtility`.

    Args:
        function: a trl-style scoring function; it may be slow, remote and unreliable.
        name: for messages.
        retries: further attempts after an exception before the run is stopped.
        wait: seconds before the first further attempt, doubled each time.

    Attributes:
        calls: completions judged so far.

    Example:
        >>> judge = Judge(lambda prompts, completions, **columns: [float(len(c)) for c in completions])
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0]), steps={"prompt": ["a"], "completion": ["bc"]})
        >>> judge(None, rollouts).tolist(), judge.calls
        ([[2.0]], 1)
    """

    def __init__(self, function: ScoreFunction, name: str = "judge", retries: int = 3, wait: float = 0.5) -> None:
        self.function = function
        self.name = name
        self.retries = retries
        self.wait = wait
        self.calls = 0

    def __call__(self, leader: Leader | None, rollouts: Rollouts) -> Tensor:
        """Scores [B, 1], float64.

        Raises:
            RunStopped: the judge raised on every attempt.
            InputError: it returned something other than B finite numbers.
        """
        arguments = score_arguments(rollouts)
        for attempt in range(self.retries + 1):
            try:
                scores = call_score_function(self.function, arguments)
                break
            except Exception as error:  # whatever somebody's judge raises, the run must survive it
                if attempt == self.retries:
                    raise RunStopped(
                        f"{self.name}: raised {type(error).__name__} on all {self.retries + 1} attempts ({error}); "
                        "the run is saved up to its last leader step: repair the judge and resume"
                    ) from error
                time.sleep(self.wait * 2**attempt)
        self.calls += rollouts.size
        return check_scores(self.name, scores, rollouts.size)[:, None]  # [B] -> [B, 1]
