"""The discrete Riccati equation of a discounted regulator, batched, with an implicit derivative.

Doubling: Chu, Fan, Lin and Wang, "Structure-preserving algorithms for periodic discrete-time algebraic Riccati
equations", International Journal of Control 77 (2004).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from toy_cmdp.followers.solve import by_context
from toy_cmdp.tables.linear_systems import LinearSystems

_DOUBLINGS = 60
_CONVERGED = 1e-14
_RESIDUAL = 1e-8  # largest, as a share of P: what the doubling leaves of a system without a solution is of order one


def riccati(systems: LinearSystems, discount: float | Tensor) -> Tensor:
    """P of the follower's costs to go s'Ps, [C, n, n]; its backward pass solves one linear system (implicit theorem).

        P = Q + gamma A'PA - gamma^2 A'PB (R + gamma B'PB)^-1 B'PA

    solved by doubling, which converges quadratically: 8 to 12 iterations for a slow closed loop.

    Args:
        systems: with their graph.
        discount: gamma, a number or [C].

    Raises:
        InputError: a context without a stabilising solution: no feedback brings the discounted costs down to a finite
            sum.

    Example:
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> p = riccati(LinearSystems(one, one, one, one, one, one[0], one), 1.0)
        >>> round(p.item(), 6)  # the golden ratio
        1.618034
    """
    with torch.no_grad():
        plain = systems.detach()
        fixed = _doubled(plain, discount)
        closed = closed_loop(plain, gain(plain, fixed, discount), discount)
        _require_stable(plain, fixed, closed, discount)
    image = bellman(systems, fixed, discount)
    out: Tensor = _FixedPoint.apply(image, fixed, closed)
    return out


def bellman(systems: LinearSystems, p: Tensor, discount: float | Tensor) -> Tensor:
    """The right-hand side of the equation at P = p, [C, n, n]."""
    gamma = by_context(discount, p)
    a, b = systems.dynamics, systems.control
    forward = gamma * (b.mT @ p @ a)
    image = (
        systems.state_cost
        + gamma * (a.mT @ p @ a)
        - forward.mT @ torch.linalg.solve(curvature(systems, p, discount), forward)
    )
    return (image + image.mT) / 2


def curvature(systems: LinearSystems, p: Tensor, discount: float | Tensor) -> Tensor:
    """R + gamma B'PB, [C, m, m]: by half of the temperature, the inverse of the response's covariance."""
    gamma = by_context(discount, p)
    found = systems.action_cost + gamma * (systems.control.mT @ p @ systems.control)
    return (found + found.mT) / 2


def gain(systems: LinearSystems, p: Tensor, discount: float | Tensor) -> Tensor:
    """K [C, m, n] of the mean response u = -K s."""
    gamma = by_context(discount, p)
    return torch.linalg.solve(curvature(systems, p, discount), gamma * (systems.control.mT @ p @ systems.dynamics))


def closed_loop(systems: LinearSystems, gain: Tensor, discount: float | Tensor) -> Tensor:
    """sqrt(gamma) (A - B K), [C, n, n]: discounted second moments die out if its spectral radius is below one."""
    root = by_context(torch.as_tensor(discount, dtype=gain.dtype).sqrt(), gain)
    return root * (systems.dynamics - systems.control @ gain)


def lyapunov(loop: Tensor, source: Tensor) -> Tensor:
    """X = M X M' + G for M [C, n, n] of spectral radius below one and G [C, n, n], by doubling.

    Example:
        >>> lyapunov(torch.full((1, 1, 1), 0.5), torch.ones(1, 1, 1)).item()  # 1 / (1 - 1/4)
        1.3333333...
    """
    total = source
    for _ in range(_DOUBLINGS):
        total = total + loop @ total @ loop.mT
        loop = loop @ loop
        if float(loop.abs().max()) < 1e-20:
            break
    return total


def _doubled(systems: LinearSystems, discount: float | Tensor) -> Tensor:
    """The least solution, or whatever the iteration has come to when there is none."""
    root = by_context(torch.as_tensor(discount, dtype=torch.float64).sqrt(), systems.control)
    a, b = root * systems.dynamics, root * systems.control
    g = b @ torch.linalg.solve(systems.action_cost, b.mT)
    h = systems.state_cost
    unit = torch.eye(systems.states, dtype=h.dtype)
    for _ in range(_DOUBLINGS):
        inner = torch.linalg.solve(unit + g @ h, torch.cat([a, g], -1))
        along, across = inner.tensor_split([systems.states], -1)
        more = a.mT @ h @ along
        a, g, h = a @ along, g + a @ across @ a.mT, h + more
        g, h = (g + g.mT) / 2, (h + h.mT) / 2
        if not bool(torch.isfinite(h).all()):
            break
        if bool((more.abs().amax((-1, -2)) <= _CONVERGED * h.abs().amax((-1, -2))).all()):
            break
    for _ in range(2):  # rounding of the doubling away
        h = bellman(systems, h, discount) if bool(torch.isfinite(h).all()) else h
    return h


def _require_stable(systems: LinearSystems, p: Tensor, closed: Tensor, discount: float | Tensor) -> None:
    finite = torch.isfinite(p).all(-1).all(-1) & torch.isfinite(closed).all(-1).all(-1)  # [C]
    safe = torch.where(finite[:, None, None], closed, 0.0)
    radius = torch.linalg.eigvals(safe).abs().amax(-1)
    left = (bellman(systems, torch.where(finite[:, None, None], p, 0.0), discount) - p).abs().amax((-1, -2))
    solved = finite & (left <= _RESIDUAL * p.abs().amax((-1, -2))) & (radius < 1)
    if bool(solved.all()):
        return
    context = int((~solved).nonzero()[0])
    gamma = float(torch.as_tensor(discount).expand(systems.contexts)[context])
    own = float(torch.linalg.eigvals(systems.dynamics[context]).abs().max())
    raise InputError(
        f"systems: no stabilising solution of the Riccati equation in context {context}: with the discount {gamma:g} "
        f"the largest eigenvalue of sqrt(gamma) A is {gamma**0.5 * own:.4g}"
        + (f" and that of the closed loop {float(radius[context]):.4g}" if bool(finite[context]) else "")
        + ", and no action brings it below 1; lower the discount or the eigenvalues of A (bound the leader's "
        "parameters in project()), let B reach what grows, or put a cost on it"
    )


class _FixedPoint(torch.autograd.Function):
    """P of P = T(P), differentiated as dP = sum_k M'^k dT M^k with M the discounted closed loop."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, fixed_point: Tensor, loop: Tensor) -> Tensor:
        ctx.loop = loop
        return fixed_point.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        symmetric = (gradients[0] + gradients[0].mT) / 2
        return lyapunov(ctx.loop, symmetric), None, None
