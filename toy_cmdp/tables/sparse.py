"""Sparse transitions: each state and action leads to at most K states.

Nothing here forms a dense [S, S] matrix. Axes: C contexts, S states, A actions, K successors of a state and action.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError

Array = npt.NDArray[np.float64]

_DIRECT_STATES = 2_000  # up to here even factors that fill in completely cost little
_LAST_RESORT_STATES = 20_000
_MAX_ITERATIONS = 20_000
_BEFORE_FACTORING = 2_000  # iterations, where factors are the way out: more would cost more than they do
_CYCLE = 1_000  # iterations between two looks at the true residual
_SINGLE_CYCLE = 1e-5  # reduction of the residual that single precision is trusted with
_ROUNDED = 8  # times the rounding error of a residual: what is left where nothing can be gained any more
_FACTORED = 1e-12  # relative residual of a factorisation that did not lose its digits
_BLOCK = 16_384


@checked
@dataclasses.dataclass(frozen=True, eq=False)
class SparseTransition:
    """P(s' | s, a) as a list of K successors, the same for all contexts, and their probabilities.

    Two successors of a row may be the same state: their probabilities add up. Rows with fewer than K successors repeat
    one of them with probability zero. Tensors that repeat themselves along an axis should be `expand`ed views, such as
    a probability [1, 1, A, K] seen as [1, S, A, K]: the axis is then never walked through.

    Attributes:
        successor: long [S, A, K].
        probability: [C, S, A, K], or [1, S, A, K] if all contexts share it; constant or differentiable in the leader.

    Raises:
        InputError: shapes or dtypes that disagree. What the tensors hold is validated by `check`.

    Example:
        >>> ring = SparseTransition(torch.tensor([[[1, 0]], [[0, 1]]]), torch.tensor([0.75, 0.25]).expand(1, 2, 1, 2))
        >>> tuple(ring.shape), ring.expect(torch.tensor([[4.0, 8.0]])).tolist()
        ((1, 2, 1, 2), [[[7.0], [5.0]]])
    """

    successor: Tensor
    probability: Tensor
    _pattern: list[_Pattern] = dataclasses.field(default_factory=list, repr=False)  # at most one, made when needed

    def __post_init__(self) -> None:
        successor, probability = self.successor, self.probability
        if successor.dtype != torch.long or successor.ndim != 3 or successor.numel() == 0:
            raise InputError(
                f"successor: expected a long tensor [S, A, K], got {successor.dtype} {tuple(successor.shape)}"
            )
        if not probability.dtype.is_floating_point or probability.shape[1:] != successor.shape or probability.ndim != 4:
            raise InputError(
                f"probability: expected a floating-point tensor [C or 1, S, A, K] with (S, A, K) = "
                f"{tuple(successor.shape)} as in `successor`, got {probability.dtype} {tuple(probability.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """That of the dense table: (C or 1, S, A, S)."""
        contexts, states, actions, _ = self.probability.shape
        return torch.Size((contexts, states, actions, states))

    @property
    def dtype(self) -> torch.dtype:
        """Of the probabilities."""
        return self.probability.dtype

    @property
    def device(self) -> torch.device:
        """Of the probabilities."""
        return self.probability.device

    @property
    def requires_grad(self) -> bool:
        """Whether the leader moves the probabilities."""
        return self.probability.requires_grad

    @property
    def _version(self) -> int:
        """Grows when the tensors are changed in place, as a tensor's own does."""
        return self.successor._version + self.probability._version

    def detach(self) -> SparseTransition:
        """The same numbers without a graph."""
        return self.with_probability(self.probability.detach()) if self.requires_grad else self

    def with_probability(self, probability: Tensor) -> SparseTransition:
        """Other probabilities [C or 1, S, A, K] of the same successors, whose sparsity pattern is analysed only once.

        A leader that moves the transitions calls it in `tables`.
        """
        return SparseTransition(self.successor, probability, self._pattern)

    def to_dense(self) -> Tensor:
        """The dense table, [C or 1, S, A, S], differentiable; for small problems and tests."""
        index = self.successor.expand(self.probability.shape)
        return self.probability.new_zeros(self.shape).scatter_add(-1, index, self.probability)

    def expect(self, value: Tensor) -> Tensor:
        """E[value(s') | s, a], [C, S] -> [C, S, A]; differentiable in value and probabilities."""
        self._check_table("value", value, (self.shape[1],))
        out: Tensor = _Expect.apply(_squeeze(self.successor, 1), self.probability, value)
        return out

    def push(self, mass: Tensor) -> Tensor:
        """sum_{s, a} mass(s, a) P(s' | s, a), [C, S, A] -> [C, S], the adjoint of `expect`; differentiable in both."""
        self._check_table("mass", mass, tuple(self.shape[1:3]))
        out: Tensor = _Push.apply(_squeeze(self.successor, 1), self.probability, mass)
        return out

    def between(self, contexts: Tensor, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """P(following | state, action) of index tensors of one shape (or that broadcast to one); differentiable."""
        context = contexts if self.shape[0] > 1 else torch.zeros_like(contexts)
        reached = self.successor[state, action] == following[..., None]  # [..., K]
        return torch.where(reached, self.probability[context, state, action], 0.0).sum(-1)

    def system(self, weights: Tensor) -> SparseSystem:
        """I - M with M(s, s') = sum_a weights(s, a) P(s' | s, a), for weights [C, S, A]; see `SparseSystem`."""
        self._check_table("weights", weights, tuple(self.shape[1:3]))
        if not self._pattern:
            self._pattern.append(_Pattern(_squeeze(self.successor, 1)))
        return SparseSystem(self._pattern[0], self.probability.detach(), weights.detach())

    def check(self, place: Callable[[Sequence[int]], str] | None = None) -> None:
        """Validate what the tensors hold.

        Args:
            place: turns (context, state, action) into words, as `ContextualMDP.place` does.

        Raises:
            InputError: successors out of range; probabilities that are negative, NaN, or do not sum to one. The
                message names context, state and action.
        """
        name = place or _place
        states = self.shape[1]
        successor = _squeeze(self.successor, 1)
        if not (int(successor.min()) >= 0 and int(successor.max()) < states):
            index = ((self.successor < 0) | (self.successor >= states)).nonzero()[0].tolist()
            raise InputError(
                f"transition.successor: expected states in [0, {states}), got {self.successor[tuple(index)].item()} "
                f"as successor {index[2]} in {name([0, *index[:2]])}"
            )
        # Along axes that only repeat themselves one look is enough.
        law = functools.reduce(_squeeze, range(3), self.probability.detach())
        tolerance = 1e-6 if law.dtype == torch.float64 else 1e-4
        # Comparisons are written so that a NaN fails them.
        if not float(law.min()) >= 0:
            index = (~(law >= 0)).nonzero()[0].tolist()
            raise InputError(
                f"transition.probability: expected probabilities, got {law[tuple(index)].item()} in "
                f"{name(index[:3])} to state {self.successor[index[1], index[2], index[3]].item()}"
            )
        total = law.sum(-1)
        if not float((total - 1).abs().max()) <= tolerance:
            index = (~((total - 1).abs() <= tolerance)).nonzero()[0].tolist()
            raise InputError(
                f"transition.probability: expected probabilities that sum to one, got sum "
                f"{total[tuple(index)].item()} in {name(index)}"
            )

    def _check_table(self, name: str, table: Tensor, tail: tuple[int, ...]) -> None:
        contexts = self.shape[0]
        if tuple(table.shape[1:]) != tail or (contexts > 1 and len(table) != contexts):
            raise InputError(
                f"{name}: expected shape {(contexts if contexts > 1 else 'C', *tail)}, got {tuple(table.shape)}"
            )


class SparseSystem:
    """I - M for a substochastic matrix M in each context, to be solved with or without transposition.

    Made by `SparseTransition.system`. Up to 2,000 states the matrix is factored (SuperLU). Above, it is solved by
    BiCGSTAB (van der Vorst 1992) on rows scaled to a unit diagonal: nothing is filled in, and the number of
    iterations depends on the horizon 1 / (1 - gamma), hardly on the number of states. Residuals are in double
    precision whatever the dtype; the work is done on the CPU, one thread for each context.

    Example:
        >>> stay = SparseTransition(torch.tensor([[[0]]]), torch.ones(1, 1, 1, 1, dtype=torch.float64))
        >>> stay.system(torch.tensor([[[0.5]]], dtype=torch.float64)).solve(torch.ones(1, 1)).tolist()
        [[2.0]]
    """

    def __init__(self, pattern: _Pattern, probability: Tensor, weights: Tensor) -> None:
        self._pattern = pattern
        self._matrices = [
            _Matrix(pattern, probability[c if len(probability) > 1 else 0], weights[c], c) for c in range(len(weights))
        ]

    def solve(self, right: Tensor, *, transpose: bool = False, tolerance: float = 1e-14) -> Tensor:
        """(I - M)^{-1} b, or (I - M)^{-T} b, for b [C, S]; without graph.

        Args:
            right: b, [C, S].
            transpose: solve with the transposed matrix.
            tolerance: of |b - (I - M) x| / |b|, Euclidean norms. A residual at the rounding error of x is accepted
                too, as far as x is no larger than a solution can be. An inner solve of Newton's method can do with much
                less than the default.

        Raises:
            InputError: another shape, numbers that are not finite, or no convergence (where a matrix of up to 20,000
                states is factored instead). Whatever the method, the residual is looked at before x is returned.
        """
        shape = (len(self._matrices), self._pattern.states)
        if tuple(right.shape) != shape:
            raise InputError(f"right: expected shape {shape}, got {tuple(right.shape)}")
        columns = right.detach().to("cpu", torch.float64).numpy()
        # Products of sparse matrices run on one thread each, and outside of the interpreter's lock.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            solved = list(pool.map(_Matrix.solve, self._matrices, columns, repeat(transpose), repeat(tolerance)))
        return torch.from_numpy(np.stack(solved)).to(right.device, right.dtype)


class _Pattern:
    """Where I - M may have entries (compressed sparse rows), and which entry each successor belongs to."""

    def __init__(self, successor: Tensor) -> None:
        self.states, self.actions, _ = successor.shape  # actions: 1 if all actions have the same successors
        diagonal = torch.arange(self.states, dtype=torch.int32)[:, None]
        columns = torch.cat([successor.flatten(1).to("cpu", torch.int32), diagonal], 1)  # [S, A K + 1]
        ordered, order = columns.sort(1)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        entry = first.flatten().cumsum(0, dtype=torch.int32).view_as(ordered) - 1
        self.counts = first.sum(1)
        self.columns = ordered[first].numpy()
        self.offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)]).to(torch.int32).numpy()
        self.entry = torch.empty_like(entry).scatter_(1, order, entry)  # the last column is the diagonal's


class _Matrix:
    """I - M of one context, its rows scaled to a unit diagonal."""

    def __init__(self, pattern: _Pattern, probability: Tensor, weights: Tensor, context: int) -> None:
        weights, probability = weights.to("cpu", torch.float64), probability.cpu()
        self._context = context
        entries = torch.zeros(len(pattern.columns), dtype=torch.float64)
        actions, width = probability.shape[1:]
        for k in range(width):
            products = (weights[:, a] * probability[:, a, k] for a in range(actions))
            if pattern.actions == 1:
                entries.index_add_(0, pattern.entry[:, k], sum(products, torch.zeros(())), alpha=-1)
            else:
                for action, product in enumerate(products):
                    entries.index_add_(0, pattern.entry[:, action * width + k], product, alpha=-1)
        diagonal = pattern.entry[:, -1].long()
        entries[diagonal] += 1
        scale = entries[diagonal]  # [S]
        if not (bool(torch.isfinite(entries).all()) and float(scale.min()) > 0):
            raise InputError(
                f"weights: context {context}: expected finite weights with sum below one in every state, such as a "
                "policy times a discount below one; their matrix is singular"
            )
        entries /= scale.repeat_interleave(pattern.counts)
        self._scale: Array = scale.numpy()
        rows = torch.arange(pattern.states).repeat_interleave(pattern.counts)
        # By how much the diagonal, one, exceeds the rest of its row: positive where weights sum to less than one.
        self._slack: Array = torch.zeros(pattern.states, dtype=torch.float64).index_add_(0, rows, entries).numpy()
        places, shape = (pattern.columns, pattern.offsets), (pattern.states, pattern.states)
        self._rows = scipy.sparse.csr_array((entries.numpy(), *places), shape=shape)
        self._single = scipy.sparse.csr_array((entries.numpy().astype(np.float32), *places), shape=shape)
        self._factors: Any = None

    def solve(self, right: Array, transpose: bool, tolerance: float) -> Array:
        if not np.isfinite(right).all():
            raise InputError(f"right: context {self._context}: expected finite numbers")
        # With A = D A', A' the scaled rows: A x = b is A' x = D^{-1} b, and A^T x = b is A'^T (D x) = b.
        if not transpose:
            right = right / self._scale
        if len(right) <= _DIRECT_STATES or self._factors is not None:
            solution = self._factored(right, transpose)
        else:
            try:
                solution = self._iterate(right, transpose, tolerance)
            except InputError:
                # Eigenvalues around a circle, as of a long deterministic cycle: Krylov methods are slow there.
                if len(right) > _LAST_RESORT_STATES:
                    raise
                solution = self._factored(right, transpose)
        return solution / self._scale if transpose else solution

    def _factored(self, right: Array, transpose: bool) -> Array:
        try:
            if self._factors is None:
                self._factors = scipy.sparse.linalg.splu(self._rows.tocsc())
        except RuntimeError as error:  # SuperLU: the factor is exactly singular
            raise InputError(self._says(f"found no factors ({error})")) from error
        rows = self._rows.T if transpose else self._rows
        solution: Array = np.zeros_like(right)
        for _ in range(2):  # the second one refines the first
            solution = solution + self._factors.solve(right - rows @ solution, trans="T" if transpose else "N")
        size, norm = _norm(right - rows @ solution), _norm(right)
        if not size <= max(_FACTORED * norm, _ROUNDED * self._rounding(solution, right, transpose)):
            raise InputError(self._says(f"factored to a relative residual of {size / norm:.2g}"))
        return solution

    def _rounding(self, solution: Array, right: Array, transpose: bool) -> float:
        """The rounding error of a residual. Of x it takes no more than a solution can be, |x| <= |b| / slack.

        An iteration that diverges would otherwise make its own residual look small.
        """
        if not float(self._slack.min()) > 0:
            return 0.0
        if transpose:
            largest = float(np.abs(right).sum() / self._slack.min())
        else:
            largest = float((np.abs(right) / self._slack).max()) * len(right) ** 0.5
        return 2 * float(np.finfo(np.float64).eps) * min(_norm(solution), largest)

    def _says(self, what: str) -> str:
        return (
            f"system: context {self._context}: the linear solver {what}; the weights' sums are too close to one, or a "
            f"cycle is too long: lower the discount, use dense tables, or at most {_LAST_RESORT_STATES:,} states, "
            "whose matrix is factored"
        )

    def _iterate(self, right: Array, transpose: bool, tolerance: float) -> Array:
        """Iterative refinement: residuals in double precision, corrections by BiCGSTAB in single precision.

        Iterations are bound by memory, hence nearly twice as fast in single precision. Where that does not get on,
        the corrections are made in double precision. A correction that makes the residual larger is not taken.
        """
        rows, single = (self._rows.T, self._single.T) if transpose else (self._rows, self._single)
        matrix, cycle = single, _SINGLE_CYCLE
        solution, residual, norm = np.zeros_like(right), right.copy(), _norm(right)
        size, iterations = norm, 0
        most = _BEFORE_FACTORING if len(right) <= _LAST_RESORT_STATES else _MAX_ITERATIONS
        while True:
            target = max(tolerance * norm, self._rounding(solution, right, transpose))
            if size <= target:
                return solution
            correction, used = _bicgstab(matrix, residual / size, max(0.5 * target / size, cycle))
            iterations += used
            candidate = solution.copy()
            _add(candidate, size, correction)
            remaining = right - rows @ candidate
            before, after = size, _norm(remaining)
            if after < before:  # written so that a NaN fails it
                solution, residual, size = candidate, remaining, after
            if iterations < most and after <= 0.5 * before:
                continue
            if matrix is single:
                matrix, cycle = rows, 0.0
            elif size <= _ROUNDED * target:  # rounding errors of the residual itself
                return solution
            else:
                raise InputError(
                    self._says(
                        f"stopped at a relative residual of {size / norm:.2g} (expected {target / norm:.2g}) after "
                        f"{iterations} iterations"
                    )
                )


def _bicgstab(matrix: Any, right: Array, target: float) -> tuple[Array, int]:
    """Solve matrix x = right, in the matrix' precision, until the recursive residual is below `target`.

    Returns:
        The solution and the number of iterations. A breakdown ends them early; the caller looks at the true residual.
    """
    residual = right.astype(matrix.dtype)
    solution, shadow, direction = np.zeros_like(residual), residual.copy(), residual.copy()
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(residual), _BLOCK)]
    rho = _dot(shadow, residual)
    for iteration in range(1, _CYCLE + 1):
        image = matrix @ direction
        along = _dot(shadow, image)
        if along == 0 or rho == 0:
            return solution, iteration
        alpha = rho / along
        _add(residual, -alpha, image)
        step = matrix @ residual
        squares = _dot(step, step)
        omega = _dot(step, residual) / squares if squares > 0 else 0.0
        previous, rho, size = rho, 0.0, 0.0
        for block in blocks:
            here = residual[block]
            solution[block] += alpha * direction[block] + omega * here
            here -= omega * step[block]
            rho += float(np.einsum("i,i->", shadow[block], here))
            size += float(np.einsum("i,i->", here, here))
        if not size > target**2 or omega == 0:
            return solution, iteration
        beta = rho / previous * alpha / omega
        for block in blocks:
            there = direction[block]
            there -= omega * image[block]
            there *= beta
            there += residual[block]
    return solution, _CYCLE


# One thread serves one context. Vectors are walked through block by block, which stay in the cache, and by none of the
# functions that start threads of their own.


def _blocks(vector: Array) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, len(vector), _BLOCK))


def _add(vector: Array, factor: float, other: Array) -> None:
    for block in _blocks(vector):
        vector[block] += factor * other[block]


def _dot(first: Array, second: Array) -> float:
    return sum(float(np.einsum("i,i->", first[block], second[block])) for block in _blocks(first))


def _norm(vector: Array) -> float:
    return _dot(vector, vector) ** 0.5


class _Expect(torch.autograd.Function):
    """out(c, s, a) = sum_k probability(c, s, a, k) value(c, successor(s, a, k)), one k at a time to save memory."""

    @staticmethod
    def forward(ctx: Any, successor: Tensor, probability: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(successor, probability, value)
        out = value.new_zeros(len(value), *probability.shape[1:3])
        for k in range(successor.shape[-1]):
            out.addcmul_(probability[..., k], _take(value, successor[..., k]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        successor, probability, value = ctx.saved_tensors
        (gradient,) = gradients
        to_probability = _outer(successor, probability, gradient, value) if ctx.needs_input_grad[1] else None
        to_value = _Push.apply(successor, probability, gradient) if ctx.needs_input_grad[2] else None
        return None, to_probability, to_value


class _Push(torch.autograd.Function):
    """out(c, s') = sum of mass(c, s, a) probability(c, s, a, k) over all (s, a, k) with successor(s, a, k) = s'."""

    @staticmethod
    def forward(ctx: Any, successor: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
        ctx.save_for_backward(successor, probability, mass)
        contexts, states, _ = mass.shape
        out = mass.new_zeros(contexts, states)
        for k in range(successor.shape[-1]):
            part = mass * probability[..., k]
            if successor.shape[1] == 1:
                part = part.sum(-1, keepdim=True)
            index = successor[..., k].reshape(1, -1).expand(contexts, -1)
            out.scatter_add_(1, index, part.reshape(contexts, -1))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        successor, probability, mass = ctx.saved_tensors
        (gradient,) = gradients
        to_probability = _outer(successor, probability, mass, gradient) if ctx.needs_input_grad[1] else None
        to_mass = _Expect.apply(successor, probability, gradient) if ctx.needs_input_grad[2] else None
        return None, to_probability, to_mass


def _outer(successor: Tensor, probability: Tensor, mass: Tensor, value: Tensor) -> Tensor:
    """mass(c, s, a) value(c, successor(s, a, k)), the gradient of both sums in the probabilities [C or 1, S, A, K]."""
    out = mass.new_empty(probability.shape)
    for k in range(successor.shape[-1]):
        product = mass * _take(value, successor[..., k])
        out[..., k] = product.sum(0, keepdim=True) if len(probability) == 1 else product
    return out


def _take(value: Tensor, index: Tensor) -> Tensor:
    """value(c, index), [C, S] and [S, A or 1] -> [C, S, A or 1]."""
    return value.index_select(1, index.reshape(-1)).view(len(value), *index.shape)


def _squeeze(tensor: Tensor, axis: int) -> Tensor:
    """The first entry along `axis` if all others are views of it."""
    return tensor.narrow(axis, 0, 1) if tensor.stride(axis) == 0 or tensor.shape[axis] == 1 else tensor


def _place(index: Sequence[int]) -> str:
    return ", ".join(f"{kind} {i}" for kind, i in zip(("context", "state", "action"), index, strict=False))
