"""Who judges the completions, as values of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.llm import Judge, JudgeCache, PairwiseJudge, RemoteJudge, RewardModel
from align_cbrl.runs.imports import load_object

_SOURCES = ("function", "reward_model", "url")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """A judge: exactly one of a function, a reward model and a URL, and what it may cost.

    Attributes:
        function: `package.module.function` or `file.py:function`, in trl's signature of a reward function.
        reward_model: folder or hub id of a sequence classifier with one label.
        url: of a server that scores; see `RemoteJudge`.
        pairwise: the function or server compares two completions, `completions_a` and `completions_b`.
        both_orders: a judge of pairs is asked about both orders.
        columns: of the data, passed on; null for all that a function takes, and for none to a server.
        budget: the most completions (comparisons) that may be paid for, over all runs that share the cache.
        cache: file of the scores; relative to the run's folder. null keeps the scores of a function or reward model in
            memory, and those of a server or of a judge with a budget in judge_cache.sqlite.
        batch_size: completions of one call; null for all at once, and 16 for a server.
        retries: further attempts after a failure.
        wait: seconds before the first of them, doubled each time.
        rate: requests a second to a server.
        timeout: seconds that a server may be silent.
        token_variable: environment variable that holds the server's bearer token; the token itself is stored nowhere.
        version: of the judge behind the URL; change it when the judge changes, so that old scores are not used.

    Raises:
        InputError: none or several of the three sources, a reward model that should compare pairs, or settings of a
            server for something else.

    Example:
        >>> settings = JudgeSettings(function="tests.length:score", rate=2.0)
        Traceback (most recent call last):
        ...
        align_cbrl.errors.InputError: rate: only a judge with a url has one
    """

    function: str | None = None
    reward_model: str | None = None
    url: str | None = None
    pairwise: bool = False
    both_orders: bool = True
    columns: list[str] | None = None
    budget: int | None = None
    cache: str | None = None
    batch_size: int | None = None
    retries: int = 3
    wait: float = 0.5
    rate: float | None = None
    timeout: float | None = None
    token_variable: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"judge: expected one of {', '.join(_SOURCES)}, got {given or 'none'}")
        if self.pairwise and self.reward_model is not None:
            raise InputError("pairwise: a reward model scores completions one by one; leave it out")
        if self.url is None:
            for name in ("rate", "timeout", "token_variable", "version"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}: only a judge with a url has one")
        for name in ("budget", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected a positive number or null, got {value}")

    def build(self, out: Path) -> Judge | PairwiseJudge:
        """The judge.

        Args:
            out: the run's folder, in which the cache lies.

        Raises:
            InputError: what is named does not load, or the server's settings are refused.
        """
        path = self.cache
        if path is None and (self.url is not None or self.budget is not None):
            path = "judge_cache.sqlite"
        options: dict[str, Any] = {
            "name": f"judge {self.function or self.reward_model or self.url}",
            "retries": self.retries,
            "wait": self.wait,
            "cache": JudgeCache(None if path is None else out / Path(path).expanduser()),
            "budget": self.budget,
            "columns": self.columns if self.url is None else None,
            "batch_size": 16 if self.batch_size is None and self.url is not None else self.batch_size,
        }
        if self.pairwise:
            return PairwiseJudge(self._source(), both_orders=self.both_orders, **options)
        return Judge(self._source(), **options)

    def _source(self) -> Callable[..., Any]:
        if self.function is not None:
            function: Callable[..., Any] = load_object(self.function)
            if not callable(function):
                raise InputError(f"function: {self.function!r} is no function, got {function!r}")
            return function
        if self.reward_model is not None:
            return RewardModel(self.reward_model)
        assert self.url is not None  # __post_init__ saw to it
        return RemoteJudge(
            self.url,
            columns=self.columns or (),
            rate=self.rate,
            timeout=60.0 if self.timeout is None else self.timeout,
            token_variable=self.token_variable,
            version=self.version or "1",
        )
