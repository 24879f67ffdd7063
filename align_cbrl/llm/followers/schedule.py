"""How the follower's training and the leader's steps alternate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.truncated import Levels, RandomlyTruncated


@checked
@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the leader steps, counted in the follower's optimizer steps.

    The default trains `warmup` steps once and then `interval` steps for every leader step, always from where the
    follower stands: the leader moves slowly, so a follower near the last best response is near the next.

    With `tolerance` every leader step waits for a full best response: the follower trains, in pieces of `interval`
    steps, until the gap estimated on its newest batch is at most `tolerance` nats, or for `limit` steps.

    With `levels` the hypergradient trains the follower itself, for 2^k steps at a level k that is drawn, and puts it
    back (RT-Q; Thoma et al. 2024). `around` makes that estimator. `interval` may then be 0: the follower moves during
    the warmup only, and every leader step starts at the same policy.

    Attributes:
        interval: optimizer steps before each leader step; with `tolerance`, between two looks at the gap.
        warmup: optimizer steps before the first of them.
        inside: the leader sees the completions that the follower has just trained on, from inside one training loop.
            Otherwise every leader step sees fresh completions of freshly drawn prompts.
        tolerance: in nats; None trains for `interval` steps whatever the gap.
        limit: the most optimizer steps that one best response may take; only with `tolerance`, which needs it.
        levels: K of RT-Q; None leaves the estimator as it is.

    Raises:
        InputError: a number out of range, or options that exclude each other.

    Example:
        >>> Schedule(interval=5, warmup=30).due(4, gap=lambda: 0.0)
        False
        >>> patient = Schedule(interval=5, tolerance=0.05, limit=100)
        >>> [patient.due(10, gap=lambda: 0.2), patient.due(10, gap=lambda: 0.04), patient.due(100, gap=lambda: 0.2)]
        [False, True, True]
    """

    interval: Whole = 5
    warmup: Whole = 0
    inside: bool = True
    tolerance: Positive | None = None
    limit: Count | None = None
    levels: Levels | None = None

    def __post_init__(self) -> None:
        least = 1 if self.levels is None else 0
        if self.interval < least:
            raise InputError(f"Schedule.interval: expected at least {least}, got {self.interval}")
        if (self.tolerance is None) != (self.limit is None):
            raise InputError(
                f"Schedule: tolerance={self.tolerance} and limit={self.limit} go together: train until the gap is "
                "below the one, for at most the other's steps"
            )
        if self.limit is not None and self.limit < max(1, self.interval):
            raise InputError(f"Schedule.limit: expected at least interval={self.interval} steps, got {self.limit}")
        if self.levels is not None and (self.inside or self.tolerance is not None):
            raise InputError(
                f"Schedule.levels: expected K >= 1 with inside=False and without tolerance, got levels={self.levels}, "
                f"inside={self.inside}, tolerance={self.tolerance}; RT-Q trains the follower itself, which it cannot "
                "do from inside the follower's own loop"
            )

    @property
    def most(self) -> int:
        """The most optimizer steps before a leader step, warmup apart."""
        return self.interval if self.limit is None else self.limit

    def due(self, taken: int, gap: Callable[[], float]) -> bool:
        """Whether the leader steps now.

        Args:
            taken: optimizer steps since the last leader step, warmup apart.
            gap: estimates the gap in nats; asked only where the answer depends on it.
        """
        if taken < self.interval:
            return False
        if self.tolerance is None or taken >= self.most:
            return True
        return taken % self.interval == 0 and gap() <= self.tolerance

    def around(self, estimator: Hypergradient, group_size: int, seed: int = 0) -> Hypergradient:
        """`estimator` under this schedule: itself, or with `levels` randomly truncated.

        Args:
            estimator: applied to fresh completions at each level.
            group_size: completions a prompt that it sees there, for every context of the rollouts it is given; those
                may then have one completion a prompt, `HPGDConfig(group_size=1)`.
            seed: of the levels and the training.
        """
        if self.levels is None:
            return estimator
        return RandomlyTruncated(estimator, self.levels, seed=seed, group_size=group_size)
