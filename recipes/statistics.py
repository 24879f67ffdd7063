"""Means over seeds, with their errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from scipy import stats
from torch import Tensor


def mean_and_error(values: Tensor | Sequence[float]) -> dict[str, float]:
    """Mean, standard error and number of independent values [N]; the error of a single one is unknown.

    Example:
        >>> mean_and_error([1.0, 3.0])
        {'mean': 2.0, 'se': 1.0, 'n': 2}
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": values.mean().item(), "se": error, "n": len(values)}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error and Student's 95 % interval of independent values [N].

    Example:
        >>> {name: round(value, 2) for name, value in interval([1.0, 2.0, 3.0]).items()}
        {'mean': 2.0, 'se': 0.58, 'n': 3, 'low': -0.48, 'high': 4.48}
    """
    found = mean_and_error(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * found["se"] if len(values) > 1 else math.nan
    return {**found, "low": found["mean"] - half, "high": found["mean"] + half}


def shown(found: Mapping[str, float]) -> str:
    """`mean_and_error` or `interval` as text.

    Example:
        >>> shown(interval([1.0, 2.0, 3.0])), shown({"mean": 0.5, "se": math.nan})
        ('+2.000 ± 0.577, 95 % [-0.484, +4.484]', '0.500')
    """
    error = found["se"]
    known = error is not None and math.isfinite(error)  # JSON has null for what is not finite
    if "low" not in found:
        return f"{found['mean']:.3f}" + (f" ± {error:.3f}" if known else "")
    if not known:
        return f"{found['mean']:+.3f} (one seed)"
    return f"{found['mean']:+.3f} ± {error:.3f}, 95 % [{found['low']:+.3f}, {found['high']:+.3f}]"


def counted(number: int, thing: str) -> str:
    """A number of things in words.

    Example:
        >>> counted(1, "seed"), counted(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {thing}" + ("" if number == 1 else "s")
