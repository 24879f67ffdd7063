"""The best contract for a hidden effort: against the closed form as lambda falls, and against a grid search."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl import DirectOnly, InputError, Problem
from align_cbrl.runs.charts import COLOURS, Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.files import read_json
from align_cbrl.runs.preflight import check_drawing
from align_cbrl.runs.report import Charts, Figure, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_kept, read_summary, write_json, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import ExactCritic, enumerate_paths, leader_value, parallel
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.problems.principal_agent import PrincipalAgentLeader, principal_agent
from toy_cmdp.referee.closed_forms import optimal_bonus

_SUCCESS, _COST = (0.2, 0.8), 0.15  # the closed form's: of an idle and of a working agent, and what work costs
_COOLING = (0.4, 0.2, 0.1)  # temperatures that are passed through on the way to a lower one
_OUTPUT = (0.0, 1.0, 2.0, 3.0)
_LAW = ((0.55, 0.3, 0.1, 0.05), (0.25, 0.3, 0.3, 0.15), (0.1, 0.15, 0.35, 0.4))
_COSTS = ((0.0, 0.1, 0.3), (0.0, 0.2, 0.6), (0.0, 0.4, 1.2))
_EFFORTS = ("idle", "some", "hard")


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for counts below their least, or temperatures that do not fall."""

    seed: int = 0
    instances: int = 10
    temperature: float = 0.05
    temperatures: tuple[float, ...] = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    steps: int = 400
    learning_rate: float = 0.1
    grid: int = 10_001

    def __post_init__(self) -> None:
        for name, least in (("instances", 2), ("steps", 1), ("grid", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not (0 < self.learning_rate < math.inf):
            raise InputError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        falling = (math.inf, *self.temperatures, 0.0)
        if not self.temperatures or not all(a > b for a, b in itertools.pairwise(falling)):
            raise InputError(f"temperatures: expected positive numbers that fall, got {list(self.temperatures)}")


preflight = check_drawing


def run(config: Config, out: Path, resume: bool) -> None:
    """Sweep lambda, learn one contract by outcome, compare random instances; write summary.json and report.html.

    Finished parts lie in closed_form.json, contract.json and instances.json, and are found again when a run is resumed.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    began = time.perf_counter()
    claim(out, config, recipe="principal_agent")

    sweep = _part(out / "closed_form.json", lambda: closed_form(config))
    contract = _part(out / "contract.json", lambda: contract_by_outcome(config))
    instances = _part(out / "instances.json", lambda: random_instances(config))

    rows = []
    for name, profits in instances.items():
        profit = torch.tensor(profits, dtype=torch.float64)
        share = profit / torch.tensor(instances["grid search"], dtype=torch.float64)
        rows.append(
            {
                "name": name,
                "profit": {"mean": profit.mean().item(), "se": _standard_error(profit)},
                "share_of_oracle": {"mean": share.mean().item(), "se": _standard_error(share)},
                "lowest_share": share.min().item(),
            }
        )
    summary = {
        "rows": rows,
        "aims": {"profit": "largest", "share_of_oracle": "largest"},
        "closed_form": sweep,
        "contract": contract,
        "seconds": time.perf_counter() - began,
    }
    write_summary(out, summary)
    report(out)
    for row in rows:
        print(f"{row['name']}: profit {row['profit']['mean']:.4f} ± {row['profit']['se']:.4f}")
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    summary = read_summary(out)
    _report(out, load_config(Config, out / CONFIG), summary["rows"], summary["closed_form"], summary["contract"])


def ascend(problem: Problem, steps: int, learning_rate: float) -> None:
    """Adam on the exact hypergradient, its rate falling linearly."""
    optimizer = torch.optim.Adam(problem.parameters, lr=learning_rate, maximize=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        leader_value(problem).backward()
        optimizer.step()


def cooled(build: Callable[[float], Problem], temperatures: Sequence[float], config: Config) -> Iterator[Problem]:
    """The problem ascended at falling temperatures, each time from where the last one ended.

    A cold agent does not respond to a contract that is far from moving it: the gradient there is zero.
    """
    previous: Problem | None = None
    for temperature in temperatures:
        problem = build(temperature)
        if previous is not None:
            for parameter, found in zip(problem.parameters, previous.parameters, strict=True):
                parameter.data.copy_(found.data)
        ascend(problem, config.steps, config.learning_rate)
        yield problem
        previous = problem


def _cooling_to(temperature: float) -> list[float]:
    return [*(warmer for warmer in _COOLING if warmer > temperature), temperature]


def closed_form(config: Config) -> list[dict[str, float]]:
    """One type, two efforts, two outcomes: at each lambda, started at the optimum of the last."""
    rows = []
    optima = cooled(lambda temperature: _textbook(temperature, config.seed), config.temperatures, config)
    for temperature, problem in zip(config.temperatures, optima, strict=True):
        failure, success = _contract(problem)[0].tolist()
        bonus, profit = optimal_bonus(_SUCCESS, _COST, temperature=temperature)
        rows.append(
            {
                "temperature": temperature,
                "bonus": success - failure,
                "closed_bonus": bonus,
                "paid_for_failure": failure,
                "profit": leader_value(problem).item(),
                "closed_profit": profit,
            }
        )
    return rows


def contract_by_outcome(config: Config) -> dict[str, Any]:
    """Four outcomes, three efforts, three types: payments, and how likely each type makes each effort."""

    def build(temperature: float) -> Problem:
        return principal_agent(
            outcome_law=_LAW, output=_OUTPUT, costs=_COSTS, temperature=temperature, seed=config.seed
        )

    *_, learned = cooled(build, _cooling_to(config.temperature), config)
    return {"start": _describe(build(config.temperature)), "learned": _describe(learned)}


def random_instances(config: Config) -> dict[str, list[float]]:
    """The principal's profit on each random instance: at the start, as learned in three ways, and by grid search."""
    seeds = range(config.seed, config.seed + config.instances)

    def build(temperature: float) -> Problem:
        return parallel([instance(seed, temperature) for seed in seeds])

    def profits(problem: Problem) -> list[float]:
        """Of each instance alone: the weights are copied back into problems of their own."""
        values = []
        for seed, weights in zip(seeds, problem.parameters, strict=True):
            alone = instance(seed, config.temperature)
            alone.parameters[0].data.copy_(weights.data)
            values.append(leader_value(alone).item())
        return values

    found = {"start": profits(build(config.temperature))}

    blind = []
    for seed in seeds:
        alone = instance(seed, config.temperature)
        optimizer = torch.optim.Adam(alone.parameters, lr=config.learning_rate, maximize=True)
        for _ in range(config.steps):
            optimizer.zero_grad()
            DirectOnly(ExactCritic()).backward(alone, enumerate_paths(alone, 1))
            optimizer.step()
        blind.append(leader_value(alone).item())
    found["no response term"] = blind

    stages = _cooling_to(config.temperature)
    straight = build(config.temperature)
    ascend(straight, len(stages) * config.steps, config.learning_rate)  # as many steps as with cooling
    found["ascent"] = profits(straight)

    *_, last = cooled(build, stages, config)
    found["ascent with cooling"] = profits(last)

    found["grid search"] = [_grid_search(instance(seed, config.temperature), config.grid) for seed in seeds]
    return found


def instance(seed: int, temperature: float) -> Problem:
    """Two outcomes worth 0 and 1, three efforts, three types that differ in what effort costs them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    success = (0.05 + 0.9 * uniform(3)).sort().values
    effort = torch.cat([torch.zeros(1, dtype=torch.float64), 0.3 * uniform(2).sort().values])
    types = 0.25 + uniform(3)
    return principal_agent(
        outcome_law=torch.stack([1 - success, success], 1),
        costs=types[:, None] * effort,
        type_probabilities=torch.softmax(uniform(3), 0),
        temperature=temperature,
        seed=seed,
    )


def _grid_search(problem: Problem, count: int) -> float:
    """The largest profit over bonuses in [0, 1], nothing being paid for a failure.

    That is no restriction: what is paid after both outcomes moves no effort, and a payment for failure moves it down.
    """
    leader = problem.leader
    assert isinstance(leader, PrincipalAgentLeader)
    bonus = torch.linspace(0, 1, count, dtype=torch.float64)[:, None, None]
    success = leader.law[:, 1]
    policy = torch.softmax((bonus * success - leader.costs) / problem.follower.temperature, -1)  # [G, C, A]
    profit = (policy * success * (1 - bonus)).sum(-1) @ require_exact(problem.follower).cmdp.context_probabilities
    return float(profit.max())


def _textbook(temperature: float, seed: int) -> Problem:
    low, high = _SUCCESS
    law = ((1 - low, low), (1 - high, high))
    return principal_agent(outcome_law=law, costs=((0.0, _COST),), temperature=temperature, seed=seed)


def _describe(problem: Problem) -> dict[str, Any]:
    with torch.no_grad():
        _, solution = require_exact(problem.follower).solve(problem.leader)
        return {
            "payments": _contract(problem)[0].tolist(),
            "efforts": solution.log_policy.exp()[:, 0].tolist(),  # [C, A]
            "profit": leader_value(problem).item(),
        }


def _contract(problem: Problem) -> Tensor:
    assert isinstance(problem.leader, PrincipalAgentLeader)
    return problem.leader.payments().detach()


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def _part(path: Path, compute: Callable[[], Any]) -> Any:
    """What `path` holds, or else what `compute` returns, kept there for a resumed run."""
    if (found := read_kept(path)) is None:
        write_json(path, compute())
        found = read_json(path)
    return found


def _report(
    out: Path,
    config: Config,
    rows: Sequence[dict[str, Any]],
    sweep: Sequence[dict[str, float]],
    contract: dict[str, Any],
) -> None:
    logs = [math.log10(row["temperature"]) for row in sweep]
    limit_bonus, limit_profit = optimal_bonus(_SUCCESS, _COST)

    def line(key: str) -> tuple[list[float], list[float]]:
        return logs, [row[key] for row in sweep]

    panels = [
        Panel(
            title,
            "log10 lambda",
            label,
            {"closed form": line(f"closed_{key}"), "ascent": line(key)},
            levels={"closed form at lambda = 0": limit},
        )
        for title, label, key, limit in (
            ("Principal's profit", "profit", "profit", limit_profit),
            ("Bonus for a success", "payment", "bonus", limit_bonus),
        )
    ]
    curves_png(out / "closed_form.png", panels)
    _contract_png(out / "contract.png", contract)

    def cell(value: dict[str, float]) -> str:
        return f"{value['mean']:.4f} ± {value['se']:.4f}"

    write_run_report(
        out,
        title="Principal and agent",
        subtitle=f"Limited liability, hidden effort; lambda {config.temperature}, {config.instances} random instances",
        sections=[
            Section(
                "Random instances",
                "Two outcomes, three efforts, three cost types. Exact expected profit of the principal.",
                [
                    Table(
                        ["leader", "profit", "share of the oracle", "lowest share"],
                        [
                            [r["name"], cell(r["profit"]), cell(r["share_of_oracle"]), f"{r['lowest_share']:.4f}"]
                            for r in rows
                        ],
                        caption="Mean ± standard error over instances. The oracle is a grid search over bonuses.",
                    )
                ],
            ),
            Section(
                "Closed form",
                "One type, two efforts, two outcomes: the optimum against the agent's temperature.",
                [
                    Charts(panels, "Profit and bonus against the temperature, with the closed form."),
                    Table(
                        ["lambda", "bonus", "closed form", "profit", "closed form ", "paid for failure"],
                        [
                            [
                                f"{r['temperature']:g}",
                                f"{r['bonus']:.5f}",
                                f"{r['closed_bonus']:.5f}",
                                f"{r['profit']:.5f}",
                                f"{r['closed_profit']:.5f}",
                                f"{r['paid_for_failure']:.1e}",
                            ]
                            for r in sweep
                        ],
                    ),
                ],
            ),
            Section(
                "Contract by outcome",
                f"Four outcomes, three efforts, three types. Profit {contract['start']['profit']:.3f} at the start, "
                f"{contract['learned']['profit']:.3f} learned.",
                [Figure(out / "contract.png", "Payment by outcome, and each type's effort, before and after.")],
            ),
        ],
    )


def _contract_png(path: Path, contract: dict[str, Any]) -> None:
    """Bars: what each outcome is paid, and how each type divides its effort, at the start and as learned."""
    from matplotlib import rc_context  # with the extra [plots], as the curves of a report
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    stages, width = ("start", "learned"), 0.38
    with rc_context({"font.family": "sans-serif", "font.size": 10.5, "axes.titlesize": 11.5}):
        canvas = Canvas(figsize=(9.6, 3.4), dpi=190, layout="constrained", facecolor="white")
        FigureCanvasAgg(canvas)
        payment, effort = canvas.subplots(1, 2, width_ratios=(1, 1.25))
        for stage, shift, colour in zip(stages, (-width / 2, width / 2), COLOURS, strict=False):
            places = [outcome + shift for outcome in range(len(_OUTPUT))]
            payment.bar(places, contract[stage]["payments"], width * 0.94, color=colour, label=stage)
        payment.set_xticks(range(len(_OUTPUT)), [f"{output:g}" for output in _OUTPUT])
        payment.set(xlabel="outcome, by its worth to the principal", ylabel="payment")
        payment.set_title("Contract", loc="left", fontweight="bold")

        places, names = [], []
        for kind in range(len(_COSTS)):
            for stage, shift in zip(stages, (-width / 2, width / 2), strict=True):
                places.append(kind + shift)
                names.append(stage)
        base = [0.0] * len(places)
        for number, (name, colour) in enumerate(zip(_EFFORTS, ("#d5d9de", COLOURS[4], COLOURS[0]), strict=True)):
            heights = [contract[stage]["efforts"][kind][number] for kind in range(len(_COSTS)) for stage in stages]
            effort.bar(places, heights, width * 0.94, bottom=base, color=colour, label=name)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        effort.set_xticks(places, names, fontsize=8.5)
        for kind, costs in enumerate(_COSTS):
            effort.text(kind, -0.13, f"hard costs {costs[-1]:g}", ha="center", va="top")
        effort.set(ylabel="probability")
        effort.set_title("Effort by cost type", loc="left", fontweight="bold")
        for axes in (payment, effort):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
            axes.set_axisbelow(True)
        payment.legend(frameon=False, fontsize=9.5)
        effort.legend(frameon=False, fontsize=9.5, loc="upper left", ncols=3, bbox_to_anchor=(0.35, 1.13))
        canvas.savefig(path, format="png")
