"""The building of BC-HG (Kudo et al. 2026): with the exact gradient, from paths, and naively."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from align_cbrl import Problem
from align_cbrl.checks import checked
from align_cbrl.runs.config import load_config
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.run_folder import CONFIG
from toy_cmdp import building

from ..linear_worlds import Ascents, run_ascents, write_ascents_report

BEST = -162.50
PUBLISHED = {"BC-HG": -196.8, "naive": -211.8, "HPGD-TD": -237.8, "HPGD-MC": -261.9}


@checked
@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for numbers out of range."""

    ascents: Ascents = dataclasses.field(
        default_factory=lambda: Ascents(
            starts=[0, 1, 2, 3], starts_from_paths=[0, 1, 2, 3], steps=100, learning_rate=0.05, paths=10, every=10
        )
    )


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Climb from every start; write a file for each ascent, summary.json and report.html."""
    run_ascents(config, out, "building", start, BEST, PUBLISHED)


def start(number: int) -> Problem:
    """Everything at one half for number 0, uniform random settings for others."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    return building() if number == 0 else building(insulation=drawn[0], airflow=drawn[1])


def report(out: Path) -> None:
    """Write report.html and its figure from a finished run's folder."""
    write_ascents_report(out, "building", load_config(Config, out / CONFIG).ascents)
