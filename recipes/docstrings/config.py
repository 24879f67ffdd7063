"""The recipe's settings; config.yaml holds and explains their values."""

from __future__ import annotations

import dataclasses

from align_cbrl import InputError
from align_cbrl.llm.settings.tracking import TrackingSettings


@dataclasses.dataclass(frozen=True)
class FollowerSettings:
    """How the policy is trained on a reward; `steps` are those of plain RLHF and of the fresh follower."""

    temperature: float = 0.5
    prompts_per_step: int = 8
    group_size: int = 8
    max_completion_length: int = 24
    learning_rate: float = 3e-4
    steps: int = 160


@dataclasses.dataclass(frozen=True)
class LeaderSettings:
    """How the leader steps around the follower's training."""

    steps: int = 28
    interval: int = 5
    warmup: int = 20
    learning_rate: float = 0.05
    kl_price: float = 0.0


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How many test prompts are answered how often."""

    prompts: int = 128
    group_size: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """See config.yaml.

    Raises:
        InputError: another kind of leader than "mixture" or "reward_model", or a count that is not positive.
    """

    seed: int = 0
    data: str = "align_cbrl.recipes.docstrings.data.load_docstrings"
    model: str | None = None
    proxy: str | None = None
    base_epochs: float = 4.5
    proxy_pairs: int = 3000
    judge: str = "align_cbrl.recipes.docstrings.judge.docstring_judge"
    rewards: dict[str, str] = dataclasses.field(default_factory=dict)
    leader: str = "mixture"
    budget: float = 1.0
    strength: float = 1.0
    follower: FollowerSettings = dataclasses.field(default_factory=FollowerSettings)
    hpgd: LeaderSettings = dataclasses.field(default_factory=LeaderSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = dataclasses.field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        if self.leader not in ("mixture", "reward_model"):
            raise InputError(f"leader: expected 'mixture' or 'reward_model', got {self.leader!r}")
        if self.leader == "mixture" and self.budget < self.strength:
            raise InputError(
                f"budget: expected at least strength={self.strength}, where plain RLHF and the leader start, got "
                f"{self.budget}"
            )
        if not self.base_epochs > 0:
            raise InputError(f"base_epochs: expected a positive number, got {self.base_epochs}")
        if "proxy" in self.rewards:
            raise InputError("rewards: 'proxy' is the name of the reward model's own term; choose another")
        for name, value, least in (
            ("proxy_pairs", self.proxy_pairs, 2),
            ("follower.steps", self.follower.steps, 1),
            ("follower.prompts_per_step", self.follower.prompts_per_step, 1),
            ("follower.group_size", self.follower.group_size, 2),
            ("follower.max_completion_length", self.follower.max_completion_length, 1),
            ("hpgd.steps", self.hpgd.steps, 1),
            ("hpgd.interval", self.hpgd.interval, 1),
            ("hpgd.warmup", self.hpgd.warmup, 0),
            ("evaluation.prompts", self.evaluation.prompts, 2),
            ("evaluation.group_size", self.evaluation.group_size, 2),
        ):
            if value < least:
                raise InputError(f"{name}: expected at least {least}, got {value}")
