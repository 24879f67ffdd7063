"""Preferences and a policy, and no judge: a reward model of one part of the pairs, tuned to please that of another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from align_cbrl import InputError
from align_cbrl.llm import Judge, LanguageLeader, RewardModel, TrainedFollower
from align_cbrl.llm.conversations import answer_text, shown_text
from align_cbrl.llm.followers.base import check_policy
from align_cbrl.llm.reward_models import check_reward_model
from align_cbrl.llm.settings.follower import TrainedSettings
from align_cbrl.llm.settings.hpgd import HPGDSettings
from align_cbrl.llm.settings.judge import RewardModelJudgeSettings
from align_cbrl.llm.settings.leader import LeaderSettings, MixtureSettings
from align_cbrl.llm.settings.objective import ExpectedSettings, ObjectiveSettings
from align_cbrl.objectives.preference_data import PreferenceData, Regularised
from align_cbrl.runs.config import to_dict
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.inputs import Policy, Proxy
from align_cbrl.runs.preflight import Preflight
from align_cbrl.runs.report import Section, Table

from ..fine_tuning import train_reward_model, without_bars
from ..statistics import mean_and_error, shown
from ..study import (
    FRESH_SEED,
    SeedSettings,
    Study,
    curves,
    described,
    difference,
    parts_of,
    rows_of,
    samples,
    seeds_in_words,
)
from ..worlds.bench import Bench, BenchSettings, MeasureSettings, tuning_steps
from ..worlds.cache import cached
from ..worlds.world import PROXY, PolicySettings, Replies
from .data import Parts, load_parts, pairs

LABELS = {
    "base": "base model",
    "plain": "plain RLHF on the reward model",
    "pooled": "plain RLHF on one of all pairs",
    "direct": "plain RLHF on the judge model",
    "hpgd": "HPGD",
    "fresh": "fresh follower on HPGD's reward",
}
FIGURES = {"wins": "wins over base", "truth": "true judge", "judge": "judge model", "kl": "KL (nats)", "words": "words"}
REWARDS = {
    "plain": "the reward model",
    "pooled": "one of all pairs",
    "direct": "the judge model",
    "hpgd": "HPGD's reward",
}


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """Shares of the prompts that the reward model does not see.

    Attributes:
        judge: for the model that judges.
        test: for measuring.
    """

    judge: float = 0.35
    test: float = 0.25

    def __post_init__(self) -> None:
        if not (self.judge > 0 and self.test > 0 and self.judge + self.test < 1):  # which a NaN fails too
            raise InputError(f"split: expected positive shares that leave some for training, got {self}")


@dataclasses.dataclass(frozen=True)
class RewardTrainingSettings:
    """Of every reward model, by trl's RewardTrainer, from the policy's weights.

    Attributes:
        epochs: passes over the pairs.
        batch_size: pairs of a step.
        learning_rate: the peak.
        max_length: tokens of prompt and answer; longer pairs are left out.
    """

    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_length: int = 128

    def __post_init__(self) -> None:
        if not min(dataclasses.astuple(self)) > 0:
            raise InputError(f"reward_training: expected positive numbers, got {self}")


@dataclasses.dataclass(frozen=True)
class Config(SeedSettings):
    """See config.yaml.

    Attributes:
        seeds: of the study.
        jobs: seeds at a time; null: one per core.
        preferences: pairs: a function, a file, a folder or a hub id.
        split: who gets which prompts.
        model: folder or hub id of policy and reference; null trains a small one.
        reward_model: folder or hub id; null trains one on the train pairs.
        reward_training: of every reward model that is made.
        rewards: further reward functions by name.
        leader: which reward it learns.
        objective: what it wants of the judge model's scores.
        label_weight: of the likelihood of the judge's labels under the learned reward, added to the objective.
        pairs_per_step: labels that a leader step looks at.
        follower: how the policy answers a reward.
        hpgd: how the leader climbs.
        measure: how policies are measured.
        truth: a judge that only the report sees.

    Raises:
        InputError: no seeds, or a negative weight of the labels.
    """

    preferences: str = "align_cbrl.recipes.preference_dataset.data.annotated_replies"
    split: SplitSettings = dataclasses.field(default_factory=SplitSettings)
    model: Policy | None = None
    reward_model: Proxy | None = None
    reward_training: RewardTrainingSettings = dataclasses.field(default_factory=RewardTrainingSettings)
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    leader: LeaderSettings = dataclasses.field(default_factory=MixtureSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ExpectedSettings)
    label_weight: float = 0.0
    pairs_per_step: int = 64
    follower: TrainedSettings = dataclasses.field(default_factory=TrainedSettings)
    hpgd: HPGDSettings = dataclasses.field(default_factory=HPGDSettings)
    measure: MeasureSettings = dataclasses.field(default_factory=MeasureSettings)
    truth: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_weight < 0 or self.pairs_per_step < 1:
            raise InputError(
                f"expected label_weight >= 0 and pairs_per_step >= 1, got {self.label_weight} and {self.pairs_per_step}"
            )


def _parts(config: Config, seed: int) -> Parts:
    scorer = (
        load_object(config.truth) if config.truth else RewardModel(config.reward_model) if config.reward_model else None
    )
    return load_parts(config.preferences, (config.split.judge, config.split.test), seed, scorer)


def preflight(config: Config, notes: Preflight) -> None:
    """What is looked at before anything is trained: the pairs, and what a bench needs around them."""
    STUDY.preflight(config, notes)
    if config.model is not None:
        with notes.about("model"):
            notes.found("model", check_policy(config.model))
    if config.reward_model is not None:
        with notes.about("reward_model"):
            notes.found("reward_model", check_reward_model(config.reward_model))
    with notes.about("follower"):
        config.follower.check()
    with notes.about("leader"):
        config.leader.check([PROXY, *config.rewards], True)
    with notes.about("objective"):
        config.objective.build(Judge(_nothing), natural=config.hpgd.step == "natural")
    for name, path in {"truth": config.truth, **{f"rewards.{n}": p for n, p in config.rewards.items()}}.items():
        if path is not None:
            with notes.about(name):
                load_object(path)
    if notes.refused("reward_model") or notes.refused("truth"):
        return
    for seed in config.seeds:
        with notes.about("preferences"):
            parts = _parts(config, seed)
            notes.found("preferences", f"{len(parts.train):,} pairs to train on")


def _nothing(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Stands for the judge's model, which is not made yet."""
    return [0.0 for _ in completions]


class Models:
    """One seed's pairs, and what is made of them: folders, in the cache that runs share.

    Attributes:
        parts: of the pairs.
        policy: the policy and reference.
        reward: of the train pairs, or the one that is given.
        judge: of the judge's pairs.
        pooled: of both.
        referee: of the test pairs.
    """

    def __init__(self, config: Config, seed: int, cache: Path) -> None:
        without_bars()
        self.parts = parts = _parts(config, seed)
        self.policy = Replies().another_policy(PolicySettings(config.model), seed, cache)

        def reward_model(rows: Dataset) -> str:
            training = to_dict(config.reward_training)
            facts = {"seed": seed, "model": self.policy, "training": training, "rows": [list(r.values()) for r in rows]}
            return str(
                cached(
                    cache, "preferences", facts,
                    lambda out: train_reward_model(self.policy, rows, out, seed=seed, **training),
                )
            )  # fmt: skip

        columns = ["prompt", "chosen", "rejected"]
        train, judge, test = (rows.select_columns(columns) for rows in (parts.train, parts.judge, parts.test))
        self.reward = config.reward_model or reward_model(train)
        self.judge = reward_model(judge)
        self.pooled = reward_model(concatenate_datasets([train, judge]))
        self.referee = reward_model(test)
        self.prompts = str(
            cached(
                cache, "prompts", {"seed": seed, "rows": [str(r) for part in parts.prompts().values() for r in part]},
                lambda out: parts.prompts().save_to_disk(str(out)),
            )
        )  # fmt: skip

    def bench(self, config: Config, seed: int, out: Path, cache: Path, reward: str | None = None) -> Bench:
        """The laboratory with the judge's model as its judge; `reward` is the proxy, by default the train pairs'."""
        world = Replies(data=self.prompts, model=self.policy, proxy=reward or self.reward, rewards=config.rewards)
        judge = RewardModelJudgeSettings(reward_model=self.judge)
        shared = {name: getattr(config, name) for name in ("leader", "follower", "hpgd", "measure")}
        settings = BenchSettings(world=world, judge=judge, **shared)
        plain = dict.fromkeys(("plain", "pooled", "direct"), config.follower.steps)
        steps = {"base": 0, **plain, "hpgd": tuning_steps(settings), "fresh": config.follower.steps}
        return Bench(settings, seed, out, cache, steps)


def one_seed(config: Config, seed: int, folder: Path, cache: Path) -> None:
    """Reward models, plain RLHF on three of them, HPGD, and a fresh follower on what it learned."""
    models = Models(config, seed, cache)
    bench = models.bench(config, seed, folder, cache)
    referee = Referee(config, bench, models)

    def base() -> dict[str, Any]:
        return referee.measure(bench.follower(seed))

    def plain() -> dict[str, Any]:
        reward = bench.plain()
        follower = bench.train("plain", reward, seed)
        return {**referee.measure(follower), "curve": bench.curve("plain"), "agreement": referee.agreement(reward)}

    def on_another(name: str, path: str) -> dict[str, Any]:
        other = models.bench(config, seed, folder, cache, path)
        reward = other.plain()
        follower = other.train(name, reward, seed)
        return {**referee.measure(follower), "curve": other.curve(name), "agreement": referee.agreement(reward)}

    def tuned() -> dict[str, Any]:
        leader, objective = bench.leader(), config.objective.build(bench.judge, natural=config.hpgd.step == "natural")
        if config.label_weight > 0:
            labels = pairs(models.parts.judge)
            data = PreferenceData(*labels, min(config.pairs_per_step, labels[0].size), seed)
            objective = Regularised(objective, data, config.label_weight)
        follower = bench.follower(seed)
        finished = bench.tune("hpgd", leader, objective, follower)
        return {
            **referee.measure(follower), "curve": bench.curve("hpgd"), "agreement": referee.agreement(leader),
            "reward": leader.describe(), "leader_share": finished.history[-1]["leader_share"],
        }  # fmt: skip

    def fresh() -> dict[str, Any]:
        follower = bench.train("fresh", bench.learned("hpgd"), seed + FRESH_SEED)
        return {**referee.measure(follower), "curve": bench.curve("fresh")}

    bench.kept("base", base)
    bench.kept("plain", plain)
    bench.kept("pooled", lambda: on_another("pooled", models.pooled))
    bench.kept("direct", lambda: on_another("direct", models.judge))
    bench.kept("hpgd", tuned)
    bench.kept("fresh", fresh)


class Referee:
    """Measures policies and rewards by what nobody has seen: the test pairs, and the truth where there is one."""

    def __init__(self, config: Config, bench: Bench, models: Models) -> None:
        self.config, self.bench, self.labels = config, bench, pairs(models.parts.test)
        self.model = RewardModel(models.referee)
        self.truth = None if config.truth is None else Judge(load_object(config.truth), name=f"truth {config.truth}")
        self._base: Tensor | None = None

    def measure(self, follower: TrainedFollower) -> dict[str, Any]:
        """A follower's figures on the test prompts, each {mean, se} over prompts, and samples.

        `wins` is the probability, under the model of the test pairs, that the policy's answer is preferred to the
        reference's; `judge` the score of the model that the leader pleases, in nats of the odds of a preference.
        """
        group = self.bench.settings.measure.final_group_size
        rollouts = self._answers(follower, follower.policy)
        if self._base is None:
            self._base = self._scores(self._answers(follower, follower.prior))
        odds = self._scores(rollouts).view(-1, group, 1) - self._base.view(-1, 1, group)
        assert rollouts.log_policy is not None and rollouts.log_prior is not None  # sampled here
        texts = [answer_text(completion) for completion in rollouts.steps["completion"]]
        judged = self.bench.judge(None, rollouts)[:, 0]
        truth = None if self.truth is None else self.truth(None, rollouts)[:, 0]
        figures = {
            "wins": odds.sigmoid().mean((1, 2)),
            "judge": judged.view(-1, group).mean(1),
            "kl": (rollouts.log_policy - rollouts.log_prior).view(-1, group).mean(1),
            "words": torch.tensor([float(len(text.split())) for text in texts]).view(-1, group).mean(1),
        }
        if truth is not None:
            figures["truth"] = truth.view(-1, group).mean(1)
        shown_rows = list(range(0, rollouts.size, group))[:16]
        prompts = rollouts.steps["prompt"]
        scores = {"judge model": judged, **({} if truth is None else {"true judge": truth})}
        samples = [
            {
                "prompt": shown_text(prompts[i]),
                "completion": texts[i],
                "scores": {name: value[i].item() for name, value in scores.items()},
            }
            for i in shown_rows
        ]
        return {
            **{name: mean_and_error(value) for name, value in figures.items()},
            "by_prompt": {name: value.tolist() for name, value in figures.items()},
            "samples": samples,
        }

    def agreement(self, reward: LanguageLeader | RewardModel) -> float:
        """The share of the test labels that a reward agrees with."""
        good, bad = (self._reward(reward, rollouts) for rollouts in self.labels)
        return ((good > bad).double() + 0.5 * (good == bad)).mean().item()

    def _reward(self, reward: LanguageLeader | RewardModel, rollouts: Any) -> Tensor:
        if isinstance(reward, RewardModel):
            return torch.tensor(reward(rollouts.steps["prompt"], rollouts.steps["completion"]), dtype=torch.float64)
        with torch.no_grad():
            return reward.reward(rollouts)[:, 0].double()

    def _scores(self, rollouts: Any) -> Tensor:
        return self._reward(self.model, rollouts)

    def _answers(self, follower: TrainedFollower, policy: Any) -> Any:
        test, group = self.bench.test(), self.bench.settings.measure.final_group_size
        return follower.answers(policy, follower.prior, test, range(len(test)), group, seed=self.bench.seed).rollouts()


def summarize(config: Config, out: Path) -> dict[str, Any]:
    """Rows over seeds, differences to HPGD, and how well each reward explains the test labels."""
    parts = parts_of(out, config.seeds, *LABELS)
    figures = [name for name in FIGURES if name in parts["base"][0]]
    return {
        "rows": rows_of(parts, figures),
        "comparisons": {
            f"{FIGURES[figure]}, HPGD minus {LABELS[name]}": difference(parts, "hpgd", name, figure)
            for figure in ("wins", "truth")
            if figure in figures
            for name in ("plain", "pooled", "direct", "fresh")
        },
        "agreement": {n: mean_and_error([part["agreement"] for part in parts[n]]) for n in REWARDS},
        "rewards": [part["reward"] for part in parts["hpgd"]],
        "leader_share": max(part["leader_share"] for part in parts["hpgd"]),
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """What is printed below the tables."""
    return [
        *(f"test labels that {REWARDS[name]} agrees with: {shown(v)}" for name, v in summary["agreement"].items()),
        f"\nlearned reward, first seed: {described(summary['rewards'][0])}",
    ]


def sections(config: Config, out: Path, summary: dict[str, Any]) -> list[Section]:
    """The report, with curves.png."""
    parts = parts_of(out, config.seeds, *LABELS)
    runs = {LABELS[name]: [run["curve"] for run in of_all] for name, of_all in parts.items() if "curve" in of_all[0]}
    panels = [
        ("Judge model", "follower steps", "nats", "step", "judge"),
        ("Divergence", "follower steps", "nats", "step", "kl"),
    ]
    result = STUDY.result(
        summary,
        "Test prompts. Wins over base: the probability, by a model of the test "
        "pairs, that an answer is preferred to one of the base model. Judge model: the score that HPGD climbs, in nats "
        "of the odds.",
    )
    agreement = [[REWARDS[name], shown(value)] for name, value in summary["agreement"].items()]
    return [
        Section("Result", "", result),
        Section(
            "What the rewards know",
            "The share of the test labels that each agrees with. A reward that explains labels better need not lead to "
            "a better policy: labels are of answers like the base model's, and the policy leaves them.",
            [Table(["reward", "agreement"], agreement)],
        ),
        Section("The learned reward", "\n\n".join(described(reward) for reward in summary["rewards"])),
        Section("Curves", "", [curves(out, panels, runs)]),
        Section("Test prompts", "", samples(parts, LABELS, list(LABELS))),
    ]


def title(config: Config, summary: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the report."""
    return (
        "A reward from preferences",
        f"{config.preferences}, {seeds_in_words(config)}: the reward is tuned to please a model of pairs that it was "
        "not trained on, and measured by pairs that neither has seen.",
    )


_AIMS = {"wins": "largest", "truth": "largest"}
STUDY = Study(
    "preference_dataset", Config, one_seed, summarize, sections, title, FIGURES, LABELS, lines, _AIMS, best_by="wins"
)
run, report = STUDY.run, STUDY.report
