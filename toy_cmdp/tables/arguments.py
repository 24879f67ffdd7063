"""Checks of the numbers that a builder is given: each names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError

_SUM_TOLERANCE = 1e-9
_MOST = 2**24  # numbers in the tables of a problem: 128 MiB each, and seconds to make


def check_size(numbers: int, **sizes: int) -> None:
    """Refuse a problem whose tables nobody could wait for, before memory runs out on them.

    Args:
        numbers: in the largest of its tables.
        **sizes: the arguments that make it so large.

    Raises:
        InputError: more than 2^24 numbers; it names the largest of the arguments.

    Example:
        >>> check_size(10_000**2, states=10_000)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: states: expected tables of at most 16777216 numbers, got more with states = 10000
    """
    if numbers > _MOST:
        name = max(sizes, key=lambda size: sizes[size])
        given = ", ".join(f"{size} = {value}" for size, value in sizes.items())
        raise InputError(f"{name}: expected tables of at most {_MOST} numbers, got more with {given}")


def finite_tensor(name: str, value: Any, shape: Sequence[int | str]) -> Tensor:
    """`value` as a new float64 tensor of the given shape, every entry finite.

    Args:
        name: of the argument, for messages.
        value: a tensor, or nested sequences of numbers.
        shape: a number fixes the length of an axis; a letter, used in the message, leaves it open (but not empty).

    Raises:
        InputError: not numbers, another shape, or an entry that is NaN or infinite.

    Example:
        >>> finite_tensor("costs", [[0.0, 1.0]], ("C", 2))
        tensor([[0., 1.]], dtype=torch.float64)
    """
    wanted = "[" + ", ".join(str(axis) for axis in shape) + "]"
    try:
        # A copy: what a leader keeps must not change when the caller changes the original.
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name}: expected numbers of shape {wanted}, got {value!r}") from error
    fits = tensor.ndim == len(shape) and all(
        size > 0 if isinstance(axis, str) else size == axis for size, axis in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise InputError(f"{name}: expected finite numbers, got {tensor[tuple(index)].item()} at {index}")
    return tensor


def law_tensor(name: str, value: Any, shape: Sequence[int | str]) -> Tensor:
    """As `finite_tensor`, with probabilities that are not negative and sum to one over the last axis.

    Raises:
        InputError: as above, a negative entry, or a row with another sum.

    Example:
        >>> law_tensor("nature", [0.25, 0.75], (2,)).tolist()
        [0.25, 0.75]
    """
    tensor = finite_tensor(name, value, shape)
    if bool((tensor < 0).any()):
        index = (tensor < 0).nonzero()[0].tolist()
        raise InputError(f"{name}: expected probabilities, got {tensor[tuple(index)].item()} at {index}")
    total = tensor.sum(-1)
    wrong = ((total - 1).abs() > _SUM_TOLERANCE).nonzero()
    if len(wrong):
        index = wrong[0].tolist()
        place = f" in row {index}" if index else ""
        raise InputError(f"{name}: expected probabilities that sum to one, got {total[tuple(index)].item()}{place}")
    return tensor


def nature_law(name: str, value: Any, count: int) -> Tensor:
    """Nature's law of `count` contexts, [count]: `value` if given, else uniform. Raises InputError as `law_tensor`.

    Example:
        >>> nature_law("type_probabilities", None, 2).tolist()
        [0.5, 0.5]
    """
    if value is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    return law_tensor(name, value, (count,))
