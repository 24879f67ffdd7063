"""A leader who acts in the follower's linear system by feedback, and a published world of that kind.

LQR-v4: Kudo et al., "Sample-Efficient Hypergradient Estimation for Decentralized Bi-Level Reinforcement Learning",
ICAPS 2026 (arXiv 2603.14867).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Positive, Range, Whole, checked
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Problem
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.tables.arguments import finite_tensor
from toy_cmdp.tables.linear_systems import BumpUtility, Horizon, LinearSystems, StructuredLeader, block_diagonal


@checked
@dataclasses.dataclass(frozen=True)
class FeedbackWorld:
    """x' = A x + B u + C a + noise, what nature gives; the leader's action a has l numbers.

    Attributes:
        dynamics, control, push: A [C, n, n], B [C, n, m] and C [C, n, l].
        noise: [C, n, n], covariance.
        state_cost, action_cost: Q [C, n, n] and R [C, m, m], the follower's.
        initial_mean, initial_covariance: of x_0, [C, n] and [C, n, n].
    """

    dynamics: Tensor
    control: Tensor
    push: Tensor
    noise: Tensor
    state_cost: Tensor
    action_cost: Tensor
    initial_mean: Tensor
    initial_covariance: Tensor


@checked
class FeedbackLeader(StructuredLeader):
    """Acts by a ~ N(G x, v I), which the follower sees before it acts: the state of the system is s = (x, a).

    Seeing a is seeing a - G x, what the follower cannot foresee. Only the law of the next a moves with G, and has
    noise, so that the score of the transition exists however small v is.

    Attributes:
        gain: the parameter G, [l, n], the same in all contexts.
        world: what nature gives.
        variance: v > 0.
    """

    def __init__(self, gain: Tensor, world: FeedbackWorld, variance: Positive) -> None:
        super().__init__()
        shape = (world.push.shape[-1], world.dynamics.shape[-1])
        self.gain = nn.Parameter(finite_tensor("gain", gain, shape))
        self.world, self.variance = world, variance

    def systems(self) -> LinearSystems:
        """Of s = (x, a)."""
        world = self.world
        contexts, actions = len(world.dynamics), self.gain.shape[0]
        unit = torch.eye(world.dynamics.shape[-1], dtype=self.gain.dtype)
        after = torch.cat([unit, self.gain]).expand(contexts, -1, -1)  # x to the mean of (x, a), [C, n + l, n]
        tremble = self.variance * torch.eye(actions, dtype=self.gain.dtype).expand(contexts, -1, -1)

        def with_action(covariance: Tensor) -> Tensor:
            return after @ covariance @ after.mT + block_diagonal(torch.zeros_like(covariance), tremble)

        return LinearSystems(
            dynamics=after @ torch.cat([world.dynamics, world.push], -1),
            control=after @ world.control,
            noise=with_action(world.noise),
            state_cost=block_diagonal(world.state_cost, torch.zeros_like(tremble)),
            action_cost=world.action_cost,
            initial_mean=(after @ world.initial_mean[..., None])[..., 0],
            initial_covariance=with_action(world.initial_covariance),
        )

    def nature(self) -> Tensor:
        """The entries of [A C B], [C, n (n + l + m)]."""
        return torch.cat([self.world.dynamics, self.world.push, self.world.control], -1).flatten(1)

    def own_states(self) -> int:
        """Its action."""
        return self.gain.shape[0]

    def supposing(
        self, numbers: Tensor, noise: Tensor, initial_mean: Tensor, initial_covariance: Tensor
    ) -> FeedbackLeader:
        """See `StructuredLeader.supposing`; of the noise and the first state only the parts of x count."""
        actions, size = self.gain.shape
        dynamics, push, control = numbers.view(len(numbers), size, -1).tensor_split([size, size + actions], -1)
        world = dataclasses.replace(
            self.world,
            dynamics=dynamics,
            push=push,
            control=control,
            noise=noise[:, :size, :size],
            initial_mean=initial_mean[:, :size],
            initial_covariance=initial_covariance[:, :size, :size],
        )
        other = FeedbackLeader(self.gain.detach(), world, self.variance)
        other.gain = self.gain  # the same parameter
        return other


@checked
def lqr(
    *,
    gain: Any = None,
    horizon: Horizon = 100,
    temperature: Positive = 0.1,
    discount: Annotated[float, Range(0, 1, open="low high")] = 0.95,
    leader_discount: Annotated[float, Range(0, 1)] = 1.0,
    action_variance: Positive = 1e-6,
    seed: Whole = 0,
) -> Problem:
    """LQR-v4: a follower who regulates to zero, and a leader who wants the first coordinate at -0.8.

    x' = A x + B u + C a without noise, A = [[0, 1], [0, 0]], B = (0, 0.1), C = (0.1, 0), x_0 = (1, 0). The follower
    pays |x|^2 + u^2; the leader acts by a ~ N(G x, 1e-6) and earns exp(-sum_i (x_i - c_i)^2 / (2 sigma_i^2)) at every
    step, c = (-0.8, 0), sigma = (0.2, 0.01).

    Args:
        gain: G [1, 2], N(0, 1) by default.
        horizon: steps that the leader counts.
        temperature: lambda.
        discount: gamma.
        leader_discount: gammaF; 1 for the undiscounted sum.
        action_variance: v.
        seed: of the gain.

    Raises:
        InputError: a gain of another shape, numbers out of range.

    Example:
        >>> from toy_cmdp import leader_value
        >>> round(leader_value(lqr(gain=[[0.0, 0.0]])).item(), 4)
        0.0149
    """
    drawn = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = drawn if gain is None else finite_tensor("gain", gain, (1, 2))

    def tensor(*rows: Any) -> Tensor:
        return torch.tensor([rows], dtype=torch.float64)

    world = FeedbackWorld(
        dynamics=tensor([0, 1], [0, 0]),
        control=tensor([0], [0.1]),
        push=tensor([0.1], [0]),
        noise=tensor([0, 0], [0, 0]),
        state_cost=tensor([1, 0], [0, 1]),
        action_cost=tensor([1]),
        initial_mean=tensor(1, 0),
        initial_covariance=tensor([0, 0], [0, 0]),
    )
    utility = BumpUtility(
        [0, 1],
        torch.tensor([-0.8, 0.0]),
        torch.tensor([0.2, 0.01]),
        horizon=horizon,
        undiscounted=discount if leader_discount == 1 else None,
    )
    objective = ExpectedUtility(utility, discount=discount if leader_discount == 1 else leader_discount)
    nature = torch.ones(1, dtype=torch.float64)
    follower = LinearQuadraticFollower(nature, temperature, discount, horizon=horizon)
    return Problem(FeedbackLeader(start, world, action_variance), objective, follower)
