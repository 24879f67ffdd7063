"""The benchmark of a leader step's memory, at a size that takes no time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from align_cbrl.recipes.benchmarks.leader_step_memory import Usage, build, measure


def test_a_measurement(tmp_path: Path) -> None:
    build(tmp_path, width=64, layers=1)
    usage = measure(tmp_path, batch=6, chunk=2, length=3, gradient_checkpointing=True)
    embedding, layer = 514 * 64, 4 * 64**2 + 3 * 64 * 224 + 2 * 64
    assert usage.parameters == embedding + layer + 64 + 64  # the last norm, the head
    assert usage.peak >= usage.held > 0 and usage.seconds > 0
    assert Usage(**dataclasses.asdict(usage)).beyond == usage.peak - usage.held - 4 * usage.parameters
