"""RT-Q against plain truncation: exact bias and variance on random problems, and the estimator itself."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl import InputError, Problem
from align_cbrl.estimators.truncated import RandomlyTruncated, gradients_after
from align_cbrl.problem import step_seed
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_summary, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ExactFollower, expected_policy_response, random_cmdp
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.iterative import NaturalPolicyGradient
from toy_cmdp.referee.frozen_policy import PresentPolicyResponse

from ..study import measured


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for counts below their least."""

    seed: int = 0
    problems: int = 10
    contexts: int = 16
    states: int = 5
    actions: int = 3
    temperature: float = 0.3
    discount: float = 0.9
    leader_discount: float = 0.9
    step: float = 0.1
    max_level: int = 8
    draws: int = 40
    budgets: tuple[int, ...] = (256, 1024, 4096, 16384, 65536, 262144)

    def __post_init__(self) -> None:
        for name, least in (("problems", 2), ("max_level", 1), ("draws", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.budgets or min(self.budgets) < 1:
            raise InputError(f"budgets: expected positive numbers of iterations, got {list(self.budgets)}")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Measure problem by problem; write problems.jsonl, summary.json, figures and report.html.

    Finished problems are found again when a run is resumed.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    claim(out, config, recipe="rtq")
    problems = measured(out / "problems.jsonl", config.problems, lambda number: measure(config, config.seed + number))

    rows = [_row(config, level, problems) for level in range(1, config.max_level + 1)]
    budgets = [_budget_row(budget, i, problems) for i, budget in enumerate(config.budgets)]
    decay = [_statistics([p["change"][k] for p in problems]) for k in range(config.max_level)]
    summary = {
        "rows": rows,
        "budgets": budgets,
        "change": decay,
        "seconds": time.perf_counter() - began,
    }
    write_summary(out, summary)
    report(out)
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    summary = read_summary(out)
    _report(out, load_config(Config, out / CONFIG), summary["rows"], summary["budgets"], summary["change"])


def build(config: Config, seed: int) -> Problem:
    """A random problem with equally likely contexts, and a follower that takes natural policy gradient steps."""
    known = random_cmdp(
        contexts=config.contexts,
        states=config.states,
        actions=config.actions,
        temperature=config.temperature,
        discount=config.discount,
        leader_discount=config.leader_discount,
        seed=seed,
    )
    nature = torch.full((config.contexts,), 1 / config.contexts, dtype=torch.float64)
    cmdp = dataclasses.replace(require_exact(known.follower).cmdp, context_probabilities=nature)
    follower = NaturalPolicyGradient(
        cmdp, config.temperature, config.discount, step=config.step, iterations=0, horizon=1
    )
    problem = dataclasses.replace(known, follower=follower)
    follower.respond(problem.leader, torch.arange(config.contexts))
    return problem


def measure(config: Config, seed: int) -> dict[str, Any]:
    """One problem: exact moments of plain and random truncation, and draws of the estimator.

    Every estimate draws one context. The follower is deterministic and the gradient formula is evaluated without paths,
    so that the expectation over contexts and levels is a finite sum. All is relative to the true gradient's norm.
    """
    problem = build(config, seed)
    levels = _levels(problem, config)  # [C, K + 1, n]
    truth = _truth(problem, config)
    scale = float(truth.norm())
    levels, truth = levels / scale, truth / scale
    mean = levels.mean(0)  # [K + 1, n]
    bias = (mean - truth).norm(dim=-1)  # [K + 1]
    plain = (levels - mean).pow(2).sum(-1).mean(0)  # [K + 1]
    change = levels.diff(dim=1).pow(2).sum(-1).mean(0)  # [K]
    random = levels.new_tensor([_rtq_variance(levels[:, : k + 1]) for k in range(1, config.max_level + 1)])
    cost = levels.new_tensor([_expected_iterations(k) for k in range(1, config.max_level + 1)])
    length = 2.0 ** torch.arange(1, config.max_level + 2).to(levels)
    squares = {
        budget: ((bias**2 + plain * length / budget), (bias[1:] ** 2 + random * cost / budget))
        for budget in config.budgets
    }
    return {
        "bias": bias.tolist(),
        "plain_variance": plain.tolist(),
        "rtq_variance": random.tolist(),
        "change": change.tolist(),
        "plain_mse": [one.tolist() for one, _ in squares.values()],
        "rtq_mse": [other.tolist() for _, other in squares.values()],
        "draws": [_draw(problem, config, k, mean[k], scale, seed) for k in range(1, config.max_level + 1)],
    }


def _levels(problem: Problem, config: Config) -> Tensor:
    """g_1, ..., g_{K+1} in every context, [C, K + 1, n]."""
    stops = [2**level for level in range(1, config.max_level + 2)]
    rows = []
    for context in range(config.contexts):
        found = gradients_after(
            stops, PresentPolicyResponse(), problem, torch.tensor([context]), torch.Generator().manual_seed(0)
        )
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in gradients]) for gradients, _ in found]))
    return torch.stack(rows)


def _truth(problem: Problem, config: Config) -> Tensor:
    """The gradient through the best response, [n]."""
    follower = problem.follower
    assert isinstance(follower, NaturalPolicyGradient)
    cmdp = follower.cmdp
    exact = ExactFollower(cmdp, config.temperature, config.discount, horizon=1)
    gradients = expected_policy_response(dataclasses.replace(problem, follower=exact))
    return torch.cat([g.reshape(-1) for g in gradients])


def _expected_iterations(max_level: int) -> float:
    return RandomlyTruncated(PresentPolicyResponse(), max_level).expected_iterations


def _rtq_variance(levels: Tensor) -> float:
    """E |g_1 + (g_{k+1} - g_k) / p_k - E g_{K+1}|^2 over contexts and k, from [C, K + 1, n]."""
    count = levels.shape[1] - 1
    probabilities = RandomlyTruncated(PresentPolicyResponse(), count).probabilities
    estimates = levels[:, :1] + levels.diff(dim=1) / probabilities[:, None]  # [C, K, n]
    squares = (estimates - levels[:, -1].mean(0)).pow(2).sum(-1)  # [C, K]
    return float((squares @ probabilities).mean())


def _draw(problem: Problem, config: Config, level: int, centre: Tensor, scale: float, seed: int) -> dict[str, Any]:
    """The estimator itself: deviations from E g_{K+1} along that direction, and iterations, one a draw."""
    direction = centre / centre.norm()
    deviations, iterations = [], []
    for draw in range(config.draws):
        generator = torch.Generator().manual_seed(step_seed(seed, draw))
        contexts = problem.follower.sample_contexts(1, generator)
        problem.follower.respond(problem.leader, contexts)
        rollouts = problem.follower.rollout(contexts, 1, generator)
        for parameter in problem.parameters:
            parameter.grad = None
        estimator = RandomlyTruncated(PresentPolicyResponse(), level, seed=step_seed(draw, level))
        metrics = estimator.backward(problem, rollouts)
        gradient = torch.cat([p.grad.reshape(-1) for p in problem.parameters if p.grad is not None])
        deviations.append(float((gradient / scale - centre) @ direction))
        iterations.append(metrics["lower_iterations"])
    return {"deviations": deviations, "iterations": iterations}


def _statistics(values: Sequence[float]) -> dict[str, float]:
    sample = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(sample.mean()), "se": float(sample.std() / len(sample) ** 0.5)}


def _row(config: Config, level: int, problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    k = level - 1
    deviation = _statistics([d for p in problems for d in p["draws"][k]["deviations"]])
    longest = 2 ** (level + 1)
    ratios = [
        p["plain_variance"][level] * longest / (p["rtq_variance"][k] * _expected_iterations(level)) for p in problems
    ]
    return {
        "levels": level,
        "bias": _statistics([p["bias"][level] for p in problems]),
        "bias_against_level": {**deviation, "z": deviation["mean"] / deviation["se"]},
        "iterations": _statistics([i for p in problems for i in p["draws"][k]["iterations"]]),
        "expected_iterations": _expected_iterations(level),
        "plain_iterations": longest,
        "variance": _statistics([p["rtq_variance"][k] for p in problems]),
        "plain_variance": _statistics([p["plain_variance"][level] for p in problems]),
        "variance_ratio_at_equal_cost": _statistics(ratios),
    }


def _budget_row(budget: int, i: int, problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best plain truncation in hindsight against the best K in hindsight, on every problem."""
    plain, rtq = ([min(p[name][i]) for p in problems] for name in ("plain_mse", "rtq_mse"))
    last = [p["plain_mse"][i][-1] / p["rtq_mse"][i][-1] for p in problems]
    return {
        "budget": budget,
        "plain_mse": _statistics(plain),
        "rtq_mse": _statistics(rtq),
        "ratio": _statistics([a / b for a, b in zip(plain, rtq, strict=True)]),
        "least_ratio": min(a / b for a, b in zip(plain, rtq, strict=True)),
        "ratio_at_the_last_level": _statistics(last),
    }


def _report(
    out: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    budgets: Sequence[dict[str, Any]],
    decay: Sequence[dict[str, float]],
) -> None:
    levels = [row["levels"] for row in rows]

    def log2(values: Sequence[float]) -> list[float]:
        return [math.log2(v) if v > 1e-24 else math.nan for v in values]

    bits = [b["budget"] for b in budgets]
    panels = [
        Panel(
            "Change between levels",
            "k",
            "log2 E|g_{k+1} - g_k|^2",
            {"measured": (levels, log2([d["mean"] for d in decay])), "2^-k": (levels, [-float(k) for k in levels])},
        ),
        Panel(
            "Cost of one estimate",
            "K",
            "log2 lower iterations",
            {
                "RT-Q": (levels, log2([r["iterations"]["mean"] for r in rows])),
                "plain truncation": (levels, log2([r["plain_iterations"] for r in rows])),
            },
        ),
        Panel(
            "Best mean-squared error",
            "log2 lower iterations",
            "log2 relative error^2",
            {
                "RT-Q": (log2(bits), log2([b["rtq_mse"]["mean"] for b in budgets])),
                "plain truncation": (log2(bits), log2([b["plain_mse"]["mean"] for b in budgets])),
            },
        ),
    ]
    curves_png(out / "curves.png", panels)

    def pm(value: dict[str, float], digits: int = 3) -> str:
        return f"{value['mean']:.{digits}g} ± {value['se']:.1g}"

    write_run_report(
        out,
        title="RT-Q",
        subtitle=f"{config.problems} random problems, {config.contexts} contexts, natural policy gradient follower",
        sections=[
            Section(
                "Levels",
                "Bias and variance are exact, relative to the true gradient; the mean and standard error are over "
                "problems. Deviation is that of the estimator's own draws from plain truncation at 2^(K+1), in "
                "standard errors. The last column compares variances at equal cost in lower iterations and equal bias.",
                [
                    Table(
                        [
                            "K",
                            "bias",
                            "deviation (z)",
                            "iterations",
                            "2K / (1 - 2^-K)",
                            "plain",
                            "variance",
                            "plain variance",
                            "plain / RT-Q at equal cost",
                        ],
                        [
                            [
                                str(r["levels"]),
                                pm(r["bias"]),
                                f"{r['bias_against_level']['z']:.2f}",
                                pm(r["iterations"]),
                                f"{r['expected_iterations']:.2f}",
                                str(r["plain_iterations"]),
                                pm(r["variance"]),
                                pm(r["plain_variance"]),
                                pm(r["variance_ratio_at_equal_cost"]),
                            ]
                            for r in rows
                        ],
                    ),
                    Charts(panels, "Change between levels, cost, and the best mean-squared error."),
                ],
            ),
            Section(
                "Equal cost",
                "A budget of lower iterations is spent on the mean of as many independent estimates as it pays for. "
                "Both sides may choose their level in hindsight, on every problem.",
                [
                    Table(
                        ["budget", "plain error^2", "RT-Q error^2", "plain / RT-Q", "least", "at the largest K"],
                        [
                            [
                                str(b["budget"]),
                                pm(b["plain_mse"]),
                                pm(b["rtq_mse"]),
                                pm(b["ratio"]),
                                f"{b['least_ratio']:.3g}",
                                pm(b["ratio_at_the_last_level"]),
                            ]
                            for b in budgets
                        ],
                    )
                ],
            ),
        ],
    )
