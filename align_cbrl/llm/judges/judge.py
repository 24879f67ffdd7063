"""`Judge`: scores that express what the leader wants, computed once per distinct completion and within a budget."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from align_cbrl.checks import Count, NonNegative, Whole, checked
from align_cbrl.errors import InputError, RunStopped
from align_cbrl.identity import identity_of, require_identity
from align_cbrl.llm.judges.cache import JudgeCache
from align_cbrl.llm.scoring import (
    arguments_taken,
    call_patiently,
    check_scores,
    is_number,
    listed,
    score_arguments,
)
from align_cbrl.plain import plain
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

judge_identity = identity_of
"""The name under which a judge's scores are cached, which changes when the judge does; None if there is none."""

_unnamed = itertools.count()


@runtime_checkable
class _PaidByRequest(Protocol):
    """What a function has that pays for every request, such as a `ChatJudge`."""

    concurrency: int

    def charge_to(self, cache: JudgeCache, account: str) -> None: ...


@checked
class Asked:
    """A scoring function whose calls are expensive: called once per distinct row, in batches, and within a budget."""

    unit = "completions"
    bounds = (-math.inf, math.inf)

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "judge",
        retries: Whole = 3,
        wait: NonNegative = 0.5,
        *,
        cache: JudgeCache | None = None,
        identity: str | None = None,
        budget: Count | None = None,
        batch_size: Count | None = None,
        concurrency: Count | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.retries = retries
        self.wait = wait
        self.cache = JudgeCache() if cache is None else cache
        if identity is None and self.cache.path is not None:
            identity = require_identity(f"{name}, whose scores go to {self.cache.path},", function)
        self.identity = identity_of(function) if identity is None else identity
        # What cannot be told from another judge shares scores with nobody, not even in memory.
        self._cached_as = f"{name}, number {next(_unnamed)}" if self.identity is None else self.identity
        self.budget = budget
        paid: Any = function if isinstance(function, _PaidByRequest) else None
        if paid is not None and batch_size not in (None, 1):
            raise InputError(
                f"{name}: batch_size: expected 1 or none of a judge that is paid by the request, got {batch_size}; "
                "concurrency says how many are made at a time"
            )
        self.batch_size = batch_size if paid is None else 1
        self.concurrency = concurrency or (1 if paid is None else paid.concurrency)
        if paid is not None:
            paid.charge_to(self.cache, self._cached_as)
        self._storing = threading.Lock()
        self.columns = getattr(function, "columns", None) if columns is None else columns
        self.calls = 0
        self.cached = 0

    @property
    def spent(self) -> int:
        """Number of rows that were scored, hence paid for, in all runs that share the cache."""
        return self.cache.spent(self._cached_as)

    def scores(self, arguments: Mapping[str, Sequence[Any]]) -> Tensor:
        """One score per row of `arguments`, float64 [N]: from the cache if it is there, from the function otherwise.

        Args:
            arguments: by name, N values each.

        Raises:
            RunStopped: scoring the rows that are not cached would exceed the budget, or the function raised on every
                attempt.
            InputError: the function did not return one finite number per row, or a row holds values from which no key
                can be made.
        """
        always = {"prompts", "completions", "completions_a", "completions_b"}
        taken = arguments_taken(self.function, arguments)
        if self.columns is not None:
            if missing := sorted(set(self.columns) - set(arguments)):
                raise InputError(f"{self.name}: the data have no columns {missing}; there are {sorted(arguments)}")
            taken = {name: value for name, value in taken.items() if name in always or name in self.columns}
        count = len(next(iter(arguments.values())))
        keys = [self._key({name: value[i] for name, value in taken.items()}) for i in range(count)]
        known = self.cache.get(list(dict.fromkeys(keys)))
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, i)
        if self.budget is not None and first and (spent := self.spent) + len(first) > self.budget:
            raise RunStopped(
                f"{self.name}: {spent} of the budget of {self.budget} {self.unit} are spent, and {len(first)} more are "
                "needed now; the run is saved up to its last leader step; resume with a larger budget"
            )
        known |= self._ask(first, taken)
        self.cached += count - len(first)
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    def _ask(self, rows: Mapping[str, int], taken: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """The scores of rows by their keys, asked in batches; those of a batch are stored as soon as they are there."""
        unknown = list(rows.items())
        size = self.batch_size or max(1, math.ceil(len(unknown) / self.concurrency))
        batches = [unknown[start : start + size] for start in range(0, len(unknown), size)]

        stop = threading.Event()

        @torch.no_grad()  # a thread of its own has gradients
        def asked(batch: Sequence[tuple[str, int]]) -> dict[str, float]:
            if stop.is_set():
                return {}
            try:
                returned = self._call({name: [value[i] for _, i in batch] for name, value in taken.items()})
                with self._storing:
                    return self._keep([key for key, _ in batch], returned)
            except BaseException:
                stop.set()
                raise

        found: dict[str, float] = {}
        if self.concurrency == 1:
            for batch in batches:
                found |= asked(batch)
            return found
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.name) as threads:
            asking = [threads.submit(asked, batch) for batch in batches]
            try:
                for answered in as_completed(asking):
                    found |= answered.result()
            except BaseException:  # what is under way is paid for: it is waited for and stored, and nothing more asked
                stop.set()
                raise
        return found

    def _key(self, row: Mapping[str, Any]) -> str:
        try:
            text = json.dumps([self._cached_as, row], sort_keys=True, default=lambda value: plain(value, _unknown))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.name}: cannot tell its rows apart ({error}); name the columns that the judge needs, as "
                "arguments of the function instead of **columns, or by columns=[...]"
            ) from error
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns, after at most 1 + `retries` attempts."""
        return call_patiently(self.name, self.function, arguments, self.retries, self.wait)

    def _keep(self, keys: Sequence[str], returned: Any) -> dict[str, float]:
        """Cache and check what the function returned; valid scores are cached even where others are refused."""
        low, high = self.bounds
        scores = [] if returned is None else listed(self.name, returned)
        if len(scores) == len(keys):
            pairs = zip(keys, scores, strict=True)
            valid = {key: float(score) for key, score in pairs if is_number(score) and low <= score <= high}
            self.cache.add(self._cached_as, valid)
            self.calls += len(valid)
        checked = check_scores(self.name, returned, len(keys), self.unit[:-1]).tolist()
        for i, score in enumerate(checked):
            if not low <= score <= high:
                raise InputError(f"{self.name}: expected numbers in [{low:g}, {high:g}], got {score:g} for pair {i}")
        return dict(zip(keys, checked, strict=True))


class Judge(Asked):
    """A judge's score of each completion, as the leader's utility: a function for `ExpectedUtility`.

    The judge is assumed to be deterministic. A completion that occurs twice in a batch is scored once, and one that is
    in the cache is not scored again.

    Args:
        function: a scoring function in trl's signature; it may be slow, remote and unreliable.
        name: of the judge, for messages.
        retries: how often a call that raised an exception is repeated before the run is stopped.
        wait: seconds before the first retry, doubled for each further one up to a minute and varied at random by up to
            a half. If the exception has an attribute `retry_after`, in seconds, the wait is at least that long.
        cache: where scores are stored and counted; by default in memory. A cache with a path outlives the process and
            may be shared.
        identity: the name of the judge in the cache; by default `identity_of(function)`, a digest of its content.
        budget: largest number of completions that may be paid for, in all runs that share the cache. Processes that
            judge at the same time may each exceed it by one batch.
        batch_size: completions per call; the scores of a batch are stored before the next call. None: all in one call,
            or in `concurrency` ones. A `ChatJudge` is asked about one at a time.
        concurrency: calls at a time, in threads, so that the function must be one that several threads may call; for
            functions that wait, for a server, say. Scores keep the order of the completions, and those of a batch are
            stored as soon as they are there. None: 1, or what a `ChatJudge` says.
        columns: columns of the data that are passed on besides prompts and completions; None: all that the function
            takes.

    Attributes:
        calls: number of completions that this object has scored, hence paid for.
        cached: number of completions that were answered without a call.
        identity: what the scores are stored under; None where the function's content cannot be read.

    Raises:
        InputError: a budget or batch size below 1, negative retries or wait, or a cache on disk for a function without
            an identity.

    Example:
        >>> judge = Judge(lambda prompts, completions, **columns: [float(len(c)) for c in completions])
        >>> steps = {"prompt": ["a", "a"], "completion": ["bc", "bc"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
        >>> judge(None, rollouts).tolist(), judge.calls, judge.cached
        ([[2.0], [2.0]], 1, 1)
    """

    def __call__(self, leader: Leader | None, rollouts: Rollouts) -> Tensor:
        """Scores [B, 1], float64; raises what `scores` raises."""
        return self.scores(score_arguments(rollouts))[:, None]  # [B] -> [B, 1]


def _unknown(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} has no plain form")
