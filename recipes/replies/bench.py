"""What the laboratory's recipes share: a policy, rewards, a judge, and one follower trained on a reward or under HPGD.

A configuration names them, so that the same recipe runs on somebody else's. What is not named is made in the world of
`align_cbrl.recipes.replies`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, DatasetDict
from torch import Tensor

from align_cbrl import HPGD, HPGDConfig, InputError, Objective, Problem, Rollouts
from align_cbrl.llm import (
    Judge,
    LanguageLeader,
    RewardModel,
    load_leader,
    load_prompts,
    sample_completions,
    train_follower,
)
from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.llm.scoring import ScoreFunction
from align_cbrl.llm.settings.follower import FollowerSettings
from align_cbrl.llm.settings.judge import JudgeSettings
from align_cbrl.llm.settings.leader import LeaderSettings
from align_cbrl.runs.config import fingerprint, to_dict
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.metrics import MetricsLog

from ..docstrings.stages import cached
from ..statistics import mean_and_error
from .models import Family, train_policy, train_proxy

PROXY = "proxy"
REFERENCE_PROMPTS = 128
"""Training prompts whose completions by the reference standardise the rewards."""


@dataclasses.dataclass(frozen=True)
class WorldSettings:
    """Who is trained, on what, and which rewards there are.

    Attributes:
        data: prompts: a function, a file, a folder or a hub id.
        model: folder or hub id of the policy and reference; null trains one that writes replies.
        family: architecture of the policy that is made.
        hidden_size: its width.
        layers: its depth.
        rows: replies that it learns from.
        proxy: folder or hub id of the reward model; null trains a flawed one for the policy that is made, and leaves
            the first of `rewards` to stand in for it where `model` names a policy.
        proxy_pairs: preference pairs for the reward model that is made.
        rewards: further reward functions by name, as `package.module.function` or `file.py:function`.
        costs: what a constrained objective may bound, likewise.
    """

    data: str = "align_cbrl.recipes.replies.data.load_requests"
    model: str | None = None
    family: Family = "llama"
    hidden_size: int = 64
    layers: int = 2
    rows: int = 6000
    proxy: str | None = None
    proxy_pairs: int = 4000
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    costs: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is not None and self.proxy is None and not self.rewards:
            raise InputError("rewards: expected at least one where model names a policy and proxy is null, got none")
        if PROXY in self.rewards:
            raise InputError(f"rewards: {PROXY!r} is the name of the reward model's own term; choose another")


@dataclasses.dataclass(frozen=True)
class HPGDSettings:
    """How the leader climbs.

    Attributes:
        steps: leader steps.
        learning_rate: of the leader's Adam.
        replays: further updates after each leader step, on batches judged before; see `HPGDConfig.replays`.
    """

    steps: int = 30
    learning_rate: float = 0.1
    replays: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.replays < 0 or not self.learning_rate > 0:
            raise InputError(
                f"hpgd: expected steps >= 1, replays >= 0 and a positive learning_rate, got {dataclasses.astuple(self)}"
            )


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How policies are measured on test prompts.

    Attributes:
        every: follower steps between two points of a curve.
        prompts: test prompts, at most.
        group_size: completions of each for a point of a curve.
        final_group_size: and for the final figures.
    """

    every: int = 10
    prompts: int = 180
    group_size: int = 4
    final_group_size: int = 16

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.prompts < 2:
            raise InputError(f"measure: expected positive numbers and at least 2 prompts, got {self}")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """The part of a configuration that all of the laboratory's recipes have."""

    world: WorldSettings = dataclasses.field(default_factory=WorldSettings)
    judge: JudgeSettings = dataclasses.field(
        default_factory=lambda: JudgeSettings(function="align_cbrl.recipes.replies.judge.reply_judge")
    )
    leader: LeaderSettings = dataclasses.field(default_factory=LeaderSettings)
    follower: FollowerSettings = dataclasses.field(default_factory=FollowerSettings)
    hpgd: HPGDSettings = dataclasses.field(default_factory=HPGDSettings)
    measure: MeasureSettings = dataclasses.field(default_factory=MeasureSettings)


class Bench:
    """One seed's world, and how policies are trained and measured in it.

    Args:
        settings: the recipe's.
        seed: of everything that is drawn.
        out: this seed's folder. Models that are made lie in `cache`, shared by runs.
        cache: see above.

    Attributes:
        data: train and test prompts.
        model: folder or hub id of the policy.
        proxy: folder or hub id of the reward model, or None.
        judge: one for the whole seed, which counts what it is asked.
    """

    def __init__(self, settings: BenchSettings, seed: int, out: Path, cache: Path) -> None:
        # Bars of a fraction of a second, a hundred times over, would bury the run's own.
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        self.settings, self.seed, self.out, self.cache = settings, seed, out, cache
        out.mkdir(parents=True, exist_ok=True)
        world = settings.world
        self.data: DatasetDict = load_prompts(world.data, seed=seed)
        self.model = world.model or self.made_policy(world.family, world.hidden_size, world.layers)
        self.proxy = world.proxy or (None if world.model else self._made_proxy())
        judge = settings.judge.build(out)
        if not isinstance(judge, Judge):
            raise InputError("judge: expected one that scores completions, got one that compares pairs")
        self.judge = judge
        self._reference: Rollouts | None = None

    def made_policy(self, family: Family, hidden_size: int, layers: int) -> str:
        """Folder of a policy that writes replies, trained when it is not there yet."""
        facts: dict[str, object] = {
            "seed": self.seed, "family": family, "hidden_size": hidden_size, "layers": layers,
            "rows": self.settings.world.rows,
        }  # fmt: skip
        return str(cached(self.cache, "policy", facts, lambda out: train_policy(out, **facts), {}))  # type: ignore[arg-type]  # as above

    def terms(self) -> dict[str, ScoreFunction]:
        """The reward model, if there is one, and the further reward functions; the first is the proxy."""
        rewards = {name: load_object(path) for name, path in self.settings.world.rewards.items()}
        return rewards if self.proxy is None else {PROXY: RewardModel(self.proxy), **rewards}

    def costs(self) -> dict[str, Judge]:
        """What a constrained objective may bound, by name."""
        return {n: Judge(load_object(path), name=f"cost {n}") for n, path in self.settings.world.costs.items()}

    def leader(self, settings: LeaderSettings | None = None) -> LanguageLeader:
        """A leader where plain RLHF stands; the configuration's, or one of other settings."""
        settings = settings or self.settings.leader
        of_all = settings.kind == "mixture" or (settings.kind == "shaped" and settings.shaped is None)
        terms = self.terms()
        return settings.build(terms if of_all else dict(list(terms.items())[:1]), self.reference())

    def plain(self, strength: float | None = None) -> LanguageLeader:
        """The proxy alone, at the strength at which leaders start, or at another."""
        strength = strength or self.settings.leader.strength
        settings = LeaderSettings(strength=strength, budget=strength)
        return settings.build(dict(list(self.terms().items())[:1]), self.reference())

    def follower(self, seed: int, model: str | None = None) -> TrainedFollower:
        """A fresh follower, of the world's policy or of another one."""
        prompts = self.data["train"]
        prompts = prompts.remove_columns([name for name in prompts.column_names if name == "completion"])
        follower = self.settings.follower.build(model or self.model, prompts, seed)
        if not isinstance(follower, TrainedFollower):
            raise InputError(f"follower.trainer: expected one that trains, got {self.settings.follower.trainer!r}")
        return follower

    def reference(self) -> Rollouts:
        """Completions of the reference on training prompts, on which rewards are standardised."""
        if self._reference is None:
            follower = self.follower(self.seed)
            rows = torch.arange(min(REFERENCE_PROMPTS, len(self.data["train"])))
            generator = torch.Generator().manual_seed(self.seed)
            self._reference = follower.rollout(rows, 8, generator)
        return self._reference

    def test(self) -> Dataset:
        """The test prompts that policies are measured on."""
        return self.data["test"].select(range(min(self.settings.measure.prompts, len(self.data["test"]))))

    def measure(self, follower: TrainedFollower, group_size: int) -> dict[str, Any]:
        """A follower's figures on the test prompts.

        Returns:
            judge, proxy (in standard deviations of the reference's completions of a prompt), kl (nats) and words, each
            {mean, se} with the standard error over prompts; `costs`, likewise, by name; `by_prompt`, the judge's mean
            for each test prompt, and `groups`, the columns of these prompts; `samples`, a completion for some of them.
        """
        rollouts = self._answers(follower, group_size)
        size = (-1, group_size)
        judged, proxy, kl, words = (
            value.view(size).mean(1)
            for value in (
                self.judge(None, rollouts)[:, 0],
                self._proxy_scores(rollouts),
                (rollouts.log_policy - rollouts.log_prior)[:, 0],  # type: ignore[operator]  # sampled here, hence known
                torch.tensor([float(len(str(text).split())) for text in rollouts.steps["completion"]]),
            )
        )
        shown = range(0, rollouts.size, max(1, rollouts.size // (8 * group_size)) * group_size)
        return {
            **{n: mean_and_error(v) for n, v in (("judge", judged), ("proxy", proxy), ("kl", kl), ("words", words))},
            "by_prompt": judged.tolist(),
            "groups": {n: v[::group_size] for n, v in rollouts.steps.items() if n in self.data["test"].column_names},
            "costs": {n: mean_and_error(c(None, rollouts).view(size).mean(1)) for n, c in self.costs().items()},
            "samples": [
                {name: str(rollouts.steps[name][i]) for name in ("prompt", "completion")} for i in list(shown)[:8]
            ],
        }

    def point(self, follower: TrainedFollower) -> dict[str, float]:
        """The means of `measure`, for a point of a curve."""
        found = self.measure(follower, self.settings.measure.group_size)
        return {name: found[name]["mean"] for name in ("judge", "proxy", "kl", "words")}

    def final(self, follower: TrainedFollower) -> dict[str, Any]:
        """`measure` with many completions."""
        return self.measure(follower, self.settings.measure.final_group_size)

    def train(
        self, name: str, leader: LanguageLeader, seed: int, *, model: str | None = None, steps: int | None = None
    ) -> TrainedFollower:
        """A fresh follower trained on a frozen reward, its curve kept in `name`/metrics.jsonl; continues by itself."""
        follower = self.follower(seed, model)
        steps = steps or self.settings.follower.steps
        with torch.no_grad():
            parameters = [p.double().sum().item() for p in leader.parameters()]
        train_follower(
            follower, leader, steps, out=self.out / name,
            fingerprint=fingerprint({"seed": seed, "model": model or self.model, "parameters": parameters,
                                     "follower": to_dict(self.settings.follower)}),
            monitor=lambda rollouts: self.point(follower), log_every=self.settings.measure.every,
            checkpoint_every=50, name=f"{self.out.name} {name}",
        )  # fmt: skip
        return follower

    def tune(
        self, name: str, leader: LanguageLeader, objective: Objective, follower: Any = None, hpgd: Any = None
    ) -> HPGD:
        """HPGD around a fresh follower, its curve kept in `name`/curve.jsonl; continues by itself.

        Args:
            name: of the folder, in which the learned reward is saved too, as `name`/reward.
            leader: moved.
            objective: what it wants.
            follower: one of its own, such as a population; null for the configuration's.
            hpgd: settings other than the configuration's.
        """
        hpgd = hpgd or self.settings.hpgd
        out, settings = self.out / name, self.settings.follower
        watched = self.follower(self.seed) if follower is None else follower
        members = getattr(watched, "members", [watched])
        curve = MetricsLog(out / "curve.jsonl")
        every = self.settings.measure.every

        def observe(row: dict[str, float], rollouts: Rollouts) -> None:
            if row["step"] == 1:
                curve.truncate_after(0)
            taken = row["follower_steps"] / len(members)
            if taken % every < settings.schedule.interval or row["step"] == hpgd.steps:
                for i, member in enumerate(members):
                    judged = row["step"] * rollouts.size
                    curve.append(
                        {"step": taken, "leader_step": row["step"], "member": i, "judged": judged, **self.point(member)}
                    )

        run = HPGD(
            Problem(leader, objective, watched),
            torch.optim.Adam([p for p in leader.parameters() if p.requires_grad], lr=hpgd.learning_rate, maximize=True),
            config=HPGDConfig(
                steps=hpgd.steps, contexts_per_step=settings.prompts_per_step * len(members),
                group_size=settings.group_size, replays=hpgd.replays, seed=self.seed, checkpoint_every=5,
            ),
            out=out,
            fingerprint=fingerprint({"seed": self.seed, "model": self.model, "proxy": self.proxy, "name": name,
                                     "settings": to_dict(self.settings), "hpgd": to_dict(hpgd)}),
            observers=[observe],
        )  # fmt: skip
        with curve:
            run.run(resume=True)
        leader.save_pretrained(out / "reward")
        return run

    def learned(self, name: str) -> LanguageLeader:
        """The reward that `tune` left, as anybody would load it."""
        return load_leader(self.out / name / "reward")

    def curve(self, name: str) -> list[dict[str, Any]]:
        """The points of a curve, of `train` or `tune`; a point that a resumed run has made again counts once."""
        file = self.out / name / "curve.jsonl"
        rows = MetricsLog.read(file if file.exists() else self.out / name / "metrics.jsonl")
        return list({(row.get("member", 0), row["step"]): row for row in rows}.values())

    def _answers(self, follower: TrainedFollower, group_size: int) -> Rollouts:
        test = self.test()
        return sample_completions(
            follower.policy, follower.prior, follower.tokenizer, test, list(range(len(test))), group_size,
            self.settings.follower.max_completion_length, seed=self.seed,
        ).rollouts()  # fmt: skip

    def _proxy_scores(self, rollouts: Rollouts) -> Tensor:
        with torch.no_grad():
            return self.plain().reward(rollouts)[:, 0] / self.settings.leader.strength

    def _made_proxy(self) -> str:
        world = self.settings.world
        facts: dict[str, object] = {"seed": self.seed, "model": Path(self.model).name, "pairs": world.proxy_pairs}
        prompts = list(self.data["train"]["prompt"])
        return str(
            cached(
                self.cache, "proxy", facts,
                lambda out: train_proxy(self.model, prompts, out, seed=self.seed, pairs=world.proxy_pairs), {},
            )
        )  # fmt: skip


def at_divergence(curve: Sequence[Mapping[str, Any]], nats: float, figure: str = "judge") -> float | None:
    """A curve's figure where its divergence from the reference first reaches `nats`, linear between points.

    Args:
        curve: points with `kl` and `figure`, in the order of training; the reference itself is the first.
        nats: of divergence.
        figure: which.

    Returns:
        None when the curve does not reach that far.

    Example:
        >>> at_divergence([{"kl": 0.0, "judge": 0.5}, {"kl": 2.0, "judge": 0.9}], 1.0)
        0.7
    """
    for before, after in itertools.pairwise(curve):
        if before["kl"] <= nats <= after["kl"]:
            width = after["kl"] - before["kl"]
            share = (nats - before["kl"]) / width if width > 0 else 0.0
            return float(before[figure] + share * (after[figure] - before[figure]))
    return None
