"""A study in parts: its folder belongs to one configuration, and finished parts are found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cbrl import CheckpointError
from align_cbrl.config import fingerprint
from align_cbrl.metrics import MetricsLog


def claim(out: Path, config: Any) -> None:
    """Mark `out` as this configuration's.

    Raises:
        CheckpointError: it is another one's.
    """
    mark = out / "fingerprint.json"
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != fingerprint(config):
        raise CheckpointError(f"{out} holds a run of another configuration; choose another --out")
    mark.write_text(json.dumps(fingerprint(config)), encoding="utf-8")


def measured(file: Path, count: int, measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of problems 0, ..., count - 1, one line each in `file`; those that are there are not measured again."""
    done = len(MetricsLog.read(file)) if file.exists() else 0
    with MetricsLog(file) as log:
        for number in range(done, count):
            log.append({"problem": number, **measure(number)})
            print(f"problem {number + 1} of {count}", flush=True)
    return MetricsLog.read(file)
