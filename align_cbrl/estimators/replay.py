"""Batches that earlier leader steps were taken on, kept so that what was judged can be used again."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
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
        """Keep a batch, and forget the oldest where there are too many.

        Raises:
            InputError: a column of values that no checkpoint can hold, such as images; before anything is lost by it.
        """
        for name, column in rollouts.steps.items():
            if not isinstance(column, Tensor):
                _packed(name, list(column))
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
        self._batches = [Rollouts(**{**fields, "steps": _unpacked(fields["steps"])}) for fields in state]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: column if isinstance(column, Tensor) else _packed(name, column) for name, column in value.items()}
    return value


_KIND = "kind of value"
_KINDS: dict[str, tuple[type[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda value: value // datetime.timedelta(microseconds=1),
        lambda value: datetime.timedelta(microseconds=value),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "float": (float, repr, float),  # NaN and infinities, which are no JSON
}
"""What columns of data hold besides numbers, texts, lists and dictionaries, and how a checkpoint holds it."""


def _packed(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {key: _packed(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(name, item) for item in value]
    if hasattr(value, "tolist"):  # an array, or a number of NumPy's
        return _packed(name, value.tolist())
    for kind, (of, pack, _) in _KINDS.items():
        if isinstance(value, of):
            return {_KIND: kind, "value": pack(value)}
    raise InputError(
        f"replays: the column {name!r} holds values that a checkpoint cannot, of type {type(value).__name__}; drop the "
        f"column, dataset.remove_columns({name!r}), or set replays to 0"
    )


def _unpacked(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {_KIND, "value"}:
            return _KINDS[value[_KIND]][2](value["value"])
        return {key: _unpacked(item) for key, item in value.items()}
    return [_unpacked(item) for item in value] if isinstance(value, list) else value
