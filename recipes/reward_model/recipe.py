"""Repair a hacked reward model by HPGD, and by iterated retraining on the same labels of the judge."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

from align_cbrl import InputError
from align_cbrl.checks import Count, Positive, Whole, check, checked
from align_cbrl.llm import RewardModelLeader
from align_cbrl.llm.leaders.reward_model import Trainable
from align_cbrl.llm.settings.hpgd import HPGDSettings
from align_cbrl.llm.settings.leader import RewardModelSettings
from align_cbrl.runs.charts import Panel, curves_png, mean_curve
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Charts, Section, Table

from ..refit import refit
from ..statistics import interval, mean_and_error, shown
from ..study import FRESH_SEED, SeedSettings, Study, compared, parts_of, rows_of, seeds_in_words
from ..worlds.bench import FIGURES, Bench, BenchSettings, at_divergence, tuning_steps
from ..worlds.check import check_bench
from ..worlds.world import PROXY, PolicySettings

SAME = "same"
"""The name of the policy that HPGD tuned around, among the fresh followers."""

WAYS = {"hpgd": "HPGD", "refit": "retrained"}


@checked
@dataclasses.dataclass(frozen=True)
class VariantSettings:
    """How a part of the reward model is trained.

    Attributes:
        budget: HPGD's, the largest relative change of what is trained.
        learning_rate: of HPGD's Adam, with hpgd.step: gradient; null: natural steps.
        refit_learning_rate: of iterated retraining's.
        replays: of HPGD's Adam, in place of hpgd.replays.

    Raises:
        InputError: replays without a learning rate.
    """

    budget: Positive
    refit_learning_rate: Positive
    learning_rate: Positive | None = None
    replays: Whole | None = None

    def __post_init__(self) -> None:
        if self.replays is not None and self.learning_rate is None:
            raise InputError("replays: belongs to a learning_rate; natural steps use what was judged before anyway")

    def steps(self, hpgd: HPGDSettings) -> HPGDSettings:
        """How HPGD climbs. Raises InputError for a learning rate with hpgd.step: natural."""
        if self.learning_rate is None:
            kept = {name: getattr(hpgd, name) for name in ("steps", "nats", "memory", "correction", "checkpoint_every")}
            return HPGDSettings(**kept)
        replays = hpgd.replays if self.replays is None else self.replays
        return dataclasses.replace(hpgd, learning_rate=self.learning_rate, replays=replays)


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings, BenchSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
        plain_strength: of plain RLHF's proxy, so that its curve reaches divergences beyond the repaired ones.
        variants: what is trained: head, lora or all.
        refit_passes: batches that retraining fits at each leader step.
        strengths: two spreads of a learned reward within prompts, at which fresh followers of the policy train.
        followers: further policies, by name, that train on the learned rewards.

    Raises:
        InputError: no seeds or variants, an unknown variant, or a follower named as the policy itself is.
    """

    plain_strength: float = 2.0
    variants: dict[str, VariantSettings] = dataclasses.field(default_factory=dict)
    refit_passes: int = 16
    strengths: list[float] = dataclasses.field(default_factory=lambda: [0.8, 1.25])
    followers: dict[str, PolicySettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("plain_strength", Positive), ("refit_passes", Count), ("strengths", list[Positive])):
            check(name, getattr(self, name), kind)
        if not self.variants:
            raise InputError("variants: expected at least one, got none")
        if unknown := set(self.variants) - set(get_args(Trainable)):
            raise InputError(f"variants: expected some of {', '.join(get_args(Trainable))}, got {sorted(unknown)}")
        if len(self.strengths) != 2 or not self.strengths[0] < self.strengths[1]:
            raise InputError(f"strengths: expected two positive numbers, the smaller first, got {self.strengths}")
        if SAME in self.followers:
            raise InputError(f"followers: {SAME!r} is the policy itself; choose another name")


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained."""
    STUDY.preflight(config, notes)
    named = {f"followers.{n}.model": p.model for n, p in config.followers.items()}
    check_bench(config, notes, seeds=config.seeds, policies=named)
    for key, variant in config.variants.items():
        with notes.about(f"variants.{key}"):
            RewardModelSettings(trainable=key).check([PROXY], True)  # type: ignore[arg-type]  # Config looked at it
            variant.steps(config.hpgd)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Both repairs of every variant, and fresh followers on what they leave."""
    bench = Bench(config, seed, folder, cache, _stages(config))
    models = {SAME: bench.model, **{name: bench.policy(policy) for name, policy in config.followers.items()}}

    def frozen(part: str, reward: str, policy: str, strength: float) -> dict[str, Any]:
        """A fresh follower on a frozen reward of this spread within prompts; its curve starts at the reference."""
        start = bench.point(bench.follower(seed, models[policy]))
        if reward == "plain":
            leader = bench.plain(strength)
        else:
            leader = bench.learned(reward)
            assert isinstance(leader, RewardModelLeader)  # that is what was tuned, or fitted
            leader.strength = strength
            leader.calibrate(bench.reference())
        follower = bench.train(part, leader, seed + FRESH_SEED, model=models[policy])
        return {**bench.final(follower), "curve": [{"step": 0, **start}, *bench.curve(part)]}

    def repaired(way: str, key: Trainable) -> dict[str, Any]:
        variant, name = config.variants[key], f"{way}-{key}"
        settings = RewardModelSettings(
            trainable=key, budget=variant.budget, strength=config.leader.strength, beta=config.leader.beta
        )
        leader, follower = bench.leader(settings), bench.follower(seed)
        if way == "refit":
            rate, passes = variant.refit_learning_rate, config.refit_passes
            _, curve = refit(bench, name, leader, spread=settings.strength, passes=passes, learning_rate=rate)
            return {"curve": curve}
        finished = bench.tune(name, leader, follower=follower, hpgd=variant.steps(config.hpgd))
        return {**bench.final(follower), **bench.cost_of(finished, follower), "curve": bench.curve(name)}

    def train(part: str, reward: str, policy: str, strength: float) -> None:
        bench.kept(part, lambda: frozen(part, reward, policy, strength))

    for policy in models:
        train(f"plain-{policy}", "plain", policy, config.plain_strength)
    for key in config.variants:
        for way in WAYS:
            bench.kept(f"{way}-{key}", lambda way=way, key=key: repaired(way, key))  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
            for strength in config.strengths:
                train(f"{way}-{key}-{SAME}-{strength:g}", f"{way}-{key}", SAME, strength)
        for policy in config.followers:
            train(f"hpgd-{key}-{policy}", f"hpgd-{key}", policy, config.leader.strength)


def _stages(config: Config) -> dict[str, int]:
    """The stages of a seed in their order, and the follower steps of each."""
    fresh, found = config.follower.steps, {}
    for policy in (SAME, *config.followers):
        found[f"plain-{policy}"] = fresh
    for key in config.variants:
        for way in WAYS:
            found[f"{way}-{key}"] = tuning_steps(config)
            found |= {f"{way}-{key}-{SAME}-{strength:g}": fresh for strength in config.strengths}
        found |= {f"hpgd-{key}-{policy}": fresh for policy in config.followers}
    return found


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


def _strong(config: Config, out: Path, way: str, key: str) -> dict[str, list[dict[str, Any]]]:
    """Fresh followers of the policy itself at either strength, by the name of their row."""
    parts = [f"{way}-{key}-{SAME}-{strength:g}" for strength in config.strengths]
    found = parts_of(out, config.seeds, *parts)
    names = [f"{WAYS[way]} {key}, fresh {SAME}, strength {strength:g}" for strength in config.strengths]
    return {name: found[part] for name, part in zip(names, parts, strict=True)}


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """What fresh followers reach, and how much of it each repair is worth at equal divergence."""

    def part(name: str) -> list[dict[str, Any]]:
        return parts_of(out, config.seeds, name)[name]

    def gains(policies: list[dict[str, Any]], plain: str) -> list[float]:
        return [over_plain(a, b) for a, b in zip(policies, part(f"plain-{plain}"), strict=True)]

    rows = {f"plain, {name}": part(f"plain-{name}") for name in (SAME, *config.followers)}
    variants = {}
    for key in config.variants:
        tuned, strong = part(f"hpgd-{key}"), {way: _strong(config, out, way, key) for way in WAYS}
        others = {name: part(f"hpgd-{key}-{name}") for name in config.followers}
        rows |= {f"HPGD {key}, tuned": tuned, **strong["hpgd"], **strong["refit"]}
        rows |= {f"HPGD {key}, fresh {name}": parts for name, parts in others.items()}
        own = [sum(pair) / 2 for pair in zip(*(gains(p, SAME) for p in strong["hpgd"].values()), strict=True)]
        pairs = {way: [list(pair) for pair in zip(*strong[way].values(), strict=True)] for way in WAYS}
        others_gain = {name: gains(parts, name) for name, parts in others.items()}
        variants[key] = {
            "tuned_over_plain": interval(gains(tuned, SAME)),
            "over_plain": interval(own),
            "over_retraining": interval(
                [difference_at_equal_divergence(h, r) for h, r in zip(pairs["hpgd"], pairs["refit"], strict=True)]
            ),
            # A share of no gain at all is not defined; every policy may score alike, in a short run.
            "kept": {name: sum(values) / sum(own) for name, values in others_gain.items()} if sum(own) else {},
            "others_over_plain": {name: interval(values) for name, values in others_gain.items()},
            "leader_share": max(p["leader_share"] for p in tuned),
        }
    labels = config.hpgd.steps * config.follower.prompts_per_step * config.follower.group_size
    return {"rows": rows_of(rows, ("judge", "proxy", "kl", "words")), "variants": variants, "labels": labels}


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the table."""
    found = []
    for key, variant in summary["variants"].items():
        found.append(f"{key}: over plain RLHF at equal divergence {shown(variant['over_plain'])}")
        found.append(f"{key}: over retraining at equal divergence {shown(variant['over_retraining'])}")
        found += [
            f"{key}: the follower {name} keeps {share:.0%} of the gain" for name, share in variant["kept"].items()
        ]
    return found


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report, with curves.png."""
    plain = [run["curve"] for run in parts_of(out, config.seeds, f"plain-{SAME}")[f"plain-{SAME}"]]
    # Both means over the steps that all seeds have.
    (_, nats, *_), _ = mean_curve([{point["step"]: point["kl"] for point in curve} for curve in plain])
    (_, judge, *error), _ = mean_curve([{point["step"]: point["judge"] for point in curve} for curve in plain])
    panels = []
    for key in config.variants:
        ends = {}
        for way in reversed(WAYS):
            runs = list(_strong(config, out, way, key).values())
            ended = [[mean_and_error([p[f]["mean"] for p in parts]) for parts in runs] for f in ("kl", "judge")]
            errors = [e["se"] if math.isfinite(e["se"]) else 0.0 for e in ended[1]]
            ends[WAYS[way]] = ([k["mean"] for k in ended[0]], [j["mean"] for j in ended[1]], errors)
        name = {"head": "Head", "lora": "LoRA", "all": "All parameters"}[key]
        lines_of = {"plain RLHF": (nats, judge, *error)}
        panels.append(Panel(name, "nats from the reference", "judge", lines_of, points=ends))
    curves_png(out / "curves.png", panels)
    differences, repairs = {}, []
    for key, found in summary["variants"].items():
        differences[f"{key}: over plain RLHF"] = found["over_plain"]
        differences[f"{key}: over retraining"] = found["over_retraining"]
        differences |= {f"{key}: {n} over its own plain RLHF": v for n, v in found["others_over_plain"].items()}
        # Of no gain, or a loss, there is no part.
        kept = found["kept"].items() if found["over_plain"]["mean"] > 0 else ()
        repairs.append(
            [key, ", ".join(f"{name} {share:.0%}" for name, share in kept) or None, f"{found['leader_share']:.1%}"]
        )
    heads = ["trained", "part of the gain that others keep", "leader's share of time"]
    return [
        Section(
            "At equal divergence",
            "The judge's score on test prompts: fresh followers on the frozen, learned rewards, each standardised and "
            "at two strengths. Plain RLHF is "
            "compared where its training passes the same divergence, retraining on the line through its two policies.",
            [
                compared(differences),
                Table(heads, repairs),
                Charts(
                    panels,
                    "Plain RLHF in training, from the reference on; the end of fresh followers' training on learned "
                    "rewards, at two strengths. Mean over seeds and its error.",
                ),
            ],
        ),
        Section("Where training ends", "", STUDY.result(summary, "Test prompts.")),
    ]


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    subtitle = f"{seeds_in_words(config)}, {summary['labels']:,} labels of the judge for each repair."
    return "A repaired reward model", subtitle


STUDY = Study("reward_model", Config, one_seed, summarize, sections, title, FIGURES, lines=lines)
run, report = STUDY.run, STUDY.report
