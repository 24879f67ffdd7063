"""One reward for several policies at once, against one that was tuned around the first of them alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from align_cbrl import InputError
from align_cbrl.llm import Population
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Figure, Panel, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

from ..parts import each_seed, kept, of_each_seed
from ..replies.bench import Bench, BenchSettings
from ..replies.models import Family
from ..statistics import band, counted, interval, mean_and_error, shown

FRESH_SEED = 1_000_003
REWARDS = {"plain": "plain RLHF", "alone": "tuned around the first", "population": "tuned around all"}


@dataclasses.dataclass(frozen=True)
class MemberSettings:
    """One follower: a model by folder or hub id, or the architecture and size of one that is made."""

    model: str | None = None
    family: Family = "llama"
    hidden_size: int = 64
    layers: int = 2


@dataclasses.dataclass(frozen=True)
class Config(BenchSettings):
    """See config.yaml.

    Raises:
        InputError: no seeds, or fewer than two followers.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None
    followers: dict[str, MemberSettings] = dataclasses.field(default_factory=dict)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("seeds: expected at least one, got none")
        if len(self.followers) < 2:
            raise InputError(f"followers: expected at least two, got {list(self.followers)}")


def run(config: Config, out: Path, resume: bool) -> None:
    """Tune around all followers, and around the first; then a fresh follower of each on every reward. See config.yaml.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="population", free=["jobs"])
    each_seed(_one_seed, config, out, config.seeds, config.jobs)
    write_summary(out, _summarize(config, out))
    report(out)
    _print(out)


def _one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    bench = Bench(config, seed, folder, cache)
    models = {
        name: member.model or bench.made_policy(member.family, member.hidden_size, member.layers)
        for name, member in config.followers.items()
    }

    def tuned(name: str, members: list[str]) -> dict[str, Any]:
        leader = bench.leader()
        followers = [bench.follower(seed, model) for model in members]
        objective = config.objective.build(bench.judge, bench.costs())
        bench.tune(name, leader, objective, Population(followers))
        return {"curve": bench.curve(name), "reward": leader.describe()}

    def frozen(reward: str, name: str) -> dict[str, Any]:
        leader = bench.plain() if reward == "plain" else bench.learned(reward)
        return bench.final(bench.train(f"{reward}-{name}", leader, seed + FRESH_SEED, model=models[name]))

    def keep(part: str, make: Any, *arguments: Any) -> None:
        kept(folder / f"{part}.json", lambda: make(*arguments))

    keep("population", tuned, "population", list(models.values()))
    keep("alone", tuned, "alone", [next(iter(models.values()))])
    for reward in REWARDS:
        for name in models:
            keep(f"{reward}-{name}", frozen, reward, name)


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    rows, comparisons = [], {}
    for name in config.followers:
        judged = {}
        for reward, label in REWARDS.items():
            parts = of_each_seed(out, config.seeds, f"{reward}-{name}")
            judged[reward] = [part["judge"]["mean"] for part in parts]
            figures = {f: mean_and_error([p[f]["mean"] for p in parts]) for f in ("judge", "proxy", "kl", "words")}
            rows.append({"name": f"{name}, {label}", **figures})
        for other in ("plain", "alone"):
            differences = [a - b for a, b in zip(judged["population"], judged[other], strict=True)]
            comparisons[f"{name}: {REWARDS['population']} minus {REWARDS[other]}"] = interval(differences)
    rewards = {
        name: [part["reward"] for part in of_each_seed(out, config.seeds, name)] for name in ("population", "alone")
    }
    return {"rows": rows, "comparisons": comparisons, "rewards": rewards}


def report(out: Path) -> None:
    """Draw curves.png and write report.html again, from what a finished run left in `out`."""
    summary = read_summary(out)
    config = load_config(Config, out / "config.yaml")
    curves = [part["curve"] for part in of_each_seed(out, config.seeds, "population")]
    lines = {
        name: band([[row for row in curve if row["member"] == i] for curve in curves], "step", "judge")
        for i, name in enumerate(config.followers)
    }
    curves_png(out / "curves.png", [Panel("While one reward is tuned", "follower steps of each", "judge", lines)])
    write_report(
        out / "report.html",
        title="One reward for several policies",
        subtitle=f"{', '.join(config.followers)}; {counted(len(config.seeds), 'seed')}.",
        sections=[
            Section(
                "Fresh followers on each reward",
                "",
                [
                    Table(
                        ["follower and reward", "judge", "proxy (sd)", "KL (nats)", "words"],
                        [
                            [r["name"], *(shown(r[f]) for f in ("judge", "proxy", "kl", "words"))]
                            for r in summary["rows"]
                        ],
                        "Test prompts; mean and standard error over seeds.",
                    ),
                    Table(["comparison", "judge"], [[n, shown(v)] for n, v in summary["comparisons"].items()]),
                ],
            ),
            Section("Curves", "", [Figure(out / "curves.png", "Mean over seeds, and one standard error.")]),
        ],
    )


def _print(out: Path) -> None:
    summary = read_summary(out)
    for row in summary["rows"]:
        print(f"{row['name']:<36} judge {shown(row['judge'])}   KL {shown(row['kl'])}")
    for name, value in summary["comparisons"].items():
        print(f"{name}: {shown(value)}")
    print(f"report: {out / 'report.html'}")
