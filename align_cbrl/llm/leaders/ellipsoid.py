"""The point of an ellipsoid that is nearest in a metric: where a natural step beyond a budget ends."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 80


def nearest_in_ellipsoid(point: Tensor, metric: Tensor, shape: Tensor, radius: float, positive: bool) -> Tensor:
    """The z with z' shape z <= radius^2, and z >= 0 where `positive`, that minimises (z - point)' metric (z - point).

    The problem is convex. With a multiplier mu of the ellipsoid, z solves (metric + mu shape) z = metric point; mu is
    found by bisection, and the entries that are held at zero by exchanging one after the other until the conditions of
    optimality hold.

    Args:
        point: [K].
        metric: [K, K], positive definite.
        shape: [K, K], positive semidefinite.
        radius: > 0.
        positive: whether no entry may be negative.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> point = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> [round(value, 6) for value in nearest_in_ellipsoid(point, one, one, 1.0, positive=False).tolist()]
        [0.6, 0.8]
    """
    aim = metric @ point

    def with_multiplier(mu: float) -> Tensor:
        matrix = metric + mu * shape
        return minimum_above_zero(matrix, aim) if positive else torch.linalg.solve(matrix, aim)

    def beyond(z: Tensor) -> bool:
        return float(z @ shape @ z) > radius**2

    found = with_multiplier(0.0)
    if not beyond(found):
        return found
    low, high = 0.0, float(metric.diagonal().mean() / shape.diagonal().mean())
    while beyond(with_multiplier(high)):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if beyond(with_multiplier(middle)) else (low, middle)
    return with_multiplier(high)


def minimum_above_zero(matrix: Tensor, aim: Tensor) -> Tensor:
    """The z >= 0 that minimises z' matrix z / 2 - aim' z, matrix positive semidefinite (Lawson and Hanson 1974).

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> minimum_above_zero(matrix, torch.tensor([2.0, -1.0], dtype=torch.float64)).tolist()
        [1.0, 0.0]
    """
    size = len(aim)
    free = torch.zeros(size, dtype=torch.bool)
    z = torch.zeros_like(aim)
    tolerance = 1e-12 * float(aim.abs().max())
    for _ in range(3 * size + 1):
        slope = torch.where(free, 0.0, aim - matrix @ z)
        if float(slope.max()) <= tolerance:
            break
        free[int(slope.argmax())] = True
        while True:
            trial = torch.zeros_like(z)
            trial[free] = torch.linalg.lstsq(matrix[free][:, free], aim[free, None], driver="gelsd").solution[:, 0]
            wrong = free & (trial <= 0)
            if not wrong.any():
                z = trial
                break
            step = float((z[wrong] / (z[wrong] - trial[wrong])).min())
            z = z + step * (trial - z)
            free &= z > tolerance / float(matrix.diagonal().max())
            z = torch.where(free, z, 0.0)
    return z
