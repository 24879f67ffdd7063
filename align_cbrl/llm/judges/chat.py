"""`ChatJudge`: a language model as judge, behind an endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align_cbrl.checks import Count, NonNegative, Positive, checked
from align_cbrl.errors import InputError, RunStopped
from align_cbrl.llm.conversations import answer_text, content_text, shown_text
from align_cbrl.llm.judges.cache import JudgeCache
from align_cbrl.llm.judges.endpoint import Endpoint, JudgeUnavailable
from align_cbrl.llm.judges.reply import ReplyReader
from align_cbrl.llm.judges.template import PAIR, SET, SINGLE, Template
from align_cbrl.llm.judges.usage import Prices, Usage
from align_cbrl.plain import plain
from align_cbrl.runs.secrets import redact, redacted

_PATH = "/chat/completions"
_OWN = ("model", "messages", "temperature", "stream", "n")  # of a request's body
_SHOWN = 200  # characters of a completion or a reply in a message


@checked
class ChatJudge:
    r"""A scoring function that asks a language model: one request for each completion, pair or set.

    It is the `function` of a `Judge`, `PairwiseJudge` or `SetJudge`, by the places in its template. They add the cache,
    retries, and the threads in which several requests are made at a time; every score is kept as soon as it is there.
    What is spent is kept beside the scores, so that the limits hold for all runs that share the cache.

    Args:
        url: of the API, such as https://api.openai.com/v1; http is allowed without a token, or to this machine.
        model: its name there.
        template: the question, a text or the `Path` of a file, with the places `{prompt}` and `{completion}`; for pairs
            `{prompt}`, `{completion_a}` and `{completion_b}`; for sets `{prompt}` and `{completions}`, which become
            numbered answers in alphabetical order. Columns of the data have places by their names. `{{name}}` stands
            for `{name}` itself.
        scale: lowest and highest number that is asked for; scores are mapped from it to [0, 1].
        verdicts: words that are asked for instead of a number, and their scores.
        pattern: a regular expression whose first group is the number or verdict. None: a line of its own
            (`ReplyReader`).
        temperature: at which the model answers; None: it is not sent, for models that take none.
        extra_body: further parameters of the request, such as max_completion_tokens, seed or response_format.
        token_variable: name of the environment variable that holds the key, which is sent as a bearer token. It is read
            anew for every request and not stored.
        rate: largest number of requests per second; None: no limit.
        timeout: seconds after which a request fails, from the connection to the last byte of the answer.
        concurrency: requests at a time, of a `Judge` that is given no other number.
        attempts: how often a question is asked before its replies count as unreadable.
        fallback: score of a completion whose replies are unreadable. None: the run is stopped.
        prices: of tokens, for `cost`.
        max_calls: largest number of answered requests.
        max_tokens: of tokens sent and received; requests that are under way when it is reached are finished.
        max_cost: in the currency of `prices`; as `max_tokens`.

    Attributes:
        identity: model, URL and a digest of everything that scores depend on: template, scale, parameters.
        usage: what was spent, in all runs that share the cache of the judge whose function this is.

    Raises:
        InputError: a URL, template, scale, pattern or parameter that cannot be used, or a `max_cost` without prices.

    Example:
        >>> template = "How kind is this answer to {prompt}, from 1 to 5? Only the number.\n\n{completion}"
        >>> judge = ChatJudge("http://localhost:8000/v1", "llama", template, scale=(1, 5), max_calls=1000)
        >>> judge.usage.calls, judge.batch_size, judge.concurrency
        (0, 1, 8)
    """

    batch_size = 1

    def __init__(
        self,
        url: str,
        model: str,
        template: str | Path,
        *,
        scale: tuple[float, float] = (0.0, 1.0),
        verdicts: Mapping[str, float] | None = None,
        pattern: str | None = None,
        temperature: NonNegative | None = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        token_variable: str | None = None,
        rate: Positive | None = None,
        timeout: Positive = 60.0,
        concurrency: Count = 8,
        attempts: Count = 3,
        fallback: float | None = None,
        prices: Prices | None = None,
        max_calls: Count | None = None,
        max_tokens: Count | None = None,
        max_cost: Positive | None = None,
    ) -> None:
        if not model.strip():
            raise InputError("ChatJudge.model: expected the name of a model on the server, got an empty text")
        if max_cost is not None and prices is None:
            raise InputError("ChatJudge.max_cost: needs prices, by which tokens are turned into a cost")
        if verdicts is not None and tuple(scale) != (0.0, 1.0):
            raise InputError("ChatJudge.scale: is of numbers, and verdicts were given; leave one of them out")
        self._endpoint = Endpoint("ChatJudge", _of_chat(url), rate=rate, timeout=timeout, token_variable=token_variable)
        self._template = Template(template)
        self._reader = ReplyReader(scale, verdicts, pattern)
        self._body = {"model": model, **({} if temperature is None else {"temperature": float(temperature)})}
        self._body |= _parameters(extra_body or {})
        self.url, self.model, self.rate, self.timeout, self.token_variable = url, model, rate, timeout, token_variable
        self.concurrency, self.attempts, self.fallback, self.prices = concurrency, attempts, fallback, prices
        self.max_calls, self.max_tokens, self.max_cost = max_calls, max_tokens, max_cost
        facts = plain([self._body, self._template.text, scale, verdicts, pattern, fallback])
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=float).encode()).hexdigest()[:32]
        self.identity = f"{redact(f'{model} at {self._endpoint.url}')} {digest}"
        # What is taken, so that a column which the data lack is missed before anything is trained.
        self._judged = _ARGUMENTS[self._template.judged]
        names = ["prompts", *self._judged, *self._template.columns]
        self.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
        self._cache, self._account = JudgeCache(), self.identity
        self._lock = threading.Lock()
        self._under_way = 0
        self._unread: dict[str, int] = {}  # replies without a score, by question, until there is one with
        self._told: set[str] = set()

    @property
    def judged(self) -> tuple[str, ...]:
        """The places of what the template asks about: `SINGLE`, `PAIR` or `SET`."""
        return self._template.judged

    @property
    def sorts_completions(self) -> bool:
        """Whether several completions are shown in an order of its own, whatever the order they come in."""
        return self.judged == SET

    @property
    def usage(self) -> Usage:
        """What was spent, in all runs that share the cache."""
        return self._cache.usage(self._account)

    @property
    def cost(self) -> float | None:
        """What that came to, in the currency of the prices; None without prices."""
        return None if self.prices is None else self.usage.cost(self.prices)

    def charge_to(self, cache: JudgeCache, account: str) -> None:
        """Write down what is spent under this name in this cache; a `Judge` says so of its own."""
        with self._lock:
            self._cache, self._account = cache, account

    def __call__(self, **arguments: Sequence[Any]) -> list[float]:
        """One score for each row, asked for one after another; see `Judge` for several at a time.

        Args:
            **arguments: prompts; completions, or completions_a and completions_b; and columns. Others are left out.

        Raises:
            JudgeUnavailable: no answer, after which another attempt may succeed.
            InputError: a request that the server refuses, a column that is missing, or an environment variable that is
                not set; the server reports no tokens, and there is a limit on them.
            RunStopped: a limit is reached, or there was no score in any of `attempts` replies.
        """
        names = list(self.__signature__.parameters)
        if missing := [name for name in names if name not in arguments]:
            raise InputError(f"{self._endpoint.name}: needs {missing}, got {sorted(arguments)}")
        columns = [arguments[name] for name in names]
        return [self._score(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    def _score(self, row: Mapping[str, Any]) -> float:
        question = self._question(row)
        while True:
            reply, score = self._ask(question)
            if score is not None:
                self._unread.pop(question, None)
                return score
            # Counted across calls: a failure in between makes `Judge` begin this one again.
            self._unread[question] = unread = self._unread.get(question, 0) + 1
            if unread >= self.attempts:
                self._unread.pop(question, None)
                return self._without_a_score(row, reply)

    def _without_a_score(self, row: Mapping[str, Any], reply: str) -> float:
        shown = " and ".join(self._brief(row[name]) for name in self._judged)
        what = (
            f"{self._endpoint.name}: no score in {self.attempts} replies about {shown}: expected "
            f"{self._reader.expected}, got {self._brief(reply)} ({self._template.name})"
        )
        if self.fallback is None:
            raise RunStopped(
                f"{what}; resume to ask again; or let the template ask for nothing but the score, give a pattern that "
                "finds it, or a fallback"
            )
        with self._lock:
            self._cache.charge(self._account, Usage(fallbacks=1))
        self._tell("fallback", f"{what}; its score is the fallback, {self.fallback:g}, as that of all further ones")
        return self.fallback

    def _brief(self, said: Any) -> str:
        """What was said, for a message: hidden first, since half a key would not be known as one."""
        return f"{self._endpoint.hidden(repr(said)):.{_SHOWN}}"

    def _question(self, row: Mapping[str, Any]) -> str:
        values = {name: _text(row[name]) for name in self._template.columns} | {"prompt": shown_text(row["prompts"])}
        if self.judged == SET:
            texts = sorted(answer_text(completion) for completion in row["completions"])
            values["completions"] = "\n\n".join(f"[{i}]\n{text}" for i, text in enumerate(texts, 1))
        else:
            answers = (answer_text(row[name]) for name in self._judged)
            values |= dict(zip(self.judged, answers, strict=True))
        return self._template.fill(values)

    def _ask(self, question: str) -> tuple[str, float | None]:
        """One request: the reply, and the score in it; whatever comes of it is written down."""
        self._endpoint.token()  # or an error, before anything is sent
        self._begin()
        spent = Usage(failed=1)
        try:
            answer = self._endpoint.post({**self._body, "messages": [{"role": "user", "content": question}]})
            tokens, reply = _tokens(answer), _reply(answer)
            if tokens is None and reply is not None:
                self._tell("tokens", f"{self._endpoint.name}: reports no tokens: they and their cost count as 0")
            spent += tokens or Usage()
            if reply is None:
                raise JudgeUnavailable(
                    f"{self._endpoint.name}: expected a chat completion with a message, got "
                    f"{self._endpoint.brief(answer)}"
                )
            score = self._reader.read(reply)
            if score is None and answer["choices"][0].get("finish_reason") == "length":
                self._tell("length", f"{self._endpoint.name}: a reply without a score ended at its limit of tokens")
            spent = (tokens or Usage()) + Usage(calls=1, unread=int(score is None))
            return reply, score
        finally:
            self._end(spent)

    def _begin(self) -> None:
        """Have a request counted as under way, unless a limit is reached."""
        with self._lock:
            limits = {"max_calls": self.max_calls, "max_tokens": self.max_tokens, "max_cost": self.max_cost}
            used = self.usage if any(limit is not None for limit in limits.values()) else Usage()
            if used.calls and not used.tokens and (self.max_tokens or self.max_cost):
                raise InputError(
                    f"{self._endpoint.name}: reports no tokens, so that max_tokens and max_cost cannot be kept; use "
                    "max_calls"
                )
            spent: dict[str, float] = {"max_calls": used.calls + self._under_way, "max_tokens": used.tokens}
            spent["max_cost"] = 0.0 if self.prices is None else used.cost(self.prices)
            for name, limit in limits.items():
                if limit is not None and spent[name] >= limit:
                    raise RunStopped(
                        f"{self._endpoint.name}: {name} is reached: {spent[name]:,.10g} of {limit:,.10g} are spent; "
                        f"every score so far is kept; resume with a larger {name}"
                    )
            self._under_way += 1

    def _end(self, spent: Usage) -> None:
        with self._lock:
            self._under_way -= 1
            self._cache.charge(self._account, spent)

    def _tell(self, kind: str, message: str) -> None:
        """A warning, one of each kind."""
        with self._lock:
            known = kind in self._told
            self._told.add(kind)
        if not known:
            warnings.warn(message, stacklevel=2)


_ARGUMENTS = {SINGLE: ("completions",), PAIR: ("completions_a", "completions_b"), SET: ("completions",)}
"""What a scoring function gets, by what it judges."""


def _of_chat(url: str) -> str:
    """The URL of chat completions below that of an API; a query stays where it is.

    Example:
        >>> _of_chat("https://api.example/v1/"), _of_chat("https://api.example/v1/chat/completions?version=2")
        ('https://api.example/v1/chat/completions', 'https://api.example/v1/chat/completions?version=2')
    """
    before, mark, query = url.partition("?")
    base = before.rstrip("/")
    return f"{base if base.endswith(_PATH) else base + _PATH}{mark}{query}"


def _parameters(extra_body: Mapping[str, Any]) -> dict[str, Any]:
    for name in extra_body:
        if name in _OWN:
            raise InputError(f"ChatJudge.extra_body: expected parameters other than {', '.join(_OWN)}, got {name!r}")
    try:
        made: dict[str, Any] = json.loads(json.dumps(dict(extra_body), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"ChatJudge.extra_body: expected plain data that JSON can hold ({error})") from error
    if redacted(made) != made:
        raise InputError(
            "ChatJudge.extra_body: holds a key or password; put it into an environment variable, which token_variable "
            "names"
        )
    return made


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def _reply(answer: Any) -> str | None:
    """What the model says, "" where it says nothing; None where this is no chat completion.

    Example:
        >>> _reply({"choices": [{"message": {"content": "7"}}]}), _reply({"error": "overloaded"})
        ('7', None)
    """
    try:
        return content_text(answer["choices"][0]["message"].get("content"))
    except (TypeError, KeyError, IndexError, AttributeError):
        return None


def _tokens(answer: Any) -> Usage | None:
    """The tokens that an answer reports, None where it reports none.

    Example:
        >>> _tokens({"usage": {"prompt_tokens": 9, "completion_tokens": 1}}).tokens, _tokens({"usage": None})
        (10, None)
    """
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    try:
        return Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])
    except (KeyError, InputError):
        return None
