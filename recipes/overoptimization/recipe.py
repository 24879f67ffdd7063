"""The gold-KL frontier of plain RLHF and of the reward that HPGD has tuned."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from align_cbrl import InputError
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Figure, Panel, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

from ..parts import each_seed, kept, of_each_seed
from ..replies.bench import Bench, BenchSettings, at_divergence
from ..statistics import counted, interval, mean_and_error, shown

FRESH_SEED = 1_000_003
LABELS = {"plain": "plain RLHF", "fresh": "on HPGD's reward", "hpgd": "while HPGD tunes"}


@dataclasses.dataclass(frozen=True)
class Config(BenchSettings):
    """See config.yaml.

    Raises:
        InputError: no seeds, or no divergences to compare at.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None
    grid: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)

    def __post_init__(self) -> None:
        if not self.seeds or not self.grid:
            raise InputError("seeds, grid: expected at least one of each")
        if min(self.grid) <= 0:
            raise InputError(f"grid: expected positive numbers of nats, got {min(self.grid)}")


def run(config: Config, out: Path, resume: bool) -> None:
    """Plain RLHF, HPGD, and a fresh follower on what it learned, for every seed; then the report. See config.yaml.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="overoptimization", free=["jobs"])
    each_seed(_one_seed, config, out, config.seeds, config.jobs)
    write_summary(out, _summarize(config, out))
    report(out)
    _print(out)


def _one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    bench = Bench(config, seed, folder, cache)

    def frozen(name: str, seed: int) -> dict[str, Any]:
        follower = bench.follower(seed)
        start = {"step": 0, **bench.point(follower)}
        leader = bench.plain() if name == "plain" else bench.learned("hpgd")
        trained = bench.train(name, leader, seed)
        return {**bench.final(trained), "curve": [start, *bench.curve(name)]}

    def tuned() -> dict[str, Any]:
        follower, leader = bench.follower(seed), bench.leader()
        bench.tune("hpgd", leader, config.objective.build(bench.judge, bench.costs()), follower)
        return {**bench.final(follower), "curve": bench.curve("hpgd"), "reward": leader.describe()}

    # The same prompts and random numbers for both: what differs is the reward.
    kept(folder / "plain.json", lambda: frozen("plain", seed + FRESH_SEED))
    kept(folder / "hpgd.json", tuned)
    kept(folder / "fresh.json", lambda: frozen("fresh", seed + FRESH_SEED))


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


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    parts = {name: of_each_seed(out, config.seeds, name) for name in LABELS}
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
    return {
        "rows": [
            {"name": name, **{f: mean_and_error([p[f]["mean"] for p in runs]) for f in ("judge", "proxy", "kl")}}
            for name, runs in parts.items()
        ],
        "frontier": frontier,
        "ends": {name: [max(p["kl"] for p in run["curve"]) for run in parts[name]] for name in ("plain", "fresh")},
        "fits": {name: [fit_overoptimization(run["curve"]) for run in parts[name]] for name in ("plain", "fresh")},
        "rewards": [run["reward"] for run in parts["hpgd"]],
    }  # fmt: skip


def report(out: Path) -> None:
    """Draw frontier.png and write report.html again, from what a finished run left in `out`."""
    summary = read_summary(out)
    config = load_config(Config, out / "config.yaml")
    parts = {name: of_each_seed(out, config.seeds, name) for name in LABELS}
    fine = [i * max(config.grid) / 50 for i in range(51)]
    panels = []
    for figure, label in (("judge", "judge"), ("proxy", "proxy (sd)")):
        curves = {}
        for name in ("plain", "fresh"):
            values = [[at_divergence(run["curve"], nats, figure) for run in parts[name]] for nats in fine]
            found = [mean_and_error(v) if (v := [x for x in row if x is not None]) else None for row in values]
            reached = [(nats, f) for nats, f in zip(fine, found, strict=True) if f is not None]
            curves[LABELS[name]] = (
                [nats for nats, _ in reached],
                [f["mean"] for _, f in reached],
                [f["se"] if math.isfinite(f["se"]) else 0.0 for _, f in reached],
            )
        panels.append(Panel(label.capitalize(), "nats from the reference", label, curves))
    curves_png(out / "frontier.png", panels)
    rows = [
        [f"{r['kl']:g}", r["seeds"], *(None if r[k] is None else shown(r[k]) for k in ("plain", "hpgd", "difference"))]
        for r in summary["frontier"]
    ]
    write_report(
        out / "report.html",
        title="Over-optimization",
        subtitle=f"{counted(len(config.seeds), 'seed')}: the judge's score against the divergence spent for it.",
        sections=[
            Section(
                "The frontier",
                "Followers trained from the reference on a frozen reward, measured on test prompts every few steps: on "
                "the proxy (plain RLHF), and on the reward that HPGD has tuned. Both are trained on the same prompts "
                "with the same random numbers.",
                [
                    Figure(out / "frontier.png", "Mean over the seeds that reach so far, and one standard error."),
                    Table(
                        ["nats", "seeds", "plain RLHF", "on HPGD's reward", "difference"], rows,
                        "A seed counts where both of its curves reach the divergence.",
                    ),
                ],
            ),
            Section(
                "The form of Gao et al.",
                "judge = start + d (a - b log d), d the root of the divergence; a is the slope at first, b how fast it "
                "is lost.",
                [
                    Table(
                        ["seed", "a, plain", "b, plain", "a, HPGD's reward", "b, HPGD's reward"],
                        [
                            [str(seed), *summary["fits"]["plain"][i], *summary["fits"]["fresh"][i]]
                            for i, seed in enumerate(config.seeds)
                        ],
                    )
                ],
            ),
        ],
    )  # fmt: skip


def _print(out: Path) -> None:
    summary = read_summary(out)
    for row in summary["rows"]:
        print(f"{LABELS[row['name']]:<20} judge {shown(row['judge'])}   KL {shown(row['kl'])}")
    for row in summary["frontier"]:
        if row["difference"] is None:
            print(f"{row['kl']:g} nats: no seed reaches it on both rewards")
        else:
            print(
                f"{row['kl']:g} nats, {counted(row['seeds'], 'seed')}: plain {shown(row['plain'])}, "
                f"HPGD {shown(row['hpgd'])}, "
                f"difference {shown(row['difference'])}"
            )
    print(f"report: {out / 'report.html'}")
