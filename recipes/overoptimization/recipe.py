"""The gold-KL frontier of plain RLHF and of the reward that HPGD has tuned."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from align_cbrl import InputError
from align_cbrl.checks import Positive, check
from align_cbrl.runs.charts import Panel, curves_png, mean_curve
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Charts, Section, Table

from ..statistics import counted, interval, mean_and_error, shown
from ..study import FRESH_SEED, SeedSettings, Study, compared, parts_of, rows_of, seeds_in_words
from ..worlds.bench import FIGURES, Bench, BenchSettings, at_divergence, tuning_steps
from ..worlds.check import check_bench

LABELS = {"plain": "plain RLHF", "fresh": "on HPGD's reward", "hpgd": "while HPGD tunes"}


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
        grid: divergences, in nats, at which the two curves are compared.

    Raises:
        InputError: no seeds, or no divergences to compare at.
    """

    grid: list[float] = dataclasses.field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        check("grid", self.grid, list[Positive])
        if not self.grid:
            raise InputError("grid: expected at least one number of nats, got none")


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    check_bench(config, notes, seeds=config.seeds)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Plain RLHF, HPGD, and a fresh follower on what it learned."""
    bench = Bench(
        config, seed, folder, cache,
        {"plain": config.follower.steps, "hpgd": tuning_steps(config), "fresh": config.follower.steps},
    )  # fmt: skip
    bench.leader()  # refuses what it cannot be built from, before anything is trained

    def frozen(name: str) -> dict[str, Any]:
        # The same prompts and random numbers for both: what differs is the reward.
        start = {"step": 0, **bench.point(bench.follower(seed + FRESH_SEED))}
        leader = bench.plain() if name == "plain" else bench.learned("hpgd")
        trained = bench.train(name, leader, seed + FRESH_SEED)
        return {**bench.final(trained), "curve": [start, *bench.curve(name)]}

    def tuned() -> dict[str, Any]:
        follower, leader = bench.follower(seed), bench.leader()
        bench.tune("hpgd", leader, follower=follower)
        return {**bench.final(follower), "curve": bench.curve("hpgd"), "reward": leader.describe()}

    bench.kept("plain", lambda: frozen("plain"))
    bench.kept("hpgd", tuned)
    bench.kept("fresh", lambda: frozen("fresh"))


def fit_overoptimization(curve: list[dict[str, Any]]) -> tuple[float, float]:
    """Least squares of judge - judge at the start = d (a - b log d), d = sqrt(KL) (Gao et al. 2022, section 3.2, RL).

    Args:
        curve: points with `kl` and `judge`, the reference first.

    Returns:
        a and b; NaN where fewer than two points have moved.

    Example:
        >>> points = [{"kl": d * d, "judge": d * (0.5 - 0.2 * math.log(d))} for d in (0.5, 1.0, 2.0)]
        >>> [round(x, 6) for x in fit_overoptimization([{"kl": 0.0, "judge": 0.0}, *points])]
        [0.5, 0.2]
    """
    moved = [(math.sqrt(p["kl"]), p["judge"] - curve[0]["judge"]) for p in curve if p["kl"] > 1e-3]
    if len(moved) < 2:
        return math.nan, math.nan
    d, gain = np.array(moved).T
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), gain, rcond=None)
    return float(a), float(b)


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """The two curves at equal divergence, and the fit of each."""
    parts = parts_of(out, config.seeds, *LABELS)
    frontier = []
    for nats in config.grid:
        pairs = [
            (at_divergence(p["curve"], nats), at_divergence(h["curve"], nats))
            for p, h in zip(parts["plain"], parts["fresh"], strict=True)
        ]
        both = [(p, h) for p, h in pairs if p is not None and h is not None]
        frontier.append(
            {
                "kl": nats, "seeds": len(both),
                "plain": mean_and_error([p for p, _ in both]) if both else None,
                "hpgd": mean_and_error([h for _, h in both]) if both else None,
                "difference": interval([h - p for p, h in both]) if both else None,
            }
        )  # fmt: skip
    frozen = ("plain", "fresh")
    return {
        "rows": rows_of(parts, ("judge", "proxy", "kl")),
        "frontier": frontier,
        "ends": {name: [max(p["kl"] for p in run["curve"]) for run in parts[name]] for name in frozen},
        "fits": {name: [fit_overoptimization(run["curve"]) for run in parts[name]] for name in frozen},
        "rewards": [run["reward"] for run in parts["hpgd"]],
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the table: the comparison at each divergence."""
    return [
        f"{row['kl']:g} nats: no seed reaches it on both rewards"
        if row["difference"] is None
        else f"{row['kl']:g} nats, {counted(row['seeds'], 'seed')}: plain {shown(row['plain'])}, HPGD "
        f"{shown(row['hpgd'])}, difference {shown(row['difference'])}"
        for row in summary["frontier"]
    ]


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report, with frontier.png."""
    parts = parts_of(out, config.seeds, "plain", "fresh")
    fine = [i * max(config.grid) / 50 for i in range(51)]
    panels = []
    for figure, label in (("judge", "judge"), ("proxy", "proxy (sd)")):
        curves, remarks = {}, []
        for name, runs in parts.items():
            values = [{nats: at_divergence(run["curve"], nats, figure) for nats in fine} for run in runs]
            curves[LABELS[name]], remark = mean_curve(values)
            remarks += [f"{LABELS[name]}: {remark}"] if remark else []
        panels.append(Panel(label.capitalize(), "nats from the reference", label, curves, note="; ".join(remarks)))
    curves_png(out / "frontier.png", panels)
    differences = {
        f"judge at {r['kl']:g} nats, on HPGD's reward minus plain RLHF": r["difference"]
        for r in summary["frontier"]
        if r["difference"] is not None
    }
    rows = [
        [f"{r['kl']:g}", r["seeds"], *(None if r[k] is None else shown(r[k]) for k in ("plain", "hpgd"))]
        for r in summary["frontier"]
    ]
    fits = [
        [str(seed), *summary["fits"]["plain"][i], *summary["fits"]["fresh"][i]] for i, seed in enumerate(config.seeds)
    ]
    return [
        Section(
            "The frontier",
            "Followers trained from the reference on a frozen reward, measured on test prompts every few steps: on the "
            "proxy (plain RLHF), and on the reward that HPGD has tuned. Both are trained on the same prompts with the "
            "same random numbers.",
            [
                Charts(panels, "Mean over seeds as far as all of them reach, and one standard error."),
                Table(
                    ["nats", "seeds", "plain RLHF", "on HPGD's reward"],
                    rows,
                    "A seed counts where both of its curves reach the divergence.",
                ),
                *([compared(differences)] if differences else []),
            ],
        ),
        Section("Where training ends", "", STUDY.result(summary, "Test prompts.")),
        Section(
            "The form of Gao et al.",
            "judge = start + d (a - b log d), d the root of the divergence; a is the slope at first, b how fast it is "
            "lost.",
            [Table(["seed", "a, plain", "b, plain", "a, HPGD's reward", "b, HPGD's reward"], fits)],
        ),
    ]


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    return "Over-optimization", f"{seeds_in_words(config)}: the judge's score against the divergence spent for it."


STUDY = Study("overoptimization", Config, one_seed, summarize, sections, title, FIGURES, LABELS, lines)
run, report = STUDY.run, STUDY.report
