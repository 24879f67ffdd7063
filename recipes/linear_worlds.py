"""What the recipes on linear systems share: ascents from many starts, exact, naive and from paths, and their report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align_cbrl import HPGD, Halving, HPGDConfig, Problem, Rollouts, successive_halving
from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import claim, read_kept, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ExactClimb, FittedSystem, SystemMemory, leader_value
from toy_cmdp.followers.linear_quadratic import require_normal
from toy_cmdp.referee.linear_quadratic import linear_values

from .statistics import interval, mean_and_error, shown
from .study import compared

LABELS = {"exact": "HPGD, exact gradient", "paths": "HPGD, from paths (fitted system)", "naive": "naive, no response"}


@checked
@dataclasses.dataclass(frozen=True)
class Ascents:
    """How far every leader climbs.

    Attributes:
        starts: numbers of the starts, of the exact and the naive leader.
        starts_from_paths: those of the leader that sees paths only.
        steps: leader steps.
        learning_rate: Adam's; held for the first half of the exact leaders' steps, then it falls to zero.
        paths: in a leader step.
        every: leader steps between two points of the curves.
    """

    starts: list[Whole]
    starts_from_paths: list[Whole]
    steps: Count
    learning_rate: Positive
    paths: Count
    every: Count


class NaiveClimb(ExactClimb):
    """Follows the exact gradient at a fixed policy of the follower, who then responds."""

    def _backward(self) -> None:
        nature = require_normal(self._joint.follower).context_probabilities
        (nature * linear_values(self._joint, responds=False)).sum().backward()


def climbed(problems: list[Problem], ascents: Ascents, kind: type[ExactClimb]) -> dict[str, Any]:
    """All starts side by side: exact values by start and point of the curve, and seconds."""
    began = time.perf_counter()
    values = [[leader_value(problem).item()] for problem in problems]
    steps = [0]

    def keep(step: int, now: torch.Tensor) -> None:
        steps.append(step)
        for curve, value in zip(values, now.tolist(), strict=True):
            curve.append(value)

    climb = kind(problems, steps=ascents.steps, learning_rate=ascents.learning_rate)
    halving = Halving(steps=ascents.steps, cuts=())  # nobody is dropped: every start is reported
    successive_halving(climb, len(problems), halving, every=ascents.every, on_values=keep)
    return {"steps": steps, "values": values, "seconds": time.perf_counter() - began}


def from_paths(problem: Problem, ascents: Ascents, seed: int) -> dict[str, Any]:
    """One start, which sees paths of the follower only: exact values on the way, environment steps, seconds."""
    began = time.perf_counter()
    steps, values = [0], [leader_value(problem).item()]

    def observe(metrics: dict[str, float], rollouts: Rollouts) -> None:
        if len(run.history) % ascents.every == 0 or len(run.history) == ascents.steps:
            steps.append(len(run.history))
            values.append(leader_value(problem).item())

    run = HPGD(
        problem,
        torch.optim.Adam(problem.parameters, lr=ascents.learning_rate, maximize=True),
        FittedSystem(SystemMemory()),
        HPGDConfig(
            steps=ascents.steps,
            contexts_per_step=ascents.paths,
            group_size=1,
            max_gradient_norm=None,
            seed=seed,
            progress=False,
        ),
        observers=[observe],
    )
    run.run()
    used = ascents.steps * ascents.paths * require_normal(problem.follower).length
    parameters = [p.tolist() for p in problem.parameters]
    seconds = time.perf_counter() - began
    return {"steps": steps, "values": values, "environment_steps": used, "seconds": seconds, "parameters": parameters}


def run_ascents(
    config: Any, out: Path, recipe: str, start: Callable[[int], Problem], best: float, published: dict[str, float]
) -> None:
    """All ascents, each kept in a file of its own; summary.json and report.html.

    Args:
        config: with a field `ascents`.
        out: the run's folder.
        recipe: its name.
        start: maps the number of a start to the problem there.
        best: the best value known.
        published: values by whose they are.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    ascents: Ascents = config.ascents
    claim(out, config, recipe=recipe)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, kind in (("exact", ExactClimb), ("naive", NaiveClimb)):
        path = out / f"{name}.json"
        if (kept := read_kept(path)) is None:
            problems = [start(number) for number in ascents.starts]
            kept = climbed(problems, ascents, kind)
            kept["parameters"] = [[p.tolist() for p in problem.parameters] for problem in problems]
            write_json(path, kept)
        found[name] = [{"steps": kept["steps"], "values": curve} for curve in kept["values"]]
        print(f"{LABELS[name]}: {', '.join(f'{curve[-1]:.4g}' for curve in kept['values'])}", flush=True)
    found["paths"] = []
    for number in ascents.starts_from_paths:
        path = out / f"paths-{number}.json"
        if (kept := read_kept(path)) is None:
            kept = from_paths(start(number), ascents, number)
            write_json(path, kept)
        found["paths"].append(kept)
        print(f"{LABELS['paths']}, start {number}: {kept['values'][-1]:.4g}", flush=True)
    rows = [
        {
            "name": LABELS[name],
            "starts": len(curves),
            "value": mean_and_error([curve["values"][-1] for curve in curves]),
            "worst": min(curve["values"][-1] for curve in curves),
            "environment_steps": curves[0].get("environment_steps"),
        }
        for name, curves in found.items()
    ]
    gained = [e["values"][-1] - n["values"][-1] for e, n in zip(found["exact"], found["naive"], strict=True)]
    comparisons = {f"value, {LABELS['exact']} minus {LABELS['naive']}": interval(gained)}
    summary = {
        "rows": rows,
        "comparisons": comparisons,
        "best": best,
        "published": published,
        "aims": {"value": "largest"},
    }
    summary["seconds"] = time.perf_counter() - began
    write_summary(out, summary)
    write_ascents_report(out, recipe, ascents)
    print(f"report: {out / 'report.html'}")


def write_ascents_report(out: Path, recipe: str, ascents: Ascents) -> None:
    """Write report.html and its figure from a finished run's folder."""
    summary = read_summary(out)
    curves = {}
    for name in ("exact", "naive"):
        kept = read_kept(out / f"{name}.json")
        assert kept is not None
        curves[LABELS[name]] = _curve(kept["steps"], kept["values"])
    sampled = [read_kept(out / f"paths-{number}.json") for number in ascents.starts_from_paths]
    runs = [one for one in sampled if one is not None]
    curves[LABELS["paths"]] = _curve(runs[0]["steps"], [one["values"] for one in runs])
    levels = {"best known": summary["best"], **{f"published {who}": v for who, v in summary["published"].items()}}
    panels = [Panel(recipe, "leader step", "leader's value J", curves, levels=levels)]
    curves_png(out / "curves.png", panels)
    cells = [
        [
            row["name"],
            str(row["starts"]),
            shown(row["value"]),
            f"{row['worst']:.3f}",
            "none" if row["environment_steps"] is None else f"{row['environment_steps']:,}",
        ]
        for row in summary["rows"]
    ]
    cells += [[f"published: {who}", "", f"{value:.3f}", "", ""] for who, value in summary["published"].items()]
    table = Table(["leader", "starts", "value", "worst", "environment steps"], cells, "Exact values; mean ± error.")
    write_run_report(
        out,
        title=recipe,
        subtitle=f"{ascents.steps} leader steps of Adam, learning rate {ascents.learning_rate:g}",
        sections=[
            Section(
                "Result",
                f"The best value known is {summary['best']:.2f}.",
                [table, compared(summary["comparisons"], "starts")],
            ),
            Section("Curves", "", [Charts(panels, "Means over starts; bands: standard errors.")]),
        ],
    )


def _curve(steps: list[int], values: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    points = [mean_and_error(column) for column in zip(*values, strict=True)]
    errors = [point["se"] if len(values) > 1 else 0.0 for point in points]
    return [float(step) for step in steps], [point["mean"] for point in points], errors
