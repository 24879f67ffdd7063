"""The bench: one seed's policy, rewards and judge, and how followers are trained and measured with them.

A configuration names them, so that the same recipe runs on somebody else's. What it does not name is made by its world.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from align_cbrl import HPGD, InputError, Objective, Problem, Rollouts
from align_cbrl.functional import best_response_gap
from align_cbrl.llm import (
    ChatJudge,
    Judge,
    LanguageLeader,
    Population,
    RewardMixture,
    RewardModel,
    TrainedFollower,
    load_leader,
    load_prompts,
    train_follower,
)
from align_cbrl.llm.conversations import answer_text, shown_text
from align_cbrl.llm.prompts import check_count
from align_cbrl.llm.scoring import ScoreFunction, check_arguments, score_arguments
from align_cbrl.llm.settings.follower import TrainedSettings
from align_cbrl.llm.settings.hpgd import HPGDSettings
from align_cbrl.llm.settings.judge import FunctionSettings, JudgeSettings, judge_facts
from align_cbrl.llm.settings.leader import LeaderSettings, MixtureSettings
from align_cbrl.llm.settings.objective import ExpectedSettings, ObjectiveSettings
from align_cbrl.llm.settings.tracking import TrackingSettings
from align_cbrl.plain import plain
from align_cbrl.runs.config import fingerprint, nearest, to_dict, to_plain
from align_cbrl.runs.facts import facts_of
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.run_folder import read_kept, write_json
from align_cbrl.runs.secrets import redacted

from ..fine_tuning import without_bars
from ..stages import Stages, announced, guessed_fit, guessed_step
from ..statistics import mean_and_error
from ..study import USAGE, kept
from .cache import being_made
from .world import PROXY, PolicySettings, Replies, WorldSettings, size_of

_SHOWN = 16  # prompts among the samples of a report
FIGURES = {"judge": "judge", "proxy": "proxy (sd)", "kl": "KL (nats)", "gap": "gap (nats)", "words": "words"}
"""What is measured of a policy, and how tables name it."""


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How policies are measured on test prompts.

    Attributes:
        every: follower steps between two points of a curve; null: curves show the batches that are trained on anyway.
        prompts: test prompts, at most.
        group_size: completions of each for a point of a curve.
        final_group_size: completions of each for the final figures.
    """

    every: int | None = 10
    prompts: int = 180
    group_size: int = 4
    final_group_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("prompts", 2), ("group_size", 1), ("final_group_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"measure.{name}: expected a positive number, at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """The part of a configuration that all recipes around language models have.

    Attributes:
        world: who is trained, on what, and which rewards there are.
        judge: what the leader really wants.
        leader: which reward it learns.
        objective: what it wants of the judge's scores.
        follower: how the policy answers a reward.
        hpgd: how the leader climbs.
        measure: how policies are measured.
        tracking: where leader steps are tracked.
    """

    world: WorldSettings = dataclasses.field(default_factory=Replies)
    judge: JudgeSettings = dataclasses.field(
        default_factory=lambda: FunctionSettings(function="align_cbrl.recipes.worlds.replies.judge.reply_judge")
    )
    leader: LeaderSettings = dataclasses.field(default_factory=MixtureSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ExpectedSettings)
    follower: TrainedSettings = dataclasses.field(default_factory=TrainedSettings)
    hpgd: HPGDSettings = dataclasses.field(default_factory=HPGDSettings)
    measure: MeasureSettings = dataclasses.field(default_factory=MeasureSettings)
    tracking: TrackingSettings = dataclasses.field(default_factory=TrackingSettings)


def tuning_steps(settings: BenchSettings) -> int:
    """Follower steps of HPGD around one follower, and of what is fitted beside it."""
    schedule = settings.follower.schedule
    return schedule.warmup + schedule.most * settings.hpgd.steps


class Bench:
    """One seed's world, and how policies are trained and measured in it.

    Args:
        settings: the recipe's.
        seed: of everything that is drawn.
        out: this seed's folder.
        cache: folder of the models that are made, shared by runs.
        parts: the stages that follow, in their order (`kept`), and how many follower steps each takes.

    Attributes:
        data: train and test prompts.
        model: folder or hub id of the policy.
        proxy: folder or hub id of the reward model, or None.
        judge: one for the whole seed, which counts what it is asked.
        further: figures by name, of all completions of the test prompts, that a recipe measures besides.
    """

    def __init__(
        self, settings: BenchSettings, seed: int, out: Path, cache: Path, parts: Mapping[str, int] | None = None
    ) -> None:
        without_bars()
        self.settings, self.seed, self.out, self.cache = settings, seed, out, cache
        out.mkdir(parents=True, exist_ok=True)
        world = settings.world
        judge = settings.judge.build(out)
        if not isinstance(judge, Judge):
            raise InputError("judge: expected one that scores completions, got one that compares pairs or scores sets")
        self.judge = judge
        self.data: DatasetDict = load_prompts(world.data, seed=seed)
        check_count(self.data["test"], 2)  # a standard error needs two
        self.check_names(settings.objective)
        self._stages = self._make_stages(parts or {})
        if (own := world.policy()) is None:
            with announced(self._stages, "policy"):
                own = world.make_policy(self.data, seed, cache)
        self.model = own
        self.follower(seed).check(self._prompts("test"))  # before a reward model is trained
        if world.makes_proxy(self.data):
            with announced(self._stages, "reward model"):
                self.proxy = world.make_proxy(self.model, self.data, seed, cache)
        else:
            self.proxy = world.proxy or world.make_proxy(self.model, self.data, seed, cache)
        self.further: Mapping[str, Callable[[Rollouts], float]] = {}
        self._reference: Rollouts | None = None
        self._plain: LanguageLeader | None = None
        self._mixture: RewardMixture | None = None

    def check_names(self, objective: ObjectiveSettings) -> None:
        """Refuse what is misnamed before anything is trained: functions, costs, and the columns that they take.

        Raises:
            InputError: an objective, judge, cost or reward that names what there is not.
        """
        world, costs = self.settings.world, self.costs()
        objective.build(self.judge, costs, natural=self.settings.hpgd.step == "natural")
        needed = {"judge": self.judge.function, **{f"cost {name}": cost.function for name, cost in costs.items()}}
        needed |= {f"reward {name}": load_object(path) for name, path in world.rewards.items()}
        if (answer := getattr(objective, "answer", None)) is not None:
            needed["objective.answer"] = load_object(answer)
        for part in ("train", "test"):
            columns = [name for name in self.data[part].column_names if name not in ("prompt", "completion")]
            column = getattr(objective, "column", None)
            if column is not None and column not in columns:
                raise InputError(f"objective.column: the data have no column {column!r}; {nearest(column, columns)}")
            for name, function in needed.items():
                check_arguments(name, function, ["prompts", "completions", "completion_ids", *columns])

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage `name`: what `make` returned, as `study.kept` keeps it; its begin and its figures are printed."""
        file = self.out / f"{name}.json"
        if read_kept(file) is not None:
            self._stages.skipped(name)
            return kept(file, make)
        with self._stages.stage(name):
            found = kept(file, make)
        means = {label: found[figure]["mean"] for figure, label in FIGURES.items() if figure in found}
        if means:
            self._stages.found(name, means)
        return found

    def _make_stages(self, parts: Mapping[str, int]) -> Stages:
        settings, world, rows = self.settings, self.settings.world, len(self.data["train"])
        own = world.policy()
        parameters, layers = world.size() if own is None else size_of(own)
        follower, measure = settings.follower, settings.measure
        guess = guessed_step(
            parameters, layers, follower.max_completion_length, follower.prompts_per_step * follower.group_size
        )
        made: dict[str, int] = {}
        fixed: dict[str, float] = {}
        if own is None:
            made["policy"], fixed["policy"] = 0, guessed_fit(parameters, layers, world.rows_of_policy(rows))
        if world.makes_proxy(self.data):
            made["reward model"], fixed["reward model"] = 0, 2 * guessed_fit(parameters, layers, 2 * world.proxy_pairs)
        measured = (
            guess * measure.prompts * measure.final_group_size / (follower.prompts_per_step * follower.group_size)
        )
        fixed |= {name: measured / 2 for name, steps in parts.items() if not steps}
        names = ("world", "follower", "hpgd", "measure", "judge")
        sizes = {name: to_plain(getattr(settings, name)) for name in names}
        return Stages(
            self.out.name.replace("-", " "), {**made, **parts}, guess=guess, kept=self.cache,
            sizes=redacted({**sizes, "rows": rows}), fixed=fixed,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ what there is

    def policy(self, settings: PolicySettings) -> str:
        """Folder or hub id of a policy besides the world's own."""
        return self.settings.world.another_policy(settings, self.seed, self.cache)

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
        return settings.build(self._terms_of(settings), self.reference())

    def _terms_of(self, settings: LeaderSettings) -> dict[str, ScoreFunction]:
        """The terms that a leader is made of: all of them, or the first."""
        of_all = settings.kind == "mixture" or (settings.kind == "shaped" and settings.correction == "terms")
        return dict(list(self.terms().items())[: None if of_all else 1])

    def plain(self, strength: float | None = None) -> LanguageLeader:
        """The proxy alone, at the strength at which leaders start, or at another."""
        strength = strength or self.settings.leader.strength
        settings = MixtureSettings(strength=strength, budget=strength)
        return settings.build(dict(list(self.terms().items())[:1]), self.reference())

    def follower(self, seed: int, model: str | None = None) -> TrainedFollower:
        """A fresh follower, of the world's policy or of another one."""
        return self.settings.follower.build(model or self.model, self._prompts("train"), seed)

    def reference(self) -> Rollouts:
        """Completions of the reference on training prompts, evenly spaced, on which rewards are standardised."""
        if self._reference is None:
            follower, count = self.follower(self.seed), self.settings.world.reference_prompts
            rows = list(range(0, len(follower.prompts), max(1, len(follower.prompts) // count)))[:count]
            drawn = follower.answers(follower.policy, None, follower.prompts, rows, 8, seed=self.seed)
            self._reference = drawn.rollouts()
        return self._reference

    def test(self) -> Dataset:
        """The test prompts that policies are measured on, the same for all."""
        shuffled = self._prompts("test").shuffle(seed=0)
        return shuffled.select(range(min(self.settings.measure.prompts, len(shuffled))))

    # ------------------------------------------------------------------------------------------------ training

    def train(
        self, name: str, leader: LanguageLeader, seed: int, *, model: str | None = None, shared: bool = False
    ) -> TrainedFollower:
        """A fresh follower trained on a frozen reward, its curve kept in `name`/metrics.jsonl; continues by itself.

        Args:
            name: of the folder under the seed's.
            leader: the reward.
            seed: of prompts and samples.
            model: the policy to start from; None for the world's.
            shared: keep it in the cache instead, where other runs with the same settings find it.
        """
        follower, settings = self.follower(seed, model), self.settings
        with torch.no_grad():
            parameters = [p.double().sum().item() for p in leader.parameters()]
        world, rows = settings.world, self.data["train"]
        facts = fingerprint(
            {
                "seed": seed, "model": model or self.model, "parameters": parameters,
                "data": [world.data, len(rows), plain(rows[0])], "reference_prompts": world.reference_prompts,
                # The reward of plain RLHF: the proxy, or the first of the rewards where there is none.
                "proxy": self.proxy or next(iter(world.rewards.items())),
                "follower": to_dict(settings.follower), "judge": judge_facts(settings.judge),
                "measure": to_dict(settings.measure), "facts": facts_of(settings),
            }
        )  # fmt: skip
        out = self.cache / f"{name}-{facts[:12]}" if shared else self.out / name
        every = settings.measure.every
        with being_made(out) if shared else contextlib.nullcontext():
            train_follower(
                follower, leader, settings.follower.steps, out=out, fingerprint=facts, name=f"{self.out.name} {name}",
                monitor=self._judged if every is None else lambda rollouts: self.point(follower),
                log_every=every or 5, checkpoint_every=25 if every is None else 50,
            )  # fmt: skip
        if shared:
            curve = MetricsLog(self.out / name / "metrics.jsonl")
            curve.truncate_after(0)
            with curve:
                for row in MetricsLog.read(out / "metrics.jsonl"):
                    curve.append(row)
        return follower

    def tune(
        self,
        name: str,
        leader: LanguageLeader,
        objective: ObjectiveSettings | Objective | None = None,
        follower: TrainedFollower | Population | None = None,
        hpgd: HPGDSettings | None = None,
    ) -> HPGD:
        """HPGD around a fresh follower, its curve kept in `name`; continues by itself.

        The learned reward is saved as `name`/reward.

        Args:
            name: of the folder under the seed's.
            leader: moved.
            objective: what it wants; None for the configuration's. Tracked samples show the judge's scores of one that
                comes as settings.
            follower: one of its own, such as a population; None for the configuration's.
            hpgd: settings other than the configuration's.
        """
        hpgd = hpgd or self.settings.hpgd
        out, settings = self.out / name, self.settings.follower
        watched = self.follower(self.seed) if follower is None else follower
        members: Sequence[Any] = watched.members if isinstance(watched, Population) else [watched]
        tracker = self.settings.tracking.build(out, to_dict(self.settings), leader)
        objective = objective or self.settings.objective
        if not isinstance(objective, Objective):
            objective = objective.build(tracker.watch(self.judge), self.costs(), natural=hpgd.step == "natural")
        curve, every = MetricsLog(out / "curve.jsonl"), self.settings.measure.every

        def observe(row: dict[str, float], rollouts: Rollouts) -> None:
            if row["step"] == 1:
                curve.truncate_after(0)
            taken = row["follower_steps"] / len(members)
            points = [self._judged(rollouts)] if every is None else []
            if every and (taken % every < settings.schedule.interval or row["step"] == hpgd.steps):
                points = [self.point(member) for member in members]
            for i, point in enumerate(points):
                at = {"step": taken, "leader_step": row["step"], "member": i, "judged": row["step"] * rollouts.size}
                curve.append({**at, "kl": row.get("kl"), "gap": row.get("gap"), **point})

        run = HPGD(
            Problem(leader, objective, watched),
            hpgd.optimizer(leader),
            config=hpgd.build(settings.prompts_per_step * len(members), settings.group_size, self.seed),
            out=out,
            fingerprint={
                "seed": self.seed, "model": self.model, "proxy": self.proxy, "name": name, "hpgd": to_dict(hpgd),
                "settings": {k: v for k, v in to_dict(self.settings).items() if k not in ("tracking", "jobs", "judge")},
                "judge": judge_facts(self.settings.judge), "facts": facts_of(self.settings),
            },
            observers=[tracker, observe],
        )  # fmt: skip
        with curve, tracker:
            run.run(resume=True)
        leader.save_pretrained(out / "reward")
        return run

    def learned(self, name: str) -> LanguageLeader:
        """The reward that `tune` left, as anybody would load it."""
        return load_leader(self.out / name / "reward", trust_code=True)  # this run wrote it, of functions that it named

    def curve(self, name: str) -> list[dict[str, Any]]:
        """The points of a curve, of `train` or `tune`; a point that a resumed run has made again counts once."""
        file = self.out / name / "curve.jsonl"
        rows = MetricsLog.read(file if file.exists() else self.out / name / "metrics.jsonl")
        return list({(row.get("member", 0), row["step"]): row for row in rows}.values())

    def cost_of(self, run: HPGD, follower: TrainedFollower | Population) -> dict[str, float]:
        """What a finished run of HPGD cost: the judge's calls, and the leader's share of the time."""
        judged = run.step * run.config.contexts_per_step * run.config.group_size
        return {
            "judge_calls": judged,
            "completions": follower.completions_seen,
            "judge_share": judged / follower.completions_seen,
            "leader_share": run.history[-1]["leader_share"],
        }

    # ----------------------------------------------------------------------------------------------- measuring

    def measure(self, follower: TrainedFollower, leader: LanguageLeader | None, group_size: int) -> dict[str, Any]:
        """A follower's figures on the test prompts.

        Args:
            follower: whose policy is measured.
            leader: the reward that it was trained on, against which the gap is measured; None: no gap.
            group_size: completions of each prompt.

        Returns:
            judge, proxy (in standard deviations of the reference's completions of a prompt, from its mean), kl (nats),
            gap (nats to the best response to `leader`, a lower bound in expectation) and words, each {mean, se} with
            the standard error over prompts; `by_prompt`, the means of judge, kl and every cost for each test prompt,
            and `groups`, the columns of these prompts; `samples`, one completion of each of the first prompts with its
            `scores`: of the judge, and of every term of the leader in standard deviations, as the proxy's.
        """
        test = self.test()
        rollouts = follower.answers(
            follower.policy, follower.prior, test, range(len(test)), group_size, seed=self.seed
        ).rollouts()
        assert rollouts.log_policy is not None and rollouts.log_prior is not None  # answers come with both
        divergence = (rollouts.log_policy - rollouts.log_prior)[:, 0]
        judged, proxy = self.judge(None, rollouts)[:, 0], self._proxy_scores(rollouts)

        def by_prompt(value: Tensor) -> Tensor:  # [B] -> [P]
            return value.view(len(test), group_size).mean(1)

        figures = {"judge": by_prompt(judged), "proxy": by_prompt(proxy), "kl": by_prompt(divergence)}
        if leader is not None:
            with torch.no_grad():
                reward = leader.reward(rollouts)[:, 0].double().cpu()
            temperature = leader.follower_temperature()
            scale = follower.temperature if temperature is None else float(temperature.detach())
            figures["gap"] = best_response_gap(reward / scale - divergence, rollouts.group[:, 0])
        texts = [answer_text(completion) for completion in rollouts.steps["completion"]]
        figures["words"] = by_prompt(torch.tensor([float(len(text.split())) for text in texts]))
        return {
            **{name: mean_and_error(value) for name, value in figures.items()},
            **{name: {"mean": figure(rollouts), "se": math.nan} for name, figure in self.further.items()},
            "by_prompt": {
                **{name: figures[name].tolist() for name in ("judge", "kl")},
                **{n: by_prompt(cost(None, rollouts)[:, 0]).tolist() for n, cost in self.costs().items()},
            },
            "groups": {n: plain(v[::group_size]) for n, v in rollouts.steps.items() if n in test.column_names},
            "samples": self._samples(rollouts.select(slice(0, _SHOWN * group_size, group_size)), judged[::group_size]),
        }  # fmt: skip

    def _samples(self, rollouts: Rollouts, judged: Tensor) -> list[dict[str, Any]]:
        """Prompts, completions and their scores, as a report shows them; `judged` [>= B]."""
        terms = self._term_scores(rollouts)
        return [
            {
                "prompt": shown_text(rollouts.steps["prompt"][i]),
                "completion": answer_text(rollouts.steps["completion"][i]),
                "scores": {"judge": judged[i].item(), **{name: scores[i] for name, scores in terms.items()}},
            }
            for i in range(rollouts.size)
        ]

    def point(self, follower: TrainedFollower) -> dict[str, float]:
        """The means of `measure`, for a point of a curve."""
        found = self.measure(follower, None, self.settings.measure.group_size)
        return {name: found[name]["mean"] for name in ("judge", "proxy", "kl", "words", *self.further)}

    def final(self, follower: TrainedFollower, leader: LanguageLeader | None = None) -> dict[str, Any]:
        """`measure` with many completions; what a judge that is paid by the request has cost so far is noted, too."""
        found = self.measure(follower, leader, self.settings.measure.final_group_size)
        if isinstance(self.judge.function, ChatJudge):
            spent = {**dataclasses.asdict(self.judge.function.usage), "cost": self.judge.function.cost}
            write_json(self.out / USAGE, {"cache": str(self.judge.cache.path), **spent})
        return found

    def _prompts(self, split: str) -> Dataset:
        """Prompts without what somebody once answered, of which only a world's own policy is made."""
        data: Dataset = self.data[split]
        return data.remove_columns([name for name in data.column_names if name == "completion"])

    def _judged(self, rollouts: Rollouts) -> dict[str, float]:
        return {"judge": self.judge(None, rollouts).mean().item()}

    def _term_scores(self, rollouts: Rollouts) -> dict[str, list[float]]:
        """The standardised scores of each of the leader's terms."""
        if self._mixture is None:
            self._mixture = RewardMixture(self._terms_of(self.settings.leader))
            self._mixture.calibrate(self.reference())
        features = self._mixture.features(**score_arguments(rollouts))
        return dict(zip(self._mixture.terms, features.T.tolist(), strict=True))

    def _proxy_scores(self, rollouts: Rollouts) -> Tensor:
        if self._plain is None:
            self._plain = self.plain()
        with torch.no_grad():
            return self._plain.reward(rollouts)[:, 0] / self.settings.leader.strength


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
