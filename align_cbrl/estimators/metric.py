"""The Fisher metric of the follower's best response, as a matrix or by its products alone."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from align_cbrl.distributed import gather_rows, own_rows, sum_
from align_cbrl.errors import InputError, first_line
from align_cbrl.estimators.shortage import make_room, out_of_memory
from align_cbrl.functional import group_advantage
from align_cbrl.problem import Problem, per_path
from align_cbrl.rollouts import Rollouts

T = TypeVar("T")

LARGE = 8192
"""Parameters of the largest leader whose metric, their number squared of entries, is formed."""
_ROWS = 256  # paths whose gradients are taken at once
_COPIES = 1e-8  # smallest eigenvalue of the parameters' correlation, of which the largest possible is their number
_ITERATIONS, _TOLERANCE = 4, 1e-2  # of conjugate gradients; measured in docs/derivation.md
_DEEPER = 3  # a second derivative keeps about this many times what a first one does

_NO_RESPONSE = (
    "natural steps: the follower's best response does not depend on the leader's parameters on these samples, "
    "although the objective does; use HPGDConfig(natural=None) for an objective without a response"
)


@dataclasses.dataclass(frozen=True)
class Direction:
    """What a metric makes of a gradient.

    Attributes:
        value: d = (F + D)^-1 g [n], D the damping.
        square: d'(F + D) d, or d'F d in the metric of the policies that were sampled, whichever is larger.
    """

    value: Tensor
    square: float


class Metric(abc.ABC):
    """F = E Cov(d log pi*, d log pi*), and the same of the policies that were sampled, over all n parameters."""

    @abc.abstractmethod
    def solve(self, gradient: Tensor, ridge: float) -> Direction:
        """(F + D)^-1 g, with a damping D that is relative to F.

        Args:
            gradient: g [n].
            ridge: of the damping.

        Raises:
            InputError: no parameter moves the best response although J depends on them.
        """

    def copies(self) -> tuple[int, int] | None:
        """Numbers of two parameters whose gradients are the same up to a factor, where that is known; or None."""
        return None


@dataclasses.dataclass(frozen=True)
class MatrixMetric(Metric):
    """A metric that was formed; the damping is `ridge` times the diagonal, whatever the parameters' units.

    The diagonal of either metric, whichever is larger; of a parameter that moves nothing, the mean.

    Attributes:
        matrix: F [n, n].
        sampled: F of the policies that were sampled [n, n]; None where it is the same.

    Example:
        >>> metric = MatrixMetric(torch.tensor([[2.0, 0.0], [0.0, 8.0]]))
        >>> metric.solve(torch.tensor([2.1, 8.4]), ridge=0.05).value.tolist()
        [1.0, 1.0]
    """

    matrix: Tensor
    sampled: Tensor | None = None

    def solve(self, gradient: Tensor, ridge: float) -> Direction:
        """See `Metric.solve`."""
        sampled, gradient = self._broad, gradient.to(self.matrix)
        diagonal = torch.maximum(self.matrix.diagonal(), sampled.diagonal())
        if not bool((diagonal > 0).any()):
            raise InputError(_NO_RESPONSE)
        damped = self.matrix + torch.diag(ridge * torch.where(diagonal > 0, diagonal, diagonal.mean()))
        direction = torch.linalg.solve(damped, gradient)
        square = max(float(direction @ damped @ direction), float(direction @ sampled @ direction))
        return Direction(direction, square)

    def copies(self) -> tuple[int, int] | None:
        """See `Metric.copies`."""
        sampled = self._broad
        scale = sampled.diagonal().sqrt()
        moving = (scale > 0).nonzero()[:, 0]
        correlation = sampled[moving][:, moving] / (scale[moving, None] * scale[moving])
        size = len(moving)
        alike = (correlation.abs() - 2 * torch.eye(size, dtype=sampled.dtype, device=sampled.device)).flatten()
        if size < 2 or float(alike.max()) < 1 - _COPIES:
            return None
        place = int(alike.argmax())
        return int(moving[place // size]), int(moving[place % size])

    @property
    def _broad(self) -> Tensor:
        return self.matrix if self.sampled is None else self.sampled


class ProductMetric(Metric):
    """A metric that is never formed, of a leader of any size: conjugate gradients on products with it.

    With rows G [B, n], d log pi* of each path, F v = G'W G v / B, where W takes each path's slope to that over its
    group's weighted mean. G v is the derivative of G'u, which is linear in u, along v (a second backward pass), and G'u
    is one backward pass: both chunk by chunk, so that nothing of B times n numbers is ever kept.

    The damping is the same number for all parameters, `ridge` times g'F g / g'g: how much F stretches the gradient, in
    whichever of the two metrics it is more. That is known before the first iteration, from the product that it needs
    anyway. A diagonal would take a backward pass for each path; its mean is no measure where there are far more
    parameters than paths and most of F's eigenvalues are zero.

    Args:
        problem: its leader's trainable parameters are x.
        rollouts: one step; in several processes, this rank's part.
        chunks: into how many pieces the paths are cut. With one piece the pass through the leader is kept for all
            products; with more it is made again for each, in bounded memory. What does not fit is cut smaller.
        iterations: of conjugate gradients, at most. Fewer regularise: the directions that the paths tell most about
            come first.
        tolerance: of the residual, relative to g, at which they end.
    """

    def __init__(
        self,
        problem: Problem,
        rollouts: Rollouts,
        chunks: int = 1,
        iterations: int = _ITERATIONS,
        tolerance: float = _TOLERANCE,
    ) -> None:
        self.problem, self.rollouts = problem, rollouts
        self._parameters = problem.parameters  # looked for once: a network of many modules takes long to search
        self.iterations, self.tolerance = iterations, tolerance
        self._pieces = 1 if chunks == 1 else min(_DEEPER * chunks, rollouts.size)
        self._kept: list[_Linearised] = []
        whole = rollouts.over_ranks()
        self._group, self._size = whole.group[:, 0], whole.size
        self._weight = None if whole.weight is None else whole.path_weight()
        self._own = own_rows(rollouts.size)

    def solve(self, gradient: Tensor, ridge: float) -> Direction:
        """See `Metric.solve`."""
        unit = float(gradient.abs().max())  # squares of what is tiny would be zero in single precision
        gradient = gradient.to(self._like) / unit
        slope = self._along(gradient)  # G g [B]
        mixed = self._mixed(slope)
        left = start = float(gradient.dot(gradient))
        damping = ridge * max(self._square(slope, mixed), self._square(slope)) / start
        if not damping > 0:
            raise InputError(_NO_RESPONSE)
        direction, reached = torch.zeros_like(gradient), torch.zeros_like(slope)
        residual, search = gradient, gradient.clone()
        for iteration in range(1, self.iterations + 1):
            curvature = self._square(slope, mixed) + damping * float(search.dot(search))
            length = left / curvature
            direction.add_(search, alpha=length)
            reached.add_(slope, alpha=length)
            if iteration == self.iterations:
                break
            residual.sub_(self._back(mixed).div_(self._size).add_(search, alpha=damping), alpha=length)
            before, left = left, float(residual.dot(residual))
            if left <= self.tolerance**2 * start:
                break
            search.mul_(left / before).add_(residual)
            slope = self._along(search)
            mixed = self._mixed(slope)
        self._kept.clear()
        damped = self._square(reached, self._mixed(reached)) + damping * float(direction.dot(direction))
        return Direction(direction.mul_(unit), max(damped, self._square(reached)) * unit**2)

    @property
    def _like(self) -> Tensor:
        """Whose type and device vectors have: float64 where any parameter has."""
        parameters = self._parameters
        return next((p for p in parameters if p.dtype == torch.float64), parameters[0]).detach()

    def _mixed(self, slope: Tensor) -> Tensor:
        """W u [B]: each path's slope less its group's weighted mean, times its weight."""
        weight = torch.ones_like(slope) if self._weight is None else self._weight.to(slope)
        return weight * group_advantage(slope, self._group.to(slope.device), weight)

    def _square(self, slope: Tensor, mixed: Tensor | None = None) -> float:
        """d'F d of the direction whose slopes these are; without `mixed`, in the metric of what was sampled."""
        if mixed is None:
            mixed = group_advantage(slope, self._group.to(slope.device), torch.ones_like(slope))
        return float(slope.dot(mixed)) / self._size

    def _along(self, vector: Tensor) -> Tensor:
        """G v: d log pi* along v, but for a constant of the group, of every path of all ranks: [B] float64."""
        parameters = self._parameters
        pieces = vector.split([p.numel() for p in parameters])
        parts = [piece.view_as(p).to(p) for p, piece in zip(parameters, pieces, strict=True)]
        found = gather_rows(torch.cat(self._fitting(lambda: self._each(lambda piece, _: piece.along(parts)))))
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"{type(self.problem.leader).__name__}: a derivative of its reward along its gradient is not finite, "
                "although the gradient is; look for a square root or a logarithm at zero. The leader was left as it is"
            )
        return found

    def _back(self, weights: Tensor) -> Tensor:
        """G'u [n], of the paths of all ranks."""
        own = weights[self._own]

        def total() -> Tensor:
            found = self._like.new_zeros(sum(p.numel() for p in self._parameters))
            self._each(lambda piece, rows: piece.add_back(own[rows], found))
            return found

        return sum_(self._fitting(total))

    def _fitting(self, product: Callable[[], T]) -> T:
        """A product over all pieces. Where memory runs out it is begun again with smaller ones."""
        while True:
            try:
                return product()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                shortage = first_line(error)  # the error itself holds on to what fills the memory
            self._kept.clear()
            length = -(-self.rollouts.size // self._pieces)
            if length == 1:
                raise InputError(
                    f"natural steps: memory does not hold a second derivative of a single path's reward ({shortage}); "
                    "use HPGDConfig(natural=None) (in YAML hpgd.step: gradient), train fewer of its parameters (a "
                    "head, LoRA), shorten the completions, or use a device with more memory"
                )
            self._pieces = min(2 * self._pieces, self.rollouts.size)
            warnings.warn(
                f"a natural step ran out of memory with {length} paths at once ({shortage}); it goes on with "
                f"{-(-self.rollouts.size // self._pieces)}: set PolicyResponse(chunks={self._pieces}) to start there",
                stacklevel=4,
            )
            make_room()

    def _each(self, product: Callable[[_Linearised, slice], T]) -> list[T]:
        """A product of every piece, of which one at a time is there."""
        if self._pieces == 1:
            if not self._kept:
                self._kept.append(_Linearised(self.problem, self.rollouts, self._parameters))
            return [product(self._kept[0], slice(0, self.rollouts.size))]
        found, start = [], 0
        for piece in self.rollouts.chunks(self._pieces):
            found.append(product(_Linearised(self.problem, piece, self._parameters), slice(start, start + piece.size)))
            start += piece.size
        return found


class _Linearised:
    """log pi* of some paths to first order in the parameters, but for a constant of the group."""

    def __init__(self, problem: Problem, rollouts: Rollouts, parameters: list[torch.nn.Parameter]) -> None:
        self.problem, self.size, self._parameters = problem, rollouts.size, parameters
        with torch.enable_grad(), _plain_attention():
            self.value = log_response(problem, rollouts)
        self._pulled: tuple[Tensor, list[tuple[int, Tensor]]] | None = None

    def along(self, vector: list[Tensor]) -> Tensor:
        """Of a direction, one part for each parameter: [b] float64."""
        weight, pulled = self._pull()
        if not pulled:
            return torch.zeros(self.size, dtype=torch.float64, device=self.value.device)
        parts = [vector[number] for number, _ in pulled]
        with self._second_derivative(), _plain_attention():
            (slope,) = torch.autograd.grad([part for _, part in pulled], weight, parts, retain_graph=True)
        return slope.double()

    def add_back(self, weights: Tensor, total: Tensor) -> None:
        """Add the gradient that weights of the paths [b] make to `total` [n]."""
        if not self.value.requires_grad:
            return
        parameters = self._parameters
        each = weights.to(self.value)
        with _plain_attention():
            found = torch.autograd.grad(self.value, parameters, each, allow_unused=True, retain_graph=True)
        for own, part in zip(total.split([p.numel() for p in parameters]), found, strict=True):
            if part is not None:
                own.add_(part.flatten())

    def _pull(self) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """G'u as a function of u, with its graph: what there is of it, by the parameter's number."""
        if self._pulled is None:
            weight = torch.zeros_like(self.value, requires_grad=True)
            found: tuple[Tensor | None, ...] = ()
            if self.value.requires_grad:
                with self._second_derivative(), _plain_attention():
                    found = torch.autograd.grad(
                        self.value, self._parameters, weight, create_graph=True, allow_unused=True
                    )
            self._pulled = weight, [(i, part) for i, part in enumerate(found) if part is not None]
        return self._pulled

    def _second_derivative(self) -> _Refusing:
        return _Refusing(type(self.problem.leader).__name__)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Fused attention has no second derivative. Backward too, where gradient checkpointing computes it again."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class _Refusing:
    """Says in words that something in a leader has no second derivative."""

    def __init__(self, leader: str) -> None:
        self.leader = leader

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise InputError(
                f"natural steps: the reward of {self.leader} has no second derivative ({first_line(error)}), which "
                f"leaders of more than {LARGE} parameters need; use HPGDConfig(natural=None) (in YAML hpgd.step: "
                "gradient), or what has one, such as attn_implementation='eager' of a model"
            ) from error


def response_metric(problem: Problem, rollouts: Rollouts, chunks: int = 1) -> Metric:
    """F, the Fisher metric of x -> pi*_x, from samples of one step, and the same without their weights.

    Without weights it is the metric of the policies that were sampled; both are in nats.

    It is the mean over paths of the covariance within groups of d log pi* = d(r / lambda) + d log prior, estimated as
    the hypergradient estimates its own covariance (`group_advantage`): both are of the same samples and weights.
    Leaders of at most 8192 parameters get a matrix, float64, larger ones a `ProductMetric`.

    Args:
        problem: its leader's trainable parameters are x, n numbers in all.
        rollouts: one step; weighted as samples of pi* where they are not drawn from it. In several processes, this
            rank's part; every rank returns the metric of all.
        chunks: into how many pieces the paths are cut for the products of a large leader's.

    Raises:
        InputError: paths of several steps.
    """
    if rollouts.horizon != 1:
        raise InputError(
            f"natural steps: expected rollouts of one step, such as completions, got a horizon of {rollouts.horizon}, "
            "whose metric a critic does not give; use an estimator with a model of the world (toy_cmdp.PlugIn fits "
            "one), or HPGDConfig(natural=None)"
        )
    if is_large(problem):
        return ProductMetric(problem, rollouts, chunks)
    slope = gather_rows(response_gradients(problem, rollouts))  # [B, n]
    whole = rollouts.over_ranks()
    group = whole.group[:, 0].to(slope.device)

    def covariance(weight: Tensor) -> Tensor:
        metric = (weight[:, None] * group_advantage(slope, group, weight)).T @ slope / whole.size
        return (metric + metric.T) / 2  # which it is but for rounding

    sampled = covariance(slope.new_ones(len(slope)))
    if whole.weight is None:
        return MatrixMetric(sampled)
    return MatrixMetric(covariance(whole.path_weight().to(slope)), sampled)


def is_large(problem: Problem) -> bool:
    """Whether the leader has too many parameters for its metric to be formed."""
    return sum(p.numel() for p in problem.parameters) > LARGE


def response_gradients(problem: Problem, rollouts: Rollouts) -> Tensor:
    """d(r_x / lambda + log prior_x)/dx of every path of one step, [B, n] float64: d log pi* but for a constant of the
    group.
    """
    parameters = problem.parameters
    rows = []
    for piece in rollouts.chunks(-(-rollouts.size // _ROWS)):
        with torch.enable_grad():
            value = log_response(problem, piece)
        if not value.requires_grad:
            rows.append(torch.zeros(piece.size, sum(p.numel() for p in parameters), dtype=torch.float64))
            continue
        each = torch.eye(piece.size, dtype=value.dtype, device=value.device)
        found = torch.autograd.grad(value, parameters, each, is_grads_batched=True, allow_unused=True)
        columns = [
            torch.zeros(piece.size, p.numel(), dtype=torch.float64, device=p.device)
            if slope is None
            else slope.reshape(piece.size, -1).double()
            for p, slope in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def log_response(problem: Problem, rollouts: Rollouts) -> Tensor:
    """r_x / lambda + log prior_x of every path of one step [B]: log pi* but for a constant of the group."""
    reward = problem.leader.reward(rollouts)[:, 0]
    temperature = per_path(problem.temperature, rollouts.contexts)
    value = reward / (temperature.to(reward) if isinstance(temperature, Tensor) else temperature)
    prior = problem.leader.log_prior(rollouts)
    return value if prior is None else value + prior[:, 0].to(value)
