"""Runs side by side: where their configurations differ, what they reached, and their curves."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.runs.facts import differences
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Figure, Item, Panel, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import SUMMARY, read_about, read_summary

_CURVES = {
    "objective": "Leader's objective",
    "kl": "Divergence from the reference (nats)",
    "gap": "Gap to the best response (nats)",
    "effective_sample_size": "Effective sample size",
    "gradient_norm": "Norm of the gradient",
}
"""Metrics of a leader step that are drawn when a run has them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder says of it.

    Attributes:
        name: the folder's path, without what all compared folders begin with.
        about: run.json.
        rows: the figures of summary.json by row and figure, each (value, standard error or None); empty before the end.
        learned: the learned reward in words, or None.
        logs: metrics.jsonl of the run, or of the leader in each of its seeds.
    """

    name: str
    about: dict[str, Any]
    rows: dict[str, dict[str, tuple[float, float | None]]]
    learned: str | None
    logs: list[list[dict[str, Any]]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, which may be unfinished.

    Raises:
        InputError: fewer than two folders, one twice, one that is not a run's, or one that has nothing to show yet.
    """
    if len(folders) < 2:
        raise InputError("compare: expected at least two folders")
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise InputError(f"{folders[i]}: given twice")
    return [_read(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def comparison(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """The tables that stand beside each other, by title: a column a run.

    Of different recipes, settings are those that at least two runs have; figures always are.
    """
    names = [run.name for run in runs]
    differing = differences([run.about["config"] for run in runs])
    recipes = [run.about["recipe"] for run in runs]
    if len(set(recipes)) > 1:
        kept = {key: values for key, values in differing.items() if sum(v is not None for v in values) > 1}
        differing = {"recipe": recipes, **kept}
    settings = Table(["setting", *names], [[key, *(_setting(v) for v in values)] for key, values in differing.items()])
    tables = [("Settings that differ", settings)]

    shared: dict[tuple[str, str], int] = {}
    for run in runs:
        for row, figures in run.rows.items():
            for figure in figures:
                shared[row, figure] = shared.get((row, figure), 0) + 1
    lines = [
        [row, figure, *(_figure(run.rows.get(row, {}).get(figure)) for run in runs)]
        for (row, figure), count in shared.items()
        if count > 1
    ]
    tables.append(("What they reached", Table(["row", "figure", *names], lines)))
    learned = [[run.name, run.learned] for run in runs if run.learned is not None]
    if learned:
        tables.append(("Learned rewards", Table(["run", "reward"], learned)))
    return tables


def write_comparison(out: Path, runs: Sequence[Run]) -> Path:
    """Write compare.html, and compare.png with the curves that at least two of the runs have, into `out`.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    notes = {
        "Settings that differ": ""
        if differences([r.about["config"] for r in runs])
        else "None: the same configuration.",
        "What they reached": "Final rows; ± one standard error, where the run gave one.",
    }
    sections = []
    for title, table in comparison(runs):
        text = notes.get(title, "")
        if title == "What they reached" and not table.rows:
            text = "They share no figures: other recipes, or no two of them have ended."
        content: list[Item] = [table] if table.rows else []
        sections.append(Section(title, text, content))
    panels = _panels(runs)
    if panels:
        png = curves_png(out / "compare.png", panels)
        caption = "Against leader steps; with several seeds, their mean and one standard error around it."
        sections.append(Section("Curves", "", [Figure(png, caption)]))
    about = [
        [run.name, run.about["recipe"], *(str(_latest(run, key)) for key in ("started", "ended")), _commit(run)]
        for run in runs
    ]
    table = Table(["run", "recipe", "started", "ended", "commit"], about)
    return write_report(
        out / "compare.html", title="Runs side by side", sections=[*sections, Section("The runs", "", [table])]
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Paths below the folder that holds them all."""
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    return [folder.relative_to(common).as_posix() for folder in folders]


def _read(folder: Path, name: str) -> Run:
    about = read_about(folder)
    logs = [folder / "metrics.jsonl"]
    if not logs[0].is_file():
        logs = sorted(folder.glob("seed-*/hpgd/metrics.jsonl")) or sorted(folder.glob("seed-*/metrics.jsonl"))
    rows = [log for log in map(MetricsLog.read, logs) if log]
    summary = read_summary(folder) if rows == [] or (folder / SUMMARY).is_file() else {}
    return Run(name, about, _rows(summary.get("rows", [])), (summary.get("leader") or {}).get("reward"), rows)


def _rows(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for number, row in enumerate(rows, start=1):
        words = [value for value in row.values() if isinstance(value, str)]
        label = ", ".join(words) or (f"row {number}" if len(rows) > 1 else "result")
        if label in found:
            label = f"{label} ({number})"
        found[label] = {
            key: figure
            for key, value in row.items()
            if not key.endswith("_se") and (figure := _number(value, row.get(f"{key}_se")))
        }
    return found


def _number(value: Any, error: Any) -> tuple[float, float | None] | None:
    """A figure and its standard error: `{"mean": m, "se": s}`, or a number that may have one beside it."""
    if isinstance(value, dict):
        value, error = value.get("mean"), value.get("se")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value), error


def _figure(figure: tuple[float, float | None] | None) -> str:
    if figure is None:
        return "–"
    value, error = figure
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _setting(value: Any) -> str:
    return "–" if value is None else str(value)


def _latest(run: Run, key: str) -> Any:
    return run.about["sessions"][-1].get(key) or "–"


def _commit(run: Run) -> str:
    git = _latest(run, "git")
    return git if isinstance(git, str) else git["commit"][:10] + (" and changes" if git["dirty"] else "")


def _panels(runs: Sequence[Run]) -> list[Panel]:
    panels = []
    for key, title in _CURVES.items():
        curves = {run.name: curve for run in runs if (curve := _curve(run.logs, key))}
        if len(curves) > 1:
            panels.append(Panel(title, "leader step", key.replace("_", " "), curves))
    return panels


def _curve(logs: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[list[float], ...] | None:
    """Steps, means over logs, and standard errors where there are several logs; None where no row has the metric."""
    values: dict[float, list[float]] = {}
    for log in logs:
        for row in log:
            if isinstance(row.get(key), (int, float)) and "step" in row:
                values.setdefault(row["step"], []).append(row[key])
    steps = sorted(values)
    if not steps:
        return None
    means = [sum(values[step]) / len(values[step]) for step in steps]
    if len(logs) == 1:
        return steps, means
    errors = []
    for step, mean in zip(steps, means, strict=True):
        count = len(values[step])
        squares = sum((value - mean) ** 2 for value in values[step])
        errors.append(math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0)
    return steps, means, errors
