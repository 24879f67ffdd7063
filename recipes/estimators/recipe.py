"""Bias, variance, mean-squared error and cost of every estimator, at equal environment steps."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_cbrl import InputError
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.files import read_json
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_kept, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ExactFollower
from toy_cmdp.validate import PROBLEMS

from .study import CLIMBERS, ORACLES, Cell, measure

_SHOWN = ("plug-in", "visit-averaged", "BC-HG", "policy response", "direct only", "exact critic")


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for counts below their least, temperatures or problems that are none."""

    seed: int = 0
    leaders: int = 5
    temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
    prices: tuple[float, ...] = (1.0, 3.0, 5.0, 1.0, 3.0)
    steps: tuple[int, ...] = (1_000, 10_000, 100_000)
    repetitions: int = 200
    directions: int = 3
    problems: tuple[str, ...] = ("random_cmdp", "random_cmdp_cold", "layered")
    problem_steps: int = 10_000
    problem_repetitions: int = 100
    ascents: tuple[str, ...] = ("exact", "plug-in")
    ascent_steps: tuple[int, ...] = (10, 50)

    def __post_init__(self) -> None:
        least = {"leaders": 1, "repetitions": 2, "directions": 0, "problem_steps": 1, "problem_repetitions": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if not self.prices or not self.steps or min(self.steps) < 1:
            raise InputError("prices, steps: expected at least one price and one positive number of steps")
        for ascent in self.ascents:
            if ascent not in CLIMBERS:
                raise InputError(f"ascents: unknown ascent {ascent!r}; known are {', '.join(CLIMBERS)}")
        if any(step < 1 for step in self.ascent_steps):
            raise InputError(f"ascent_steps: expected positive numbers of leader steps, got {self.ascent_steps}")
        for problem in self.problems:
            if problem not in PROBLEMS:
                raise InputError(f"problems: unknown problem {problem!r}; known are {', '.join(PROBLEMS)}")
            if not isinstance(PROBLEMS[problem](0).follower, ExactFollower):
                raise InputError(f"problems: expected a table, got {problem}; `align-cbrl validate {problem}` takes it")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Measure cell after cell; write cells/*.json, summary.json, curves.png and report.html.

    Cells that are found in `out` are not measured again.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="estimators")
    (out / "cells").mkdir(parents=True, exist_ok=True)

    cells = _cells(config)
    results = []
    for number, cell in enumerate(cells, start=1):
        path = out / "cells" / f"{cell.key}.json"
        result = read_kept(path)
        if result is None:
            began = time.perf_counter()
            result = measure(cell, config.directions)
            result["wall_seconds"] = time.perf_counter() - began
            write_json(path, result)
            print(f"{number} of {len(cells)}: {cell.key}, {result['wall_seconds']:.1f} s")
            result = read_json(path)
        results.append(result)

    rooms = [result for result in results if result["temperature"] is not None and result["ascent"] is None]
    climbed = [result for result in results if result["ascent"] is not None]
    rows = _rows(rooms, config)
    coverage = _coverage(rooms, config)
    others = [result for result in results if result["temperature"] is None]
    problems = [
        {"problem": result["problem"], "estimator": name, **numbers}
        for result in others
        for name, numbers in result["estimators"].items()
    ]
    summary = {
        "rows": rows,
        "aims": {"median": "smallest"},
        "ascents": _ascents(climbed),
        "coverage": coverage,
        "problems": problems,
        "seconds": sum(result["wall_seconds"] for result in results),
    }
    write_summary(out, summary)
    report(out)
    for row in rows:
        if row["temperature"] is None:
            print(f"{row['steps']} steps, {row['estimator']}: relative MSE {row['median']:.3g}")
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figure from a finished run's folder."""
    summary = read_summary(out)
    config = load_config(Config, out / CONFIG)
    _report(out, config, summary["rows"], summary["coverage"], summary["problems"], summary["ascents"])


def _cells(config: Config) -> list[Cell]:
    rooms = [
        Cell("four_rooms", config.seed + leader, steps, config.repetitions, temperature, price)
        for steps in sorted(config.steps)
        for temperature in config.temperatures
        for leader in range(config.leaders)
        for price in [config.prices[leader % len(config.prices)]]
    ]
    others = [Cell(name, config.seed, config.problem_steps, config.problem_repetitions) for name in config.problems]
    climbed = [
        Cell(
            "four_rooms",
            config.seed,
            config.problem_steps,
            config.problem_repetitions,
            temperature,
            config.prices[number % len(config.prices)],
            ascent,
            steps,
        )
        for number, temperature in enumerate(config.temperatures)
        for ascent in config.ascents
        for steps in config.ascent_steps
    ]
    return others + climbed + rooms


def _ascents(climbed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ascent, leader step, temperature and estimator."""
    names = ("ascent", "leader_steps", "temperature", "price")
    return [
        {**{name: result[name] for name in names}, "estimator": estimator, **numbers}
        for result in climbed
        for estimator, numbers in result["estimators"].items()
    ]


def _rows(rooms: Sequence[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """A row for each temperature (None: all of them), number of steps and estimator: medians over leaders."""
    rows = []
    for temperature in (None, *config.temperatures):
        for steps in sorted(config.steps):
            here = [r for r in rooms if r["steps"] == steps and temperature in (None, r["temperature"])]
            if not here:
                continue
            for name in here[0]["estimators"]:
                found = [result["estimators"][name] for result in here]
                errors = [numbers["mse"] for numbers in found]
                rows.append(
                    {
                        "temperature": temperature,
                        "steps": steps,
                        "estimator": name,
                        "median": statistics.median(errors),
                        "se": statistics.median(numbers["mse_se"] for numbers in found),
                        "min": min(errors),
                        "max": max(errors),
                        "bias2": statistics.median(numbers["bias2"] for numbers in found),
                        "variance": statistics.median(numbers["variance"] for numbers in found),
                        "of_visit_averaged": _median_ratio(here, name, "visit-averaged"),
                        "of_bchg": _median_ratio(here, name, "BC-HG"),
                        "seconds": statistics.mean(numbers["seconds"] for numbers in found),
                        "sampling_seconds": statistics.mean(result["sampling_seconds"] for result in here),
                        "leaders": len(here),
                        "oracle": name in ORACLES,
                    }
                )
    return rows


def _median_ratio(here: Sequence[dict[str, Any]], name: str, rival: str) -> float:
    return statistics.median(r["estimators"][name]["mse"] / r["estimators"][rival]["mse"] for r in here)


def _coverage(rooms: Sequence[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Of the plug-in's 95 % intervals, by temperature (None: all of them) and number of steps."""
    rows = []
    for temperature in (None, *config.temperatures):
        for steps in sorted(config.steps):
            here = [r for r in rooms if r["steps"] == steps and temperature in (None, r["temperature"])]
            inside = sum(r["coverage"]["inside"] for r in here)
            total = inside + sum(r["coverage"]["outside"] for r in here)
            covered = inside / total if total else None
            rows.append(
                {
                    "temperature": temperature,
                    "steps": steps,
                    "given": statistics.mean(r["coverage"]["given"] for r in here) if here else None,
                    "covered": covered,
                    # Directions of one batch are not independent; the batches are.
                    "se": _binomial(covered, total / (1 + config.directions)) if covered is not None else None,
                    "intervals": total,
                }
            )
    return rows


def _binomial(share: float, count: float) -> float:
    return math.sqrt(max(share * (1 - share), 1e-12) / count)


def _report(
    out: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    coverage: Sequence[dict[str, Any]],
    problems: Sequence[dict[str, Any]],
    ascents: Sequence[dict[str, Any]],
) -> None:
    panels = []
    for temperature in config.temperatures:
        curves: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for name in _SHOWN:
            here = [r for r in rows if r["temperature"] == temperature and r["estimator"] == name]
            curves[name] = (
                [math.log10(r["steps"]) for r in here],
                [math.log10(r["median"]) for r in here],
                [r["se"] / r["median"] / math.log(10) for r in here],
            )
        panels.append(Panel(f"lambda = {temperature:g}", "log10 environment steps", "log10 relative MSE", curves))
    curves_png(out / "curves.png", panels)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    def least(found: Sequence[dict[str, Any]], figure: str) -> str | None:
        """The estimator with the least error of those that a leader could have, with no oracle's help."""
        own = [row for row in found if row.get(figure) is not None and row["estimator"] not in ORACLES]
        return None if not own else str(min(own, key=lambda row: row[figure])["estimator"])

    def of(temperature: float | None, steps: int) -> list[dict[str, Any]]:
        return [row for row in rows if row["temperature"] == temperature and row["steps"] == steps]

    columns = ("median", "se", "min", "max", "bias2", "variance", "of_visit_averaged", "of_bchg", "seconds")
    tables = [
        Table(
            ["estimator", *columns],
            [
                [row["estimator"] + (" (oracle)" if row["oracle"] else ""), *(number(row[c]) for c in columns)]
                for row in of(temperature, steps)
            ],
            f"{steps} environment steps, {'all temperatures' if temperature is None else f'lambda = {temperature:g}'}; "
            "set off: the least of those without an oracle",
            least(of(temperature, steps), "median"),
        )
        for temperature in (None, *config.temperatures)
        for steps in sorted(config.steps)
    ]
    elsewhere = [
        Table(
            ["estimator", "mse", "se", "bias2", "variance", "seconds"],
            [
                [row["estimator"], *(["does not apply"] + ["-"] * 4)]
                if "refused" in row
                else [row["estimator"], *(number(row[c]) for c in ("mse", "mse_se", "bias2", "variance", "seconds"))]
                for row in problems
                if row["problem"] == problem
            ],
            f"{problem}, {config.problem_steps} environment steps, {config.problem_repetitions} repetitions; set off: "
            "the least",
            least([row for row in problems if row["problem"] == problem], "mse"),
        )
        for problem in config.problems
    ]
    places = list(dict.fromkeys((row["ascent"], row["leader_steps"]) for row in ascents))
    along = [
        Table(
            ["estimator", *(f"lambda = {temperature:g}" for temperature in config.temperatures)],
            [
                [
                    name,
                    *(
                        number(row["mse"])
                        for row in ascents
                        if (row["ascent"], row["leader_steps"]) == place and row["estimator"] == name
                    ),
                ]
                for name in dict.fromkeys(row["estimator"] for row in ascents)
            ],
            f"Ascent of {place[0]}, leader step {place[1]}: relative MSE at {config.problem_steps} environment steps",
        )
        for place in places
    ]
    intervals = Table(
        ["lambda", "steps", "given", "covered", "se", "intervals"],
        [
            [
                "all" if row["temperature"] is None else f"{row['temperature']:g}",
                row["steps"],
                *(number(row[c]) for c in ("given", "covered", "se")),
                row["intervals"],
            ]
            for row in coverage
        ],
        f"Along the gradient and {config.directions} random directions.",
    )
    write_run_report(
        out,
        title="Estimators of the hypergradient",
        subtitle=f"{config.leaders} leaders a temperature, {config.repetitions} repetitions, seed {config.seed}",
        sections=[
            Section(
                "Mean-squared error",
                "Four Rooms at weights N(0, 1). Errors are relative to the squared norm of the exact hypergradient, so "
                "that 1 is the error of saying zero. Medians over leaders; se is the median of the leaders' own.",
                [Charts(panels, "Relative mean-squared error against environment steps."), *tables],
            ),
            *(
                [
                    Section(
                        "Along ascents",
                        "Leaders as an ascent from small weights meets them, whoever leads it. Near an optimum the "
                        "exact hypergradient, by which errors are divided, is small. The remembering plug-in "
                        "and the carried Q have seen the ascent's batches, 50 paths a leader step.",
                        along,
                    )
                ]
                if along
                else []
            ),
            Section("Intervals", "How often the plug-in's 95 % intervals hold the truth.", [intervals]),
            *([Section("Other problems", "", elsewhere)] if elsewhere else []),
        ],
    )
