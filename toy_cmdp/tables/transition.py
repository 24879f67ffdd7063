"""What solvers, referee and sampler ask of a transition law P_x(s' | s, a), dense or sparse.

A dense law is a tensor [C, S, A, S], or [1, S, A, S] where all contexts share it: one copy in memory, and one matrix
product for all contexts. Mostly empty laws are a `SparseTransition`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from toy_cmdp.tables.sparse import SparseTransition

Transition = Tensor | SparseTransition


class PolicySystem(Protocol):
    """I - M, ready to be solved with."""

    def solve(self, right: Tensor, *, transpose: bool = False, tolerance: float = 1e-14) -> Tensor:
        """(I - M)^{-1} b, or (I - M)^{-T} b, for b [C, S], to a relative residual where solved by iterations."""


class Factorization:
    """LU factors of I - M, M [C, S, S], reused for solves with it and with its transpose.

    On CPU the contexts are factored one by one: batched LU fails there with two or more threads from n of about 150
    (pytorch #142815).

    Example:
        >>> half = Factorization(0.5 * torch.eye(2, dtype=torch.float64)[None])
        >>> half.solve(torch.ones(1, 2, dtype=torch.float64)).tolist()
        [[2.0, 2.0]]
    """

    def __init__(self, matrix: Tensor) -> None:
        system = matrix.neg()
        system.diagonal(dim1=-2, dim2=-1).add_(1)
        if matrix.is_cuda:
            self._factors = [torch.linalg.lu_factor(system)]
        else:
            self._factors = [torch.linalg.lu_factor(one) for one in system]
        self._batched = matrix.is_cuda

    def solve(self, right: Tensor, *, transpose: bool = False, tolerance: float = 0.0) -> Tensor:
        """(I - M)^{-1} b, or (I - M)^{-T} b, for b [C, S]; exact, whatever the tolerance."""
        if self._batched:
            lu, pivots = self._factors[0]
            return torch.linalg.lu_solve(lu, pivots, right[..., None], adjoint=transpose)[..., 0]
        columns = right[..., None]  # [C, S, 1]
        return torch.stack(
            [
                torch.linalg.lu_solve(lu, pivots, column, adjoint=transpose)
                for (lu, pivots), column in zip(self._factors, columns, strict=True)
            ]
        )[..., 0]


def expected_next(transition: Transition, value: Tensor) -> Tensor:
    """E[V(s') | s, a], for value [C, S]: [C, S, A], differentiable in both.

    Example:
        >>> stay = torch.eye(2)[None, :, None, :]  # [1, S, A, S]: one law for all contexts
        >>> expected_next(stay, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[..., 0].tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    if isinstance(transition, SparseTransition):
        return transition.expect(value)
    c, s, a, _ = transition.shape
    if c == 1:
        return (transition.reshape(s * a, s) @ value.T).T.reshape(len(value), s, a)
    return (transition.reshape(c, s * a, s) @ value[..., None]).view(c, s, a)


def pushed(transition: Transition, mass: Tensor) -> Tensor:
    """The mass that arrives, sum_{s, a} mass(s, a) P(s' | s, a), for mass [C, S, A]: [C, S]; adjoint to expected_next.

    Example:
        >>> stay = torch.eye(2)[None, :, None, :]
        >>> pushed(stay, torch.tensor([[[0.25], [0.75]]])).tolist()
        [[0.25, 0.75]]
    """
    if isinstance(transition, SparseTransition):
        return transition.push(mass)
    c, s, a, _ = transition.shape
    if c == 1:
        return mass.reshape(-1, s * a) @ transition.reshape(s * a, s)
    return (mass.reshape(c, 1, s * a) @ transition.reshape(c, s * a, s))[:, 0]


def policy_system(transition: Transition, weights: Tensor) -> PolicySystem:
    """I - M with M(s, s') = sum_a weights(s, a) P(s' | s, a), for weights [C, S, A]: a policy times a discount.

    Example:
        >>> stay = torch.eye(2, dtype=torch.float64)[None, :, None, :]
        >>> half = policy_system(stay, torch.full((1, 2, 1), 0.5, dtype=torch.float64))
        >>> half.solve(torch.ones(1, 2, dtype=torch.float64)).tolist()
        [[2.0, 2.0]]
    """
    if isinstance(transition, SparseTransition):
        return transition.system(weights)
    c, s, a, _ = transition.shape
    if c == 1:
        matrix = (weights.transpose(0, 1) @ transition[0]).transpose(0, 1)  # [S, C, A] @ [S, A, S] -> [C, S, S]
    else:
        matrix = (weights.reshape(c * s, 1, a) @ transition.reshape(c * s, a, s)).view(c, s, s)
    return Factorization(matrix)


def between(transition: Transition, contexts: Tensor, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """P(s' | s, a) for index tensors of one shape, differentiable: that shape.

    Example:
        >>> stay = torch.eye(2)[None, :, None, :]
        >>> one = torch.tensor([1])
        >>> between(stay, 0 * one, one, 0 * one, one).tolist()
        [1.0]
    """
    if isinstance(transition, SparseTransition):
        return transition.between(contexts, state, action, following)
    c, s, a, _ = transition.shape
    row = (state if c == 1 else contexts * s + state) * a + action
    flat = row * s + following
    return transition.reshape(-1).index_select(0, flat.reshape(-1)).view(flat.shape)
