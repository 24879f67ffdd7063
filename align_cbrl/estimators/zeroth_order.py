"""`ZerothOrder`: the hypergradient from differences of the leader's value, two best responses a direction."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.random_numbers import generator_for
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts

_LARGEST_SEED = 2**62


@checked
class ZerothOrder(Hypergradient):
    """Perturb the leader along random directions, let the follower respond, and divide the change of J by the length.

    With v ~ N(0, I) in the leader's parameters and the radius h, averaged over directions,

        two-sided:  (J(x + h v) - J(x - h v)) / (2 h) v,      one-sided:  (J(x + h v) - J(x)) / h v.

    Both are unbiased for the gradient of the smoothed E_v J(x + h v), which is that of J up to O(h^2) (Nesterov and
    Spokoiny 2017). Their variance grows with the number n of parameters: for a small h and an exact J the mean-squared
    error of one direction is (n + 1) |dJ|^2. J is estimated from paths of the response in the contexts of the rollouts,
    with the same random numbers at all points (common random numbers) and the follower always starting from where it
    was found, unless `value` is given.

    The leader's parameters come out bit by bit as they went in, and so does the follower's `state_dict`; `respond` has
    to be called before its next `rollout`.

    Args:
        radius: h > 0, in the unit of the parameters.
        directions: how many are averaged; each takes two responses, or one and a common one where one-sided.
        two_sided: see above.
        value: computes J of a problem, such as `toy_cmdp.leader_value`, without asking the follower for paths.
        seed: of the directions and the paths, together with the leader's parameters and the rollouts.

    Raises:
        InputError: a radius that is not positive, no directions; a J that is not finite.

    Example:
        >>> import toy_cmdp
        >>> problem = toy_cmdp.random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = problem.follower.rollout(torch.arange(2), 4, torch.Generator().manual_seed(0))
        >>> ZerothOrder(0.1, directions=3).backward(problem, rollouts)["responses"]
        6.0
    """

    def __init__(
        self,
        radius: Positive,
        directions: Count = 1,
        *,
        two_sided: bool = True,
        value: Callable[[Problem], Tensor] | None = None,
        seed: Whole = 0,
    ) -> None:
        if not 0 < radius < float("inf"):
            raise InputError(f"radius: expected a positive length, got {radius}")
        self.radius = radius
        self.directions = directions
        self.two_sided = two_sided
        self.value = value
        self.seed = seed

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`.

        Metrics: `objective`, the mean of J over the perturbed points, or J itself where one-sided; `gradient_norm`;
        `responses`, how often the follower was asked to respond, or J to be computed.
        """
        generator = generator_for(problem, rollouts, self.seed)
        paths_seed = int(torch.randint(_LARGEST_SEED, (), generator=generator))
        parameters = problem.parameters
        centre = [p.detach().clone() for p in parameters]
        start = copy.deepcopy(problem.follower.state_dict())  # a network's is its weights themselves
        total = [torch.zeros_like(p) for p in centre]
        values: list[float] = []

        def value_at(direction: list[Tensor] | None, length: float) -> float:
            """J at centre + length * direction, the follower starting from where it was found."""
            moved = centre if direction is None else [c + length * d for c, d in zip(centre, direction, strict=True)]
            _place(problem, moved)
            if self.value is None:
                value = _sampled_value(problem, rollouts, start, paths_seed)
            else:
                with torch.no_grad():
                    value = self.value(problem)
            if not bool(torch.isfinite(value)):
                raise InputError(
                    f"ZerothOrder: J is {value.item()} at distance {length} from the leader's parameters; reduce the "
                    "radius"
                )
            return float(value)

        try:
            base = 0.0 if self.two_sided else value_at(None, 0.0)
            for _ in range(self.directions):
                direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in centre]
                ahead = value_at(direction, self.radius)
                if self.two_sided:
                    behind = value_at(direction, -self.radius)
                    slope = (ahead - behind) / (2 * self.radius)
                    values += [ahead, behind]
                else:
                    slope = (ahead - base) / self.radius
                for one, along in zip(total, direction, strict=True):
                    one += slope / self.directions * along
        finally:
            _place(problem, centre)
            problem.follower.load_state_dict(start)
        norm = accumulate(problem, total)
        return {
            "objective": sum(values) / len(values) if values else base,
            "gradient_norm": norm,
            "responses": float(len(values) or self.directions + 1),
        }


def _sampled_value(problem: Problem, rollouts: Rollouts, start: dict[str, Any], seed: int) -> Tensor:
    problem.follower.load_state_dict(start)
    problem.follower.respond(problem.leader, rollouts.contexts)
    paths = problem.follower.rollout(rollouts.contexts, 1, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # not around `respond`, which may be a training of its own
        return problem.objective.evaluate(problem.leader, paths).value


def _place(problem: Problem, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(problem.parameters, values, strict=True):
            parameter.copy_(value)
