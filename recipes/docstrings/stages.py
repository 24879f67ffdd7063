"""What happens before the leader enters, each stage cached: base model, proxy reward model, plain RLHF."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from datasets import DatasetDict

from align_cbrl.errors import InputError
from align_cbrl.llm import (
    Judge,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    RLOOFollower,
    load_prompts,
    sample_completions,
    train_follower,
)
from align_cbrl.llm.sampling import check_prompts
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.config import fingerprint
from align_cbrl.runs.imports import load_object

from .base import train_base
from .config import Config
from .proxy import train_proxy


@dataclasses.dataclass(frozen=True)
class Workbench:
    """What every later stage starts from.

    Attributes:
        config: the run's settings.
        data: train and test prompts.
        model: folder or hub id of the reference policy.
        proxy: folder or hub id of the proxy reward model.
        reference: completions of the reference on training prompts, on which rewards are standardised.
        plain: folder of the policy that plain RLHF on the proxy trained, and of its metrics.
    """

    config: Config
    data: DatasetDict
    model: str
    proxy: str
    reference: Rollouts
    plain: Path

    def judge(self) -> Judge:
        """A judge with its own count of calls."""
        return Judge(load_object(self.config.judge), name=f"judge {self.config.judge}")

    def mixture(self) -> RewardMixture:
        """Proxy and further rewards, standardised, with all the weight on the proxy: what plain RLHF optimises."""
        return _mixture(self.config, self.proxy, self.reference)

    def leader(self) -> RewardMixture | RewardModelLeader:
        """The leader that the configuration asks for, standing where plain RLHF stands."""
        if self.config.leader == "mixture":
            return self.mixture()
        leader = RewardModelLeader(
            RewardModel(self.proxy), "head", strength=self.config.strength, budget=self.config.budget
        )
        leader.calibrate(self.reference)
        return leader

    def follower(self, seed: int) -> RLOOFollower:
        """A fresh follower."""
        return _follower(self.config, self.data, self.model, seed)


def prepare(config: Config, cache: Path, seconds: dict[str, float]) -> Workbench:
    """Run, or find in the cache, everything before the leader enters.

    Args:
        config: the run's settings.
        cache: folder shared by runs; a stage is found again by what it depends on.
        seconds: receives the time each stage took when it ran ("base", "proxy", "plain").
    """
    data = load_prompts(config.data, seed=config.seed)
    check_prompts(data["test"], 2)  # a standard error needs two
    shape = {"seed": config.seed, "data": config.data, "rows": len(data["train"]), "first": data["train"][0]}

    model = config.model
    if model is None:
        _need_completions(data, "model")
        folder = cached(
            cache, "base", {**shape, "epochs": config.base_epochs},
            lambda out: train_base(data["train"], out, seed=config.seed, epochs=config.base_epochs), seconds,
        )  # fmt: skip
        model = str(folder)
    proxy = config.proxy
    if proxy is None:
        _need_completions(data, "proxy")
        folder = cached(
            cache, "proxy", {**shape, "model": model, "pairs": config.proxy_pairs},
            lambda out: train_proxy(model, data["train"], out, seed=config.seed, pairs=config.proxy_pairs), seconds,
        )  # fmt: skip
        proxy = str(folder)

    reference = _reference_completions(config, data, model)
    facts = {
        **shape, "model": model, "proxy": proxy, "judge": config.judge, "strength": config.strength,
        "follower": dataclasses.asdict(config.follower),
    }  # fmt: skip

    def train_plain(out: Path) -> None:
        follower = _follower(config, data, model, config.seed)
        judge = Judge(load_object(config.judge))
        leader = _mixture(dataclasses.replace(config, rewards={}), proxy, reference)
        train_follower(
            follower, leader, config.follower.steps, out=out, fingerprint=fingerprint(facts), name="plain RLHF",
            monitor=lambda rollouts: {"judge": judge(None, rollouts).mean().item()},
        )  # fmt: skip
        follower.save_pretrained(out / "policy")

    plain = cached(cache, "plain", facts, train_plain, seconds)
    return Workbench(config, data, model, proxy, reference, plain)


def cached(
    cache: Path, name: str, facts: dict[str, object], build: Callable[[Path], object], seconds: dict[str, float]
) -> Path:
    """The folder of a finished stage; built first if the cache does not hold it.

    The folder's name carries a fingerprint of `facts`. A stage that was interrupted leaves a folder ending in
    .partial, from which `build` may continue.
    """
    folder = cache / f"{name}-{fingerprint(facts)[:12]}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    build(partial)
    seconds[name] = time.perf_counter() - began
    (partial / "stage.json").write_text(json.dumps({"facts": facts, "seconds": seconds[name]}, indent=2, default=str))
    shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # the finished policy has replaced them
    os.replace(partial, folder)
    return folder


def _mixture(config: Config, proxy: str, reference: Rollouts) -> RewardMixture:
    terms = {"proxy": RewardModel(proxy), **{name: load_object(path) for name, path in config.rewards.items()}}
    # Plain RLHF spends `strength` on the proxy. Where the leader is a reward model, the budget is its own.
    mixture = RewardMixture(terms, {"proxy": config.strength}, budget=max(config.budget, config.strength))
    mixture.calibrate(reference)
    return mixture


def _follower(config: Config, data: DatasetDict, model: str, seed: int) -> RLOOFollower:
    return RLOOFollower(
        model,
        data["train"].remove_columns([c for c in data["train"].column_names if c == "completion"]),
        config.follower.temperature,
        max_completion_length=config.follower.max_completion_length,
        prompts_per_step=config.follower.prompts_per_step,
        group_size=config.follower.group_size,
        learning_rate=config.follower.learning_rate,
        interval=config.hpgd.interval,
        warmup=config.hpgd.warmup,
        seed=seed,
    )


def _reference_completions(config: Config, data: DatasetDict, model: str, prompts: int = 64) -> Rollouts:
    follower = _follower(config, data, model, config.seed)
    rows = list(range(0, len(data["train"]), max(1, len(data["train"]) // prompts)))[:prompts]
    return sample_completions(
        follower.policy, None, follower.tokenizer, follower.prompts, rows, 8,
        config.follower.max_completion_length, seed=config.seed,
    ).rollouts()  # fmt: skip


def _need_completions(data: DatasetDict, name: str) -> None:
    if "completion" not in data["train"].column_names:
        raise InputError(
            f"{name}: null trains one from the data's 'completion' column, which is missing (columns: "
            f"{data['train'].column_names}); give a hub id or a folder"
        )
