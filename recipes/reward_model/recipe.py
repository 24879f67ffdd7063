"""Repair a hacked reward model by HPGD, and by iterated retraining on the same labels of the judge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from align_cbrl import ExpectedUtility, InputError, KLPriced
from align_cbrl.llm import RewardModelLeader
from align_cbrl.llm.settings.leader import LeaderSettings, RewardModelSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.report import Figure, Panel, Section, Table, curves_png, write_report
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

from ..parts import each_seed, kept, of_each_seed
from ..replies.bench import Bench, BenchSettings, at_divergence
from ..replies.models import Family
from ..replies.refit import refit
from ..statistics import band, counted, interval, mean_and_error, shown

Trainable = Literal["head", "lora", "all"]
FRESH_SEED = 1_000_003
SAME = "same"
"""The name of the policy that HPGD tuned around, among the fresh followers."""


@dataclasses.dataclass(frozen=True)
class VariantSettings:
    """How a part of the reward model is trained.

    Attributes:
        budget: HPGD's, the largest relative change of what is trained.
        learning_rate: of HPGD's Adam.
        refit_learning_rate: of iterated retraining's.
    """

    budget: float
    learning_rate: float
    refit_learning_rate: float


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """A policy that is made: its architecture and size."""

    family: Family
    hidden_size: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Config(BenchSettings):
    """See config.yaml.

    Raises:
        InputError: no seeds or variants, an unknown variant, or a follower named as the policy itself is.
    """

    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    jobs: int | None = None
    price: float = 0.0
    plain_strength: float = 2.0
    variants: dict[str, VariantSettings] = dataclasses.field(default_factory=dict)
    refit_passes: int = 16
    strengths: list[float] = dataclasses.field(default_factory=lambda: [0.8, 1.25])
    followers: dict[str, PolicySettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or not self.variants:
            raise InputError("seeds, variants: expected at least one of each")
        if unknown := set(self.variants) - set(get_args(Trainable)):
            raise InputError(f"variants: expected some of {', '.join(get_args(Trainable))}, got {sorted(unknown)}")
        if len(self.strengths) != 2 or not 0 < self.strengths[0] < self.strengths[1]:
            raise InputError(f"strengths: expected two positive numbers, the smaller first, got {self.strengths}")
        if SAME in self.followers:
            raise InputError(f"followers: {SAME!r} is the policy itself; choose another name")


def run(config: Config, out: Path, resume: bool) -> None:
    """HPGD, retraining and fresh followers for every variant and seed, then the report; see config.yaml.

    Writes to `out`: summary.json, curves.png, report.html, and a folder for each seed with the learned reward models.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    claim(out, config, recipe="reward_model", free=["jobs"])
    each_seed(_one_seed, config, out, config.seeds, config.jobs)
    write_summary(out, _summarize(config, out))
    report(out)
    _print(out)


def _one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    bench = Bench(config, seed, folder, cache)
    models = {SAME: None, **{n: bench.made_policy(**dataclasses.asdict(p)) for n, p in config.followers.items()}}

    def frozen(name: str, reward: str, model: str | None, strength: float) -> dict[str, Any]:
        """A fresh follower on a frozen reward of this spread within prompts; its curve starts at the reference."""
        start = bench.point(bench.follower(seed, model))
        if reward == "plain":
            leader = bench.plain(strength)
        else:
            leader = bench.learned(reward)
            assert isinstance(leader, RewardModelLeader)  # that is what was tuned, or fitted
            leader.strength = strength
            leader.calibrate(bench.reference())
        follower = bench.train(name, leader, seed + FRESH_SEED, model=model)
        return {**bench.final(follower), "curve": [{"step": 0, **start}, *bench.curve(name)]}

    def tuned(trainable: Trainable, variant: VariantSettings) -> dict[str, Any]:
        objective = KLPriced(ExpectedUtility(bench.judge), config.price)
        follower = bench.follower(seed)
        hpgd = dataclasses.replace(config.hpgd, learning_rate=variant.learning_rate)
        leader = bench.leader(_leader(trainable, variant.budget))
        finished = bench.tune(f"hpgd-{trainable}", leader, objective, follower, hpgd)
        curve = bench.curve(f"hpgd-{trainable}")
        return {**bench.final(follower), "curve": curve, "leader_share": finished.history[-1]["leader_share"]}

    def refitted(trainable: Trainable, variant: VariantSettings) -> dict[str, Any]:
        leader, rate = bench.leader(_leader(trainable, variant.budget)), variant.refit_learning_rate
        curve = refit(
            bench, f"refit-{trainable}", leader, spread=config.leader.strength, passes=config.refit_passes,
            learning_rate=rate,
        )  # fmt: skip
        return {"curve": curve}

    def keep(part: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        kept(folder / f"{part}.json", lambda: make(*arguments))

    for name, model in models.items():
        keep(f"plain-{name}", frozen, f"plain-{name}", "plain", model, config.plain_strength)
    for key, variant in config.variants.items():
        keep(f"hpgd-{key}", tuned, key, variant)
        keep(f"refit-{key}", refitted, key, variant)
        for way in ("hpgd", "refit"):
            for strength in config.strengths:
                part = f"{way}-{key}-{SAME}-{strength:g}"
                keep(part, frozen, part, f"{way}-{key}", None, strength)
        for name in config.followers:
            part = f"hpgd-{key}-{name}"
            keep(part, frozen, part, f"hpgd-{key}", models[name], config.leader.strength)


def _leader(trainable: Trainable, budget: float) -> LeaderSettings:
    return LeaderSettings(kind="reward_model", budget=budget, reward_model=RewardModelSettings(trainable=trainable))


def over_plain(policy: dict[str, Any], plain: dict[str, Any]) -> float:
    """How much better a trained policy is judged than plain RLHF was where its training passed the same divergence.

    Args:
        policy: its final figures, `judge` and `kl`, each with a mean.
        plain: with `curve`, points of plain RLHF's training, the reference first. If it never went as far, its end.

    Example:
        >>> policy = {"judge": {"mean": 0.7}, "kl": {"mean": 1.0}}
        >>> round(over_plain(policy, {"curve": [{"kl": 0.0, "judge": 0.5}, {"kl": 2.0, "judge": 0.3}]}), 6)
        0.3
    """
    there = at_divergence(plain["curve"], policy["kl"]["mean"])
    return float(policy["judge"]["mean"] - (plain["curve"][-1]["judge"] if there is None else there))


def difference_at_equal_divergence(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """The judge's score of one reward's policies over another's, each trained at two strengths, at one divergence.

    Each pair of final policies makes a line of score against divergence; the lines are compared where all four policies
    lie on average.

    Example:
        >>> line = lambda *points: [{"kl": {"mean": k}, "judge": {"mean": j}} for k, j in points]
        >>> round(difference_at_equal_divergence(line((1.0, 0.5), (2.0, 0.6)), line((0.9, 0.45), (1.9, 0.55))), 6)
        0.04
    """
    nats = sum(policy["kl"]["mean"] for policy in (*first, *second)) / 4

    def at(pair: list[dict[str, Any]]) -> float:
        (k0, j0), (k1, j1) = ((policy["kl"]["mean"], policy["judge"]["mean"]) for policy in pair)
        slope = (j1 - j0) / (k1 - k0) if abs(k1 - k0) > 0.05 else 0.0  # too close together for a line
        return float((j0 + j1) / 2 + slope * (nats - (k0 + k1) / 2))

    return at(first) - at(second)


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    def part(name: str) -> list[dict[str, Any]]:
        return of_each_seed(out, config.seeds, name)

    def gains(policy: str, plain: str) -> list[float]:
        return [over_plain(a, b) for a, b in zip(part(policy), part(plain), strict=True)]

    rows, variants = [], {}
    for name in (SAME, *config.followers):
        rows.append(_row(f"plain, {name}", part(f"plain-{name}")))
    for key in config.variants:
        rows.append(_row(f"HPGD {key}, tuned", part(f"hpgd-{key}")))
        pairs = {}
        for way, label in (("hpgd", "HPGD"), ("refit", "retrained")):
            strong = [part(f"{way}-{key}-{SAME}-{strength:g}") for strength in config.strengths]
            rows += [
                _row(f"{label} {key}, fresh {SAME}, strength {strength:g}", parts)
                for strength, parts in zip(config.strengths, strong, strict=True)
            ]
            pairs[way] = [list(pair) for pair in zip(*strong, strict=True)]
        rows += [_row(f"HPGD {key}, fresh {name}", part(f"hpgd-{key}-{name}")) for name in config.followers]
        weak, strong_gains = (gains(f"hpgd-{key}-{SAME}-{s:g}", f"plain-{SAME}") for s in config.strengths)
        own = [(a + b) / 2 for a, b in zip(weak, strong_gains, strict=True)]
        others = {name: gains(f"hpgd-{key}-{name}", f"plain-{name}") for name in config.followers}
        mean = sum(own) / len(own)
        variants[key] = {
            "tuned_over_plain": interval(gains(f"hpgd-{key}", f"plain-{SAME}")),
            "over_plain": interval(own),
            "over_retraining": interval(
                [difference_at_equal_divergence(h, r) for h, r in zip(pairs["hpgd"], pairs["refit"], strict=True)]
            ),
            "kept": {name: sum(values) / len(values) / mean for name, values in others.items()},
            "others_over_plain": {name: interval(values) for name, values in others.items()},
            "leader_share": max(p["leader_share"] for p in part(f"hpgd-{key}")),
        }
    labels = config.hpgd.steps * config.follower.prompts_per_step * config.follower.group_size
    return {"rows": rows, "variants": variants, "labels": labels}


def _row(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        **{f: mean_and_error([p[f]["mean"] for p in parts]) for f in ("judge", "proxy", "kl", "words")},
    }


def report(out: Path) -> None:
    """Draw curves.png and write report.html again, from what a finished run left in `out`."""
    summary = read_summary(out)
    config = load_config(Config, out / "config.yaml")
    panels = []
    plain = [part["curve"] for part in of_each_seed(out, config.seeds, f"plain-{SAME}")]
    _, nats, _ = band(plain, "step", "kl")
    _, judge, error = band(plain, "step", "judge")
    for key in config.variants:
        ends = {}
        for way, label in (("refit", "retrained"), ("hpgd", "HPGD")):
            runs = [of_each_seed(out, config.seeds, f"{way}-{key}-{SAME}-{s:g}") for s in config.strengths]
            found = [[mean_and_error([p[f]["mean"] for p in parts]) for parts in runs] for f in ("kl", "judge")]
            errors = [e["se"] if e["se"] is not None and math.isfinite(e["se"]) else 0.0 for e in found[1]]
            ends[label] = ([k["mean"] for k in found[0]], [j["mean"] for j in found[1]], errors)
        title = {"head": "Head", "lora": "LoRA", "all": "All parameters"}[key]
        panels.append(
            Panel(title, "nats from the reference", "judge", {"plain RLHF": (nats, judge, error)}, points=ends)
        )
    curves_png(out / "curves.png", panels)
    figures = {"judge": "judge", "proxy": "proxy (sd)", "kl": "KL (nats)", "words": "words"}
    write_report(
        out / "report.html",
        title="A repaired reward model",
        subtitle=f"{counted(len(config.seeds), 'seed')}, {summary['labels']:,} labels of the judge for each repair.",
        sections=[
            Section(
                "At equal divergence",
                "Fresh followers on the frozen, learned rewards, each standardised and at two strengths. Plain RLHF is "
                "compared where its training passes the same divergence, retraining on the line through its two "
                "policies.",
                [
                    Table(
                        ["trained", "over plain RLHF", "over retraining", "kept by others", "leader's share of time"],
                        [
                            [key, shown(v["over_plain"]), shown(v["over_retraining"]),
                             ", ".join(f"{name} {share:.0%}" for name, share in v["kept"].items()) or "-",
                             v["leader_share"]]
                            for key, v in summary["variants"].items()
                        ],
                        "Differences of the judge's score on test prompts.",
                    ),
                    Figure(out / "curves.png", "Plain RLHF in training, from the reference on; the end of fresh "
                           "followers' training on learned rewards, at two strengths. Mean over seeds and its error."),
                ],
            ),
            Section(
                "Where training ends", "",
                [
                    Table(
                        ["policy", *figures.values()],
                        [[row["name"], *(shown(row[f]) for f in figures)] for row in summary["rows"]],
                        "Test prompts; mean and standard error over seeds.",
                    )
                ],
            ),
        ],
    )  # fmt: skip


def _print(out: Path) -> None:
    summary = read_summary(out)
    for row in summary["rows"]:
        print(f"{row['name']:<32}" + "".join(f"{f} {shown(row[f])}  " for f in ("judge", "kl")))
    for key, found in summary["variants"].items():
        print(f"{key}: over plain RLHF at equal divergence {shown(found['over_plain'])}")
        print(f"{key}: over retraining at equal divergence {shown(found['over_retraining'])}")
        for name, share in found["kept"].items():
            print(f"{key}: the follower {name} keeps {share:.0%} of the gain")
    print(f"report: {out / 'report.html'}")
