"""One reward for several policies at once, against one that was tuned around the first of them alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from align_cbrl import InputError
from align_cbrl.llm import Population
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Section

from ..study import FRESH_SEED, SeedSettings, Study, curves, difference, parts_of, rows_of, seeds_in_words
from ..worlds.bench import FIGURES, Bench, BenchSettings, tuning_steps
from ..worlds.check import check_bench
from ..worlds.world import PolicySettings

REWARDS = {"plain": "plain RLHF", "alone": "tuned around the first", "population": "tuned around all"}


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
        followers: policies by name.

    Raises:
        InputError: no seeds, or fewer than two followers.
    """

    followers: dict[str, PolicySettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.followers) < 2:
            raise InputError(f"followers: expected at least two, got {list(self.followers)}")


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    named = {f"followers.{n}.model": p.model for n, p in config.followers.items()}
    check_bench(config, notes, seeds=config.seeds, policies=named)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Tune around all followers, and around the first; then a fresh follower of each on every reward."""
    around = tuning_steps(config)
    fresh = {f"{reward}-{name}": config.follower.steps for reward in REWARDS for name in config.followers}
    bench = Bench(config, seed, folder, cache, {"population": len(config.followers) * around, "alone": around, **fresh})
    models = {name: bench.policy(settings) for name, settings in config.followers.items()}

    def tuned(name: str, members: list[str]) -> dict[str, Any]:
        leader, followers = bench.leader(), [bench.follower(seed, model) for model in members]
        bench.tune(name, leader, follower=Population(followers))
        return {"curve": bench.curve(name), "reward": leader.describe()}

    def frozen(reward: str, name: str) -> dict[str, Any]:
        leader = bench.plain() if reward == "plain" else bench.learned(reward)
        return bench.final(bench.train(f"{reward}-{name}", leader, seed + FRESH_SEED, model=models[name]))

    bench.kept("population", lambda: tuned("population", list(models.values())))
    bench.kept("alone", lambda: tuned("alone", list(models.values())[:1]))
    for reward in REWARDS:
        for name in models:
            bench.kept(f"{reward}-{name}", lambda reward=reward, name=name: frozen(reward, name))  # type: ignore[misc]  # mypy cannot infer a lambda with defaults


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """For each follower: what it reaches on each reward, and by how much the shared one is better."""
    names = [(reward, name) for name in config.followers for reward in REWARDS]
    parts = parts_of(out, config.seeds, "population", "alone", *(f"{reward}-{name}" for reward, name in names))
    fresh = {f"{name}, {REWARDS[reward]}": parts[f"{reward}-{name}"] for reward, name in names}
    return {
        "rows": rows_of(fresh, ("judge", "proxy", "kl", "words")),
        "comparisons": {
            f"{name}: {REWARDS['population']} minus {REWARDS[other]}": difference(
                parts, f"population-{name}", f"{other}-{name}"
            )
            for name in config.followers
            for other in ("plain", "alone")
        },
        "rewards": {name: [part["reward"] for part in parts[name]] for name in ("population", "alone")},
    }


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report, with curves.png."""
    tuned = parts_of(out, config.seeds, "population")["population"]
    members = {
        name: [[point for point in run["curve"] if point["member"] == i] for run in tuned]
        for i, name in enumerate(config.followers)
    }
    panels = [("While one reward is tuned", "follower steps of each", "judge", "step", "judge")]
    table = STUDY.result(summary, "Test prompts.")
    return [
        Section("Fresh followers on each reward", "", table),
        Section("Curves", "", [curves(out, panels, members)]),
    ]


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    return "One reward for several policies", f"{', '.join(config.followers)}; {seeds_in_words(config)}."


STUDY = Study("population", Config, one_seed, summarize, sections, title, FIGURES)
run, report = STUDY.run, STUDY.report
