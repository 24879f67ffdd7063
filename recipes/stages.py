"""The stages of one seed's work: which one is under way, of how many, and how long it will take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from align_cbrl import CheckpointError
from align_cbrl.runs.config import fingerprint
from align_cbrl.runs.progress import duration
from align_cbrl.runs.run_folder import read_kept, write_json

_FILE = "durations.json"


class Stages:
    """Says of every stage, at once and flushed, its number, of how many, its name, and how long it is expected to take.

    A stage that has been done before, with the same sizes and beside the same cache, takes as long as it did. Otherwise
    it is expected to take its follower steps at the pace of the stages before, or at one that is guessed from the
    model's size, which may be off by a factor of three.

    Args:
        label: in front of every line, such as "seed 0".
        steps: the stages in their order, and how many follower steps each takes.
        guess: seconds of a follower step, before there is a measurement.
        kept: where durations are kept; None keeps none.
        sizes: what durations depend on; plain data.
        fixed: seconds of stages that are not made of follower steps.

    Example:
        >>> stages = Stages("seed 0", {"plain": 100, "fresh": 100}, guess=0.5)
        >>> with stages.stage("plain"):
        ...     pass
        seed 0, stage 1 of 2, plain: perhaps 50 s
        >>> with stages.stage("fresh"):
        ...     pass
        seed 0, stage 2 of 2, fresh: about 1 s
    """

    def __init__(
        self,
        label: str,
        steps: Mapping[str, int],
        *,
        guess: float,
        kept: Path | None = None,
        sizes: Any = None,
        fixed: Mapping[str, float] | None = None,
    ) -> None:
        self._label, self._steps, self._fixed = label, dict(steps), dict(fixed or {})
        self._pace, self._measured = guess, False
        self._file = None if kept is None else kept / _FILE
        self._mark = fingerprint({"sizes": sizes})[:12]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage that begins now, and learn from it how long the next ones will take."""
        began = self.begin(name)
        yield
        self.end(name, time.perf_counter() - began)

    def begin(self, name: str) -> float:
        """Say that a stage begins; the time that it begins at."""
        known = self._known().get(self._key(name))
        steps, fixed = self._steps.get(name, 0), self._fixed.get(name, 0.0)
        if known is not None:
            told = f"about {duration(known)}, as the last time"
        elif name not in self._steps:
            told = "begun"
        else:
            sure = self._measured and not fixed
            told = f"{'about' if sure else 'perhaps'} {duration(steps * self._pace + fixed)}"
        self._say(name, told)
        return time.perf_counter()

    def end(self, name: str, seconds: float) -> None:
        """Say how long a stage took, where that is worth a line, and keep it."""
        if seconds >= 5:
            self._say(name, f"done in {duration(seconds)}")
        if (steps := self._steps.get(name, 0)) and not self._fixed.get(name):
            self._pace, self._measured = seconds / steps, True
        if self._file is not None:
            with contextlib.suppress(CheckpointError):  # another seed writes it too; no run ends for want of a guess
                write_json(self._file, {**self._known(), self._key(name): round(seconds, 3)})

    def skipped(self, name: str) -> None:
        """Say that a stage was found finished."""
        self._say(name, "finished before")

    def found(self, name: str, figures: Mapping[str, float]) -> None:
        """Say what a stage found: labelled figures."""
        self._say(name, ", ".join(f"{label} {value:.3f}" for label, value in figures.items()))

    def _say(self, name: str, told: str) -> None:
        number = f", stage {list(self._steps).index(name) + 1} of {len(self._steps)}" if name in self._steps else ""
        print(f"{self._label}{number}, {name}: {told}", flush=True)

    def _key(self, name: str) -> str:
        return f"{name} {self._mark}"

    def _known(self) -> dict[str, float]:
        return {} if self._file is None else read_kept(self._file) or {}


_making: list[Callable[[], None]] = []
"""Who wants to know that something is made which others will find in the cache; the last one is told."""


@contextlib.contextmanager
def announced(stages: Stages, name: str) -> Iterator[None]:
    """A stage that is one only if the cache does not hold what the block makes."""
    began: list[float] = []
    _making.append(lambda: began.append(stages.begin(name)))
    try:
        yield
    finally:
        _making.pop()
    if began:
        stages.end(name, time.perf_counter() - began[0])
    else:
        stages.skipped(name)


def announce(otherwise: str) -> None:
    """Say that something is made now: as the stage that it is, or, outside of any, in these words."""
    if _making:
        _making[-1]()
    else:
        print(otherwise, flush=True)


def guessed_step(parameters: float, layers: int, length: int, completions: int) -> float:
    """Seconds of an optimizer step of RLHF on one core, or on a GPU where there is one; right to a factor of three.

    Tokens are generated one after the other, which takes a layer's fixed time each, and all of them go through the
    policy forward and back and through the reference: about eight operations a parameter and token.

    Args:
        parameters: of the policy.
        layers: of the policy.
        length: tokens of a completion.
        completions: of a step.

    Example:
        >>> 0.05 < guessed_step(1e5, 2, 24, 64) < 0.5
        True
    """
    gpu = torch.cuda.is_available()
    overhead, speed = (5e-4, 5e13) if gpu else (1.5e-3, 4e10)
    return length * layers * overhead + 8 * parameters * completions * (length + 16) / speed


def guessed_fit(parameters: float, layers: int, rows: float, tokens: int = 40) -> float:
    """Seconds of training on this many rows in batches, likewise."""
    gpu = torch.cuda.is_available()
    overhead, speed = (5e-4, 5e13) if gpu else (1.5e-3, 4e10)
    return rows / 24 * layers * 10 * overhead + 6 * parameters * rows * tokens / speed
