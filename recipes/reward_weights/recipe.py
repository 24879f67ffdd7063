"""Tune reward weights by HPGD, and by the search that people run today around the same follower."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Literal

from align_cbrl import InputError
from align_cbrl.llm import RewardMixture
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Figure, Panel, Sample, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

from ..parts import each_seed, kept, of_each_seed
from ..replies.bench import Bench, BenchSettings
from ..replies.refit import refit
from ..statistics import band, counted, interval, mean_and_error, shown
from .search import SearchSettings, search

FRESH_SEED = 1_000_003
"""Added to the seed for the fresh follower: other prompts in another order, other samples."""

LABELS = {
    "base": "base model",
    "plain": "plain RLHF on the proxy",
    "random": "random search",
    "tpe": "TPE (Optuna)",
    "refit": "weights refitted to the judge",
    "hpgd": "HPGD",
    "fresh": "fresh follower on HPGD's reward",
}
FIGURES = {"judge": "judge", "proxy": "proxy (sd)", "kl": "KL (nats)", "words": "words"}


@dataclasses.dataclass(frozen=True)
class Config(BenchSettings):
    """See config.yaml.

    Raises:
        InputError: no seeds, a leader without weights, or a search without HPGD to compare it with.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None
    methods: list[Literal["hpgd", "tpe", "random", "refit"]] = dataclasses.field(default_factory=lambda: ["hpgd"])
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("seeds: expected at least one, got none")
        if "hpgd" not in self.methods:
            raise InputError("methods: expected hpgd among them; it is what the others are compared with")
        if self.leader.kind != "mixture":
            raise InputError(f"leader.kind: expected mixture, whose weights are tuned here, got {self.leader.kind}")


def run(config: Config, out: Path, resume: bool) -> None:
    """Every method on every seed, then the report; see config.yaml.

    Writes to `out`: summary.json, curves.png, report.html, and for each seed a folder with the learned reward
    (hpgd/reward), the curves and checkpoints.

    Args:
        config: settings.
        out: the run's folder.
        resume: unused: finished parts are found again, and the caller guards folders that were not meant to be.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="reward_weights", free=["jobs"])
    each_seed(_one_seed, config, out, config.seeds, config.jobs)
    write_summary(out, _summarize(config, out))
    report(out)
    _print(out)


def _one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    bench = Bench(config, seed, folder, cache)

    def tuned() -> dict[str, Any]:
        leader = bench.leader()
        assert isinstance(leader, RewardMixture)  # Config saw to it
        objective = config.objective.build(bench.judge, bench.costs())
        follower = bench.follower(seed)
        finished = bench.tune("hpgd", leader, objective, follower)
        return {
            **bench.final(follower), "curve": bench.curve("hpgd"), "weights": leader.weights(),
            "leader_share": finished.history[-1]["leader_share"], "judged": bench.curve("hpgd")[-1]["judged"],
        }  # fmt: skip

    def base() -> dict[str, Any]:
        return bench.final(bench.follower(seed))

    def plain() -> dict[str, Any]:
        return {**bench.final(bench.train("plain", bench.plain(), seed)), "curve": bench.curve("plain")}

    def fresh() -> dict[str, Any]:
        follower = bench.train("fresh", bench.learned("hpgd"), seed + FRESH_SEED)
        return {**bench.final(follower), "curve": bench.curve("fresh")}

    def searched(kind: Literal["tpe", "random"]) -> dict[str, Any]:
        trials = search(bench, kind, config.search, folder / kind)
        best = max(trials, key=lambda row: row["score"])
        return {
            "judge": {"mean": best["judge"], "se": math.nan}, "kl": {"mean": best["kl"], "se": math.nan},
            "weights": best["weights"], "trials": trials,
        }  # fmt: skip

    def refitted() -> dict[str, Any]:
        leader = bench.leader()
        assert isinstance(leader, RewardMixture)  # as above
        curve = refit(bench, "refit", leader, spread=config.leader.budget)
        return {
            "curve": curve, "weights": leader.weights(),
            **{name: {"mean": curve[-1][name], "se": math.nan} for name in FIGURES},
        }  # fmt: skip

    kept(folder / "base.json", base)
    kept(folder / "plain.json", plain)
    kept(folder / "hpgd.json", tuned)
    kept(folder / "fresh.json", fresh)
    if "tpe" in config.methods:
        kept(folder / "tpe.json", lambda: searched("tpe"))
    if "random" in config.methods:
        kept(folder / "random.json", lambda: searched("random"))
    if "refit" in config.methods:
        kept(folder / "refit.json", refitted)


def steps_to(curve: list[dict[str, Any]], target: float) -> float | None:
    """Follower steps until the judge's score is `target`, and still is at the next point; None if it never is.

    Example:
        >>> steps_to([{"step": 10, "judge": 0.5}, {"step": 20, "judge": 0.4}, {"step": 30, "judge": 0.6}], 0.45)
        30
    """
    for here, after in itertools.zip_longest(curve, curve[1:]):
        if here["judge"] >= target and (after is None or after["judge"] >= target):
            steps: float = here["step"]
            return steps
    return None


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    names = [name for name in LABELS if name in ("base", "plain", "hpgd", "fresh") or name in config.methods]
    parts = {name: of_each_seed(out, config.seeds, name) for name in names}

    def over_seeds(name: str, figure: str) -> dict[str, float] | None:
        return mean_and_error([p[figure]["mean"] for p in parts[name]]) if figure in parts[name][0] else None

    comparisons = {
        f"judge, HPGD minus {LABELS[name]}": interval(
            [h["judge"]["mean"] - other["judge"]["mean"] for h, other in zip(parts["hpgd"], parts[name], strict=True)]
        )
        for name in names
        if name not in ("base", "hpgd")
    }
    reached = []
    for i, seed in enumerate(config.seeds):
        for kind in ("tpe", "random"):
            if kind in names:
                target, total = parts[kind][i]["judge"]["mean"], config.search.trials * config.search.steps
                taken = steps_to(parts["hpgd"][i]["curve"], target)
                judged = next((r["judged"] for r in parts["hpgd"][i]["curve"] if r["step"] == taken), None)
                reached.append(
                    {
                        "seed": seed, "search": kind, "target": target, "search_steps": total, "hpgd_steps": taken,
                        "share": None if taken is None else taken / total, "hpgd_judged": judged,
                        "search_judged": parts[kind][i]["trials"][-1]["judged"],
                    }
                )  # fmt: skip
    return {
        "rows": [{"name": name, **{f: over_seeds(name, f) for f in FIGURES}} for name in names],
        "comparisons": comparisons,
        "reached": reached,
        "weights": [part["weights"] for part in parts["hpgd"]],
        "leader_share": max(part["leader_share"] for part in parts["hpgd"]),
    }


def report(out: Path) -> None:
    """Draw curves.png and write report.html again, from what a finished run left in `out`."""
    summary = read_summary(out)
    config = load_config(Config, out / "config.yaml")
    parts = {row["name"]: of_each_seed(out, config.seeds, row["name"]) for row in summary["rows"]}
    by_steps: dict[str, Any] = {}
    by_calls: dict[str, Any] = {}
    for name, runs in parts.items():
        if "trials" in runs[0]:
            trials = [run["trials"] for run in runs]
            by_steps[LABELS[name]], by_calls[LABELS[name]] = (
                band(trials, "steps", "best"),
                band(trials, "judged", "best"),
            )
        elif "curve" in runs[0]:
            curves = [run["curve"] for run in runs]
            by_steps[LABELS[name]] = band(curves, "step", "judge")
            if "judged" in curves[0][0]:
                by_calls[LABELS[name]] = band(curves, "judged", "judge")
    curves_png(
        out / "curves.png",
        [
            Panel("Judge, against follower steps", "follower steps", "score", by_steps, log_x=True),
            Panel("Judge, against what it was asked", "completions judged", "score", by_calls, log_x=True),
        ],
    )
    seeds = counted(len(config.seeds), "seed")
    write_report(
        out / "report.html",
        title="Tuned reward weights",
        subtitle=f"{len(parts['hpgd'][0]['weights'])} rewards, one judge, {seeds}: HPGD, and one RLHF run a trial.",
        sections=[
            Section(
                "Result",
                "",
                [
                    Table(
                        ["policy", *FIGURES.values()],
                        [
                            [LABELS[r["name"]], *(None if r[f] is None else shown(r[f]) for f in FIGURES)]
                            for r in summary["rows"]
                        ],
                        "Test prompts; mean and standard error over seeds. Of a search, the trial that the judge "
                        "preferred on training prompts.",
                        highlight=LABELS["hpgd"],
                    ),
                    Table(["comparison", "value"], [[n, shown(v)] for n, v in summary["comparisons"].items()]),
                ],
            ),
            Section(
                "Follower steps to the score that a search ends with",
                "",
                [
                    Table(
                        ["seed", "search", "score", "its steps", "HPGD's", "share", "HPGD judged", "it judged"],
                        [
                            [str(r["seed"]), r["search"], r["target"], r["search_steps"], r["hpgd_steps"], r["share"],
                             r["hpgd_judged"], r["search_judged"]]
                            for r in summary["reached"]
                        ],
                        "HPGD's steps: the first point of its curve at which the test score is at least the search's, "
                        "and still is at the next point.",
                    )
                ] if summary["reached"] else [],
            ),
            Section(
                "Curves", "", [Figure(out / "curves.png", "Test prompts; mean over seeds and one standard error around "
                "it. A search is drawn as the test score of its best trial so far.")]
            ),
            Section(
                "Learned weights",
                "Of standardised rewards: a weight of 1 is one standard deviation of the reward within a prompt.",
                [
                    Table(
                        ["reward", *(f"seed {seed}" for seed in config.seeds)],
                        [[name, *(w[name] for w in summary["weights"])] for name in summary["weights"][0]],
                    )
                ],
            ),
            Section("Test prompts", "", _samples(parts)),
        ],
    )  # fmt: skip


def _samples(parts: dict[str, list[dict[str, Any]]]) -> list[Sample]:
    names = [name for name in ("base", "plain", "hpgd", "fresh") if name in parts]
    by_name = {LABELS[name]: parts[name][0]["samples"] for name in names}
    first = next(iter(by_name.values()))
    return [Sample(first[i]["prompt"], {n: s[i]["completion"] for n, s in by_name.items()}) for i in range(len(first))]


def _print(out: Path) -> None:
    summary = read_summary(out)
    print(f"\n{'':<34}" + "".join(f"{label:>17}" for label in FIGURES.values()))
    for row in summary["rows"]:
        cells = "".join(f"{'-' if row[f] is None else shown(row[f]):>17}" for f in FIGURES)
        print(f"{LABELS[row['name']]:<34}{cells}")
    print()
    for name, value in summary["comparisons"].items():
        print(f"{name}: {shown(value)}")
    for row in summary["reached"]:
        taken = "never" if row["hpgd_steps"] is None else f"after {row['hpgd_steps']:.0f}"
        print(
            f"seed {row['seed']}: {row['search']} ends with {row['target']:.3f} after {row['search_steps']} follower "
            f"steps; HPGD is there {taken}"
        )
    weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in summary["weights"][0].items())
    print(f"\nlearned weights, first seed: {weights}\nreport: {out / 'report.html'}")
