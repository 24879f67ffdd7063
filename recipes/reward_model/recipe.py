"""Repair a hacked reward model by HPGD, and by iterated retraining on the same labels of the judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from align_cbrl import ExpectedUtility, InputError, KLPriced
from align_cbrl.config import load_config
from align_cbrl.report import Figure, Panel, Section, Table, curves_png, write_report
from align_cbrl.run_folder import claim, read_summary, write_summary
from recipes.parts import each_seed, kept, of_each_seed
from recipes.replies.bench import Bench, BenchSettings, at_divergence
from recipes.replies.models import Family
from recipes.replies.refit import refit
from recipes.settings.leader import LeaderSettings, RewardModelSettings
from recipes.statistics import band, interval, mean_and_error, shown

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
    followers: dict[str, PolicySettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or not self.variants:
            raise InputError("seeds, variants: expected at least one of each")
        if unknown := set(self.variants) - set(get_args(Trainable)):
            raise InputError(f"variants: expected some of {', '.join(get_args(Trainable))}, got {sorted(unknown)}")
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

    def frozen(name: str, reward: str, model: str | None) -> dict[str, Any]:
        """A fresh follower on a frozen reward, its curve starting at the reference."""
        start = bench.point(bench.follower(seed, model))
        leader = bench.plain(config.plain_strength) if reward == "plain" else bench.learned(reward)
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
        keep(f"plain-{name}", frozen, f"plain-{name}", "plain", model)
    for key, variant in config.variants.items():
        keep(f"hpgd-{key}", tuned, key, variant)
        keep(f"refit-{key}", refitted, key, variant)
        keep(f"refit-{key}-{SAME}", frozen, f"refit-{key}-{SAME}", f"refit-{key}", None)
        for name, model in models.items():
            keep(f"hpgd-{key}-{name}", frozen, f"hpgd-{key}-{name}", f"hpgd-{key}", model)


def _leader(trainable: Trainable, budget: float) -> LeaderSettings:
    return LeaderSettings(kind="reward_model", budget=budget, reward_model=RewardModelSettings(trainable=trainable))


def gain_at_equal_divergence(
    policy: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> tuple[float, float]:  # fmt: skip
    """How much better a policy's curve is than plain RLHF's at the farthest divergence that both reach.

    Args:
        policy: points with `kl` and `judge`, the reference first.
        plain: the same of plain RLHF.

    Returns:
        The difference of the judge's scores, and the divergence in nats.

    Example:
        >>> start = {"kl": 0.0, "judge": 0.5}
        >>> gain_at_equal_divergence([start, {"kl": 1.0, "judge": 0.7}], [start, {"kl": 2.0, "judge": 0.3}])
        (0.3, 1.0)
    """
    nats = min(max(point["kl"] for point in policy), max(point["kl"] for point in plain))
    there = [at_divergence(curve, nats) for curve in (policy, plain)]
    assert there[0] is not None and there[1] is not None  # both curves start at zero and reach that far
    return round(there[0] - there[1], 12), nats


def _summarize(config: Config, out: Path) -> dict[str, Any]:
    def part(name: str) -> list[dict[str, Any]]:
        return of_each_seed(out, config.seeds, name)

    def gains(first: str, second: str) -> list[float]:
        return [
            gain_at_equal_divergence(a["curve"], b["curve"])[0] for a, b in zip(part(first), part(second), strict=True)
        ]

    rows, variants = [], {}
    for name in (SAME, *config.followers):
        rows.append(_row(f"plain, {name}", part(f"plain-{name}")))
    for key in config.variants:
        rows.append(_row(f"HPGD {key}, tuned", part(f"hpgd-{key}")))
        rows += [_row(f"HPGD {key}, fresh {n}", part(f"hpgd-{key}-{n}")) for n in (SAME, *config.followers)]
        rows.append(_row(f"retrained {key}, fresh {SAME}", part(f"refit-{key}-{SAME}")))
        own = gains(f"hpgd-{key}-{SAME}", f"plain-{SAME}")
        others = {name: gains(f"hpgd-{key}-{name}", f"plain-{name}") for name in config.followers}
        mean = sum(own) / len(own)
        variants[key] = {
            "over_plain": interval(own),
            "over_retraining": interval(gains(f"hpgd-{key}-{SAME}", f"refit-{key}-{SAME}")),
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
    for key in config.variants:
        curves = {}
        for name, label in (
            (f"plain-{SAME}", "plain RLHF"),
            (f"refit-{key}-{SAME}", "retrained"),
            (f"hpgd-{key}-{SAME}", "HPGD"),
        ):
            runs = [part["curve"] for part in of_each_seed(out, config.seeds, name)]
            _, nats, _ = band(runs, "step", "kl")
            _, judge, error = band(runs, "step", "judge")
            curves[label] = (nats, judge, error)
        title = {"head": "Head", "lora": "LoRA", "all": "All parameters"}[key]
        panels.append(Panel(title, "nats from the reference", "judge", curves))
    curves_png(out / "curves.png", panels)
    figures = {"judge": "judge", "proxy": "proxy (sd)", "kl": "KL (nats)", "words": "words"}
    write_report(
        out / "report.html",
        title="A repaired reward model",
        subtitle=f"{len(config.seeds)} seeds, {summary['labels']:,} labels of the judge for each way of repair.",
        sections=[
            Section(
                "At equal divergence",
                "Fresh followers on the frozen, learned rewards, against fresh followers on the flawed one, at the "
                "farthest divergence that both reach.",
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
                    Figure(out / "curves.png", "Fresh followers in training; mean over seeds, bands of "
                           "one standard error."),
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
