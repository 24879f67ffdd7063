"""The same policy under several objectives: what each reaches on its own measure, and on the others'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from align_cbrl import CVaR, ExpectedUtility, InputError, MeanVariance
from align_cbrl.llm.settings.objective import ObjectiveSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Matrix, Section, Table, write_report
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

from ..parts import each_seed, kept, of_each_seed
from ..replies.bench import Bench, BenchSettings
from ..statistics import counted, mean_and_error, shown

FRESH_SEED = 1_000_003


@dataclasses.dataclass(frozen=True)
class Config(BenchSettings):
    """See config.yaml.

    Raises:
        InputError: no seeds or objectives, or one whose measure needs the leader itself.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None
    objectives: dict[str, ObjectiveSettings] = dataclasses.field(default_factory=dict)
    penalty: float = 0.2

    def __post_init__(self) -> None:
        if not self.seeds or not self.objectives:
            raise InputError("seeds, objectives: expected at least one of each")
        for name, objective in self.objectives.items():
            if objective.kind == "preference":
                raise InputError(
                    f"objectives.{name}: preference measures the reward, not the policy; expected another kind"
                )


def run(config: Config, out: Path, resume: bool) -> None:
    """HPGD for every objective and seed, a fresh follower on each learned reward, and the matrix. See config.yaml.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="objectives", free=["jobs"])
    each_seed(_one_seed, config, out, config.seeds, config.jobs)
    write_summary(out, _summarize(config, out))
    report(out)
    _print(out)


def _one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    bench = Bench(config, seed, folder, cache)

    def reached(follower: Any) -> dict[str, Any]:
        found = bench.final(follower)
        costs = {name: found["costs"][name]["mean"] for name in bench.costs()}
        return {
            **found,
            "measures": {
                name: measure(
                    objective, found["by_prompt"], found["groups"], found["kl"]["mean"], costs, config.penalty
                )
                for name, objective in config.objectives.items()
            },
        }

    def tuned(name: str, objective: ObjectiveSettings) -> dict[str, Any]:
        leader = bench.leader()
        finished = bench.tune(name, leader, objective.build(bench.judge, bench.costs()))
        fresh = bench.train(f"{name}-fresh", bench.learned(name), seed + FRESH_SEED)
        return {**reached(fresh), "reward": leader.describe(), "last": finished.history[-1]}

    kept(folder / "base.json", lambda: reached(bench.follower(seed)))
    kept(folder / "plain.json", lambda: reached(bench.train("plain", bench.plain(), seed + FRESH_SEED)))
    for name, objective in config.objectives.items():
        kept(folder / f"{name}.json", lambda name=name, objective=objective: tuned(name, objective))  # type: ignore[misc]  # mypy cannot infer a lambda with defaults


def measure(
    objective: ObjectiveSettings,
    by_prompt: list[float],
    groups: dict[str, list[Any]],
    kl: float,
    costs: dict[str, float],
    penalty: float,
) -> float:
    """What a policy is worth by an objective, from its figures on test prompts.

    Args:
        objective: the measure. That of a constrained one is the mean score less `penalty` times the cost beyond the
            bound; that of a worst group is the plain minimum.
        by_prompt: the judge's mean for each test prompt.
        groups: the data's columns, for a worst group.
        kl: nats from the reference.
        costs: mean costs by name.
        penalty: see above.

    Example:
        >>> measure(ObjectiveSettings("cvar", share=0.5), [0.2, 0.8], {}, 0.0, {}, 0.2)
        0.2
    """
    score = torch.tensor(by_prompt, dtype=torch.float64)
    equal = torch.full_like(score, 1 / len(score))
    mean = score.mean().item()
    anything = ExpectedUtility(lambda leader, rollouts: score)
    if objective.kind == "cvar":
        assert objective.share is not None
        return CVaR(anything, objective.share).aggregate(score, equal).item()
    if objective.kind == "mean_variance":
        assert objective.aversion is not None
        return MeanVariance(anything, objective.aversion).aggregate(score, equal).item()
    if objective.kind == "worst_group":
        names = groups[str(objective.column)]
        return min(score[torch.tensor([n == name for n in names])].mean().item() for name in set(names))
    if objective.kind == "kl_priced":
        assert objective.price is not None
        return mean - objective.price * kl
    if objective.kind == "constrained":
        assert objective.bound is not None
        return mean - penalty * max(0.0, costs[str(objective.cost)] - objective.bound)
    return mean


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    names = ["base", "plain", *config.objectives]
    parts = {name: of_each_seed(out, config.seeds, name) for name in names}
    matrix = {
        name: {m: mean_and_error([part["measures"][m] for part in parts[name]]) for m in config.objectives}
        for name in names
    }
    verdicts = {}
    for own in config.objectives:
        rivals = [n for n in config.objectives if n != own]
        best = max([own, *rivals], key=lambda n: matrix[n][own]["mean"])
        gaps = [a["measures"][own] - b["measures"][own] for a, b in zip(parts[own], parts[best], strict=True)]
        verdicts[own] = {"best": best, "behind": None if best == own else mean_and_error(gaps)}
    return {
        "rows": [
            {"name": name, **{f: mean_and_error([p[f]["mean"] for p in parts[name]]) for f in ("judge", "kl", "words")}}
            for name in names
        ],
        "matrix": matrix,
        "verdicts": verdicts,
        "rewards": {name: [part["reward"] for part in parts[name]] for name in config.objectives},
    }


def report(out: Path) -> None:
    """Write report.html again, from what a finished run left in `out`."""
    summary = read_summary(out)
    config = load_config(Config, out / "config.yaml")
    matrix, columns = summary["matrix"], list(config.objectives)
    write_report(
        out / "report.html",
        title="Six objectives" if len(columns) == 6 else f"{len(columns)} objectives",
        subtitle=f"{counted(len(config.seeds), 'seed')}; a fresh follower on each learned reward, on test prompts.",
        sections=[
            Section(
                "Trained for, measured by",
                "",
                [
                    Matrix(
                        "trained for / measured by",
                        columns,
                        list(matrix),
                        [[matrix[row][column]["mean"] for column in columns] for row in matrix],
                        [[matrix[row][column]["se"] for column in columns] for row in matrix],
                        caption="Mean and standard error over seeds. Each column in its own units: see config.yaml.",
                    ),
                    Table(
                        ["measure", "best", "its own objective is behind by"],
                        [
                            [own, v["best"], None if v["behind"] is None else shown(v["behind"])]
                            for own, v in summary["verdicts"].items()
                        ],
                    ),
                ],
            ),
            Section(
                "Where training ends",
                "",
                [
                    Table(
                        ["trained for", "judge", "KL (nats)", "words"],
                        [[r["name"], *(shown(r[f]) for f in ("judge", "kl", "words"))] for r in summary["rows"]],
                    )
                ],
            ),
        ],
    )


def _print(out: Path) -> None:
    summary = read_summary(out)
    columns = list(summary["verdicts"])
    print(f"\n{'trained for':<16}" + "".join(f"{name:>17}" for name in columns))
    for name, row in summary["matrix"].items():
        print(f"{name:<16}" + "".join(f"{shown(row[c]):>17}" for c in columns))
    for own, verdict in summary["verdicts"].items():
        behind = "" if verdict["behind"] is None else f", behind by {shown(verdict['behind'])}"
        print(f"measured by {own}: best is {verdict['best']}{behind}")
    print(f"report: {out / 'report.html'}")
