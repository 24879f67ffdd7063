"""Tabular leaders that climb side by side, for `align_cbrl.search.successive_halving`: exactly, or from samples."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.functional import discount_powers
from align_cbrl.hypergradient import Hypergradient
from align_cbrl.problem import Problem, step_seed
from align_cbrl.rollouts import Rollouts
from align_cbrl.search import Climb
from toy_cmdp.exact import context_values, leader_value
from toy_cmdp.parallel import parallel

_WINDOW = 10  # leader steps over which sampled returns are averaged: leaders move little in so few


class ParallelClimb(Climb):
    """Leaders as one parallel problem, stepped by Adam: each moves as it would alone.

    The learning rate is held for the first half of the steps and then falls linearly to zero.

    Args:
        problems: one a leader, fit for `parallel`.
        steps: leader steps of the whole climb.
        learning_rate: Adam's, at the start.

    Attributes:
        problems: of the leaders still climbing.
        step: leader steps taken.
    """

    def __init__(self, problems: Sequence[Problem], *, steps: int, learning_rate: float) -> None:
        self.problems = list(problems)
        self.step = 0
        self._steps, self._learning_rate = steps, learning_rate
        self._joint = parallel(self.problems)
        self._optimizer = torch.optim.Adam(self._joint.parameters, lr=learning_rate, maximize=True)

    def keep(self, chosen: Tensor) -> None:
        """See `Climb.keep`; the survivors' moments are kept."""
        self.problems = [self.problems[i] for i in chosen.tolist()]
        self._joint = parallel(self.problems)
        (group,) = self._optimizer.param_groups
        group["params"] = list(self._joint.parameters)
        dropped = set(self._optimizer.state) - set(group["params"])
        for parameter in dropped:
            del self._optimizer.state[parameter]

    def _ascend(self) -> None:
        """One leader step along the gradients of the leaders' own values."""
        self._optimizer.zero_grad(set_to_none=True)
        self._backward()
        for parameter in self._joint.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(len(self.problems))  # the joint value is a mean
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * min(1.0, 2 * (1 - self.step / self._steps))
        self._optimizer.step()
        self._joint.leader.project()
        self.step += 1

    @abc.abstractmethod
    def _backward(self) -> None:
        """Fill `.grad` with the gradient of the joint value."""

    def _leader_of(self) -> Tensor:
        """The leader that each context of the joint problem belongs to, long [C]."""
        counts = torch.tensor([p.follower.cmdp.contexts for p in self.problems])  # type: ignore[attr-defined]
        return torch.arange(len(counts)).repeat_interleave(counts)


class ExactClimb(ParallelClimb):
    """Follows the implicit hypergradient, and knows the exact values.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> climb = ExactClimb([random_cmdp(seed=0), random_cmdp(seed=1)], steps=20, learning_rate=0.1)
        >>> before = climb.advance(1)
        >>> bool((climb.advance(10) > before).all())
        True
    """

    def advance(self, steps: int) -> Tensor:
        """See `Climb.advance`: the exact values at the present parameters, [n]."""
        for _ in range(steps):
            self._ascend()
        share = self._joint.follower.cmdp.context_probabilities * len(self.problems)  # type: ignore[attr-defined]
        values = share * context_values(self._joint)  # [C]
        return values.new_zeros(len(self.problems)).index_add(0, self._leader_of(), values)

    def _backward(self) -> None:
        leader_value(self._joint).backward()


class SampledClimb(ParallelClimb):
    """Follows an estimate from the followers' paths, and compares leaders by the returns along these paths.

    No exact gradient and no exact value is looked at. All leaders together use `environment_steps` in a leader step,
    so that each has the more of them the fewer are left.

    Args:
        problems: as for `ParallelClimb`.
        steps: likewise.
        learning_rate: likewise.
        estimator: makes a hypergradient for the joint problem; called again after every cut.
        environment_steps: transitions sampled in a leader step, all leaders together.
        seed: of the paths.

    Attributes:
        used: transitions sampled in each leader step so far.

    Raises:
        InputError: fewer environment steps than leaders.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> from toy_cmdp.plug_in import PlugIn
        >>> problems = [random_cmdp(seed=0), random_cmdp(seed=1)]
        >>> climb = SampledClimb(
        ...     problems, steps=5, learning_rate=0.1, environment_steps=200, seed=0,
        ...     estimator=lambda joint: PlugIn(joint.follower.cmdp),
        ... )
        >>> tuple(climb.advance(2).shape), len(climb.used)
        ((2,), 2)
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        steps: int,
        learning_rate: float,
        estimator: Callable[[Problem], Hypergradient],
        environment_steps: int,
        seed: int,
    ) -> None:
        super().__init__(problems, steps=steps, learning_rate=learning_rate)
        if environment_steps < len(self.problems):
            raise InputError(
                f"environment_steps: expected at least one for each of the {len(self.problems)} leaders, got "
                f"{environment_steps}"
            )
        self.used: list[int] = []
        self._budget, self._seed = environment_steps, seed
        self._make, self._estimator = estimator, estimator(self._joint)
        self._length = float(self._joint.follower.horizon)  # type: ignore[attr-defined]  # of a path; corrected at once
        self._returns: deque[tuple[Tensor, Tensor]] = deque(maxlen=_WINDOW)

    def advance(self, steps: int) -> Tensor:
        """See `Climb.advance`: mean sampled returns of the last ten leader steps, [n]."""
        for _ in range(steps):
            self._ascend()
        totals = torch.stack([total for total, _ in self._returns]).sum(0)
        counts = torch.stack([count for _, count in self._returns]).sum(0)
        return totals / counts

    def keep(self, chosen: Tensor) -> None:
        """See `Climb.keep`."""
        super().keep(chosen)
        self._estimator = self._make(self._joint)
        kept = [(total[chosen], count[chosen]) for total, count in self._returns]
        self._returns.clear()
        self._returns.extend(kept)

    def _backward(self) -> None:
        generator = torch.Generator().manual_seed(step_seed(self._seed, self.step))
        leaders, follower = len(self.problems), self._joint.follower
        paths = max(1, int(self._budget / (leaders * self._length)))
        contexts = follower.sample_contexts(leaders * paths, generator)
        follower.respond(self._joint.leader, contexts)
        rollouts = follower.rollout(contexts, 1, generator)
        transitions = int(rollouts.mask.sum())
        self.used.append(transitions)
        self._length = transitions / rollouts.size
        self._returns.append(self._returns_of(rollouts))
        self._estimator.backward(self._joint, rollouts)

    def _returns_of(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Sum of the paths' discounted utilities and number of paths, by leader, [n] each."""
        with torch.no_grad():
            utility = self._joint.objective.utility(self._joint.leader, rollouts)  # [B, T]
        powers = discount_powers(self._joint.objective.discount, rollouts.horizon, utility)
        returns = torch.where(rollouts.mask, utility * powers, 0.0).sum(1)
        leader = self._leader_of()[rollouts.contexts]
        zero = returns.new_zeros(len(self.problems))
        return zero.index_add(0, leader, returns), zero.index_add(0, leader, torch.ones_like(returns))
