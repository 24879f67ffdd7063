"""Where leader steps are tracked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cbrl.checks import Count, checked
from align_cbrl.llm import LanguageLeader
from align_cbrl.llm.trackers import Tracker, tracker_names


@checked
@dataclasses.dataclass(frozen=True)
class TrackingSettings:
    """Experiment trackers, by accelerate's names; see `Tracker`.

    Attributes:
        report_to: none, tensorboard, wandb, mlflow, ..., or a list of these.
        every: leader steps between tables of sample completions.
        samples: completions in a table.

    Raises:
        InputError: a tracker that is unknown or not installed, or a count that is not positive.
    """

    report_to: str | list[str] = "none"
    every: Count = 10
    samples: Count = 4

    def __post_init__(self) -> None:
        tracker_names(self.report_to)

    def build(self, out: Path, config: Mapping[str, Any], leader: LanguageLeader) -> Tracker:
        """The tracker of a run in `out`, to be closed after it."""
        return Tracker(self.report_to, out, config=config, leader=leader, every=self.every, samples=self.samples)
