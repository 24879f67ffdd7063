"""A study in parts: finished ones are found again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cbrl.metrics import MetricsLog


def measured(file: Path, count: int, measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of problems 0, ..., count - 1, one line each in `file`; those that are there are not measured again."""
    done = len(MetricsLog.read(file)) if file.exists() else 0
    with MetricsLog(file) as log:
        for number in range(done, count):
            log.append({"problem": number, **measure(number)})
            print(f"problem {number + 1} of {count}", flush=True)
    return MetricsLog.read(file)
