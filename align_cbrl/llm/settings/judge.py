"""Who judges the completions: a function, a reward model, a server, or a language model behind an endpoint."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.llm import ChatJudge, Judge, JudgeCache, PairwiseJudge, RemoteJudge, RewardModel, SetJudge
from align_cbrl.llm.judges.template import PAIR, SET, SINGLE
from align_cbrl.llm.judges.usage import Prices
from align_cbrl.runs.config import to_dict
from align_cbrl.runs.facts import PRACTICAL_OF_JUDGE
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.inputs import Name, Proxy
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
        if path is None and (self.budget is not None or not isinstance(self, FunctionSettings)):
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
        batch_size: completions of one call; null for all at once, or in as many calls as concurrency says.
        concurrency: calls at a time, in threads; for a function that waits for a server, say.
        retries: further attempts after a failure.
        wait: seconds before the first of them, doubled each time.
    """

    function: Name
    pairwise: bool = False
    both_orders: bool = True
    sets: bool = False
    columns: list[str] | None = None
    concurrency: Count = 1

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
        return _judge(self, {**self._options(out), "columns": self.columns, "concurrency": self.concurrency})


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelJudgeSettings(_Judge):
    """A reward model that nobody trains on.

    Attributes:
        reward_model: folder or hub id of a sequence classifier with one label.
        budget, cache, batch_size, retries, wait: as for a function; scores are always kept on disk.
    """

    reward_model: Proxy

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
        concurrency: requests at a time.
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
    concurrency: Count = 1

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
        return _judge(self, {**self._options(out), "concurrency": self.concurrency})


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings(_Judge):
    """A language model behind an endpoint that speaks OpenAI's chat completions; see `ChatJudge`.

    Attributes:
        chat: URL of the API, such as https://api.openai.com/v1.
        model: its name there.
        template: file with the question, in which {prompt} and {completion} stand for what is judged; with pairwise
            {prompt}, {completion_a} and {completion_b}; with sets {prompt} and {completions}.
        scale: lowest and highest number that the template asks for; scores are mapped from it to [0, 1].
        verdicts: words that it asks for instead, and their scores.
        pattern: a regular expression whose first group is the number or verdict; null for a line of its own.
        temperature: at which the model answers; null: not sent.
        extra_body: further parameters of the request, such as max_completion_tokens.
        token_variable: environment variable with the key; the key itself is stored nowhere.
        pairwise: it compares two completions.
        both_orders: a judge of pairs is asked about both orders.
        sets: it scores several completions of a prompt together.
        concurrency: requests at a time.
        rate: requests a second.
        timeout: seconds for one request.
        attempts: how often a question is asked before its replies count as unreadable.
        fallback: score of a completion whose replies are unreadable; null stops the run.
        prices: of a million tokens, for the cost.
        max_calls, max_tokens, max_cost: the most that may be spent, over all runs that share the cache.
        batch_size: one completion a request, always.
        budget, cache, retries, wait: as for a function; scores are always kept on disk.
    """

    chat: str
    model: str
    template: str
    scale: tuple[float, float] = (0.0, 1.0)
    verdicts: dict[str, float] | None = None
    pattern: str | None = None
    temperature: NonNegative | None = 0.0
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)
    token_variable: str | None = None
    pairwise: bool = False
    both_orders: bool = True
    sets: bool = False
    concurrency: Count = 8
    rate: Positive | None = None
    timeout: Positive = 60.0
    attempts: Count = 3
    fallback: float | None = None
    prices: Prices | None = None
    max_calls: Count | None = None
    max_tokens: Count | None = None
    max_cost: Positive | None = None
    batch_size: Count | None = 1
    retries: Whole = 8

    @property
    def _name(self) -> str:
        return self.model

    def _source(self) -> Callable[..., Any]:
        names = [field.name for field in dataclasses.fields(self)]
        shared = {name: getattr(self, name) for name in names if name in inspect.signature(ChatJudge).parameters}
        judge = ChatJudge(self.chat, **{**shared, "template": Path(self.template)})
        expected = PAIR if self.pairwise else SET if self.sets else SINGLE
        if judge.judged != expected:
            places = " and ".join(f"{{{name}}}" for name in expected)
            asks = " and ".join(f"{{{name}}}" for name in judge.judged)
            raise InputError(
                f"template {self.template}: expected {{prompt}} and {places} with pairwise "
                f"{str(self.pairwise).lower()} and sets {str(self.sets).lower()}, got {asks}"
            )
        return judge

    def build(self, out: Path) -> Judge | PairwiseJudge | SetJudge:
        """The judge; see `_Judge.build`."""
        return _judge(self, self._options(out))


def _judge(
    settings: FunctionSettings | RemoteSettings | ChatSettings, options: dict[str, Any]
) -> Judge | PairwiseJudge | SetJudge:
    if settings.pairwise and settings.sets:
        raise InputError("sets: expected either pairwise or sets, got both")
    if settings.pairwise:
        return PairwiseJudge(settings._source(), both_orders=settings.both_orders, **options)
    return (SetJudge if settings.sets else Judge)(settings._source(), **options)


JudgeSettings = FunctionSettings | RewardModelJudgeSettings | RemoteSettings | ChatSettings
"""Who judges the completions, by the key that names it."""


def judge_facts(settings: JudgeSettings) -> dict[str, Any]:
    """The settings that scores depend on, without secrets.

    Example:
        >>> judge_facts(RewardModelJudgeSettings(reward_model="a/model", budget=9))
        {'batch_size': None, 'reward_model': 'a/model'}
    """
    return {name: value for name, value in redacted(to_dict(settings)).items() if name not in PRACTICAL_OF_JUDGE}
