"""Who judges the completions: a function, a reward model, or a server."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import Judge, JudgeCache, PairwiseJudge, RemoteJudge, RewardModel, SetJudge
from align_cbrl.runs.config import to_dict
from align_cbrl.runs.facts import PRACTICAL_OF_JUDGE
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.secrets import redact, redacted


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Judge(abc.ABC):
    budget: Count | None = None
    cache: str | None = None
    batch_size: Count | None = None
    retries: Whole = 3
    wait: NonNegative = 0.5

    @property
    @abc.abstractmethod
    def _name(self) -> str: ...

    @abc.abstractmethod
    def _source(self) -> Callable[..., Any]: ...

    def build(self, out: Path) -> Judge | PairwiseJudge | SetJudge:
        """The judge.

        Args:
            out: the run's folder, in which the cache lies.

        Raises:
            InputError: what is named does not load, or the server's settings are refused.
        """
        return Judge(self._source(), **self._options(out))

    def _options(self, out: Path) -> dict[str, Any]:
        path = self.cache
        # A model's score depends on its batch by a rounding: a resumed run repeats what it does not ask again.
        if path is None and (self.budget is not None or isinstance(self, (RewardModelJudgeSettings, RemoteSettings))):
            path = "judge_cache.sqlite"
        return {
            "name": f"judge {self._name}",
            "retries": self.retries,
            "wait": self.wait,
            "cache": JudgeCache(None if path is None else out / Path(path).expanduser()),
            "budget": self.budget,
            "batch_size": self.batch_size,
        }


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionSettings(_Judge):
    """A function in trl's signature of a reward function.

    Attributes:
        function: `package.module.function` or `file.py:function`.
        pairwise: it compares two completions, `completions_a` and `completions_b`.
        both_orders: a judge of pairs is asked about both orders.
        sets: it scores several completions of a prompt together, a list of them in each item of `completions`.
        columns: of the data, passed on; null for all that the function takes.
        budget: the most completions (comparisons) that may be paid for, over all runs that share the cache.
        cache: file of the scores, relative to the run's folder; null keeps the scores in memory, and those of a judge
            with a budget in judge_cache.sqlite.
        batch_size: completions of one call; null for all at once.
        retries: further attempts after a failure.
        wait: seconds before the first of them, doubled each time.
    """

    function: str
    pairwise: bool = False
    both_orders: bool = True
    sets: bool = False
    columns: list[str] | None = None

    @property
    def _name(self) -> str:
        return self.function

    def _source(self) -> Callable[..., Any]:
        function: Callable[..., Any] = load_object(self.function)
        if not callable(function):
            raise InputError(f"function: {self.function!r} is no function, got {function!r}")
        return function

    def build(self, out: Path) -> Judge | PairwiseJudge | SetJudge:
        """The judge; see `_Judge.build`."""
        return _judge(self, {**self._options(out), "columns": self.columns})


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelJudgeSettings(_Judge):
    """A reward model that nobody trains on.

    Attributes:
        reward_model: folder or hub id of a sequence classifier with one label.
        budget, cache, batch_size, retries, wait: as for a function; scores are always kept on disk.
    """

    reward_model: str

    @property
    def _name(self) -> str:
        return self.reward_model

    def _source(self) -> Callable[..., Any]:
        return RewardModel(self.reward_model)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteSettings(_Judge):
    """A server that scores; see `RemoteJudge`.

    Attributes:
        url: of the server.
        pairwise: it compares two completions.
        both_orders: a judge of pairs is asked about both orders.
        sets: it scores several completions of a prompt together.
        columns: of the data, sent along.
        rate: requests a second.
        timeout: seconds that it may be silent.
        token_variable: environment variable with its bearer token; the token itself is stored nowhere.
        version: of the judge behind the URL; change it when the judge changes, so that old scores are not used.
        batch_size: completions of one request.
        budget, cache, retries, wait: as for a function; scores are always kept on disk.
    """

    url: str
    pairwise: bool = False
    both_orders: bool = True
    sets: bool = False
    columns: list[str] | None = None
    rate: Positive | None = None
    timeout: Positive = 60.0
    token_variable: str | None = None
    version: str = "1"
    batch_size: Count | None = 16

    @property
    def _name(self) -> str:
        return redact(self.url)

    def _source(self) -> Callable[..., Any]:
        return RemoteJudge(
            self.url,
            columns=self.columns or (),
            rate=self.rate,
            timeout=self.timeout,
            token_variable=self.token_variable,
            version=self.version,
        )

    def build(self, out: Path) -> Judge | PairwiseJudge | SetJudge:
        """The judge; see `_Judge.build`."""
        return _judge(self, self._options(out))


def _judge(settings: FunctionSettings | RemoteSettings, options: dict[str, Any]) -> Judge | PairwiseJudge | SetJudge:
    if settings.pairwise and settings.sets:
        raise InputError("sets: expected either pairwise or sets, got both")
    if settings.pairwise:
        return PairwiseJudge(settings._source(), both_orders=settings.both_orders, **options)
    return (SetJudge if settings.sets else Judge)(settings._source(), **options)


JudgeSettings = FunctionSettings | RewardModelJudgeSettings | RemoteSettings
"""Who judges the completions, by the key that names it."""


def judge_facts(settings: JudgeSettings) -> dict[str, Any]:
    """The settings that scores depend on, without secrets.

    Example:
        >>> judge_facts(RewardModelJudgeSettings(reward_model="a/model", budget=9))
        {'batch_size': None, 'reward_model': 'a/model'}
    """
    return {name: value for name, value in redacted(to_dict(settings)).items() if name not in PRACTICAL_OF_JUDGE}
