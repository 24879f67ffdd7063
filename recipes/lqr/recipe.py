"""LQR-v4 of BC-HG (Kudo et al. 2026), from starts N(0, I): with the exact gradient, from paths, and naively."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from align_cbrl.checks import checked
from align_cbrl.runs.config import load_config
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.run_folder import CONFIG
from toy_cmdp import lqr

from ..linear_worlds import Ascents, run_ascents, write_ascents_report

BEST = 18.43
PUBLISHED = {"BC-HG": 0.147, "naive": 0.036}


@checked
@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for numbers out of range."""

    ascents: Ascents = dataclasses.field(
        default_factory=lambda: Ascents(
            starts=list(range(10)), starts_from_paths=[0, 1, 2], steps=300, learning_rate=0.1, paths=4, every=20
        )
    )


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Climb from every start; write a file for each ascent, summary.json and report.html."""
    run_ascents(config, out, "lqr", lambda seed: lqr(seed=seed), BEST, PUBLISHED)


def report(out: Path) -> None:
    """Write report.html and its figure from a finished run's folder."""
    write_ascents_report(out, "lqr", load_config(Config, out / CONFIG).ascents)
