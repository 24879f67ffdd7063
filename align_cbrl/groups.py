"""Rows that belong together, such as the completions of one prompt: sums, means and extremes by group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Groups:
    """How B rows fall into K groups.

    Attributes:
        labels: [K], the distinct labels, sorted.
        place: long [B], the number of each row's group among them.
        sizes: long [K], how many rows each group has.

    Example:
        >>> groups = Groups.of(torch.tensor([7, 3, 7]))
        >>> groups.labels.tolist(), groups.place.tolist(), groups.sizes.tolist()
        ([3, 7], [1, 0, 1], [1, 2])
        >>> groups.mean(torch.tensor([1.0, 5.0, 2.0])).tolist()
        [5.0, 1.5]
    """

    labels: Tensor
    place: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Groups:
        """The groups of rows with equal labels [B]."""
        return cls(*torch.unique(labels, return_inverse=True, return_counts=True))

    @property
    def count(self) -> int:
        """K, the number of groups."""
        return len(self.sizes)

    def sum(self, value: Tensor) -> Tensor:
        """Sums over groups of value [B, ...]: [K, ...]."""
        total = torch.zeros(self.count, *value.shape[1:], dtype=value.dtype, device=value.device)
        return total.index_add(0, self.place, value)

    def mean(self, value: Tensor) -> Tensor:
        """Means over groups of value [B, ...]: [K, ...]."""
        return self.sum(value) / self.sizes.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))

    def centred(self, value: Tensor) -> Tensor:
        """Value [B, ...] less the mean of its group."""
        return value - self.mean(value)[self.place]

    def max(self, value: Tensor) -> Tensor:
        """The largest value [B] of each group: [K]."""
        lowest = torch.full((self.count,), -torch.inf, dtype=value.dtype, device=value.device)
        return lowest.scatter_reduce(0, self.place, value, "amax")

    def logsumexp(self, value: Tensor) -> Tensor:
        """log sum exp over groups of value [B]: [K]."""
        top = self.max(value)
        top = torch.where(top.isfinite(), top, 0.0)  # inf - inf is NaN, where a group is all -inf
        return self.sum(torch.exp(value - top[self.place])).log() + top

    def share(self, weight: Tensor) -> Tensor:
        """Each row's share of its group's weight [B]; a group without weight has NaN or infinite ones."""
        return weight / self.sum(weight)[self.place]

    def first(self, value: Tensor) -> Tensor:
        """The value [B] of each group's first row: [K]."""
        rows = torch.arange(len(self.place), device=self.place.device)
        last = torch.full((self.count,), len(rows), device=rows.device)
        return value[last.scatter_reduce(0, self.place, rows, "amin")]

    def tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The groups of each size at a time: their numbers [N], and their rows as a table [N, G].

        Example:
            >>> for number, rows in Groups.of(torch.tensor([7, 3, 7, 3, 5])).tables():
            ...     print(number.tolist(), rows.tolist())
            [1] [[4]]
            [0, 2] [[1, 3], [0, 2]]
        """
        for size in self.sizes.unique().tolist():
            rows = (self.sizes[self.place] == size).nonzero()[:, 0]
            rows = rows[torch.argsort(self.place[rows], stable=True)].view(-1, size)
            yield self.place[rows[:, 0]], rows
