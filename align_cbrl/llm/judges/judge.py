"""Judges: what a leader can be told to want, asked once about every distinct completion, within a budget."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError, RunStopped
from align_cbrl.llm.judges.cache import JudgeCache
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.scoring import (
    arguments_taken,
    check_scores,
    is_number,
    listed,
    score_arguments,
)
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

_LONGEST_WAIT = 600.0  # seconds that a judge may ask a run to wait before it is stopped instead


def judge_identity(function: Callable[..., Any]) -> str | None:
    """Who a cached score is from: it changes when the judge does. None when that cannot be told.

    A function's is its name and a digest of the file that it is in, a reward model's a digest of its weights; any other
    object may have an attribute `identity`.

    Example:
        >>> judge_identity(lambda prompts, completions: [0.0]) is None
        True
    """
    if isinstance(own := getattr(function, "identity", None), str):
        return own
    if isinstance(function, RewardModel):
        digest = hashlib.sha256()
        for name, value in function.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"reward model {digest.hexdigest()[:16]}"
    name = getattr(function, "__qualname__", "<")
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return None
    if "<" in name or file is None or not Path(file).is_file():
        return None
    return f"{function.__module__}.{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"


class Asked:
    """A function that costs something: asked once about every distinct row, in batches, within a budget."""

    unit = "completions"
    bounds = (-math.inf, math.inf)

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "judge",
        retries: int = 3,
        wait: float = 0.5,
        *,
        cache: JudgeCache | None = None,
        identity: str | None = None,
        budget: int | None = None,
        batch_size: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        for what, value in (("budget", budget), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name}: {what}: expected a positive number or None, got {value}")
        if retries < 0 or wait < 0:
            raise InputError(f"{name}: expected retries and wait of at least 0, got {retries} and {wait}")
        self.function = function
        self.name = name
        self.retries = retries
        self.wait = wait
        self.cache = JudgeCache() if cache is None else cache
        known = judge_identity(function) if identity is None else identity
        if known is None and self.cache.path is not None:
            raise InputError(
                f"{name}: cannot tell who the scores in {self.cache.path} will be from, since {function!r} is no "
                "function in a file; give identity='a name that changes when the judge does'"
            )
        self.identity = name if known is None else known
        self.budget = budget
        self.batch_size = batch_size
        self.columns = getattr(function, "columns", None) if columns is None else columns
        self.calls = 0
        self.cached = 0
        self._random = random.Random(0)  # of the waits alone: the run's own numbers are left as they are

    @property
    def spent(self) -> int:
        """What was paid for, in all runs that share the cache."""
        return self.cache.spent(self.identity)

    def scores(self, arguments: Mapping[str, Sequence[Any]]) -> Tensor:
        """One score a row of `arguments`, float64 [N]: from the cache where it is known, asked for where it is not.

        Args:
            arguments: by name, N values each.

        Raises:
            RunStopped: the budget does not reach for what is not known, or the function raised on every attempt.
            InputError: it returned something other than one finite number a row, or a row cannot be told from others.
        """
        always = {name for name in arguments if name.startswith(("prompts", "completions"))}
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
                "needed now; the run is saved up to its last leader step: resume with a larger budget"
            )
        unknown = list(first.items())
        size = len(unknown) if self.batch_size is None else self.batch_size
        for start in range(0, len(unknown), max(size, 1)):
            piece = unknown[start : start + size]
            said = self._ask({name: [value[i] for _, i in piece] for name, value in taken.items()})
            known.update(self._keep([key for key, _ in piece], said))
        self.cached += count - len(first)
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    def _key(self, row: Mapping[str, Any]) -> str:
        try:
            text = json.dumps([self.identity, row], sort_keys=True, default=_plain)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.name}: cannot tell its rows apart ({error}); name the columns that it needs, as arguments of "
                "the function instead of **columns, or by columns=[...]"
            ) from error
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _ask(self, arguments: Mapping[str, Any]) -> Any:
        """What the function says, after as many attempts as it takes."""
        for attempt in range(self.retries + 1):
            try:
                return self.function(**arguments)
            except (InputError, RunStopped):  # asking again would not help
                raise
            except Exception as error:  # whatever somebody's judge raises, the run must survive it
                after = float(getattr(error, "retry_after", None) or 0.0)
                if attempt == self.retries or after > _LONGEST_WAIT:
                    how = (
                        f"on all {attempt + 1} attempts" if after <= _LONGEST_WAIT else f"and asks to wait {after:g} s"
                    )
                    raise RunStopped(
                        f"{self.name}: raised {type(error).__name__} {how} ({error}); the run is saved up to its last "
                        "leader step: repair the judge and resume"
                    ) from error
                # Spread out, so that several runs do not come back at once.
                time.sleep(max(after, min(60.0, self.wait * 2**attempt * self._random.uniform(0.5, 1.5))))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _keep(self, keys: Sequence[str], said: Any) -> dict[str, float]:
        """Put what was said in the cache, sound scores also where others are not, and check it."""
        low, high = self.bounds
        given = [] if said is None else listed(self.name, said)
        if len(given) == len(keys):
            pairs = zip(keys, given, strict=True)
            sound = {key: float(score) for key, score in pairs if is_number(score) and low <= score <= high}
            self.cache.add(self.identity, sound)
            self.calls += len(sound)
        checked = check_scores(self.name, said, len(keys)).tolist()
        for i, score in enumerate(checked):
            if not low <= score <= high:
                raise InputError(f"{self.name}: expected numbers in [{low:g}, {high:g}], got {score:g} for pair {i}")
        return dict(zip(keys, checked, strict=True))


class Judge(Asked):
    """The utility of a completion is what a judge says of it; a function for `ExpectedUtility`.

    A judge is taken to say the same whenever it sees the same: a completion that occurs twice is judged once, and one
    that was judged before is not judged again.

    Args:
        function: a trl-style scoring function; it may be slow, remote and unreliable.
        name: for messages.
        retries: further attempts after an exception before the run is stopped.
        wait: seconds before the first further attempt, doubled each time up to a minute and spread by a half; an
            exception's `retry_after`, in seconds, is honoured.
        cache: where scores are kept and counted; in memory by default. One with a path lasts, and may be shared.
        identity: of whom the scores are, in the cache; by default `judge_identity`.
        budget: the most completions that may be paid for, in all runs that share the cache. Several processes that
            judge at once may each exceed it by one batch.
        batch_size: completions of one call; each batch is kept before the next one is asked for. None for all at once.
        columns: of the data, passed on besides prompts and completions; None for all that the function takes.

    Attributes:
        calls: completions judged, hence paid for, by this object.
        cached: completions that were answered without a call.

    Raises:
        InputError: numbers that are too small, or a cache on disk with a function that has no identity.

    Example:
        >>> judge = Judge(lambda prompts, completions, **columns: [float(len(c)) for c in completions])
        >>> steps = {"prompt": ["a", "a"], "completion": ["bc", "bc"]}
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
        >>> judge(None, rollouts).tolist(), judge.calls, judge.cached
        ([[2.0], [2.0]], 1, 1)
    """

    def __call__(self, leader: Leader | None, rollouts: Rollouts) -> Tensor:
        """Scores [B, 1], float64. Raises as `scores` does."""
        return self.scores(score_arguments(rollouts))[:, None]  # [B] -> [B, 1]


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    if hasattr(value, "isoformat"):  # dates
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} has no plain form")
