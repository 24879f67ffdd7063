"""`LineTransition`: a state on a line moves by what the action says, plus truncated normal noise.

Axes: C contexts, S states, A actions, W displacements (in grid steps) that have any probability.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import Factorization

_REACH = 8.5  # standard deviations; exp(-8.5^2 / 2) is below the rounding error of 1


class LineTransition(SparseTransition):
    """P(s_j | s_i, a) = w_j exp(-(s_j - m)^2 / 2 sigma^2) / sum over j, with m = clip(s_i + shift_a) to the grid.

    This is the normal law truncated to [s_0, s_{S-1}], its density and its normalisation integrated by the rule with
    weights w. It is a softmax over j, whose derivative in the mean m is P_j (s_j - E s') / sigma^2: nothing cancels,
    nothing can become NaN. All states are successors, but the kernel depends on s_j - s_i and the action only: W
    numbers an action instead of S^2, and expectations are products of matrices [C S, W] and [W, A]. `probability`, the
    dense table that a sampler wants, is made when it is asked for.

    Args:
        positions: [S], equally spaced and increasing.
        shift: [A], constant or differentiable in the leader.
        noise: sigma > 0, in the unit of the positions.
        weight: [S], positive; those of the trapezoidal rule by default.

    Raises:
        InputError: positions that are not equally spaced, shapes that disagree, a noise or weight that is not positive.

    Example:
        >>> positions = torch.linspace(-2, 2, 5, dtype=torch.float64)
        >>> line = LineTransition(positions, positions.new_zeros(1), 1.0)
        >>> tuple(line.shape), line.expect(torch.ones(1, 5, dtype=torch.float64))[0, :, 0].round(decimals=9).tolist()
        ((1, 5, 1, 5), [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, positions: Tensor, shift: Tensor, noise: float, weight: Tensor | None = None) -> None:
        states = len(positions)
        if positions.ndim != 1 or states < 2:
            raise InputError(f"positions: expected shape [S], S >= 2, got {tuple(positions.shape)}")
        spacing = positions.diff()
        if not bool((spacing > 0).all()) or float(spacing.max() - spacing.min()) > 1e-9 * float(spacing.max()):
            raise InputError("positions: expected an increasing, equally spaced grid")
        if shift.ndim != 1 or len(shift) == 0 or shift.dtype != positions.dtype:
            raise InputError(
                f"shift: expected one {positions.dtype} number an action, got {shift.dtype} {tuple(shift.shape)}"
            )
        if not 0 < noise < float("inf"):
            raise InputError(f"noise: expected a positive standard deviation, got {noise}")
        if weight is None:
            weight = torch.ones_like(positions)
            weight[[0, -1]] = 0.5
        if weight.shape != positions.shape or not bool((weight > 0).all()):
            raise InputError(f"weight: expected {states} positive numbers, got shape {tuple(weight.shape)}")
        # The base class is frozen; its own fields, but for `probability`, which is a property here.
        everywhere = torch.arange(states, device=positions.device).expand(states, len(shift), states)
        for name, value in (
            ("successor", everywhere),
            ("_pattern", []),
            ("positions", positions),
            ("shift", shift),
            ("noise", noise),
            ("weight", weight),
        ):
            object.__setattr__(self, name, value)

    positions: Tensor
    shift: Tensor
    noise: float
    weight: Tensor

    @functools.cached_property
    def probability(self) -> Tensor:  # a field of the base class, here made when asked for
        """The dense table, [1, S, A, S], as `to_dense`; kept once it was made."""
        with torch.enable_grad():
            return self.to_dense()

    @property
    def shape(self) -> torch.Size:
        """That of the dense table, (1, S, A, S)."""
        states = len(self.positions)
        return torch.Size((1, states, len(self.shift), states))

    @property
    def dtype(self) -> torch.dtype:
        """Of the positions."""
        return self.positions.dtype

    @property
    def device(self) -> torch.device:
        """Of the positions."""
        return self.positions.device

    @property
    def requires_grad(self) -> bool:
        """Whether the leader moves the shifts."""
        return self.shift.requires_grad

    @property
    def _version(self) -> int:
        return self.positions._version + self.shift._version + self.weight._version

    def detach(self) -> LineTransition:
        """The same numbers without a graph."""
        if not self.requires_grad:
            return self
        return LineTransition(self.positions, self.shift.detach(), self.noise, self.weight)

    def to_dense(self) -> Tensor:
        """The dense table from the definition, [1, S, A, S], differentiable."""
        mean = (self.positions[:, None] + self.shift).clamp(float(self.positions[0]), float(self.positions[-1]))
        score = self.weight.log() - 0.5 * ((self.positions - mean[..., None]) / self.noise) ** 2
        return torch.softmax(score, -1)[None]

    def expect(self, value: Tensor) -> Tensor:
        """E[value(s') | s, a], [C, S] -> [C, S, A]; differentiable in value and shift."""
        self._check_table("value", value, (len(self.positions),))
        inside = self._correlate(self.weight * value) / self._total
        low, high = (value @ edge for edge in self._edges)  # [C]
        return torch.where(self._below, low[:, None, None], torch.where(self._above, high[:, None, None], inside))

    def push(self, mass: Tensor) -> Tensor:
        """sum_{s, a} mass(s, a) P(s' | s, a), [C, S, A] -> [C, S], the adjoint of `expect`; differentiable in both."""
        return self._matrix(mass).sum(1)

    def between(self, contexts: Tensor, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """P(following | state, action) of index tensors of one shape; differentiable."""
        mean = (self.positions[state] + self.shift[action]).clamp(float(self.positions[0]), float(self.positions[-1]))
        score = self.weight.log() - 0.5 * ((self.positions - mean[..., None]) / self.noise) ** 2
        return torch.softmax(score, -1).gather(-1, following[..., None])[..., 0]

    def system(self, weights: Tensor) -> Factorization:  # type: ignore[override]  # both are PolicySystems
        """I - M with M(s, s') = sum_a weights(s, a) P(s' | s, a), for weights [C, S, A], factored."""
        with torch.no_grad():
            return Factorization(self._matrix(weights))

    def check(self, place: Callable[[Sequence[int]], str] | None = None) -> None:
        """Rows are laws by construction. Raises InputError for shifts that are not finite."""
        if not bool(torch.isfinite(self.shift).all()):
            action = int((~torch.isfinite(self.shift)).nonzero()[0])
            raise InputError(f"shift: expected finite numbers, got {self.shift[action].item()} for action {action}")

    @functools.cached_property
    def _first(self) -> int:
        """The smallest displacement that has any probability, in grid steps."""
        least = (float(self.shift.detach().min()) - _REACH * self.noise) / self._spacing
        return min(max(int(least), 1 - len(self.positions)), 0)

    @functools.cached_property
    def _kernel(self) -> Tensor:
        """exp(-(d - shift_a)^2 / 2 sigma^2) for displacements d, [A, W]."""
        greatest = (float(self.shift.detach().max()) + _REACH * self.noise) / self._spacing
        last = max(min(int(greatest), len(self.positions) - 1), 0)
        distance = self._spacing * torch.arange(self._first, last + 1, device=self.device).to(self.dtype)
        with torch.enable_grad():  # what is kept must have its graph, whoever asks first
            return torch.exp(-0.5 * ((distance - self.shift[:, None]) / self.noise) ** 2)

    @property
    def _spacing(self) -> float:
        return float(self.positions[-1] - self.positions[0]) / (len(self.positions) - 1)

    @functools.cached_property
    def _below(self) -> Tensor:
        """Where the mean is clipped to the first position, bool [S, A]."""
        return self.positions[:, None] + self.shift.detach() < self.positions[0]

    @functools.cached_property
    def _above(self) -> Tensor:
        return self.positions[:, None] + self.shift.detach() > self.positions[-1]

    @functools.cached_property
    def _edges(self) -> tuple[Tensor, Tensor]:
        """The laws around the two ends, [S] each."""
        laws = [
            self.weight * torch.exp(-0.5 * ((self.positions - end) / self.noise) ** 2)
            for end in self.positions[[0, -1]]
        ]
        return laws[0] / laws[0].sum(), laws[1] / laws[1].sum()

    @functools.cached_property
    def _total(self) -> Tensor:
        """What normalises each row, [S, A]; 1 where the mean is clipped and the row is an edge."""
        with torch.enable_grad():
            total = self._correlate(self.weight[None])[0]
            return torch.where(self._below | self._above, 1.0, total)

    def _correlate(self, value: Tensor) -> Tensor:
        """sum_d kernel(a, d) value(i + d), [C, S] -> [C, S, A]; zero beyond the grid."""
        width = self._kernel.shape[1]
        padded = torch.nn.functional.pad(value, (-self._first, width - 1 + self._first))
        return padded.unfold(1, width, 1) @ self._kernel.T

    def _matrix(self, weights: Tensor) -> Tensor:
        """sum_a weights(s, a) P(s' | s, a), [C, S, S]."""
        self._check_table("weights", weights, tuple(self.shape[1:3]))
        contexts, states, _ = weights.shape
        inside = torch.where(self._below | self._above, 0.0, weights / self._total)
        band = inside @ self._kernel  # [C, S, W]: entry d of row i belongs into column i + d
        width = band.shape[-1]
        row = states + width
        # A row of W entries, then S empty ones: read with rows of one entry less, each starts one column later.
        sheared = torch.nn.functional.pad(band, (0, states + 1)).reshape(contexts, -1)[:, : states * row]
        matrix = sheared.view(contexts, states, row)[..., -self._first : states - self._first] * self.weight
        low, high = ((weights * where).sum(-1)[..., None] for where in (self._below, self._above))
        return matrix + low * self._edges[0] + high * self._edges[1]
