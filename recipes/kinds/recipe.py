"""Which kinds of answers a policy gives: several good ones instead of one, or shares of kinds at their targets.

What the leader wants here is no mean of scores of single completions, so that no fit to such scores aims at it. Every
method ends with a reward; fresh followers are trained to the end on each, rivals' at several strengths, and all are
compared at the divergence from the reference at which HPGD's ends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from align_cbrl import InputError, Objective, Rollouts
from align_cbrl.checks import Positive
from align_cbrl.llm import LanguageLeader, RewardMixture
from align_cbrl.llm.settings.leader import MixtureSettings
from align_cbrl.llm.settings.objective import SetSettings, TargetSettings
from align_cbrl.runs.charts import Panel, curves_png
from align_cbrl.runs.imports import load_object, require_package
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Charts, Section, Table

from ..refit import refit
from ..statistics import interval, mean_and_error, shown
from ..study import (
    FRESH_SEED,
    SeedSettings,
    Study,
    compared,
    curves,
    described,
    parts_of,
    rows_of,
    samples,
    seeds_in_words,
)
from ..tune_weights.search import SearchSettings, search
from ..worlds.bench import FIGURES, Bench, BenchSettings, at_divergence
from ..worlds.check import check_bench
from .threshold import Threshold

Method = Literal["plain", "equal", "refit", "threshold", "tpe"]
"""Who is compared with HPGD; see config.yaml."""

SHARE = "share of "


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study; each has its own models, followers, leader and prompts.
        jobs: seeds at a time; null: one per core.
        methods: the rivals.
        strengths: standard deviations of the reward within a prompt at which plain, equal and refit try their luck.
        thresholds: strengths of the threshold reward, from far below to far above; less than half as many standard
            deviations within a prompt.
        slope: of the threshold reward, per standard deviation of the refitted reward.
        search: how TPE looks for weights.
        shown: the kinds of answers whose shares are shown.

    Raises:
        InputError: an objective that is a mean of scores, a leader that is no mixture, or curves without test prompts.
    """

    methods: list[Method] = dataclasses.field(default_factory=list)
    strengths: list[Positive] = dataclasses.field(default_factory=lambda: [0.5, 1.0])
    thresholds: list[Positive] = dataclasses.field(default_factory=lambda: [1.0, 2.0])
    slope: Positive = 2.0
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    shown: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, (SetSettings, TargetSettings)) or self.objective.answer is None:
            raise InputError(
                "objective: expected kind targets, or kind set with an answer, whose kinds are counted, got "
                f"{self.objective.kind}"
            )
        if self.leader.kind != "mixture" or self.leader.beta is not None:
            raise InputError("leader: expected a mixture without a learned beta, whose weights the rivals choose too")
        if self.measure.every is None:
            raise InputError("measure.every: expected a number, since all are compared along curves of test prompts")
        if isinstance(self.objective, TargetSettings) and {"refit", "threshold"} & set(self.methods):
            raise InputError("methods: refit and threshold describe a judge, which targets do not ask; leave them out")
        if "tpe" in self.methods:
            require_package("optuna", "tune", "methods: tpe")


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    check_bench(config, notes, seeds=config.seeds)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Everybody's reward, and a fresh follower on each; the base model and HPGD's own follower besides."""
    bench = Bench(config, seed, folder, cache)
    value = unpriced(bench)
    bench.further = {"objective": value, **shares(config)}

    def fresh(name: str, made: Callable[[], LanguageLeader]) -> dict[str, Any]:
        leader = made()
        follower = bench.train(f"{name}-fresh", leader, seed + FRESH_SEED)
        found = {**bench.final(follower, leader), "curve": bench.curve(f"{name}-fresh")}
        return {**found, "reward": leader.describe() if isinstance(leader, RewardMixture) else {}}

    def tuned() -> dict[str, Any]:
        leader, follower = bench.leader(), bench.follower(seed)
        finished = bench.tune("hpgd", leader, follower=follower)
        return {
            **bench.final(follower, leader), **bench.cost_of(finished, follower), "curve": bench.curve("hpgd"),
            "reward": leader.describe(),
        }  # fmt: skip

    bench.kept("base", lambda: bench.final(bench.follower(seed)))
    bench.kept("in_training", tuned)
    bench.kept("hpgd", lambda: fresh("hpgd", partial(bench.learned, "hpgd")))
    for name, made in rivals(bench, config, folder, value).items():
        bench.kept(name, partial(fresh, name, made))


def rivals(
    bench: Bench, config: Config, folder: Path, value: Callable[[Rollouts], float]
) -> dict[str, Callable[[], LanguageLeader]]:
    """What people would do instead: makers of rewards, by name."""
    found: dict[str, Callable[[], LanguageLeader]] = {}

    def mixture(strength: float) -> RewardMixture:
        made = bench.leader(MixtureSettings(strength=strength, budget=strength))
        assert isinstance(made, RewardMixture)
        return made

    def equal(strength: float) -> LanguageLeader:
        made = mixture(strength)
        made.aim(torch.ones(len(made.terms), dtype=torch.float64))
        return made

    def refitted(strength: float) -> RewardMixture:
        made = mixture(strength)
        name = f"refit {strength:g} in training"
        path = bench.out / name / "reward"
        if not path.exists():
            refit(bench, name, made, spread=strength)
        learned = bench.learned(name)
        assert isinstance(learned, RewardMixture)
        return learned

    def threshold(strength: float) -> LanguageLeader:
        return Threshold.around(bench, refitted(1.0), strength, config.slope)

    def best_of_search() -> LanguageLeader:
        trials = search(bench, "tpe", config.search, folder / "tpe", value)
        best = max(trials, key=lambda row: row["score"])
        made = mixture(config.leader.budget or config.leader.strength)
        made.aim(torch.tensor([best["weights"][name] for name in made.terms], dtype=torch.float64))
        return made

    for strength in config.strengths:
        if "plain" in config.methods:
            found[f"plain {strength:g}"] = partial(bench.plain, strength)
        if "equal" in config.methods:
            found[f"equal {strength:g}"] = partial(equal, strength)
        if "refit" in config.methods:
            found[f"refit {strength:g}"] = partial(refitted, strength)
    if "threshold" in config.methods:
        found |= {f"threshold {strength:g}": partial(threshold, strength) for strength in config.thresholds}
    if "tpe" in config.methods:
        found["tpe"] = best_of_search
    return found


def unpriced(bench: Bench) -> Callable[[Rollouts], float]:
    """What the leader wants, less the price, of the completions of a batch."""
    settings = bench.settings.objective
    assert isinstance(settings, (SetSettings, TargetSettings))
    objective: Objective = dataclasses.replace(settings, price=None).build(bench.judge, bench.costs(), natural=True)
    return lambda rollouts: objective.evaluate(None, rollouts).value.item()  # type: ignore[arg-type]  # asks for no reward


def shares(config: Config) -> dict[str, Callable[[Rollouts], float]]:
    """The share of each kind among the completions of a batch."""
    assert isinstance(config.objective, (SetSettings, TargetSettings))
    answer = load_object(config.objective.answer or "")

    def share(kind: str) -> Callable[[Rollouts], float]:
        def of(rollouts: Rollouts) -> float:
            kinds = answer(prompts=rollouts.steps["prompt"], completions=rollouts.steps["completion"])
            return sum(found == kind for found in kinds) / len(kinds)

        return of

    return {f"{SHARE}{kind}": share(kind) for kind in config.shown}


# ------------------------------------------------------------------------------------------------- summarizing


def most(policies: Sequence[Mapping[str, Any]], base: float, nats: float) -> float:
    """The most that policies of growing strength reach at no more than this divergence from the reference.

    Args:
        policies: the final figures of each, `kl` and `objective`, with a mean each; the line through them begins at the
            reference.
        base: the reference's own objective.
        nats: of divergence; a line that ends before counts as far as it goes.

    Example:
        >>> policies = [{"kl": {"mean": k}, "objective": {"mean": j}} for k, j in ((1.0, 0.9), (3.0, 0.5))]
        >>> most(policies, 0.2, 2.0), round(most(policies, 0.2, 0.5), 6)
        (0.9, 0.55)
    """
    line = sorted([(0.0, base), *((policy["kl"]["mean"], policy["objective"]["mean"]) for policy in policies)])
    reached = [value for kl, value in line if kl <= nats]
    crossing = at_divergence([{"kl": kl, "objective": value} for kl, value in line], nats, "objective")
    return max(reached if crossing is None else [*reached, crossing])


def best_moment(policies: Sequence[Mapping[str, Any]], base: float, nats: float) -> float:
    """The most that any of them was worth at any point of its training, at no more than this divergence.

    Chosen by the test prompts themselves, so that chance favours it.

    Example:
        >>> curve = [{"kl": 0.5, "objective": 0.6}, {"kl": 1.5, "objective": 0.8}]
        >>> best_moment([{"curve": curve}], 0.2, 1.0)
        0.6
    """
    return max([base, *(p["objective"] for policy in policies for p in policy["curve"] if p["kl"] <= nats)])


def family(name: str) -> str:
    """The method of a rival, without its strength."""
    return name.split()[0]


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """Gains over the base model at the divergence of HPGD's fresh follower; a rival has several strengths for it."""
    files = sorted(path.stem for path in (out / f"seed-{config.seeds[0]}").glob("*.json"))
    names = ["base", "in_training", "hpgd", *[n for n in files if family(n) in config.methods]]
    parts = parts_of(out, config.seeds, *names)
    bases = [part["objective"]["mean"] for part in parts["base"]]
    nats = [part["kl"]["mean"] for part in parts["hpgd"]]

    def gains(of: str, worth: Callable[[Sequence[Mapping[str, Any]], float, float], float]) -> list[float]:
        strengths = [parts[name] for name in names if family(name) == of]
        return [worth([s[i] for s in strengths], base, nats[i]) - base for i, base in enumerate(bases)]

    def own(name: str) -> list[float]:
        return [part["objective"]["mean"] - base for part, base in zip(parts[name], bases, strict=True)]

    ended: dict[str, list[float]] = {method: gains(method, most) for method in config.methods}
    best = max(ended, key=lambda method: mean_and_error(ended[method])["mean"], default=None)
    found = {"hpgd": own("hpgd"), "in_training": own("in_training"), **ended}
    at_best: dict[str, list[float]] = {f"{m}, its best moment": gains(m, best_moment) for m in config.methods}
    comparisons = {
        f"objective, HPGD's fresh follower minus {name}": interval(
            [a - b for a, b in zip(found["hpgd"], values, strict=True)]
        )
        for name, values in {**ended, **at_best}.items()
    }
    finals = ["objective", "judge", "kl", "words", *(f"{SHARE}{kind}" for kind in config.shown)]
    return {
        "rows": rows_of(parts, finals),
        "comparisons": comparisons,
        "gains": {name: interval(values) for name, values in {**found, **at_best}.items()},
        "nats": nats,
        "best_rival": best,
        "gain_over_best_rival": None if best is None else _ratio(found["hpgd"], ended[best]),
        "kept_by_fresh": _ratio(found["hpgd"], found["in_training"]),
        "rewards": {name: [part["reward"] for part in parts[name]] for name in names if name != "base"},
        "judge_calls": max(part["judge_calls"] for part in parts["in_training"]),
    }


def _ratio(gains: Sequence[float], others: Sequence[float]) -> float | None:
    """A mean gain over another one; None where the other is no gain."""
    of_others: float = mean_and_error(others)["mean"]
    return mean_and_error(gains)["mean"] / of_others if of_others > 0 else None


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the table."""
    nats = ", ".join(f"{value:.2f}" for value in summary["nats"])
    found = ["", f"gain over the base model at the divergence of HPGD's fresh follower ({nats} nats, by seed):"]
    found += [f"  {_LABELS.get(name, name)}: {shown(gain)}" for name, gain in summary["gains"].items()]
    if summary["gain_over_best_rival"] is not None:
        gain = f"{summary['gain_over_best_rival']:.2f} times what {summary['best_rival']} gains"
        found.append(f"HPGD's fresh follower gains {gain}")
    if summary["kept_by_fresh"] is not None:
        found.append(f"a fresh follower keeps {summary['kept_by_fresh']:.0%} of the gain of the one in training")
    return found


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report."""
    names = [row["name"] for row in summary["rows"]]
    parts = parts_of(out, config.seeds, *names)
    drawn: dict[str, Sequence[Any]] = {
        _LABELS.get(name, name): [part["curve"] for part in runs] for name, runs in parts.items() if "curve" in runs[0]
    }
    panels = [
        ("What the leader wants", "follower steps", "objective", "step", "objective"),
        ("Divergence from the reference", "follower steps", "nats", "step", "kl"),
    ]
    gains = {f"{_LABELS.get(name, name)}, over the base model": gain for name, gain in summary["gains"].items()}
    rewards = [[_LABELS.get(name, name), described(found[0])] for name, found in summary["rewards"].items() if found[0]]
    return [
        Section("Result", "Test prompts.", STUDY.result(summary, "Where training ends.")),
        Section(
            "At equal divergence",
            "A rival counts with the most that the line through its fully trained policies, one a strength, reaches "
            "at no more than the divergence of HPGD's fresh follower. Its best moment is the best point of all its "
            "training, chosen by the test prompts themselves.",
            [compared(gains), frontier(out, parts)],
        ),
        Section("Curves", "", [curves(out, panels, drawn)]),
        Section("Rewards of the first seed", "", [Table(["reward", "weights"], rewards)]),
        Section(
            "Test prompts",
            "",
            samples(parts, {n: _LABELS.get(n, n) for n in names}, ["base", "hpgd", *list(names[3:5])]),
        ),
    ]


def frontier(out: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Charts:
    """Where training ends: what the leader wants against divergence; frontier.png too.

    The strengths of a rival are one line from the reference on; a reward that comes in one strength is a point.
    """

    def ends(names: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
        found = [
            [mean_and_error([part[figure]["mean"] for part in parts[name]]) for figure in ("kl", "objective")]
            for name in names
        ]
        line = sorted(found, key=lambda end: end[0]["mean"])
        errors = [value["se"] if math.isfinite(value["se"]) else 0.0 for _, value in line]
        return [kl["mean"] for kl, _ in line], [value["mean"] for _, value in line], errors

    strengths: dict[str, list[str]] = {}
    for name in parts:
        if name not in ("base", "in_training"):
            strengths.setdefault("HPGD" if name == "hpgd" else family(name), []).append(name)
    lines_of = {method: ends(["base", *names]) for method, names in strengths.items() if len(names) > 1}
    points = {method: ends(names) for method, names in strengths.items()}
    panel = Panel("What the leader wants", "nats from the reference", "objective", lines_of, points=points)
    curves_png(out / "frontier.png", [panel])
    return Charts(
        [panel],
        "Fully trained policies on test prompts; the strengths of a rival are one line from the reference on. Mean "
        "over seeds and one standard error.",
    )


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    wanted = "Shares of kinds of answers" if isinstance(config.objective, TargetSettings) else "Several good answers"
    return wanted, f"{config.world.name}, {seeds_in_words(config)}; a fresh follower on every reward."


_NAMES = {**FIGURES, "objective": "objective"}
_AIMS = {"judge": "largest", "objective": "largest"}
_LABELS = {"base": "base model", "in_training": "HPGD's own follower", "hpgd": "HPGD, fresh follower"}
STUDY = Study(
    "kinds", Config, one_seed, summarize, sections, title, _NAMES, _LABELS, lines, aims=_AIMS, best_by="objective"
)
run, report = STUDY.run, STUDY.report
