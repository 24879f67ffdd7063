"""Regressors for critics: ridge regression on features, and a small network; many regressions side by side."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked

Function = Callable[[Tensor], Tensor]
"""Maps inputs [S, M, k] to values [S, M]."""


class Regressor(abc.ABC):
    """Fits functions of k numbers, one in each of S strata, such as the steps of a path."""

    @abc.abstractmethod
    def fit(self, inputs: Tensor, targets: Tensor) -> Function:
        """The functions that describe `targets` [S, N] by `inputs` [S, N, k]; they take [S, M, k] to [S, M]."""


def quadratic(inputs: Tensor) -> Tensor:
    """All products of up to two inputs but the constant, [..., k] to [..., k + k (k + 1) / 2].

    Example:
        >>> quadratic(torch.tensor([2.0, 3.0])).tolist()
        [2.0, 3.0, 4.0, 6.0, 9.0]
    """
    size = inputs.shape[-1]
    first, second = zip(*itertools.combinations_with_replacement(range(size), 2), strict=True)
    return torch.cat([inputs, inputs[..., list(first)] * inputs[..., list(second)]], -1)


@checked
@dataclasses.dataclass(frozen=True)
class Ridge(Regressor):
    """Least squares on features, which are centred and scaled to one, with a penalty on the coefficients.

    Attributes:
        features: maps inputs [..., k] to [..., F]; a constant is added.
        penalty: on the squares of the coefficients, as a share of the number of rows.

    Example:
        >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[None, :, None]
        >>> fitted = Ridge(penalty=1e-9).fit(x, 1 + 3 * x[..., 0] ** 2)
        >>> round(fitted(torch.tensor([[[2.0]]], dtype=torch.float64)).item(), 4)
        13.0
    """

    features: Callable[[Tensor], Tensor] = quadratic
    penalty: NonNegative = 1e-8

    def fit(self, inputs: Tensor, targets: Tensor) -> Function:
        """See `Regressor.fit`."""
        raw = self.features(inputs)  # [S, N, F]
        centre, scale = raw.mean(1, keepdim=True), raw.std(1, keepdim=True, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)  # a constant column says nothing, and gets no weight
        mean = targets.mean(1, keepdim=True)
        rows = (raw - centre) / scale
        gram = rows.mT @ rows / rows.shape[1] + self.penalty * torch.eye(rows.shape[-1], dtype=rows.dtype)
        right = rows.mT @ (targets - mean)[..., None] / rows.shape[1]
        # Columns may depend on each other; the least of the solutions is as good as any.
        solution = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ right

        def fitted(at: Tensor) -> Tensor:
            return (((self.features(at) - centre) / scale) @ solution)[..., 0] + mean

        return fitted


@checked
@dataclasses.dataclass(frozen=True)
class Network(Regressor):
    """Two hidden layers, fitted to standardised targets by Adam on all rows at once.

    Attributes:
        width: of the hidden layers.
        updates: Adam's.
        learning_rate: Adam's.
        seed: of the first weights.

    Example:
        >>> x = torch.linspace(-2, 2, 50, dtype=torch.float64)[None, :, None]
        >>> fitted = Network(updates=300).fit(x, x[..., 0].abs())
        >>> bool((fitted(x) - x[..., 0].abs()).abs().mean() < 0.1)
        True
    """

    width: Count = 32
    updates: Count = 300
    learning_rate: Positive = 0.01
    seed: Whole = 0

    def fit(self, inputs: Tensor, targets: Tensor) -> Function:
        """See `Regressor.fit`."""
        centre, scale = inputs.mean(1, keepdim=True), inputs.std(1, keepdim=True, correction=0).clamp(min=1e-12)
        mean, size = targets.mean(1, keepdim=True), targets.std(1, keepdim=True, correction=0).clamp(min=1e-12)
        generator = torch.Generator().manual_seed(self.seed)
        widths = [inputs.shape[-1], self.width, self.width, 1]
        weights = [
            torch.randn(len(inputs), a, b, generator=generator, dtype=torch.float64).to(inputs) / a**0.5
            for a, b in itertools.pairwise(widths)
        ]
        biases = [torch.zeros(len(inputs), 1, b).to(inputs) for b in widths[1:]]
        parameters = [nn.Parameter(p) for p in (*weights, *biases)]

        def network(at: Tensor) -> Tensor:
            hidden = (at - centre) / scale
            for i in range(3):
                hidden = hidden @ parameters[i] + parameters[3 + i]
                hidden = hidden if i == 2 else torch.tanh(hidden)
            return hidden[..., 0]

        goal = (targets - mean) / size
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        with torch.enable_grad():
            for update in range(self.updates):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - update / self.updates)
                optimizer.zero_grad()
                (network(inputs) - goal).square().mean(1).sum().backward()
                optimizer.step()

        def fitted(at: Tensor) -> Tensor:
            with torch.no_grad():
                return network(at) * size + mean

        return fitted
