"""Good leaders, not only stationary ones: many scattered starts, successive halving among them, and exchanges.

The leader's value has poor local optima, and an ascent ends in the one whose basin it starts in. Restarts find better
ones, and most of their cost can be saved: after a share of the steps the value already tells which ones to drop
(successive halving: Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016). What remains is an incentive of the
right size in the wrong place, which no gradient moves, since it would have to vanish first: an exchange moves it
(iterated local search: Lourenco, Martin and Stuetzle 2003).
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from align_cbrl.checks import Count, NonNegative, Range, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Problem, step_seed


class Climb(abc.ABC):
    """Leaders that climb side by side, each on its own, and are compared by their values from time to time."""

    @abc.abstractmethod
    def advance(self, steps: int) -> Tensor:
        """Take `steps` leader steps with each of the n leaders; returns what is known of their values, [n]."""

    @abc.abstractmethod
    def keep(self, chosen: Tensor) -> None:
        """Go on with these leaders only: long [m], places in the present order, ascending."""


@checked
@dataclasses.dataclass(frozen=True)
class Halving:
    """When to look at the values, and how many leaders go on.

    Attributes:
        steps: leader steps of the winner.
        cuts: (step, keep): after `step` leader steps the best `keep` go on. Both numbers are monotone: later cuts
            keep fewer.

    Raises:
        InputError: a number of steps or survivors that is not positive, cuts out of order or not before the end.

    Example:
        >>> Halving(steps=300, cuts=((25, 16), (50, 8), (100, 4), (150, 1))).cost(32)
        1950
    """

    steps: Count = 300
    cuts: tuple[tuple[int, int], ...] = ((25, 16), (50, 8), (100, 4), (150, 1))

    def __post_init__(self) -> None:
        at = [step for step, _ in self.cuts]
        left = [keep for _, keep in self.cuts]
        if any(keep < 1 for keep in left):
            raise InputError(f"Halving.cuts: expected at least one survivor of each cut, got {list(self.cuts)}")
        ordered = all(a < b for a, b in zip([0, *at], [*at, self.steps], strict=True))
        if not ordered or any(a <= b for a, b in itertools.pairwise(left)):
            raise InputError(
                f"Halving.cuts: expected (step, keep) with growing steps, from 1 to below {self.steps}, and falling "
                f"numbers of survivors, got {list(self.cuts)}"
            )

    def cost(self, starts: int) -> int:
        """Leader steps of all leaders together."""
        total, previous = 0, 0
        for step, keep in (*self.cuts, (self.steps, 1)):
            total += starts * (step - previous)
            previous, starts = step, min(starts, keep)
        return total


OnValues = Callable[[int, Tensor], None]
"""Called with the number of leader steps taken and the values [n] of those still climbing."""


@checked
def successive_halving(
    climb: Climb,
    starts: Annotated[int, Range(1, 2**24)],
    halving: Halving,
    *,
    every: Count = 10,
    on_values: OnValues | None = None,
) -> int:
    """Run the climb to its end and return the winner: its place among the `starts` leaders that began.

    Args:
        climb: `starts` leaders at their first step.
        starts: how many there are.
        halving: the cuts.
        every: leader steps between calls of `on_values`.
        on_values: is shown values on the way; they decide at the cuts and at the end only.

    Raises:
        InputError: values that are not one finite number a leader, or `starts` or `every` not positive.

    Example:
        >>> class Fixed(Climb):
        ...     values = torch.tensor([0.1, 0.7, 0.3])
        ...     def advance(self, steps):
        ...         return self.values
        ...     def keep(self, chosen):
        ...         self.values = self.values[chosen]
        >>> successive_halving(Fixed(), 3, Halving(steps=4, cuts=((2, 2),)))
        1
    """
    alive = torch.arange(starts)
    values = torch.zeros(starts)
    taken = 0
    for step, keep in (*halving.cuts, (halving.steps, 1)):
        while taken < step:
            block = min(every - taken % every, step - taken)
            values = climb.advance(block)
            taken += block
            if tuple(values.shape) != (len(alive),) or not bool(torch.isfinite(values).all()):
                raise InputError(
                    f"values: expected {len(alive)} finite numbers, one a leader, after {taken} leader steps, got "
                    f"{values.tolist()}"
                )
            if on_values is not None:
                on_values(taken, values)
        if keep < len(alive) and taken < halving.steps:
            chosen = best(values, keep)
            climb.keep(chosen)
            alive, values = alive[chosen], values[chosen]
    return int(alive[best(values, 1)])


def best(values: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest of `values` [n], ascending: long [keep]. Of equal ones the first stay.

    Example:
        >>> best(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [0, 2]
    """
    return torch.sort(values, descending=True, stable=True).indices[:keep].sort().values


def exchanges(weights: Tensor, heaviest: int) -> Tensor:
    """All vectors that differ from `weights` [n] in one exchange: [K, n], K < heaviest n.

    One of the `heaviest` largest entries changes places with another entry.

    Example:
        >>> exchanges(torch.tensor([3.0, 1.0, 2.0]), 1)
        tensor([[1., 3., 2.],
                [2., 1., 3.]])
    """
    largest = torch.sort(weights, descending=True, stable=True).indices[:heaviest].tolist()
    pairs = [(i, j) for k, i in enumerate(largest) for j in range(len(weights)) if j != i and j not in largest[:k]]
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    moved = weights.repeat(len(pairs), 1)
    place = torch.arange(len(pairs))
    moved[place, first], moved[place, second] = weights[second], weights[first]
    return moved


@checked
def exchange_ascent(
    problem: Problem,
    value: Callable[[], float],
    climb: Callable[[], float],
    *,
    heaviest: Count = 4,
    gain: NonNegative = 1e-4,
) -> int:
    """Leave local optima by exchanging two entries of the leader's parameter, as long as that helps.

    Every round looks at the values of all `exchanges`, goes to the best, and climbs from there, until the best is worth
    no more than the leader as it stands. It suits leaders whose entries mean the same thing in different places, such
    as the incentives of cells; nothing has to be known of the places.

    Args:
        problem: whose leader is moved; it has one parameter, a vector [n].
        value: of the leader as it stands.
        climb: ascends from where the leader stands, and returns the value that it ends with.
        heaviest: how many of the largest entries are moved; a round looks at fewer than `heaviest` n values.
        gain: an exchange has to raise the value by more.

    Returns:
        The number of exchanges that were made.

    Raises:
        InputError: a leader of several parameters, or of one that is no vector of at least two entries; a value that is
            not finite.

    Example:
        >>> from toy_cmdp import four_rooms, leader_value
        >>> from toy_cmdp.estimators.climbs import ExactClimb
        >>> problem = four_rooms(temperature=0.005, price=3.0, horizon=1)
        >>> scatter(problem, 5.0, seed=0, start=0)
        >>> before = leader_value(problem).item()
        >>> rounds = exchange_ascent(
        ...     problem,
        ...     lambda: leader_value(problem).item(),
        ...     lambda: ExactClimb([problem], steps=5, learning_rate=0.05).advance(5).item(),
        ...     heaviest=1,
        ... )
        >>> rounds > 0, leader_value(problem).item() > before
        (True, True)
    """
    shapes = [tuple(parameter.shape) for parameter in problem.parameters]
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 2:
        raise InputError(f"problem: expected a leader of one parameter, a vector of two entries or more, got {shapes}")
    (parameter,) = problem.parameters

    @torch.no_grad()
    def go_to(weights: Tensor) -> None:
        parameter.copy_(weights)

    @torch.no_grad()
    def value_at(weights: Tensor) -> float:
        go_to(weights)
        found = value()
        if not math.isfinite(found):
            raise InputError(f"value: expected a finite number, got {found} at {weights.tolist()}")
        return found

    made = 0
    while True:
        stands = parameter.detach().clone()
        reached = value_at(stands)
        candidates = exchanges(stands, heaviest)
        values = [value_at(candidate) for candidate in candidates]
        best_value = max(values)
        if best_value <= reached + gain:
            go_to(stands)
            return made
        exchanged = candidates[values.index(best_value)]
        go_to(exchanged)
        if climb() < best_value:  # it fell off a cliff: the exchange alone is kept
            go_to(exchanged)
        made += 1


def scatter(problem: Problem, scale: float, *, seed: int, start: int) -> None:
    """Put the leader at a random start: all parameters drawn afresh from N(0, scale^2).

    Small scales land all starts in one basin; large ones start with the incentives on few parameters, and reach
    others.

    Args:
        problem: whose leader is moved.
        scale: standard deviation, > 0.
        seed: of the search.
        start: number of the start; each has random numbers of its own.

    Raises:
        InputError: a scale that is not positive and finite.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> scatter(problem, 5.0, seed=0, start=3)
        >>> bool(problem.parameters[0].abs().max() > 1)
        True
    """
    if not 0 < scale < float("inf"):
        raise InputError(f"scatter: expected a positive, finite scale, got {scale}")
    generator = torch.Generator().manual_seed(step_seed(seed, start))
    with torch.no_grad():
        for parameter in problem.parameters:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * drawn)
