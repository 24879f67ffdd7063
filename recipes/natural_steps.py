"""Natural steps against Adam's, both along the exact hypergradient: how many leader steps each needs, and their price.

A world brings its cells, and a problem at a random start for each; what is done and told of them is here.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from align_cbrl import HPGD, HPGDConfig, InputError, Natural, Problem, Rollouts
from align_cbrl.checks import Count, Positive, Whole, check
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import read_summary, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ImplicitHypergradient, leader_value

from .study import measured

Kind = Literal["natural", "adam"]
KINDS: tuple[Kind, ...] = ("natural", "adam")
Cell = Mapping[str, float]
"""The settings that tell a cell from the others, such as {"temperature": 0.001, "price": 3.0}."""
GROWING = "natural.seeds"
"""The setting that may be longer when a run is resumed."""
Make = Callable[[Cell, int], Problem]
"""The problem of a cell, its leader at the start of a seed."""

_SHARE = 0.99  # of the gain, after which an ascent counts as done
_NOTHING = Rollouts.bandit(contexts=torch.zeros(1, dtype=torch.long), steps={})  # what an exact gradient sees


@dataclasses.dataclass(frozen=True)
class NaturalConfig:
    """The comparison. See natural.yaml.

    Attributes:
        seeds: of the starts that are reported.
        tuning_seeds: of the starts on which both settings are chosen.
        scale: standard deviation of a start.
        steps: leader steps of an ascent.
        ridge: `Natural.ridge`.
        nats: `Natural.nats`, of which one is chosen for all cells.
        learning_rates: Adam's, of which one is chosen for all cells.

    Raises:
        InputError: a number out of range, an empty list, a start that is both chosen on and reported.
    """

    seeds: tuple[int, ...] = (30, 31, 32, 33, 34)
    tuning_seeds: tuple[int, ...] = (100, 101)
    scale: float = 1.0
    steps: int = 200
    ridge: float = 0.05
    nats: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)

    def __post_init__(self) -> None:
        check("scale", self.scale, Positive)
        check("ridge", self.ridge, Positive)
        check("steps", self.steps, Count)
        for name in ("seeds", "tuning_seeds"):
            check(name, getattr(self, name), tuple[Whole, ...])
        for name in ("nats", "learning_rates"):
            check(name, getattr(self, name), tuple[Positive, ...])
        for name in ("seeds", "tuning_seeds", "nats", "learning_rates"):
            if not getattr(self, name):
                raise InputError(f"{name}: expected at least one, got none")
        both = sorted(set(self.seeds) & set(self.tuning_seeds))
        if both:
            raise InputError(f"tuning_seeds: expected none of the seeds that are reported, got {both}")


def compare(settings: NaturalConfig, cells: Sequence[Cell], tuning: Sequence[Cell], make: Make, out: Path) -> None:
    """Choose both settings, ascend from every start of every cell, and write tuning.jsonl, ascents.jsonl, summary.json.

    What is finished is found again when a run is resumed, also with more seeds than before.

    Args:
        settings: of the comparison.
        cells: what is reported.
        tuning: the cells, of these, on which the settings are chosen.
        make: see `Make`.
        out: the run's folder.
    """
    trials = [
        (cell, seed, choice) for cell in tuning for seed in settings.tuning_seeds for choice in _choices(settings)
    ]

    def trial(number: int) -> dict[str, Any]:
        cell, seed, (kind, setting) = trials[number]
        (ascent,) = ascend(settings, lambda: make(cell, seed), {kind: setting}).values()
        return {**cell, "seed": seed, "kind": kind, "setting": setting, **ascent}

    chosen = best_settings(measured(out / "tuning.jsonl", len(trials), trial))
    starts = [(cell, seed) for seed in settings.seeds for cell in cells]  # more seeds only add to them

    def pair(number: int) -> dict[str, Any]:
        cell, seed = starts[number]
        found = ascend(settings, lambda: make(cell, seed), chosen)
        return {**cell, "seed": seed, **{f"{kind}_{k}": v for kind, one in found.items() for k, v in one.items()}}

    pairs = measured(out / "ascents.jsonl", len(starts), pair)[: len(starts)]
    rows = [row(cell, [p for p in pairs if all(p[name] == cell[name] for name in cell)]) for cell in cells]
    write_summary(out, {"rows": rows, "aims": {}, "chosen": chosen, "steps": settings.steps})
    for one in rows:
        print("  ".join(f"{n} {f'{value:.5g}' if isinstance(value, float) else value}" for n, value in one.items()))


def _choices(settings: NaturalConfig) -> list[tuple[Kind, float]]:
    return [("natural", nats) for nats in settings.nats] + [("adam", rate) for rate in settings.learning_rates]


def ascend(
    settings: NaturalConfig, start: Callable[[], Problem], chosen: Mapping[Kind, float]
) -> dict[Kind, dict[str, Any]]:
    """Ascents from the same start, in turns: `values` (exact, before every step and at the end) and `seconds` a step.

    Seconds are the processor's, of a whole leader step: best response, gradient and, of a natural step, metric.
    """
    loops: dict[Kind, HPGD] = {}
    for kind, setting in chosen.items():
        problem = start()
        natural = Natural(nats=setting, ridge=settings.ridge) if kind == "natural" else None
        adam = torch.optim.Adam(problem.parameters, lr=setting, maximize=True) if natural is None else None
        config = HPGDConfig(natural=natural, max_gradient_norm=None, progress=False)
        loops[kind] = HPGD(problem, adam, ImplicitHypergradient(), config)
    values: dict[Kind, list[float]] = {kind: [] for kind in loops}
    seconds = dict.fromkeys(loops, 0.0)
    for _ in range(settings.steps):
        for kind, loop in loops.items():
            began = time.process_time()
            values[kind].append(loop.leader_step(_NOTHING)["objective"])
            seconds[kind] += time.process_time() - began
    for kind, loop in loops.items():
        values[kind].append(leader_value(loop.problem).item())
    return {kind: {"values": values[kind], "seconds": seconds[kind] / settings.steps} for kind in loops}


def best_settings(trials: Sequence[Mapping[str, Any]]) -> dict[Kind, float]:
    """Of each kind, the setting that needs the fewest steps to 99 % of the gain on average; then the highest end.

    A start's gain is the best of all its trials' final values less its value. An ascent that never gets there counts
    as one that got there after its last step.
    """
    found: dict[tuple[Kind, float], list[tuple[float, float]]] = {}
    for one in trials:
        here = [t for t in trials if _start(t) == _start(one)]
        best, values = max(t["values"][-1] for t in here), one["values"]
        steps = min(steps_needed(values, best), len(values))
        found.setdefault((one["kind"], one["setting"]), []).append((steps, -values[-1]))
    return {
        kind: min(
            (s for k, s in found if k == kind),
            key=lambda s: tuple(statistics.fmean(column) for column in zip(*found[kind, s], strict=True)),
        )
        for kind in KINDS
    }


def _start(trial: Mapping[str, Any]) -> dict[str, Any]:
    """What says where an ascent began: the cell and the seed."""
    own = ("problem", "kind", "setting", "values", "seconds")
    return {name: value for name, value in trial.items() if name not in own}


def steps_needed(values: Sequence[float], reference: float) -> float:
    """Leader steps to 99 % of the gain from the first value to the reference; infinite where it is not reached.

    Example:
        >>> steps_needed([0.0, 0.5, 0.995, 1.0], 1.0), steps_needed([0.0, 0.5], 1.0)
        (2, inf)
    """
    aim = values[0] + _SHARE * (reference - values[0])
    return next((step for step, value in enumerate(values) if value >= aim), math.inf)


def row(cell: Cell, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A cell's figures over its starts: of each kind median, least and most `steps` (None where 99 % was not reached),
    from how many starts it was `reached`, the mean `value` at the end and its standard error, milliseconds a step.
    """
    found: dict[str, Any] = {**cell, "starts": len(pairs), "start": statistics.fmean(_first(p) for p in pairs)}
    for kind in KINDS:
        steps = [steps_needed(p[f"{kind}_values"], max(p[f"{k}_values"][-1] for k in KINDS)) for p in pairs]
        last = [p[f"{kind}_values"][-1] for p in pairs]
        for name, value in (("steps", statistics.median_high(steps)), ("least", min(steps)), ("most", max(steps))):
            found[f"{kind}_{name}"] = value if math.isfinite(value) else None
        found[f"{kind}_reached"] = sum(math.isfinite(s) for s in steps)
        found[f"{kind}_value"] = statistics.fmean(last)
        found[f"{kind}_value_se"] = statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else None
        found[f"{kind}_milliseconds"] = 1000 * statistics.fmean(p[f"{kind}_seconds"] for p in pairs)
    return found


def _first(pair: Mapping[str, Any]) -> float:
    return float(pair["adam_values"][0])


def write_report(out: Path, title: str, cells: Sequence[Cell]) -> None:
    """report.html and curves.png from a finished comparison's folder."""
    summary, pairs = read_summary(out), MetricsLog.read(out / "ascents.jsonl")
    panels = []
    for cell in cells:
        here = [p for p in pairs if all(p[name] == cell[name] for name in cell)]
        curves = {kind: [p[f"{kind}_values"] for p in here] for kind in KINDS}
        steps = list(range(len(curves["adam"][0])))
        means: dict[str, tuple[Sequence[float], ...]] = {
            kind: (steps, [statistics.fmean(at) for at in zip(*some, strict=True)]) for kind, some in curves.items()
        }
        panels.append(Panel(", ".join(f"{name} {value:g}" for name, value in cell.items()), "leader step", "J", means))
    curves_png(out / "curves.png", panels)
    chosen = summary["chosen"]
    write_run_report(
        out,
        title=title,
        subtitle=f"steps of {chosen['natural']:g} nats against Adam {chosen['adam']:g}, exact gradients",
        sections=[
            Section(
                "Leader steps",
                f"To {_SHARE:.0%} of the gain, which is the larger of the two final values from the same start, after "
                f"{summary['steps']} steps, less the value there: median (least to most) over starts, and from how "
                "many of them. Then the exact value at the end, with its standard error, and processor time of a step.",
                [
                    Table(
                        [*cells[0], "start", *(f"{kind}: {what}" for kind in KINDS for what in ("steps", "J", "ms"))],
                        [
                            [*(f"{one[n]:g}" for n in cells[0]), f"{one['start']:.3f}", *_cells(one)]
                            for one in summary["rows"]
                        ],
                    ),
                    Charts(panels, "Leader's value before each step, mean over starts."),
                ],
            )
        ],
    )


def _cells(one: Mapping[str, Any]) -> list[str]:
    cells = []
    for kind in KINDS:
        middle, least, most = (
            "-" if one[f"{kind}_{n}"] is None else str(one[f"{kind}_{n}"]) for n in ("steps", "least", "most")
        )
        error = one[f"{kind}_value_se"]
        value = f"{one[f'{kind}_value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
        cells += [
            f"{middle} ({least} to {most}), {one[f'{kind}_reached']}/{one['starts']}",
            value,
            f"{one[f'{kind}_milliseconds']:.1f}",
        ]
    return cells
