"""Runs side by side: where their configurations differ, what they reached, and their curves."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from align_cbrl.errors import InputError
from align_cbrl.runs.charts import Curve, Panel, curves_png, mean_curve
from align_cbrl.runs.facts import differences
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Cell, Charts, Intervals, Item, Section, Table, write_report
from align_cbrl.runs.run_folder import SUMMARY, read_about, read_summary
from align_cbrl.runs.run_report import commit, is_smoke

_CURVES = {
    "objective": "Leader's objective",
    "kl": "Divergence from the reference (nats)",
    "gap": "Gap to the best response (nats)",
    "effective_sample_size": "Effective sample size",
    "gradient_norm": "Norm of the gradient",
}
"""Metrics of a leader step that are drawn when a run has them."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """A figure of a row.

    Attributes:
        value: the figure.
        error: its standard error, or None.
        count: over how many independent values, or None where the run does not say.
    """

    value: float
    error: float | None = None
    count: int | None = None

    def less(self, other: Reached) -> tuple[float, float | None, float | None]:
        """The difference to another run's figure, and its 95 % interval (Welch's) as of independent runs, or None.

        Example:
            >>> [round(value, 3) for value in Reached(1.0, 0.1, 5).less(Reached(0.5, 0.1, 5))]
            [0.5, 0.174, 0.826]
        """
        difference = self.value - other.value
        if None in (self.error, other.error) or min(self.count or 0, other.count or 0) < 2:
            return difference, None, None
        ours, theirs = (x.error**2 for x in (self, other))  # type: ignore[operator]  # not None, see above
        if ours + theirs == 0:
            return difference, difference, difference
        freedom = (ours + theirs) ** 2 / (ours**2 / (self.count - 1) + theirs**2 / (other.count - 1))  # type: ignore[operator]
        half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(ours + theirs)
        return difference, difference - half, difference + half


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder says of it.

    Attributes:
        name: the folder's path, without what all compared folders begin with.
        about: run.json.
        rows: the figures of summary.json by row and figure; empty before the end.
        aims: the figures of which the "largest" or the "smallest" is the best, as the recipe has it.
        learned: the learned reward in words, or None.
        logs: metrics.jsonl of the run, or of the leader in each of its seeds.
    """

    name: str
    about: dict[str, Any]
    rows: dict[str, dict[str, Reached]]
    aims: dict[str, str]
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
    """The tables that stand beside each other, by title: a column a run, and differences to the first of them.

    Of different recipes, settings are those that at least two runs have; figures always are. The best is marked where
    the runs' recipes say what is better.
    """
    names = [run.name for run in runs]
    differing = differences([run.about["config"] for run in runs])
    recipes = [run.about["recipe"] for run in runs]
    if len(set(recipes)) > 1:
        kept = {key: values for key, values in differing.items() if sum(v is not None for v in values) > 1}
        differing = {"recipe": recipes, **kept}
    settings = Table(["setting", *names], [[key, *(_setting(v) for v in values)] for key, values in differing.items()])
    tables = [("Settings that differ", settings)]

    lines: list[list[Cell]] = []
    marked: set[tuple[int, int]] = set()
    for row, figure in _shared(runs):
        found = [run.rows.get(row, {}).get(figure) for run in runs]
        if (best := _best(runs, figure, found)) is not None:
            marked.add((len(lines), 2 + best))
        lines.append([row, figure, *(_figure(value) for value in found)])
    tables.append(("What they reached", Table(["row", "figure", *names], lines, marked=marked)))
    first, *others = names
    changes: list[list[Cell]] = []
    for row, figure in _shared(runs):
        start, *later = (run.rows.get(row, {}).get(figure) for run in runs)
        cells = [None if start is None or value is None else _difference(value.less(start)) for value in later]
        if any(cells):
            changes.append([row, figure, *cells])
    tables.append(("Differences", Table(["row", "figure", *(f"{name} less {first}" for name in others)], changes)))
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
        "What they reached": "Final rows; ± one standard error, where the run gave one. The best of a figure is framed "
        "where its recipe says what is better; whether by more than chance, the differences say.",
        "Differences": "To the first run, with 95 % intervals (Welch's) as of runs that are independent of each other. "
        "Runs of the same seeds, which rise and fall together, are told apart too rarely by them.",
    }
    sections = []
    for title, table in comparison(runs):
        text = notes.get(title, "")
        if title == "What they reached" and not table.rows:
            text = "They share no figures: other recipes, or no two of them have ended."
        if title == "Differences" and not table.rows:
            continue
        content: list[Item] = [table] if table.rows else []
        if title == "Differences" and (bars := _bars(runs)):
            content.insert(0, Intervals(bars))
        sections.append(Section(title, text, content))
    panels = _panels(runs)
    if panels:
        curves_png(out / "compare.png", panels)
        caption = "Against leader steps; with several seeds, their mean and one standard error around it."
        sections.append(Section("Curves", "", [Charts(panels, caption)]))
    about = [
        [
            run.name,
            run.about["recipe"] + (" (smoke test)" if is_smoke(run.about) else ""),
            *(str(_latest(run, key)) for key in ("started", "ended")),
            commit(run.about["sessions"][-1].get("git")),
        ]
        for run in runs
    ]
    table = Table(["run", "recipe", "started", "ended", "commit"], about)
    return write_report(
        out / "compare.html", title="Runs side by side", sections=[*sections, Section("The runs", "", [table])]
    )


def _shared(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Rows and figures that at least two of the runs have."""
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        for row, figures in run.rows.items():
            for figure in figures:
                counts[row, figure] = counts.get((row, figure), 0) + 1
    return [place for place, count in counts.items() if count > 1]


def _best(runs: Sequence[Run], figure: str, found: Sequence[Reached | None]) -> int | None:
    """Which run has the best of a figure; None where that is not said, or several are as good."""
    aims = {run.aims.get(figure) for run, value in zip(runs, found, strict=True) if value is not None}
    if len(aims) != 1 or not aims <= {"largest", "smallest"}:
        return None
    values = [None if value is None else value.value for value in found]
    known = [value for value in values if value is not None]
    best = max(known) if aims == {"largest"} else min(known)
    return values.index(best) if known.count(best) == 1 else None


def _bars(runs: Sequence[Run]) -> list[tuple[str, float, float | None, float | None]]:
    """The differences to the first run of the figures that are aimed at."""
    first, *others = runs
    return [
        (f"{row}, {figure}: {run.name} less {first.name}", *run.rows[row][figure].less(first.rows[row][figure]))
        for row, figure in _shared(runs)
        if figure in first.aims and figure in first.rows.get(row, {})
        for run in others
        if figure in run.rows.get(row, {})
    ]


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
    learned = (summary.get("leader") or {}).get("reward")
    return Run(name, about, _rows(summary.get("rows", [])), summary.get("aims", {}), learned, rows)


def _rows(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Reached]]:
    found: dict[str, dict[str, Reached]] = {}
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


def _number(value: Any, error: Any) -> Reached | None:
    """A figure and its standard error: `{"mean": m, "se": s, "n": n}`, or a number that may have one beside it."""
    count = None
    if isinstance(value, dict):
        value, error, count = value.get("mean"), value.get("se"), value.get("n")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return Reached(float(value), error, count)


def _figure(figure: Reached | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.value:.4g}" if figure.error is None else f"{figure.value:.4g} ± {figure.error:.2g}"


def _difference(found: tuple[float, float | None, float | None]) -> str:
    difference, low, high = found
    return f"{difference:+.4g}" if low is None else f"{difference:+.4g}, 95 % [{low:+.3g}, {high:+.3g}]"


def _setting(value: Any) -> str:
    return "–" if value is None else str(value)


def _latest(run: Run, key: str) -> Any:
    return run.about["sessions"][-1].get(key) or "–"


def _panels(runs: Sequence[Run]) -> list[Panel]:
    panels = []
    for key, title in _CURVES.items():
        drawn = {run.name: _curve(run.logs, key) for run in runs}
        curves = {name: curve for name, (curve, _) in drawn.items() if curve[0]}
        note = "; ".join(f"{name}: {remark}" for name, (_, remark) in drawn.items() if remark and name in curves)
        if len(curves) > 1:
            panels.append(Panel(title, "leader step", key.replace("_", " "), curves, note=note))
    return panels


def _curve(logs: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[Curve, str]:
    """Steps, means over logs, and standard errors where there are several logs, as far as all of them go; a remark."""
    values = [
        {row["step"]: row[key] for row in log if isinstance(row.get(key), (int, float)) and "step" in row}
        for log in logs
    ]
    return mean_curve(values) if values else (([], []), "")
