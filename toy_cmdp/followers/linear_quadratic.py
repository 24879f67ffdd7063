"""`LinearQuadraticFollower`: the Boltzmann response to quadratic costs, which is normal, and its closed-loop paths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Follower, Leader, check_discount, check_temperature, temperature_of
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.exact import default_horizon
from toy_cmdp.followers.riccati import curvature, gain, riccati
from toy_cmdp.followers.solve import by_context
from toy_cmdp.tables.arguments import law_tensor
from toy_cmdp.tables.linear_systems import Horizon, LinearSystems, block_diagonal, require_linear


@checked
@dataclasses.dataclass(frozen=True)
class NormalResponse:
    """u ~ N(-K s, S), the best response at a temperature.

    Attributes:
        cost_to_go: P [C, n, n]; the follower's soft value is -s'Ps and a constant.
        gain: K [C, m, n].
        covariance: S [C, m, m], (lambda / 2) (R + gamma B'PB)^-1.
    """

    cost_to_go: Tensor
    gain: Tensor
    covariance: Tensor

    @property
    def feedback(self) -> Tensor:
        """[I; -K], [C, d, n]: the mean pair of a state."""
        unit = torch.eye(self.gain.shape[-1], dtype=self.gain.dtype).expand(len(self.gain), -1, -1)
        return torch.cat([unit, -self.gain], 1)

    @property
    def spread(self) -> Tensor:
        """The covariance of the pair in a given state, [C, d, d]."""
        nothing = torch.zeros_like(self.cost_to_go)
        return block_diagonal(nothing, self.covariance)


@checked
class LinearQuadraticFollower(Follower):
    """Solves the Riccati equations of all contexts, and is sampled in closed loop.

    It maximises E sum_t gamma^t (-(s'Qs + u'Ru) + lambda H(u | s)) without end: entropy regularisation, so that the
    log-prior is zero and log-probabilities are those of densities.

    Args:
        context_probabilities: [C], nature's law.
        temperature: lambda > 0; a tensor [C] where it depends on the context. A leader that sets it replaces it.
        discount: gamma in [0, 1); likewise.
        horizon: steps that the leader counts. Paths go on for as long as gamma^t > 1e-3 after them, since later costs
            move earlier actions.

    Raises:
        InputError: a law, temperature, discount or horizon out of range.

    Example:
        >>> from toy_cmdp import lqr
        >>> problem = lqr()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0]), 2, torch.Generator().manual_seed(0))
        >>> tuple(rollouts.steps["state"].shape), rollouts.density
        ((2, 236, 3), True)
    """

    def __init__(
        self, context_probabilities: Tensor, temperature: float | Tensor, discount: float | Tensor, *, horizon: Horizon
    ) -> None:
        self.context_probabilities = law_tensor("context_probabilities", context_probabilities, ("C",))
        contexts = len(self.context_probabilities)
        check_temperature("temperature", temperature, contexts)
        check_discount("discount", discount, contexts)
        self.temperature = temperature
        self.discount = discount
        self.horizon = horizon
        self.length = horizon + default_horizon(float(torch.as_tensor(discount).max()))
        self._shown: tuple[LinearSystems, NormalResponse] | None = None

    @property
    def contexts(self) -> int:
        """C."""
        return len(self.context_probabilities)

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts by nature's law, long [count]."""
        return torch.multinomial(self.context_probabilities, count, replacement=True, generator=generator)

    def solve(self, leader: Leader) -> tuple[LinearSystems, NormalResponse]:
        """The leader's systems and the best response to them, both with their graph; the follower's state stays.

        Raises:
            InputError: systems of another number of contexts, or that `LinearSystems.check` or `riccati` refuse.
        """
        systems = require_linear(leader).systems()
        if systems.contexts != self.contexts:
            raise InputError(f"systems: expected {self.contexts} contexts, got {systems.contexts}")
        systems.check()
        p = riccati(systems, self.discount)
        temperature = by_context(temperature_of(leader, self), p)
        covariance = torch.linalg.inv(curvature(systems, p, self.discount)) * temperature / 2
        return systems, NormalResponse(p, gain(systems, p, self.discount), (covariance + covariance.mT) / 2)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Solve for the best response in all contexts. Metric: `gain`, the largest entry of K."""
        with torch.no_grad():
            self._shown = self.solve(leader)
        return {"gain": float(self._shown[1].gain.abs().max())}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Sample closed-loop paths of the present policy.

        `steps` hold "state" [B, T + 1, n], "action" [B, T, m], and the policy at every step: "action_mean" [B, T, m]
        and "action_root" [B, T, m, m], a root of its covariance. All steps are decision points of their own.

        Raises:
            InputError: contexts out of range, a group size below one, no response yet, or states that overflow.
        """
        if self._shown is None:
            raise InputError("rollout: the follower has no policy yet; call respond(leader, contexts) first")
        if group_size < 1:
            raise InputError(f"group_size: expected at least 1, got {group_size}")
        if contexts.numel() == 0 or not bool(((contexts >= 0) & (contexts < self.contexts)).all()):
            raise InputError(f"contexts: expected numbers in [0, {self.contexts}), got {contexts.tolist()}")
        systems, response = self._shown
        contexts = contexts.repeat_interleave(group_size)
        size, horizon = len(contexts), self.length
        root = torch.linalg.cholesky(response.covariance)[contexts]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def drawn(covariance: Tensor, *shape: int) -> Tensor:
            values, vectors = torch.linalg.eigh(covariance)
            halves = vectors * values.clamp(min=0).sqrt()[:, None]  # [C, n, n]
            return (halves[contexts] @ normal(*shape)).mT  # [B, K, n]

        start = drawn(systems.initial_covariance, size, systems.states, 1)[:, 0]
        white = normal(size, horizon, systems.actions)
        tremble = (root @ white.mT).mT  # [B, T, m]
        noise = drawn(systems.noise, size, systems.states, horizon)
        dynamics, control, feedback = (x[contexts].mT for x in (systems.dynamics, systems.control, response.gain))
        states, means = [systems.initial_mean[contexts] + start], list[Tensor]()
        for t in range(horizon):
            here = states[-1][:, None]
            means.append(-(here @ feedback)[:, 0])
            action = means[-1] + tremble[:, t]
            states.append((here @ dynamics + action[:, None] @ control)[:, 0] + noise[:, t])
        state, mean = torch.stack(states, 1), torch.stack(means, 1)
        if not bool(torch.isfinite(state).all()):
            raise InputError("rollout: states overflow in the closed loop; lower the discount or the horizon")
        log_size = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]  # [B, 1]
        log_policy = -(white**2).sum(-1) / 2 - log_size - systems.actions * math.log(2 * math.pi) / 2
        return Rollouts(
            contexts=contexts,
            mask=torch.ones(size, horizon, dtype=torch.bool),
            group=torch.arange(size * horizon).view(size, horizon),
            steps={
                "state": state,
                "action": mean + tremble,
                "action_mean": mean,
                "action_root": root[:, None].expand(-1, horizon, -1, -1),
            },
            log_policy=log_policy,
            log_prior=torch.zeros_like(log_policy),
            density=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every response is solved anew."""
        return {}


def require_normal(follower: Follower) -> LinearQuadraticFollower:
    """The follower, if it is one that solves linear systems.

    Raises:
        InputError: it is not.
    """
    if not isinstance(follower, LinearQuadraticFollower):
        raise InputError(f"follower: expected a LinearQuadraticFollower, got {type(follower).__name__}")
    return follower
