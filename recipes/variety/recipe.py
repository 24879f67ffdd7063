"""Several good answers instead of one: a leader's set objective against the best refit of the weights to verdicts.

Everything can be enumerated here, so that the optimum is known, and the rival gets what nobody has: verdicts without
end, and the choice of its strength by the very objective that it is measured by.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl import HPGD, Distinct, ExpectedUtility, HPGDConfig, InputError, KLPriced, Natural, Problem, SetUtility
from align_cbrl.checks import Count, NonNegative, Positive, Whole, checked
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_kept, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import TabularLeader, TabularUtility, leader_value, preferences
from toy_cmdp.problems.preferences import PreferencesLeader
from toy_cmdp.referee.exact import exact_world

from ..statistics import interval, mean_and_error, shown
from ..study import compared

_LEAST = 0.5  # score from which on an answer is good
_SIZES = {"prompts": 8, "responses": 16, "features": 6}
_REFITS = 60  # damped by a half: the fixed point to many digits

LABELS = {
    "hpgd": "HPGD, natural steps",
    "adam": "HPGD, Adam with 4 replays",
    "refit": "best refit to the verdicts",
    "mean": "the mean verdict at its optimum",
}


@checked
@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for numbers out of range."""

    seeds: list[Whole] = dataclasses.field(default_factory=lambda: list(range(10)))
    size: Count = 4
    price: NonNegative = 0.15
    temperature: Positive = 0.5
    steps: Count = 30
    nats: Positive = 0.1
    strengths: list[Positive] = dataclasses.field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0])

    def __post_init__(self) -> None:
        if not self.seeds or not self.strengths:
            raise InputError("seeds, strengths: expected at least one of each")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Compare on every seed; write seed-N.json, summary.json and report.html.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    claim(out, config, recipe="variety", free=("seeds",))
    found = []
    for seed in config.seeds:
        path = out / f"seed-{seed}.json"
        if (kept := read_kept(path)) is None:
            kept = one_seed(config, seed)
            write_json(path, kept)
        found.append(kept)
        print(f"seed {seed}: " + ", ".join(f"{LABELS[name]} {share(kept, name)[-1]:.2f}" for name in LABELS))
    rows: list[dict[str, Any]] = [
        {
            "name": LABELS[name],
            "share_of_the_possible_gain": mean_and_error([share(one, name)[-1] for one in found]),
            "minus_refit": interval([share(one, name)[-1] - share(one, "refit")[-1] for one in found]),
        }
        for name in LABELS
    ]
    first = [
        next((i + 1 for i, s in enumerate(share(one, "hpgd")) if s > share(one, "refit")[-1]), None) for one in found
    ]
    aims = {"share_of_the_possible_gain": "largest"}
    seconds = time.perf_counter() - began
    summary = {"rows": rows, "passes_refit_after": first, "aims": aims, "seconds": seconds}
    write_summary(out, summary)
    report(out)
    for row in rows:
        print(f"{row['name']}: {shown(row['share_of_the_possible_gain'])} of the possible gain")
    print(f"report: {out / 'report.html'}")


def one_seed(config: Config, seed: int) -> dict[str, Any]:
    """J at the start, at the optimum, and what everybody reaches: a number, or one a leader step."""
    problem = variety(config, seed)
    _set(problem, 0.0)
    start = leader_value(problem).item()
    best = ascend(problem)

    mean = variety(config, seed, of_sets=False)
    ascend(mean)
    _set(problem, mean.parameters[0])
    means = leader_value(problem).item()
    refits = [refitted(problem, strength) for strength in config.strengths]

    curves: dict[str, list[float]] = {}
    for name in ("hpgd", "adam"):
        sampled = variety(config, seed)
        values: list[float] = []
        _set(sampled, 0.0)
        natural = Natural(nats=config.nats) if name == "hpgd" else None
        adam = None if natural else torch.optim.Adam(sampled.parameters, lr=0.1, maximize=True)
        loop = HPGDConfig(
            steps=config.steps,
            natural=natural,
            replays=0 if natural else 4,
            seed=seed,
            contexts_per_step=8,
            group_size=8,
            progress=False,
        )
        HPGD(
            sampled,
            adam,
            config=loop,
            observers=[lambda _, __, s=sampled, v=values: v.append(leader_value(s).item())],  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
        ).run()
        curves[name] = values
    return {"start": start, "best": best, "mean": [means], "refit": [max(refits)], "refits": refits, **curves}


def share(found: dict[str, Any], name: str) -> list[float]:
    """What part of the possible gain over the reference each value of `name` is."""
    return [(value - found["start"]) / (found["best"] - found["start"]) for value in found[name]]


def variety(config: Config, seed: int, of_sets: bool = True) -> Problem:
    """A tabular RLHF with four kinds of answers, which the reward's features see, and of which the truth prefers some.

    The leader wants the expected number of distinct good kinds among k answers, less a price on divergence; or, without
    `of_sets`, the mean verdict on single answers less that price.
    """

    def objective(score: TabularUtility) -> KLPriced:
        verdict = ExpectedUtility(TabularUtility(_verdict))
        distinct = SetUtility(Distinct(TabularUtility(_kind), score, _LEAST), config.size)
        return KLPriced(distinct if of_sets else verdict, config.price)

    return preferences(seed=seed, temperature=config.temperature, objective=objective, **_SIZES)


def ascend(problem: Problem) -> float:
    """J at the optimum of the exact objective, by L-BFGS; the leader is left there."""
    ascent = torch.optim.LBFGS(problem.parameters, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        ascent.zero_grad()
        value = -leader_value(problem)
        value.backward()
        return value

    ascent.step(loss)
    return leader_value(problem).item()


def refitted(problem: Problem, strength: float) -> float:
    """J where refitting ends: weights that describe the verdicts best on the very policy that they lead to."""
    leader, (x,) = _leader(problem), problem.parameters
    verdict = _verdict(leader)[:, 0]  # [C, A]
    for _ in range(_REFITS):
        policy = exact_world(problem).policy[:, 0]
        within = leader.features - (policy[..., None] * leader.features).sum(1, keepdim=True)
        label = verdict - (policy * verdict).sum(1, keepdim=True)
        squares = torch.einsum("ca,cai,caj->ij", policy, within, within)
        products = torch.einsum("ca,cai,ca->i", policy, within, label)
        with torch.no_grad():
            x.copy_((x + strength * torch.linalg.lstsq(squares, products[:, None]).solution[:, 0]) / 2)
    return leader_value(problem).item()


def report(out: Path) -> None:
    """Write report.html and its figure from a finished run's folder."""
    config, summary = load_config(Config, out / CONFIG), read_summary(out)
    found = [read_kept(out / f"seed-{seed}.json") for seed in config.seeds]
    curves, levels = {}, {}
    for name, label in LABELS.items():
        runs = [share(one, name) for one in found]
        if name in ("refit", "mean"):
            levels[label] = mean_and_error([one[-1] for one in runs])["mean"]
            continue
        points = [mean_and_error(values) for values in zip(*runs, strict=True)]
        curves[label] = (
            list(range(1, config.steps + 1)),
            [point["mean"] for point in points],
            [point["se"] if len(found) > 1 else 0.0 for point in points],
        )
    panel = Panel(
        "Distinct good answers", "leader step (64 verdicts each)", "share of the possible gain", curves, levels=levels
    )
    curves_png(out / "curves.png", [panel])
    table = Table(
        ["who", "share of the possible gain"],
        [[row["name"], shown(row["share_of_the_possible_gain"])] for row in summary["rows"]],
        f"J is the expected number of distinct good kinds among {config.size} answers, less {config.price:g} per nat. "
        "Mean and standard error over seeds; exact values. The refit and the mean have verdicts without end, and the "
        "refit's strength is the best one for J; HPGD sees 64 verdicts a leader step.",
    )
    refit = LABELS["refit"]
    differences = {f"{r['name']} minus {refit}": r["minus_refit"] for r in summary["rows"] if r["name"] != refit}
    after = [str(step) if step else "never" for step in summary["passes_refit_after"]]
    write_run_report(
        out,
        title="What a leader can want and a regression cannot",
        subtitle=f"{len(config.seeds)} worlds of {_SIZES['prompts']} prompts and {_SIZES['responses']} answers",
        sections=[
            Section(
                "Result",
                f"HPGD's first leader step above the best refit, seed by seed: {', '.join(after)}.",
                [table, compared(differences, "worlds")],
            ),
            Section("Curves", "", [Charts([panel], "Against leader steps; bands: standard errors.")]),
        ],
    )


def _kind(leader: TabularLeader) -> Tensor:
    """Which of four kinds each answer is, [C, 1, A]: the signs of its first two features."""
    assert isinstance(leader, PreferencesLeader)
    first, second = leader.features[..., 0] > 0, leader.features[..., 1] > 0
    return (first.double() + 2 * second.double())[:, None]


def _verdict(leader: TabularLeader) -> Tensor:
    """1 where an answer is good, [C, 1, A]."""
    assert isinstance(leader, PreferencesLeader)
    return (leader.score >= _LEAST).double()


def _leader(problem: Problem) -> PreferencesLeader:
    assert isinstance(problem.leader, PreferencesLeader)
    return problem.leader


def _set(problem: Problem, x: Tensor | float) -> None:
    with torch.no_grad():
        problem.parameters[0].copy_(torch.as_tensor(x, dtype=torch.float64).expand_as(problem.parameters[0]))
