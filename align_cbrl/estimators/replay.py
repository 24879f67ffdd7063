"""Batches that earlier leader steps were taken on, kept so that what was judged can be used again."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from align_cbrl.rollouts import Rollouts

_REMEMBERED = 64  # batches; older ones are from policies too far from the present best response


class Memory:
    """The newest batches of rollouts, drawn from at random.

    Args:
        capacity: how many batches are kept.

    Example:
        >>> memory = Memory()
        >>> memory.add(Rollouts.bandit(contexts=torch.tensor([3]), steps={"completion": ["yes"]}))
        >>> [batch.contexts.tolist() for batch in memory.draw(2, seed=0)]
        [[3], [3]]
    """

    def __init__(self, capacity: int = _REMEMBERED) -> None:
        self.capacity = capacity
        self._batches: list[Rollouts] = []

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, rollouts: Rollouts) -> None:
        """Keep a batch, and forget the oldest where there are too many."""
        self._batches.append(rollouts)
        del self._batches[: -self.capacity]

    def draw(self, count: int, seed: int) -> list[Rollouts]:
        """`count` batches, uniformly and with replacement; they depend on the seed and on what is kept alone."""
        generator = torch.Generator().manual_seed(seed)
        return [self._batches[int(torch.randint(len(self._batches), (1,), generator=generator))] for _ in range(count)]

    def state_dict(self) -> list[dict[str, Any]]:
        """The batches as plain data and tensors."""
        return [
            {
                field.name: _plain(getattr(batch, field.name))
                for field in dataclasses.fields(Rollouts)
                if field.name != "known"
            }
            for batch in self._batches
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self._batches = [Rollouts(**fields) for fields in state]


def _plain(value: Any) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        return {name: column if isinstance(column, Tensor) else list(column) for name, column in value.items()}
    return value
