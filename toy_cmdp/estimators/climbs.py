"""Leaders that climb side by side, for `successive_halving`: exactly, or from samples."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.search import Climb
from align_cbrl.problem import Problem, step_seed
from toy_cmdp.estimators.plug_in import PlugIn
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.problems.parallel import parallel
from toy_cmdp.referee.exact import context_values, leader_value

_WINDOW = 3  # leader steps averaged: many would hide a leader that rises, one is unlucky at a cliff of the value


@checked
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

    def __init__(self, problems: Sequence[Problem], *, steps: Count, learning_rate: Positive) -> None:
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

    def _leaders_values(self, values: Tensor) -> Tensor:
        """Each leader's expectation [n] of what it gets in the contexts of the joint problem, `values` [C]."""
        counts = torch.tensor([len(_nature(p)) for p in self.problems])
        leader = torch.arange(len(counts)).repeat_interleave(counts)  # [C], which one a context belongs to
        share = _nature(self._joint) * len(counts)
        return values.new_zeros(len(counts)).index_add(0, leader, share * values)


def _nature(problem: Problem) -> Tensor:
    """Nature's law of the contexts, [C]."""
    follower = problem.follower
    if isinstance(follower, LinearQuadraticFollower):
        return follower.context_probabilities
    return require_exact(follower).cmdp.context_probabilities


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
        return self._leaders_values(context_values(self._joint))

    def _backward(self) -> None:
        leader_value(self._joint).backward()


@checked
class SampledClimb(ParallelClimb):
    """Follows `PlugIn`, and compares leaders by their values in the model that it fits.

    No exact gradient and no exact value is looked at. All leaders together use `environment_steps` in a leader step,
    so that each has the more of them the fewer are left. The model's values are far less noisy than the few paths'
    returns: all leaders' transitions make one model where they share P, with a memory those of earlier steps too, and
    its errors are then common to the leaders that are compared.

    Args:
        problems: as for `ParallelClimb`.
        steps: likewise.
        learning_rate: likewise.
        estimator: makes the estimator for the joint problem; called again after every cut.
        environment_steps: transitions sampled in a leader step, all leaders together.
        seed: of the paths.

    Attributes:
        used: transitions sampled in each leader step so far.

    Raises:
        InputError: fewer environment steps than leaders.

    Example:
        >>> from toy_cmdp import random_cmdp
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
        steps: Count,
        learning_rate: Positive,
        estimator: Callable[[Problem], PlugIn],
        environment_steps: Count,
        seed: Whole,
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
        self._length = float(require_exact(self._joint.follower).horizon)  # of a path; corrected at once
        self._values: deque[Tensor] = deque(maxlen=_WINDOW)  # [n] each, of the latest leader steps

    def advance(self, steps: int) -> Tensor:
        """See `Climb.advance`: values in the fitted models, means of the last three leader steps, [n]."""
        for _ in range(steps):
            self._ascend()
        return torch.stack(list(self._values)).mean(0)

    def keep(self, chosen: Tensor) -> None:
        """See `Climb.keep`."""
        super().keep(chosen)
        self._estimator = self._make(self._joint)
        self._values = deque([values[chosen] for values in self._values], maxlen=_WINDOW)

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
        _, values = self._estimator.backward_with_values(self._joint, rollouts)
        self._values.append(self._leaders_values(values))
