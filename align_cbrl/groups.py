"""Temporary until helper E's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups."""

    labels: Tensor
    place: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Groups:
        """Of."""
        return cls(*torch.unique(labels, return_inverse=True, return_counts=True))

    def sum(self, value: Tensor) -> Tensor:
        """Sum."""
        return torch.zeros(len(self.sizes), dtype=value.dtype, device=value.device).index_add(0, self.place, value)

    def first(self, value: Tensor) -> Tensor:
        """First."""
        n = len(self.place)
        first = torch.full((len(self.sizes),), n, device=self.place.device).scatter_reduce(
            0, self.place, torch.arange(n, device=self.place.device), "amin"
        )
        return value[first]

    def tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tables."""
        for size in self.sizes.unique().tolist():
            rows = (self.sizes[self.place] == size).nonzero()[:, 0]
            rows = rows[torch.argsort(self.place[rows], stable=True)].view(-1, size)
            yield self.place[rows[:, 0]], rows
