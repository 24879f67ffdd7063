"""The same policy under several objectives: what each reaches on its own measure, and on the others'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from align_cbrl import ExpectedUtility, InputError, Objective, Rollouts
from align_cbrl.llm import RewardMixture
from align_cbrl.llm.settings.objective import ConstrainedSettings, ObjectiveSettings, WorstGroupSettings
from align_cbrl.objectives import LogRatio
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Matrix, Section, Table

from ..refit import price_of, refit
from ..statistics import interval, mean_and_error, shown
from ..study import FRESH_SEED, SeedSettings, Study, compared, parts_of, rows_of, seeds_in_words
from ..worlds.bench import FIGURES, Bench, BenchSettings, tuning_steps
from ..worlds.check import check_bench


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
        objectives: what the leader may want, by name.
        rivals: refit, the weights that describe the judge's scores, on as many labels as each objective's leader; at
            the price of the first objective, if it has one.
        penalty: of a constrained objective's measure: score per unit of cost beyond the bound.

    Raises:
        InputError: no seeds or objectives, one whose measure needs the leader itself, or one named as a rival; or a
            rival without a mixture.
    """

    objectives: dict[str, ObjectiveSettings] = dataclasses.field(default_factory=dict)
    rivals: list[Literal["refit"]] = dataclasses.field(default_factory=list)
    penalty: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.objectives:
            raise InputError("objectives: expected at least one, got none")
        if self.rivals and self.leader.kind != "mixture":
            raise InputError(f"leader.kind: expected mixture, whose weights refit chooses, got {self.leader.kind}")
        for name, objective in self.objectives.items():
            if name in ("base", "plain", "refit"):
                raise InputError(f"objectives.{name}: is the name of another policy of this comparison; choose another")
            if objective.kind == "preference":
                raise InputError(
                    f"objectives.{name}: preference measures the reward, not the policy; expected another kind"
                )
            if objective.kind in ("set", "targets", "means"):
                raise InputError(
                    f"objectives.{name}: expected a kind that the mean score of each test prompt measures, got "
                    f"{objective.kind}"
                )


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    named = {f"objectives.{n}": o for n, o in config.objectives.items()}
    check_bench(config, notes, seeds=config.seeds, objectives=named)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """HPGD for every objective, and a fresh follower on each learned reward."""
    both = tuning_steps(config) + config.follower.steps
    bench = Bench(
        config, seed, folder, cache,
        {"base": 0, "plain": config.follower.steps, **dict.fromkeys([*config.objectives, *config.rivals], both)},
    )  # fmt: skip
    for objective in config.objectives.values():
        bench.check_names(objective)
    bench.leader()  # refuses what it cannot be built from, before anything is trained

    def reached(follower: Any) -> dict[str, Any]:
        found = bench.final(follower)
        measures = {
            name: measure(objective, found["by_prompt"], found["groups"], config.penalty)
            for name, objective in config.objectives.items()
        }
        return {**found, "measures": measures}

    def tuned(name: str, objective: ObjectiveSettings) -> dict[str, Any]:
        leader = bench.leader()
        finished = bench.tune(name, leader, objective)
        fresh = bench.train(f"{name}-fresh", bench.learned(name), seed + FRESH_SEED)
        return {**reached(fresh), "reward": leader.describe(), "last": finished.history[-1]}

    def refitted() -> dict[str, Any]:
        leader = bench.leader()
        assert isinstance(leader, RewardMixture)  # Config saw to it
        price = price_of(next(iter(config.objectives.values())))
        refit(bench, "refit", leader, spread=leader.budget, price=price)
        return {**reached(bench.train("refit-fresh", leader, seed + FRESH_SEED)), "reward": leader.describe()}

    bench.kept("base", lambda: reached(bench.follower(seed)))
    bench.kept("plain", lambda: reached(bench.train("plain", bench.plain(), seed + FRESH_SEED)))
    for name, objective in config.objectives.items():
        bench.kept(name, lambda name=name, objective=objective: tuned(name, objective))  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
    if "refit" in config.rivals:
        bench.kept("refit", refitted)


def measure(
    settings: ObjectiveSettings, by_prompt: Mapping[str, list[float]], groups: Mapping[str, list[Any]], penalty: float
) -> float:
    """What a policy is worth by an objective, from its means on test prompts.

    Args:
        settings: the objective. A worst group is measured without a temperature, a constrained objective as the score
            less `penalty` times the cost beyond the bound.
        by_prompt: means for each test prompt: `judge`, `kl` (nats), and the costs by name.
        groups: the data's columns, for a worst group.
        penalty: see above.

    Example:
        >>> from align_cbrl.llm.settings.objective import CVaRSettings
        >>> measure(CVaRSettings(share=0.5), {"judge": [0.2, 0.8], "kl": [0.0, 0.0]}, {}, 0.2)
        0.2
    """
    means = {name: torch.tensor(values, dtype=torch.float64) for name, values in by_prompt.items()}
    prompts = Rollouts.bandit(
        contexts=torch.arange(len(means["judge"])),
        steps={"judge": means["judge"], **groups},
    ).knowing({LogRatio(): means["kl"][:, None]})

    def mean_of(name: str) -> Objective:
        return ExpectedUtility(lambda leader, rollouts: means[name][:, None])

    excess, cost = 0.0, mean_of("judge")
    if isinstance(settings, WorstGroupSettings):
        settings = dataclasses.replace(settings, temperature=0.0)
    if isinstance(settings, ConstrainedSettings):
        settings, cost = dataclasses.replace(settings, multiplier=0.0), mean_of(settings.cost)
        excess = max(0.0, means[settings.cost].mean().item() - settings.bound)
    # None of these utilities looks at the leader.
    value = settings.of(mean_of("judge"), cost).evaluate(None, prompts).value  # type: ignore[arg-type]
    return value.item() - penalty * excess


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """What each policy reaches on each measure, and which objective is best on each."""
    names = ["base", "plain", *config.objectives, *config.rivals]
    parts = parts_of(out, config.seeds, *names)
    matrix = {
        name: {m: mean_and_error([part["measures"][m] for part in parts[name]]) for m in config.objectives}
        for name in names
    }
    verdicts = {}
    for own in config.objectives:
        others = [n for n in (*config.objectives, *config.rivals) if n != own]
        ahead = {
            n: interval([a["measures"][own] - b["measures"][own] for a, b in zip(parts[own], parts[n], strict=True)])
            for n in others
        }
        best = max([own, *others], key=lambda n: matrix[n][own]["mean"])
        verdicts[own] = {"best": best, "ahead": ahead}
    return {
        "rows": rows_of(parts, ("judge", "kl", "words")),
        "matrix": matrix,
        "verdicts": verdicts,
        "rewards": {name: [part["reward"] for part in parts[name]] for name in (*config.objectives, *config.rivals)},
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the table: the matrix, and who is best by each measure."""
    columns = list(summary["verdicts"])
    found = [f"\n{'trained for':<16}" + "".join(f"{name:>17}" for name in columns)]
    found += [
        f"{name:<16}" + "".join(f"{shown(row[c]):>17}" for c in columns) for name, row in summary["matrix"].items()
    ]
    for own, verdict in summary["verdicts"].items():
        found.append(f"measured by {own}: best is {verdict['best']}")
        found += [f"  {own} minus {name}: {shown(ahead)}" for name, ahead in verdict["ahead"].items()]
    return found


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report."""
    matrix, columns = summary["matrix"], list(config.objectives)
    table = Matrix(
        "trained for / measured by", columns, list(matrix),
        [[matrix[row][column]["mean"] for column in columns] for row in matrix],
        [[matrix[row][column]["se"] for column in columns] for row in matrix],
        caption="Mean, and its standard error over several seeds. Each column in its own units: see config.yaml.",
    )  # fmt: skip
    best = Table(["measure", "best"], [[own, verdict["best"]] for own, verdict in summary["verdicts"].items()])
    ahead = {
        f"{own}: trained for it minus {name}": difference
        for own, verdict in summary["verdicts"].items()
        for name, difference in verdict["ahead"].items()
    }
    return [
        Section("Trained for, measured by", "", [table, best, *([compared(ahead)] if ahead else [])]),
        Section("Where training ends", "", STUDY.result(summary, "Test prompts.")),
    ]


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    count = "Six" if len(config.objectives) == 6 else str(len(config.objectives))
    return f"{count} objectives", f"{seeds_in_words(config)}; a fresh follower on each learned reward, on test prompts."


STUDY = Study("objectives", Config, one_seed, summarize, sections, title, FIGURES, lines=lines)
run, report = STUDY.run, STUDY.report
