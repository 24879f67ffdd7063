"""The study behind the README's table: several seeds of the main job with its baselines, and of the variant.

    python -m align_cbrl.recipes.docstrings.study --seeds 0 1 2 3 4 --variant-seeds 0 1 2 --out runs/study

Every seed has its own base model, proxy, follower, leader and prompts. Finished parts are found again when the command
is repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Figure, Panel, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import Clock, Rows, write_json

from ..statistics import interval, mean_and_error, shown
from .baselines import random_search, regression
from .config import Config
from .outputs import CURVES, LABELS, policy_logs
from .recipe import run
from .stages import prepare

FIGURES = ("judge", "proxy", "kl", "gap")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write summary.json and report.html in `--out` and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m align_cbrl.recipes.docstrings.study", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="of the main job and its baselines"
    )
    parser.add_argument("--variant-seeds", type=int, nargs="*", default=[0, 1, 2], help="of reward_model.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="seeds at a time")
    options = parser.parse_args(arguments)

    tasks = [(seed, "config", options.out, options.overrides, options.jobs) for seed in options.seeds]
    variants = [(seed, "reward_model", options.out, options.overrides, options.jobs) for seed in options.variant_seeds]
    # A new interpreter each: torch's threads do not survive a fork.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_seed, tasks))
        list(pool.map(run_seed, variants))

    studies = {}
    if options.seeds:
        studies["config"] = summarize(options.out, "config", options.seeds)
    if options.variant_seeds:
        studies["reward_model"] = summarize(options.out, "reward_model", options.variant_seeds)
    write_json(options.out / "summary.json", studies)
    _report(options.out, studies)
    for variant, study in studies.items():
        print(f"\n{variant}.yaml, {len(study['seeds'])} seeds (mean ± standard error over seeds)")
        print(f"{'':<44}" + "".join(f"{name:>16}" for name in FIGURES))
        for row in study["rows"]:
            cells = "".join(f"{row[name]['mean']:>9.3f} ±{row[name]['se']:.3f}" for name in FIGURES)
            print(f"{LABELS[row['name']]:<44}{cells}")
        for name, value in study["comparisons"].items():
            print(f"  {name}: {value}")
    print(f"\nreport: {options.out / 'report.html'}")


def run_seed(task: tuple[int, str, Path, list[str], int]) -> None:
    """One seed of one variant; the main job's baselines too."""
    seed, variant, out, overrides, jobs = task
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    file = Path(__file__).parent / f"{variant}.yaml"
    config = load_config(Config, file, [*overrides, f"seed={seed}"])
    folder = out / f"{variant}-{seed}"
    run(config, folder, resume=True)
    if variant != "config":
        return
    rows = Rows(folder / "baselines.json")
    clock = Clock(folder / "seconds.json")
    bench = prepare(config, out / "cache", clock.seconds)
    for name, baseline in (("regression", regression), ("random", random_search)):
        if name not in rows.done:
            with clock.measure(name):
                rows.add(name, baseline(bench, seed))


def summarize(out: Path, variant: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Rows over seeds, and the comparisons that the claims are about."""
    by_seed: list[dict[str, Any]] = []
    for seed in seeds:
        folder = out / f"{variant}-{seed}"
        by_seed.append({**Rows(folder / "rows.json").done, **Rows(folder / "baselines.json").done})
    names = [name for name in LABELS if name in by_seed[0]]

    def column(name: str, figure: str) -> torch.Tensor:
        return torch.tensor([rows[name][figure]["mean"] for rows in by_seed], dtype=torch.float64)

    gain = column("hpgd", "judge") - column("plain", "judge")
    kept = column("fresh", "judge") - column("plain", "judge")
    kl = {name: column(name, "kl") for name in ("hpgd", "plain")}
    shares = {name: max(rows["hpgd"]["leader"][name] for rows in by_seed) for name in ("leader_share", "judge_share")}
    comparisons = {
        "judge, HPGD minus plain": _difference(gain),
        "judge, fresh follower minus plain": _difference(kept),
        "share of the gain that the fresh follower keeps": f"{kept.mean() / gain.mean():.2f}",
        "KL, HPGD over plain": f"{kl['hpgd'].mean() / kl['plain'].mean():.2f} "
        f"(by seed {', '.join(f'{ratio:.2f}' for ratio in (kl['hpgd'] / kl['plain']).tolist())})",
        "leader's share of wall time, largest": f"{shares['leader_share']:.3f}",
        "share of completions judged, largest": f"{shares['judge_share']:.3f}",
    }
    for name in ("regression", "random"):
        if name in names:
            comparisons[f"judge, HPGD minus {name}"] = _difference(column("hpgd", "judge") - column(name, "judge"))
    return {
        "seeds": list(seeds),
        "rows": [{"name": n, **{f: mean_and_error(column(n, f)) for f in FIGURES}} for n in names],
        "by_seed": [{n: {f: rows[n][f]["mean"] for f in FIGURES} for n in names} for rows in by_seed],
        "learned_rewards": [rows["hpgd"]["leader"]["reward"] for rows in by_seed],
        "comparisons": comparisons,
        "seconds": [json.loads((out / f"{variant}-{seed}" / "seconds.json").read_text()) for seed in seeds],
    }


def _difference(values: torch.Tensor) -> str:
    return shown(interval(values.tolist()))


def _report(out: Path, studies: dict[str, Any]) -> None:
    sections = []
    for variant, study in studies.items():
        curves = _draw_curves(out, variant, study["seeds"])
        table = Table(
            ["policy", "judge", "proxy, sd", "KL, nats", "gap, nats"],
            [[LABELS[r["name"]], *(f"{r[f]['mean']:.3f} ± {r[f]['se']:.3f}" for f in FIGURES)] for r in study["rows"]],
            f"Test prompts; mean and standard error over {len(study['seeds'])} seeds.",
            highlight=LABELS["hpgd"],
        )
        compared = Table(["comparison", "value"], [[name, value] for name, value in study["comparisons"].items()])
        learned = Table(
            ["seed", "learned reward"],
            [[str(s), w] for s, w in zip(study["seeds"], study["learned_rewards"], strict=True)],
        )
        sections.append(Section(f"{variant}.yaml", "", [table, Figure(curves, _CURVES), compared, learned]))
    write_report(out / "report.html", title="Docstrings: the study", sections=sections)


_CURVES = "Training completions, batch by batch: mean over seeds, and one standard error around it."


def _draw_curves(out: Path, variant: str, seeds: Sequence[int]) -> Path:
    """Judge, divergence and gap against follower steps; bands are a standard error over seeds."""
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in seeds:
        for name, rows in policy_logs(out / f"{variant}-{seed}").items():
            logs.setdefault(name, []).append(rows)
    panels = []
    for key, title, label in CURVES:
        lines = {}
        for name, runs in logs.items():
            values = torch.tensor([[row[key] for row in rows] for rows in runs], dtype=torch.float64)  # [seeds, steps]
            error = values.std(0) / math.sqrt(len(runs)) if len(runs) > 1 else torch.zeros(values.shape[1])
            lines[name] = ([row["step"] for row in runs[0]], values.mean(0).tolist(), error.tolist())
        panels.append(Panel(title, "follower steps", label, lines))
    return curves_png(out / f"{variant}.png", panels)


if __name__ == "__main__":
    main()
