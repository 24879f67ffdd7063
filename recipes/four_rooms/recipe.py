"""Four Rooms: one cell of the published table, exactly or from sampled paths; the whole, a search in each cell; or
natural steps against Adam's in every cell.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import toy_cmdp
from align_cbrl import HPGD, HPGDConfig, Hypergradient, InputError, PolicyResponse, Problem
from align_cbrl.estimators.search import scatter
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import fingerprint, load_config, to_dict
from align_cbrl.runs.files import read_json
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Figure, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp.problems.four_rooms import GOALS, Goals

from ..natural_steps import GROWING as GROWING_STARTS
from ..natural_steps import Cell, NaturalConfig, compare, write_report
from .figures import before_and_after_png, fines_png
from .table import GROWING, TableConfig, read_units, rows, run_units

_MAP_CAPTION = (
    "Fines on the map, and the follower's discounted occupancy without and with them, for each of its goals. "
    "S start, T the leader's target, G goal."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml, table.yaml and natural.yaml.

    With a `table`, of the other values only `slip` and `goals` are used; with `natural`, these and the table's
    `temperatures` and `prices`.

    Raises:
        InputError: a number of paths that is not positive.
    """

    seed: int = 0
    temperature: float = 0.001
    price: float = 1.0
    slip: float = 0.44
    goals: Goals = GOALS
    exact: bool = True
    steps: int = 400
    learning_rate: float = 0.1
    paths: int = 50
    table: TableConfig | None = None
    natural: NaturalConfig | None = None

    def __post_init__(self) -> None:
        if self.paths < 1:
            raise InputError(f"paths: expected a positive number, got {self.paths}")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Ascend the leader's value, in one cell or in all of a table.

    Writes metrics.jsonl, summary.json, curves.png, figures and report.html; one cell also weights.json, a table
    units/, the searches one by one.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="four_rooms", free=("steps", GROWING_STARTS, *(f"table.{name}" for name in GROWING)))
    if config.natural is not None:
        cells, tuning = _cells(config)
        compare(config.natural, cells, tuning, functools.partial(_scattered, config), out)
    elif config.table is None:
        _run_cell(config, out, resume)
    else:
        _run_table(config, config.table, out, resume)
    report(out)
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    config, summary = load_config(Config, out / CONFIG), read_summary(out)
    if config.natural is not None:
        write_report(out, "Four Rooms: natural steps against Adam", _cells(config)[0])
    elif config.table is None:
        _report(out, config, summary["rows"][0], read_json(out / "weights.json"))
    else:
        records = read_units(config.table, out)
        _table_report(out, config, config.table, records, rows(records))


def _cells(config: Config) -> tuple[list[Cell], list[Cell]]:
    """The cells of a table, and those of its middle price, on which settings are chosen."""
    table = TableConfig() if config.table is None else config.table
    cells: list[Cell] = [{"temperature": t, "price": p} for t in table.temperatures for p in table.prices]
    middle = table.prices[len(table.prices) // 2]
    return cells, [cell for cell in cells if cell["price"] == middle]


def _scattered(config: Config, cell: Cell, seed: int) -> Problem:
    """A cell's problem, its fines at a random start."""
    assert config.natural is not None
    problem = toy_cmdp.four_rooms(
        temperature=cell["temperature"], price=cell["price"], slip=config.slip, goals=config.goals, horizon=1
    )
    scatter(problem, config.natural.scale, seed=seed, start=0)
    return problem


def _run_cell(config: Config, out: Path, resume: bool) -> None:
    began = time.perf_counter()
    problem = toy_cmdp.four_rooms(
        temperature=config.temperature,
        price=config.price,
        slip=config.slip,
        goals=config.goals,
        seed=config.seed,
        horizon=1 if config.exact else None,  # the exact gradient needs no paths
    )
    hypergradient: Hypergradient = PolicyResponse(toy_cmdp.ExactCritic())
    if config.exact:
        hypergradient = toy_cmdp.ImplicitHypergradient()
    start = toy_cmdp.leader_value(problem).item()
    optimizer = torch.optim.Adam(problem.parameters, lr=config.learning_rate, maximize=True)
    loop = HPGDConfig(
        steps=config.steps,
        contexts_per_step=1 if config.exact else config.paths,
        group_size=1,
        max_gradient_norm=None if config.exact else 1.0,
        seed=config.seed,
        checkpoint_every=20,
    )
    settings = {
        name: value for name, value in to_dict(config).items() if name not in ("steps", "table", "natural")
    }  # a resumed run may be longer
    HPGD(problem, optimizer, hypergradient, loop, out, fingerprint=fingerprint(settings)).run(resume=resume)

    value = toy_cmdp.leader_value(problem).item()
    row = {"temperature": config.temperature, "price": config.price, "start": start, "value": value}
    weights = torch.cat([p.detach().flatten() for p in problem.parameters]).tolist()
    write_json(out / "weights.json", weights)
    write_summary(out, {"rows": [row], "aims": {"value": "largest"}, "seconds": time.perf_counter() - began})
    print(f"exact leader value: {start:.4f} at the start, {value:.4f} after {config.steps} steps")


def _report(out: Path, config: Config, row: dict[str, float], weights: Sequence[float]) -> None:
    log = MetricsLog.read(out / "metrics.jsonl")
    label = "exact" if config.exact else f"estimate from {config.paths} paths"
    values = ([r["step"] for r in log], [r["objective"] for r in log])
    panels = [Panel("Leader's value before each step", "leader step", "J", {label: values})]
    curves_png(out / "curves.png", panels)
    before_and_after_png(
        out / "map.png", weights,
        temperature=config.temperature, price=config.price, slip=config.slip, goals=config.goals,
    )  # fmt: skip
    write_run_report(
        out,
        title="Four Rooms",
        subtitle=f"lambda {config.temperature}, price {config.price}, slip {config.slip}, seed {config.seed}",
        sections=[
            Section(
                "Result",
                "Exact expected discounted return of the leader, from the start.",
                [
                    Table(list(row), [[f"{v:.4g}" for v in row.values()]]),
                    Charts(panels, "Leader's value against leader steps."),
                    Figure(out / "map.png", _MAP_CAPTION),
                ],
            )
        ],
    )


def _run_table(config: Config, table: TableConfig, out: Path, resume: bool) -> None:
    began = time.perf_counter()
    records = run_units(table, config.slip, config.goals, out, resume)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    with MetricsLog(out / "metrics.jsonl") as log:  # one row a search, in the table's order
        for step, record in enumerate(records):
            log.append({"step": step, **{k: v for k, v in record.items() if k not in ("weights", "fingerprint")}})
    result = rows(records)
    summary = {
        "rows": result,
        "aims": dict.fromkeys(("mean", "min", "median", "max"), "largest"),
        "seconds": time.perf_counter() - began,
        "processor_seconds": sum(record["seconds"] for record in records),
        "environment_steps": max((record["environment_steps"] or 0 for record in records), default=0),
    }
    write_summary(out, summary)
    for row in result:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def _table_report(
    out: Path, config: Config, table: TableConfig, records: Sequence[dict[str, Any]], result: Sequence[dict[str, float]]
) -> None:
    kind = "exact values" if table.environment_steps is None else "sampled returns"
    panels, overview, details = [], [], []
    for row in result:
        here = [r for r in records if (r["temperature"], r["price"]) == (row["temperature"], row["price"])]
        title = f"lambda {row['temperature']:g}, price {row['price']:g}"
        steps = [point[0] for point in here[0]["curve"]]
        bests = [[r["curve"][i][1] for r in here] for i in range(len(steps))]
        middles = [[r["curve"][i][2] for r in here] for i in range(len(steps))]
        panels.append(
            Panel(title, "leader step", "J", {"best start": _band(steps, bests), "median start": _band(steps, middles)})
        )
        finest = max(here, key=lambda r: r["value"])
        overview.append((f"{title}: J = {finest['value']:.2f}", finest["weights"]))
        png = out / "maps" / f"temperature-{row['temperature']:g}-price-{row['price']:g}.png"
        before_and_after_png(
            png,
            finest["weights"],
            temperature=row["temperature"],
            price=row["price"],
            slip=config.slip,
            goals=config.goals,
        )
        details.append(Figure(png, f"{title}, best seed ({finest['seed']}). {_MAP_CAPTION}"))
    curves_png(out / "curves.png", panels)
    fines_png(out / "fines.png", overview, columns=min(3, len(table.prices)), goals=config.goals)
    budget = (
        "Exact gradients."
        if table.environment_steps is None
        else f"Sampled followers only: about {table.environment_steps:,} environment steps a leader step, all starts "
        "together; no exact value decides anything."
    )
    write_run_report(
        out,
        title="Four Rooms: the table",
        subtitle=f"{len(table.seeds)} seeds a cell, {table.starts} starts a seed, slip {config.slip}. {budget}",
        sections=[
            Section(
                "Leader's value",
                "Exact expected discounted return of the leader that each search ends with; standard error over seeds.",
                [
                    Table(
                        ["lambda", "price", "mean", "minimum", "median", "maximum"],
                        [
                            [
                                f"{row['temperature']:g}",
                                f"{row['price']:g}",
                                f"{row['mean']:.3f}" + (f" ± {row['se']:.3f}" if math.isfinite(row["se"]) else ""),
                                row["min"],
                                row["median"],
                                row["max"],
                            ]
                            for row in result
                        ],
                    )
                ],
            ),
            Section(
                "Searches",
                f"Values of the starts still climbing ({kind}): mean over seeds, with a band of one standard error. "
                "Where starts are dropped, the median jumps.",
                [Charts(panels, "Best and median value of the starts against leader steps.")],
            ),
            Section(
                "Fines",
                "",
                [
                    Figure(out / "fines.png", "Fines of the best seed of each cell. S start, T target, G goals."),
                    *details,
                ],
            ),
        ],
    )


def _band(steps: Sequence[float], values: Sequence[Sequence[float]]) -> tuple[Sequence[float], ...]:
    """x, mean over seeds, and its standard error."""
    error = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in values]
    return steps, [statistics.fmean(v) for v in values], error
