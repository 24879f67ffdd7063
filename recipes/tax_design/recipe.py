"""HPGD on tax design: exact, or by a leader that sees trajectories only, of an exact or a neural follower.

Or, exactly, natural steps against Adam's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch

from align_cbrl import HPGD, HPGDConfig, Hypergradient, InputError, Problem, Rollouts
from align_cbrl.runs.charts import curves_png
from align_cbrl.runs.config import fingerprint, load_config, to_dict
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Figure, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_summary, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp.estimators.observed_policy import ObservedPolicyResponse
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.followers.neural import NeuralSoftQFollower
from toy_cmdp.problems.tax_design import TaxLeader, tax_design
from toy_cmdp.referee.exact import ImplicitHypergradient, context_values, leader_value

from ..natural_steps import GROWING as GROWING_STARTS
from ..natural_steps import Cell, NaturalConfig, compare, write_report
from .figures import behaviour, behaviour_png, progress

_CELLS: list[Cell] = [{"temperature": temperature} for temperature in (0.1, 0.2, 0.3)]  # as published
RATES = ("vat_1", "vat_2", "vat_3", "tau")


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml and natural.yaml. With `natural`, of the other values only `grid` and `start` are used.

    Raises:
        InputError: numbers out of range.
    """

    seed: int = 0
    seeds: int = 1
    temperature: float = 0.1
    grid: int = 201
    start: float = 0.3
    spread: float = 0.0
    follower: Literal["exact", "sampled", "neural"] = "exact"
    steps: int = 1000
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    clip: float = 1.0
    tail: float = 0.1
    paths: int = 50
    updates: int = 40
    first_updates: int = 4000
    natural: NaturalConfig | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "paths", "updates", "first_updates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 < self.tail <= 1:
            raise InputError(f"tail: expected a share in (0, 1], got {self.tail}")
        if not 0 <= self.spread < math.inf:
            raise InputError(f"spread: expected a standard deviation >= 0, got {self.spread}")


class _Watched(Hypergradient):
    """Another hypergradient, clipped as the authors do; its metrics also tell rates and welfare before the step.

    Args:
        inner: the hypergradient.
        clip: largest norm of the three VAT rates' gradient, and of the income tax's: the two are clipped apart.
    """

    def __init__(self, inner: Hypergradient, clip: float) -> None:
        self._inner = inner
        self._clip = clip

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        metrics = self._inner.backward(problem, rollouts)
        (logits,) = problem.parameters
        assert logits.grad is not None
        for tax in (logits.grad[:-1], logits.grad[-1:]):
            tax.mul_((self._clip / tax.norm().clamp(min=1e-12)).clamp(max=1.0))
        if isinstance(self._inner, ImplicitHypergradient):
            metrics.update({f"objective_{c}": v for c, v in enumerate(context_values(problem).tolist())})
        return {**metrics, **_rates(problem)}


class _Unseen(ExactFollower):
    """An exact follower of which the exact gradient wants no paths, and which makes none: sampling has its price."""

    def rollout(self, contexts: torch.Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        return Rollouts.bandit(contexts=contexts, steps={})


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Ascend social welfare; write metrics.jsonl for each seed, summary.json, three figures and report.html.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    claim(out, config, recipe="tax_design", free=("steps", "seed", "seeds", "tail", GROWING_STARTS))
    if config.natural is not None:
        compare(config.natural, _CELLS, _CELLS[1:2], functools.partial(_perturbed, config), out)
        report(out)
        print(f"report: {out / 'report.html'}")
        return
    start = leader_value(_exact_problem(config, seed=None)).item()
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        name = f"seed-{seed}"
        runs.append(_ascend(config, seed, out / name, resume))
        print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in runs[-1].items()))

    row: dict[str, Any] = {"temperature": config.temperature, "follower": config.follower, "seeds": config.seeds}
    row["start"] = start
    for name in runs[0]:
        values = [r[name] for r in runs]
        row[name] = statistics.fmean(values)
        row[f"{name}_se"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    rows = [row]
    if config.follower != "exact":
        exact = dataclasses.replace(config, follower="exact", seeds=1, spread=0.0)
        reference = _ascend(exact, config.seed, out / "exact", resume)
        rows.append({"temperature": config.temperature, "follower": "exact", "seeds": 1, "start": start, **reference})
    summary = {
        "rows": rows,
        "aims": {"value": "largest"},
        "runs": runs,
        "seconds": time.perf_counter() - began,
    }
    write_summary(out, summary)
    report(out)
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    config, summary = load_config(Config, out / CONFIG), read_summary(out)
    if config.natural is not None:
        write_report(out, "Tax design: natural steps against Adam", _CELLS)
        return
    before, after = _exact_problem(config, seed=None), _exact_problem(config, seed=None)
    _set_rates(after, [statistics.fmean(r[name] for r in summary["runs"]) for name in RATES])
    _report(out, config, summary["rows"], before, after)


def _ascend(config: Config, seed: int, out: Path, resume: bool) -> dict[str, float]:
    """One run; the rates reached, their exact welfare, in all and of each household, and seconds a step."""
    problem = _exact_problem(config, seed=seed)
    leader, follower = problem.leader, problem.follower
    assert isinstance(leader, TaxLeader) and isinstance(follower, ExactFollower)
    inner: Hypergradient = ImplicitHypergradient()
    if config.follower != "exact":
        inner = ObservedPolicyResponse(follower.cmdp, leader.assets)
    if config.follower == "neural":
        problem = dataclasses.replace(problem, follower=_network(config, problem, seed))
    maker = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    loop = HPGDConfig(
        steps=config.steps,
        contexts_per_step=1 if config.follower == "exact" else config.paths,
        group_size=1,
        max_gradient_norm=None,  # clipped before, VAT and income tax apart
        seed=seed,
        checkpoint_every=20,
    )
    free = ("steps", "seed", "seeds", "tail", "natural")
    settings = {
        name: value for name, value in to_dict(config).items() if name not in free
    }  # a resumed run may be longer, or have more company
    optimizer = maker(problem.parameters, lr=config.learning_rate, maximize=True)
    hypergradient = _Watched(inner, config.clip)
    HPGD(problem, optimizer, hypergradient, loop, out, fingerprint=fingerprint([settings, seed])).run(resume=resume)

    log = MetricsLog.read(out / "metrics.jsonl")
    tail = log[-max(1, round(config.tail * len(log))) :]
    reached = {name: statistics.fmean(row[name] for row in tail) for name in RATES}
    exact = _exact_problem(config, seed=None)
    _set_rates(exact, list(reached.values()))
    values = context_values(exact).tolist()
    seconds = statistics.fmean(row["leader_seconds"] + row["follower_seconds"] for row in log)
    return {
        **reached,
        "value": leader_value(exact).item(),
        "household_1": values[0],
        "household_2": values[1],
        "seconds_per_step": seconds,
    }


def _perturbed(config: Config, cell: Cell, seed: int) -> Problem:
    """The exact problem at a published temperature, its start rates perturbed."""
    assert config.natural is not None
    return _exact_problem(
        dataclasses.replace(config, temperature=cell["temperature"], spread=config.natural.scale), seed=seed
    )


def _exact_problem(config: Config, seed: int | None) -> Problem:
    """The problem at the start rates; perturbed by `seed` unless it is None."""
    problem = tax_design(config.temperature, grid=config.grid, rates=(config.start,) * len(RATES))
    follower = problem.follower
    if config.follower == "exact":
        assert isinstance(follower, ExactFollower)
        unseen = _Unseen(follower.cmdp, follower.temperature, follower.discount)
        problem = dataclasses.replace(problem, follower=unseen)
    if seed is not None and config.spread > 0:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in problem.parameters:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(config.spread * noise)
    return problem


def _network(config: Config, problem: Problem, seed: int) -> NeuralSoftQFollower:
    """A network that sees smooth functions of the assets; walkers go where the households go, and nowhere else."""
    leader, follower = problem.leader, problem.follower
    assert isinstance(leader, TaxLeader) and isinstance(follower, ExactFollower)
    assets = leader.assets[:, None]
    steps = torch.tanh((assets - torch.tensor([-40.0, -20.0, -10.0, 0.0, 10.0, 20.0, 40.0])) / 10)
    seen = torch.cat([assets.clamp(max=0) / 20, torch.log1p(assets.clamp(min=0) / 20), steps], -1)  # [S, F]
    return NeuralSoftQFollower(
        follower.cmdp,
        follower.temperature,
        follower.discount,
        seen.expand(follower.cmdp.contexts, -1, -1),
        updates=config.updates,
        first_updates=config.first_updates,
        environments=64,
        draws=128,
        exploration=0.0,
        seed=seed,
    )


def _rates(problem: Problem) -> dict[str, float]:
    leader = problem.leader
    assert isinstance(leader, TaxLeader)
    return dict(zip(RATES, leader.rates.tolist(), strict=True))


def _set_rates(problem: Problem, rates: list[float]) -> None:
    leader = problem.leader
    assert isinstance(leader, TaxLeader)
    with torch.no_grad():
        leader.logits.copy_(torch.special.logit(torch.tensor(rates, dtype=torch.float64) / 2))


def _report(out: Path, config: Config, rows: list[dict[str, Any]], before: Problem, after: Problem) -> None:
    logs = [
        MetricsLog.read(out / f"seed-{seed}" / "metrics.jsonl")
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    panels = progress(logs)
    curves_png(out / "progress.png", panels)
    behaviour_png(out / "behaviour.png", behaviour(before), behaviour(after))
    columns = ["follower", *RATES, "value", "household_1", "household_2"]
    cells = [[row["follower"], *(_with_error(row, name) for name in columns[1:])] for row in rows]
    write_run_report(
        out,
        title="Tax design",
        subtitle=f"lambda {config.temperature}, {config.grid} assets, {config.follower} follower, {config.steps} steps "
        f"of {config.optimizer} with learning rate {config.learning_rate}, {config.seeds} seed(s)",
        sections=[
            Section(
                "Rates reached",
                f"Means over the last {config.tail:.0%} of the steps. The values are exact, at these rates: expected "
                f"discounted welfare, in all and under each household. At the start it is {rows[0]['start']:.3f}.",
                [
                    Table(columns, cells, "± one standard error over seeds."),
                    Charts(panels, "Rates, and welfare under each household, before each step."),
                ],
            ),
            Section(
                "The households, before and after",
                "Best responses at the start rates (dashed) and at the rates reached (solid), exact.",
                [
                    Figure(
                        out / "behaviour.png",
                        "Mean hours of work, mean consumption of each good, and the discounted distribution of assets.",
                    )
                ],
            ),
        ],
    )


def _with_error(row: dict[str, Any], name: str) -> str:
    error = row.get(f"{name}_se")
    return f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
