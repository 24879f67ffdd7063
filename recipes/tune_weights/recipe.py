"""Tune a reward so that the policy pleases the judge, not the proxy: HPGD, and what people do instead."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import RewardMixture
from align_cbrl.runs.imports import require_package
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Section, Table

from ..refit import price_of, refit
from ..statistics import interval, shown
from ..study import (
    FRESH_SEED,
    SeedSettings,
    Study,
    compared,
    curves,
    described,
    difference,
    parts_of,
    rows_of,
    samples,
    seeds_in_words,
)
from ..worlds.bench import FIGURES, Bench, BenchSettings, tuning_steps
from ..worlds.check import check_bench
from .search import SearchSettings, search

LABELS = {
    "base": "base model",
    "plain": "plain RLHF on the proxy",
    "random": "random search over weights",
    "tpe": "TPE (Optuna)",
    "refit": "weights refitted to the judge",
    "hpgd": "HPGD",
    "fresh": "fresh follower on HPGD's reward",
}


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study; each has its own models, follower, leader and prompts.
        jobs: seeds at a time; null: one per core.
        methods: hpgd, and the rivals that it is compared with.
        search: how TPE and random search look for weights.

    Raises:
        InputError: no seeds, rivals without HPGD, or rivals that search weights around a leader that has none, or that
            learns beta as well.
    """

    methods: list[Literal["hpgd", "tpe", "random", "refit"]] = dataclasses.field(default_factory=lambda: ["hpgd"])
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "hpgd" not in self.methods:
            raise InputError("methods: expected hpgd among them; it is what the others are compared with")
        if {"tpe", "random"} & set(self.methods):
            require_package("optuna", "tune", "methods: tpe and random")
        rivals = [name for name in self.methods if name != "hpgd"]
        if rivals and self.leader.kind != "mixture":
            raise InputError(
                f"leader.kind: expected mixture, whose weights {', '.join(rivals)} search too, got {self.leader.kind}"
            )
        if rivals and self.leader.beta is not None:
            raise InputError(
                f"leader.beta: {', '.join(rivals)} search weights at a fixed temperature; omit beta, or these methods"
            )


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    check_bench(config, notes, seeds=config.seeds)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Base, plain RLHF, HPGD and a fresh follower on what it learned; then the rivals."""
    taken = {"base": 0, "plain": config.follower.steps, "hpgd": tuning_steps(config), "fresh": config.follower.steps}
    taken |= {"refit": tuning_steps(config)} if "refit" in config.methods else {}
    searched_for = config.search.trials * config.search.steps
    bench = Bench(
        config, seed, folder, cache, taken | {n: searched_for for n in ("tpe", "random") if n in config.methods}
    )
    price = price_of(config.objective)  # which everybody pays
    start = bench.leader()  # where plain RLHF stands: what base and plain are measured against

    def base() -> dict[str, Any]:
        return bench.final(bench.follower(seed), start)

    def plain() -> dict[str, Any]:
        follower = bench.train("plain", bench.plain(), seed, shared=True)
        return {**bench.final(follower, start), "curve": bench.curve("plain")}

    def tuned() -> dict[str, Any]:
        leader, follower = bench.leader(), bench.follower(seed)
        finished = bench.tune("hpgd", leader, follower=follower)
        follower.save_pretrained(folder / "hpgd" / "policy")
        return {
            **bench.final(follower, leader), **bench.cost_of(finished, follower), "curve": bench.curve("hpgd"),
            "reward": leader.describe(), "weights": leader.weights() if isinstance(leader, RewardMixture) else None,
        }  # fmt: skip

    def fresh() -> dict[str, Any]:
        learned = bench.learned("hpgd")
        follower = bench.train("fresh", learned, seed + FRESH_SEED)
        follower.save_pretrained(folder / "fresh" / "policy")
        return {**bench.final(follower, learned), "curve": bench.curve("fresh")}

    def priced(drawn: Rollouts) -> float:
        assert drawn.log_policy is not None and drawn.log_prior is not None  # a follower's completions come with both
        return (bench.judge(None, drawn) - price * (drawn.log_policy - drawn.log_prior)).mean().item()

    def searched(kind: Literal["tpe", "random"]) -> dict[str, Any]:
        trials = search(bench, kind, config.search, folder / kind, priced if price else None)
        best = max(trials, key=lambda row: row["score"])
        figures = {name: {"mean": best[name], "se": math.nan} for name in ("judge", "proxy", "kl", "words")}
        return {**figures, "weights": best["weights"], "trials": trials}

    def refitted() -> dict[str, Any]:
        leader = bench.leader()
        assert isinstance(leader, RewardMixture)  # Config saw to it
        follower, curve = refit(bench, "refit", leader, spread=leader.budget, price=price)
        return {**bench.final(follower, leader), "curve": curve, "weights": leader.weights()}

    bench.kept("base", base)
    bench.kept("plain", plain)
    bench.kept("hpgd", tuned)
    bench.kept("fresh", fresh)
    if "refit" in config.methods:
        bench.kept("refit", refitted)
    for kind in ("tpe", "random"):
        if kind in config.methods:
            bench.kept(kind, lambda kind=kind: searched(kind))  # type: ignore[misc]


def steps_to(curve: list[dict[str, Any]], target: float, price: float = 0.0) -> float | None:
    """Follower steps until the judge's score is `target`, and still is at the next point; None if it never is.

    With a price of a nat it is the score less what the divergence of each point costs.

    Example:
        >>> steps_to([{"step": 10, "judge": 0.5}, {"step": 20, "judge": 0.4}, {"step": 30, "judge": 0.6}], 0.45)
        30
    """
    for here, after in itertools.zip_longest(curve, curve[1:]):
        if _scored(here, price) >= target and (after is None or _scored(after, price) >= target):
            steps: float = here["step"]
            return steps
    return None


def _scored(point: dict[str, Any], price: float) -> float:
    return float(point["judge"] - (price * point["kl"] if price else 0.0))


def along_the_curve(
    first: Sequence[list[dict[str, Any]]], second: Sequence[list[dict[str, Any]]], price: float = 0.0
) -> dict[str, Any]:
    """One method's score on test prompts less another's, after as many labels, at every point that both curves have.

    Args:
        first: its curves, one a seed: points with `judged`, `judge` and, for a price, `kl`.
        second: the other's, of the same seeds.
        price: of a nat of divergence, taken off the score.

    Returns:
        `points`, for each number of labels the difference over seeds, and `mean`, of each seed's mean over the points.

    Example:
        >>> first = [[{"judged": 64, "judge": 0.5}, {"judged": 128, "judge": 0.6}], [{"judged": 64, "judge": 0.4}]]
        >>> second = [[{"judged": 64, "judge": 0.4}, {"judged": 128, "judge": 0.6}], [{"judged": 64, "judge": 0.4}]]
        >>> found = along_the_curve(first, second)
        >>> list(found["points"]), round(found["points"][64]["mean"], 6)
        ([64], 0.05)
    """
    pairs = [
        [{p["judged"]: _scored(p, price) for p in curve} for curve in curves]
        for curves in zip(first, second, strict=True)
    ]
    common = sorted(set.intersection(*(set(curve) for pair in pairs for curve in pair)))
    gaps = [[own[judged] - other[judged] for judged in common] for own, other in pairs]  # by seed, [points]
    points = {judged: interval(list(column)) for judged, column in zip(common, zip(*gaps, strict=True), strict=True)}
    return {"points": points, "mean": interval([sum(row) / len(row) for row in gaps]) if common else None}


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """Rows over seeds, differences to HPGD, and how soon it reaches what a search ends with."""
    names = [name for name in LABELS if name in ("base", "plain", "hpgd", "fresh") or name in config.methods]
    parts = parts_of(out, config.seeds, *names)
    price = price_of(config.objective)
    scores = {"judge": 0.0} | ({"judge less the price": price} if price else {})
    searches = [name for name in ("tpe", "random") if name in names and config.measure.every is not None]
    reached = []  # on test prompts, of which curves are where measure.every is given
    for score, kind, (i, seed) in itertools.product(scores, searches, enumerate(config.seeds)):
        curve, best = parts["hpgd"][i]["curve"], {n: parts[kind][i][n]["mean"] for n in ("judge", "kl")}
        target, total = _scored(best, scores[score]), config.search.trials * config.search.steps
        taken = steps_to(curve, target, scores[score])
        reached.append(
            {
                "seed": seed, "search": kind, "score": score, "target": target, "search_steps": total,
                "hpgd_steps": taken, "share": None if taken is None else taken / total,
                "hpgd_judged": next((r["judged"] for r in curve if r["step"] == taken), None),
                "search_judged": parts[kind][i]["trials"][-1]["judged"],
            }
        )  # fmt: skip
    rivals = [name for name in names if name not in ("base", "hpgd", "fresh")]
    tuned = parts["hpgd"]
    along = {}
    if "refit" in names and config.measure.every is not None:
        own, other = ([part["curve"] for part in parts[name]] for name in ("hpgd", "refit"))
        along = {score: along_the_curve(own, other, cost) for score, cost in scores.items()}
    return {
        "rows": rows_of(parts, list(FIGURES)),
        "comparisons": {
            **{f"judge, HPGD minus {LABELS[name]}": difference(parts, "hpgd", name) for name in rivals},
            f"judge, fresh follower minus {LABELS['plain']}": difference(parts, "fresh", "plain"),
        },
        "reached": reached,
        "along": along,
        "rewards": [part["reward"] for part in tuned],
        **{name: max(part[name] for part in tuned) for name in ("judge_calls", "judge_share", "leader_share")},
        "completions": max(part["completions"] for part in tuned),
        "seconds": {name: sum(part["seconds"] for part in runs) for name, runs in parts.items()},
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the tables."""
    found = []
    for name, gaps in summary["along"].items():
        found.append(f"{name}, HPGD minus refit along the curve, by completions judged:")
        found += [f"  {judged}: {shown(gap)}" for judged, gap in gaps["points"].items()]
        found += [f"  mean over these points: {shown(gaps['mean'])}"] if gaps["points"] else []
    for row in summary["reached"]:
        taken = "never" if row["hpgd_steps"] is None else f"after {row['hpgd_steps']:.0f}"
        found.append(
            f"seed {row['seed']}, {row['score']}: {row['search']} ends with {row['target']:.3f} after "
            f"{row['search_steps']} follower steps; HPGD is there {taken}"
        )
    return [
        *found,
        f"\nlearned reward, first seed: {described(summary['rewards'][0])}",
        f"judge calls: {summary['judge_calls']:,}, on {summary['judge_share']:.0%} of the follower's completions; "
        f"leader's share of time: {summary['leader_share']:.1%}",
        f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in summary['seconds'].items())}",
    ]


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report."""
    names = [row["name"] for row in summary["rows"]]
    parts = parts_of(out, config.seeds, *names)
    by_steps = {LABELS[n]: [p["curve"] for p in runs] for n, runs in parts.items() if "curve" in runs[0]}
    panels = [("Judge", "follower steps", "score", "step", "judge")]
    if config.measure.every is None:
        panels += [
            ("Divergence from the reference", "follower steps", "nats", "step", "kl"),
            ("Gap to the best response", "follower steps", "nats", "step", "gap"),
        ]
    else:
        panels.append(("Judge, against what it was asked", "completions judged", "score", "judged", "judge"))
        for name, runs in parts.items():
            if "trials" in runs[0]:  # drawn as the test score of the best trial so far
                best = [[{**t, "step": t["steps"], "judge": t["best"]} for t in run["trials"]] for run in runs]
                by_steps[LABELS[name]] = best
    of_batches = " Training completions, batch by batch." if config.measure.every is None else ""
    figure = curves(out, panels, by_steps, log_x=config.measure.every is not None)
    figure = dataclasses.replace(figure, caption=figure.caption + of_batches)
    result = STUDY.result(
        summary,
        "Test prompts. The proxy is in standard deviations of the reference's completions of one prompt; the gap is a "
        "lower bound, in expectation, of the divergence from the best response to the reward that the policy was "
        "trained on.",
    )
    text = (
        f"The leader saw the judge's verdict on {summary['judge_calls']:,} of the follower's "
        f"{summary['completions']:,} completions ({summary['judge_share']:.0%}) and took "
        f"{summary['leader_share']:.1%} of the wall time of tuning."
    )
    rewards = [[str(seed), described(reward)] for seed, reward in zip(config.seeds, summary["rewards"], strict=True)]
    found = [
        Section("Result", text, result),
        Section("The learned reward", "Weights are of standardised rewards.", [Table(["seed", "reward"], rewards)]),
        Section("Curves", "", [figure]),
        Section("Test prompts", "", samples(parts, LABELS, ["base", "plain", "hpgd", "fresh"])),
    ]
    gaps: dict[str, Any] = {}
    for name, along in summary["along"].items():
        gaps |= {f"{name}, after {judged} labels": gap for judged, gap in along["points"].items()}
        gaps |= {f"{name}, mean of these": along["mean"]} if along["points"] else {}
    if gaps:
        text = "Policies in training, on test prompts, both after as many verdicts."
        found.insert(1, Section("HPGD minus the refitted weights, label by label", text, [compared(gaps)]))
    if summary["reached"]:
        table = _reached(summary["reached"])
        found.insert(1, Section("Follower steps to the score that a search ends with", "", [table]))
    return found


def _reached(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each search and seed; those of earlier runs went by the judge's score alone, and do not say so."""
    heads = ["seed", "search", "score", "it ends with", "its steps", "HPGD's", "share", "HPGD judged", "it judged"]
    keys = ["search", "score", "target", "search_steps", "hpgd_steps", "share", "hpgd_judged", "search_judged"]
    return Table(
        heads,
        [[str(row["seed"]), *({"score": "judge", **row}[key] for key in keys)] for row in rows],
        "HPGD's steps: the first point of its curve at which the test score is at least the search's, and still is "
        "at the next point.",
    )


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    return (
        "Pleasing the judge, not the proxy",
        f"{config.world.name}, {seeds_in_words(config)}: HPGD around a follower.",
    )


STUDY = Study("tune_weights", Config, one_seed, summarize, sections, title, FIGURES, LABELS, lines, best_by="judge")
run, report = STUDY.run, STUDY.report
