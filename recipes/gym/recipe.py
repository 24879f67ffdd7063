"""Agents of Stable-Baselines3 as followers: against an exact referee, and where nobody knows the answer."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file

from align_cbrl import HPGD, HPGDConfig, PolicyResponse, Problem, RegressionCritic, Rollouts
from align_cbrl.checks import Count, Discount, Positive, Range, Several, Whole, checked
from align_cbrl.estimators.regression import Network
from align_cbrl.gym import GymFollower, policy_nodes
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.config import load_config
from align_cbrl.runs.preflight import Preflight, check_drawing
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import CONFIG, claim, read_kept, read_summary, write_summary
from align_cbrl.runs.run_report import write_run_report
from toy_cmdp import leader_value
from toy_cmdp.environments import LinearEnvironment
from toy_cmdp.followers.linear_quadratic import require_normal
from toy_cmdp.tables.linear_systems import require_linear

from ..statistics import mean_and_error, shown
from ..study import each_seed, kept
from .regulator import BOUND, DISCOUNT, LENGTH, NAMES, TEMPERATURE, regulator
from .swing_up import share_upright, swing_up, upright

ARMS = ("shaped", "unshaped", "paid more")
FRESH = 1_000_003
"""Added to a seed, for paths that nobody has learned from."""
START = [0.0, 0.0, 0.0]


@checked
@dataclasses.dataclass(frozen=True)
class Agent:
    """SAC's settings, the same in all parts.

    Attributes:
        width: of two hidden layers.
        learning_rate: of networks in the regulator; it falls to a thirtieth within the warmup, then stays there.
        batch: rows of an update.
        updates_at_once: environment steps between two bursts of as many updates.
    """

    width: Count = 64
    learning_rate: Positive = 0.003
    batch: Count = 128
    updates_at_once: Count = 20

    def settings(self, learning_rate: Any, **others: Any) -> dict[str, Any]:
        """Of `GymFollower`."""
        return {
            "policy_kwargs": {
                "net_arch": [self.width, self.width],
                "activation_fn": torch.nn.Tanh,
                "optimizer_kwargs": {"fused": True},
            },
            "learning_rate": learning_rate,
            "train_freq": self.updates_at_once,
            "gradient_steps": self.updates_at_once,
            "batch_size": self.batch,
            "tau": 0.02,
            "buffer_size": 300_000,
            **others,
        }


@checked
@dataclasses.dataclass(frozen=True)
class Cosines:
    """Hypergradients of the regulator, once each.

    Attributes:
        leaders: x, a row each.
        warmup: environment steps of the agent.
        paths: that the estimate is made of.
        seed: of agent and paths.
    """

    leaders: list[list[float]]
    warmup: Count
    paths: Several
    seed: Whole = 0


@checked
@dataclasses.dataclass(frozen=True)
class Ascent:
    """HPGD on the regulator, from x = 0.

    Attributes:
        seeds: of the runs.
        steps: leader steps.
        learning_rate: Adam's.
        warmup: environment steps of the agent before the first leader step.
        agent_steps: before every other.
        paths: in a leader step.
    """

    seeds: list[Whole]
    steps: Count
    learning_rate: Positive
    warmup: Count
    agent_steps: Count
    paths: Several


@checked
@dataclasses.dataclass(frozen=True)
class SwingUp:
    """Pendulum-v1, with and without a leader.

    Attributes:
        seeds: of the runs.
        jobs: seeds at a time.
        steps: leader steps.
        learning_rate: Adam's.
        bound: of what the leader adds to a reward of 0 or 1.
        temperature, discount: of the agent.
        leader_discount: of the leader.
        agent_learning_rate: of its networks.
        warmup, agent_steps: as for the regulator.
        paths: in a leader step.
        length: of a path.
        judged_on: fresh paths at the end, which nobody learns from.
    """

    seeds: list[Whole]
    jobs: Count
    steps: Count
    learning_rate: Positive
    bound: Positive
    temperature: Positive
    discount: Discount
    leader_discount: Annotated[float, Range(0, 1, open="high")]
    agent_learning_rate: Positive
    warmup: Count
    agent_steps: Count
    paths: Several
    length: Count
    judged_on: Count


@checked
@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml. Raises InputError for numbers out of range."""

    agent: Agent = dataclasses.field(default_factory=Agent)
    cosines: Cosines = dataclasses.field(
        default_factory=lambda: Cosines(
            leaders=[[0.0, 0.0, 0.0], [1.0, -1.0, 0.5], [-1.0, 0.5, 1.0]], warmup=4_000, paths=1_024
        )
    )
    ascent: Ascent = dataclasses.field(
        default_factory=lambda: Ascent(seeds=[0], steps=25, learning_rate=0.1, warmup=3_000, agent_steps=200, paths=256)
    )
    swing_up: SwingUp = dataclasses.field(
        default_factory=lambda: SwingUp(
            seeds=[0, 1, 2],
            jobs=1,
            steps=12,
            learning_rate=0.05,
            bound=2.0,
            temperature=0.2,
            discount=0.8,
            leader_discount=0.95,
            agent_learning_rate=0.001,
            warmup=2_000,
            agent_steps=200,
            paths=64,
            length=100,
            judged_on=50,
        )
    )


def preflight(config: Config, notes: Preflight) -> None:
    """Gymnasium and Stable-Baselines3 are there, and what draws."""
    for package in ("gymnasium", "stable_baselines3"):
        notes.need_package(package, "gym", "agents")
    check_drawing(config, notes)


@dataclasses.dataclass(frozen=True)
class Falling:
    """A learning rate that falls with the share of the warmup that is left."""

    first: float

    def __call__(self, left: float) -> float:
        """The rate when the share `left` is to come."""
        return self.first * max(left, 1 / 30)


def agent_of(problem: Problem, config: Config, *, warmup: int, steps: int, seed: int) -> Problem:
    """The regulator with an agent in the place of the exact follower."""
    systems = require_linear(problem.leader).systems().detach()
    follower = GymFollower(
        [lambda: LinearEnvironment(systems, length=LENGTH, bound=BOUND)],
        TEMPERATURE,
        DISCOUNT,
        warmup=warmup,
        steps=steps,
        length=LENGTH,
        settings=config.agent.settings(Falling(config.agent.learning_rate), learning_starts=300),
        seed=seed,
    )
    return Problem(problem.leader, problem.objective, follower)


def states(rollouts: Rollouts) -> torch.Tensor:
    """What a critic sees of every state."""
    found: torch.Tensor = rollouts.steps["state"]
    return found


def cosine(config: Config, x: list[float]) -> dict[str, Any]:
    """Cosine of the hypergradient from an agent's paths to the exact one, at a leader x."""
    exact = regulator(torch.tensor(x))
    leader_value(exact).backward()
    true = _taken(exact)
    settings = config.cosines
    problem = agent_of(exact, config, warmup=settings.warmup, steps=1, seed=settings.seed)
    context = torch.tensor([0])
    problem.follower.respond(problem.leader, context)
    rollouts = problem.follower.rollout(context, settings.paths, torch.Generator().manual_seed(settings.seed))
    PolicyResponse(RegressionCritic(states, policy_nodes, pooled=True)).backward(problem, rollouts)
    estimated = _taken(exact)
    _, response = require_normal(exact.follower).solve(exact.leader)
    nodes = rollouts.steps["action_nodes"]
    seen = rollouts.steps["state"][:, :-1].flatten(0, 1)
    gain = torch.linalg.lstsq(seen, nodes.mean(2).flatten(0, 1)).solution[:, 0]
    return {
        "x": x,
        "cosine": float(torch.cosine_similarity(estimated, true, 0)),
        "ratio": float(estimated.norm() / true.norm()),
        "estimated": estimated.tolist(),
        "exact": true.tolist(),
        "agent_gain": (-gain).tolist(),
        "exact_gain": response.gain[0, 0].tolist(),
        "agent_steps": settings.warmup,
        "path_steps": int(rollouts.mask.sum()),
    }


def _taken(problem: Problem) -> torch.Tensor:
    """The gradient in `.grad`, which is empty afterwards."""
    (parameter,) = problem.parameters
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    parameter.grad = None
    return gradient


def best_known(steps: int = 1_000) -> dict[str, Any]:
    """The regulator's optimum by the exact gradient, from x = 0."""
    problem = regulator(torch.tensor(START))
    optimizer = torch.optim.Adam(problem.parameters, lr=0.05, maximize=True)
    for _ in range(steps):
        optimizer.zero_grad()
        leader_value(problem).backward()
        optimizer.step()
    return {
        "start": leader_value(regulator(torch.tensor(START))).item(),
        "best": leader_value(problem).item(),
        "x": problem.parameters[0].tolist(),
    }


def ascend(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """HPGD with the agent as follower; values are exact, those of the best response to the leader reached.

    Of the leaders on the way the one is chosen whose paths were worth most to it, which needs no exact value.
    """
    settings = config.ascent
    start = regulator(torch.tensor(START))
    problem = agent_of(start, config, warmup=settings.warmup, steps=settings.agent_steps, seed=seed)
    follower = problem.follower
    assert isinstance(follower, GymFollower)
    run = HPGD(
        problem,
        torch.optim.Adam(problem.parameters, lr=settings.learning_rate, maximize=True),
        PolicyResponse(RegressionCritic(states, policy_nodes, pooled=True)),
        HPGDConfig(
            steps=settings.steps,
            contexts_per_step=1,
            group_size=settings.paths,
            max_gradient_norm=None,
            seed=seed,
            progress=False,
            checkpoint_every=5,
        ),
        out=folder,
    )
    run.run(resume=True)
    passed = [START, *([row[name] for name in NAMES] for row in run.history)]
    values = [leader_value(regulator(torch.tensor(x))).item() for x in passed]
    measured = [row["objective"] for row in run.history]  # of the leader before each step
    chosen = measured.index(max(measured))
    return {
        "values": values,
        "chosen": chosen,
        "value": values[chosen],
        "x": passed[chosen],
        "environment_steps": follower.environment_steps,
    }


def swing(config: Config, seed: int, arm: str, folder: Path) -> dict[str, Any]:
    """One agent in Pendulum-v1. But for "shaped" its leader never moves, and all else is the same.

    "paid more" earns 1 + bound times the objective: as much as a shaped one at most, without any shape.
    """
    settings = config.swing_up
    rate = settings.agent_learning_rate
    problem = swing_up(
        times=1 + settings.bound if arm == "paid more" else 1.0,
        temperature=settings.temperature,
        discount=settings.discount,
        leader_discount=settings.leader_discount,
        bound=settings.bound,
        warmup=settings.warmup,
        steps=settings.agent_steps,
        length=settings.length,
        settings=config.agent.settings(rate, learning_starts=min(1_000, settings.warmup // 2)),
        seed=seed,
    )
    follower = problem.follower
    assert isinstance(follower, GymFollower)
    curve: list[tuple[int, float]] = []

    def look(metrics: dict[str, float], rollouts: Rollouts) -> None:
        curve.append((follower.environment_steps, float(upright(rollouts)[rollouts.mask].mean())))

    def go_on(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        look(metrics, rollouts)
        return True

    if arm == "shaped":
        critic = RegressionCritic(states, policy_nodes, Network(updates=150), pooled=True)
        HPGD(
            problem,
            torch.optim.Adam(problem.parameters, lr=settings.learning_rate, maximize=True),
            PolicyResponse(critic),
            HPGDConfig(
                steps=settings.steps,
                contexts_per_step=1,
                group_size=settings.paths,
                max_gradient_norm=None,
                seed=seed,
                progress=False,
            ),
            observers=[look],
        ).run()
        save_file(problem.leader.state_dict(), folder / "leader.safetensors")
    else:
        follower.follow(
            problem.leader,
            go_on,
            start=0,
            steps=settings.steps,
            contexts_per_step=1,
            group_size=settings.paths,
            seed=seed,
        )
    follower.respond(problem.leader, torch.tensor([0]))  # to the last leader
    used = follower.environment_steps
    return {
        "share": share_upright(problem, settings.judged_on, FRESH + seed),
        "environment_steps": used,
        "curve": curve,
    }


def swing_both(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """All arms of a seed."""
    torch.set_num_threads(1)
    for arm in ARMS:
        found = kept(folder / f"{arm}.json", lambda arm=arm: swing(config, seed, arm, folder))  # type: ignore[misc]
        print(f"swing-up, seed {seed}, {arm}: upright {found['share']:.3f} of the time", flush=True)


def run(config: Config, out: Path, resume: bool) -> None:
    """Cosines, ascents, and Pendulum-v1; each part is kept in a file; summary.json and report.html.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
        RunStopped: an agent diverged.
    """
    began = time.perf_counter()
    claim(out, config, recipe="gym")
    torch.set_num_threads(1)
    cosines = []
    for number, x in enumerate(config.cosines.leaders):
        cosines.append(kept(out / f"cosine-{number}.json", lambda x=x: cosine(config, x)))  # type: ignore[misc]
        print(f"regulator, x = {x}: cosine {cosines[-1]['cosine']:.3f}", flush=True)
    optimum = kept(out / "optimum.json", best_known)
    ascents = []
    for seed in config.ascent.seeds:
        folder = out / f"ascent-{seed}"
        ascents.append(kept(folder / "ascent.json", lambda s=seed, f=folder: ascend(config, s, f)))  # type: ignore[misc]
        print(f"regulator, seed {seed}: value {ascents[-1]['value']:.3f} of {optimum['best']:.3f}", flush=True)
    each_seed(swing_both, config, out, config.swing_up.seeds, config.swing_up.jobs)
    swung = {arm: [read_kept(out / f"seed-{s}" / f"{arm}.json") for s in config.swing_up.seeds] for arm in ARMS}
    gained = [(a["value"] - optimum["start"]) / (optimum["best"] - optimum["start"]) for a in ascents]
    summary = {
        "cosines": cosines,
        "optimum": optimum,
        "share_of_gain": mean_and_error(gained),
        "gained": gained,
        "swing_up": {arm: mean_and_error([one["share"] for one in swung[arm]]) for arm in ARMS},
        "shares": {arm: [one["share"] for one in swung[arm]] for arm in ARMS},
        "environment_steps": {arm: [one["environment_steps"] for one in swung[arm]] for arm in ARMS},
        "seconds": time.perf_counter() - began,
    }
    write_summary(out, summary)
    report(out)
    print(f"report: {out / 'report.html'}")


def report(out: Path) -> None:
    """Write report.html and its figures from a finished run's folder."""
    config, summary = load_config(Config, out / CONFIG), read_summary(out)
    optimum = summary["optimum"]
    climbs = [read_kept(out / f"ascent-{seed}" / "ascent.json")["values"] for seed in config.ascent.seeds]
    points = [mean_and_error(column) for column in zip(*climbs, strict=True)]
    climb = (
        [float(step) for step in range(len(points))],
        [point["mean"] for point in points],
        [point["se"] if len(climbs) > 1 else 0.0 for point in points],
    )
    swings = {}
    for arm in ARMS:
        curves = [read_kept(out / f"seed-{seed}" / f"{arm}.json")["curve"] for seed in config.swing_up.seeds]
        column = [mean_and_error([share for _, share in row]) for row in zip(*curves, strict=True)]
        swings[arm] = (
            [float(steps) for steps, _ in curves[0]],
            [point["mean"] for point in column],
            [point["se"] if len(curves) > 1 else 0.0 for point in column],
        )
    levels = {"optimum": optimum["best"]}
    panels = [
        Panel("regulator", "leader step", "leader's exact value J", {"HPGD, SAC follower": climb}, levels=levels),
        Panel("Pendulum-v1", "environment steps", "share of steps upright", swings),
    ]
    curves_png(out / "curves.png", panels)
    rows = [
        [str(row["x"]), f"{row['cosine']:.3f}", f"{row['ratio']:.2f}", f"{row['agent_steps']:,}",
         ", ".join(f"{g:.2f}" for g in row["agent_gain"]), ", ".join(f"{g:.2f}" for g in row["exact_gain"])]
        for row in summary["cosines"]
    ]  # fmt: skip
    arms = [
        [arm, shown(summary["swing_up"][arm]), ", ".join(f"{s:.3f}" for s in summary["shares"][arm]),
         f"{summary['environment_steps'][arm][0]:,}"]
        for arm in ARMS
    ]  # fmt: skip
    write_run_report(
        out,
        title="gym",
        subtitle="SAC of Stable-Baselines3 as the follower",
        sections=[
            Section(
                "Hypergradients against the exact ones",
                "The agent learns once and is seen through its paths only.",
                [Table(["leader x", "cosine", "norm / exact", "agent's steps", "agent's gain", "exact gain"], rows)],
            ),
            Section(
                "Ascent on the regulator",
                f"From {optimum['start']:.3f} the leader reaches {shown(summary['share_of_gain'])} of what there is to "
                f"gain, chosen by its own paths; the optimum is {optimum['best']:.3f}. Values are exact.",
                [Charts(panels, "Left: the regulator; right: Pendulum-v1. Bands: standard errors.")],
            ),
            Section(
                "Pendulum-v1, sparse objective",
                f"Upright share over {config.swing_up.judged_on} fresh paths.",
                [Table(["agent", "upright", "by seed", "environment steps"], arms)],
            ),
        ],
    )
