"""HPGD's two error sources on random problems: sampled gradients, and a follower that is not at its best response."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl import Hypergradient, InputError, PolicyResponse, Problem
from align_cbrl.problem import step_seed
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_summary, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ExactCritic, ExactFollower, ImplicitHypergradient, expected_policy_response, random_cmdp
from toy_cmdp.followers.iterative import SoftValueIteration
from toy_cmdp.referee.frozen_policy import present
from toy_cmdp.validate import implicit_gradient

from ..study import measured


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for counts below their least, or lists that do not rise."""

    seed: int = 0
    problems: int = 10
    contexts: int = 2
    states: int = 4
    actions: int = 3
    temperature: float = 0.5
    discount: float = 0.9
    leader_discount: float = 0.8
    batches: tuple[int, ...] = (4, 32, 256)
    steps: int = 300
    learning_rate: float = 0.3
    every: int = 10
    sweeps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12)

    def __post_init__(self) -> None:
        for name, least in (("problems", 2), ("steps", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name, least, length in (("batches", 1, 1), ("sweeps", 1, 2)):
            numbers = getattr(self, name)
            if len(numbers) < length or min(numbers) < least or sorted(set(numbers)) != list(numbers):
                raise InputError(f"{name}: expected at least {length} rising numbers >= {least}, got {list(numbers)}")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Measure problem by problem; write problems.jsonl, summary.json, figures and report.html.

    Finished problems are found again when a run is resumed.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    claim(out, config, recipe="convergence")
    problems = measured(out / "problems.jsonl", config.problems, lambda number: measure(config, config.seed + number))

    rows = []
    for name in problems[0]["ascent"]:
        last = [_tail(p["ascent"][name]) for p in problems]
        rows.append({"estimate": name, "last_squared_gradient": _statistics(last)})
    floor = []
    for i, sweeps in enumerate(config.sweeps):
        floor.append(
            {
                "sweeps": sweeps,
                **{name: _statistics([p["floor"][name][i] for p in problems]) for name in problems[0]["floor"]},
            }
        )
    slopes = {
        name: _statistics([slope(p["floor"]["distance"], p["floor"][name]) for p in problems])
        for name in ("bias", "kl")
    }
    summary = {
        "rows": rows,
        "aims": {"last_squared_gradient": "smallest"},
        "floor": floor,
        "slopes": slopes,
        "seconds": time.perf_counter() - began,
    }
    write_summary(out, summary)
    report(out)
    for name, value in slopes.items():
        print(f"{name} against delta: slope {value['mean']:.2f} ± {value['se']:.2f}")
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    summary = read_summary(out)
    problems = MetricsLog.read(out / "problems.jsonl")
    config = load_config(Config, out / CONFIG)
    _report(out, config, problems, summary["rows"], summary["floor"], summary["slopes"])


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Both experiments on one problem."""
    ascent = {f"{batch} paths": _ascend(config, seed, batch) for batch in config.batches}
    ascent["exact"] = _ascend(config, seed, None)
    return {"ascent": ascent, "floor": _floor(config, seed)}


def build(config: Config, seed: int) -> Problem:
    """A random problem in which x moves rewards, transitions, starts, prior and utility."""
    return random_cmdp(
        contexts=config.contexts,
        states=config.states,
        actions=config.actions,
        temperature=config.temperature,
        discount=config.discount,
        leader_discount=config.leader_discount,
        seed=seed,
    )


def _ascend(config: Config, seed: int, batch: int | None) -> list[float]:
    """|dJ|^2, exact, every `every` steps of plain ascent on sampled gradients, or on exact ones (None)."""
    problem = build(config, seed)
    estimator: Hypergradient = ImplicitHypergradient() if batch is None else PolicyResponse(ExactCritic())
    squares = []
    for step in range(config.steps + 1):
        if step % config.every == 0:
            squares.append(float(implicit_gradient(problem).pow(2).sum()))
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        contexts = problem.follower.sample_contexts(batch or 1, generator)
        problem.follower.respond(problem.leader, contexts)
        rollouts = problem.follower.rollout(contexts, 1, generator)
        _step(problem, estimator, rollouts, config.learning_rate)
    return squares


def _step(problem: Problem, estimator: Hypergradient, rollouts: Any, learning_rate: float) -> None:
    for parameter in problem.parameters:
        parameter.grad = None
    estimator.backward(problem, rollouts)
    with torch.no_grad():
        for parameter in problem.parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=learning_rate)


def _floor(config: Config, seed: int) -> dict[str, list[float]]:
    """The follower stopped after so many sweeps: its distance, the gradient's bias, and where the ascent ends.

    distance is delta = max_s |pi(.|s) - pi*(.|s)|_1 and kl the largest KL(pi || pi*), both at the start;
    bias is |g - dJ| / |dJ| there, with the gradient's formula at pi and without sampling; stationarity is the exact
    |dJ| after `steps` steps of ascent on that formula.
    """
    found: dict[str, list[float]] = {"distance": [], "kl": [], "bias": [], "stationarity": []}
    for sweeps in config.sweeps:
        exact = build(config, seed)
        assert isinstance(exact.follower, ExactFollower)
        cmdp = exact.follower.cmdp
        follower = SoftValueIteration(cmdp, config.temperature, config.discount, iterations=sweeps, horizon=1)
        problem = dataclasses.replace(exact, follower=follower)
        _, best = exact.follower.solve(exact.leader)
        truth = implicit_gradient(exact)

        contexts = torch.arange(config.contexts)
        follower.respond(problem.leader, contexts)
        policy = follower.log_policy
        estimate = _flat(expected_policy_response(present(problem)))
        found["distance"].append(float((policy.exp() - best.log_policy.exp()).abs().sum(-1).max()))
        found["kl"].append(float((policy.exp() * (policy - best.log_policy)).sum(-1).max()))
        found["bias"].append(float((estimate - truth).norm() / truth.norm()))
        found["stationarity"].append(_end(config, exact, problem))
    return found


def _end(config: Config, exact: Problem, problem: Problem) -> float:
    """The exact |dJ| where the ascent on a stopped follower's formula ends."""
    follower = problem.follower
    for _ in range(config.steps):
        follower.respond(problem.leader, torch.arange(config.contexts))
        gradients = expected_policy_response(present(problem))
        with torch.no_grad():
            for parameter, gradient in zip(problem.parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=config.learning_rate)
    return float(implicit_gradient(exact).norm())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y against log x, over the smaller half of x."""
    keep = sorted(range(len(x)), key=lambda i: x[i])[: max(2, len(x) // 2)]
    a, b = (torch.tensor([values[i] for i in keep], dtype=torch.float64).log() for values in (x, y))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).pow(2).sum())


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients])


def _tail(values: Sequence[float]) -> float:
    """The mean over the last fifth."""
    tail = values[-max(1, len(values) // 5) :]
    return sum(tail) / len(tail)


def _statistics(values: Sequence[float]) -> dict[str, float]:
    sample = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(sample.mean()), "se": float(sample.std() / len(sample) ** 0.5)}


def _report(
    out: Path,
    config: Config,
    problems: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    floor: Sequence[dict[str, Any]],
    slopes: dict[str, dict[str, float]],
) -> None:
    def log10(values: Sequence[float]) -> list[float]:
        return [math.log10(v) if v > 0 else math.nan for v in values]

    names = [row["estimate"] for row in rows]
    marks = [float(i * config.every) for i in range(len(problems[0]["ascent"][names[0]]))]
    squares = {
        name: torch.tensor([p["ascent"][name] for p in problems], dtype=torch.float64).mean(0).tolist()
        for name in names
    }
    distance = log10([row["distance"]["mean"] for row in floor])
    panels = [
        Panel(
            "Stationarity",
            "outer step",
            "log10 mean |dJ|^2",
            {name: (marks, log10(values)) for name, values in squares.items()},
        ),
        Panel(
            "Bias of a stopped follower",
            "log10 delta",
            "log10 relative bias",
            {
                "measured": (distance, log10([row["bias"]["mean"] for row in floor])),
                "slope 1": (distance, [d - distance[-1] + math.log10(floor[-1]["bias"]["mean"]) for d in distance]),
            },
        ),
        Panel(
            "Where its ascent ends",
            "log10 delta",
            "log10 |dJ|",
            {"measured": (distance, log10([row["stationarity"]["mean"] for row in floor]))},
        ),
    ]
    curves_png(out / "curves.png", panels)

    def pm(value: dict[str, float]) -> str:
        return f"{value['mean']:.3g} ± {value['se']:.1g}"

    keys = ("distance", "kl", "bias", "stationarity")
    write_run_report(
        out,
        title="Convergence",
        subtitle=f"{config.problems} random problems, {config.steps} outer steps of plain ascent",
        sections=[
            Section(
                "Sampled gradients",
                "The exact |dJ|^2, mean over the last fifth of the steps, then mean and standard error over problems.",
                [
                    Table(["estimate", "|dJ|^2"], [[r["estimate"], pm(r["last_squared_gradient"])] for r in rows]),
                    Charts(panels, "Stationarity; bias and floor against delta, means over problems."),
                ],
            ),
            Section(
                "A follower stopped early",
                "Slopes on log-log axes against delta, over the smaller half of delta: "
                + ", ".join(f"{name} {pm(value)}" for name, value in slopes.items())
                + ".",
                [
                    Table(
                        ["sweeps", "delta", "largest KL", "relative bias", "final |dJ|"],
                        [[str(row["sweeps"]), *(pm(row[key]) for key in keys)] for row in floor],
                    )
                ],
            ),
        ],
    )
