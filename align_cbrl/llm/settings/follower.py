"""The follower of a recipe, as YAML says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from align_cbrl.errors import InputError
from align_cbrl.llm.followers.base import LanguageFollower
from align_cbrl.llm.followers.schedule import Schedule
from align_cbrl.llm.followers.tilted import TiltedFollower
from align_cbrl.llm.followers.trained import GRPOFollower, RLOOFollower


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """When the leader steps; see `align_cbrl.llm.Schedule`."""

    interval: int = 5
    warmup: int = 0
    inside: bool = True
    tolerance: float | None = None  # nats; null: a fixed number of steps
    limit: int | None = None
    levels: int | None = None  # K of RT-Q; null: no randomly truncated responses

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Schedule:
        """The schedule."""
        return Schedule(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class FollowerSettings:
    """How the policy answers a reward; `steps` are those of training on a frozen reward.

    Example:
        >>> FollowerSettings(trainer="grpo", temperature=0.5).schedule.interval
        5
        >>> FollowerSettings(trainer="tilted", lora=8)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: follower.lora: expected null with trainer 'tilted', which trains nothing, got 8
    """

    trainer: Literal["rloo", "grpo", "tilted"] = "rloo"
    temperature: float = 1.0
    steps: int = 200
    prompts_per_step: int = 8
    group_size: int = 8
    max_completion_length: int = 64
    learning_rate: float = 1e-4
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    lora: int | None = None  # rank of an adapter on every linear layer; null trains all parameters
    vllm: bool = False  # generate with vLLM, on a GPU
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other fields of trl's configuration

    def __post_init__(self) -> None:
        if self.trainer not in ("rloo", "grpo", "tilted"):
            raise InputError(f"follower.trainer: expected rloo, grpo or tilted, got {self.trainer!r}")
        for name, least in (
            ("steps", 1), ("prompts_per_step", 1), ("group_size", 2), ("max_completion_length", 1), ("lora", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"follower.{name}: expected at least {least}, got {value}")
        for name in ("temperature", "learning_rate"):
            if not (0 < getattr(self, name) < float("inf")):
                raise InputError(f"follower.{name}: expected a positive number, got {getattr(self, name)}")
        if self.trainer == "tilted":
            for name, empty in (("lora", None), ("vllm", False), ("settings", {})):
                if getattr(self, name) != empty:
                    expected = "null" if empty is None else str(empty)
                    raise InputError(
                        f"follower.{name}: expected {expected} with trainer 'tilted', which trains nothing, got "
                        f"{getattr(self, name)!r}"
                    )

    def build(self, model: str | Path, prompts: Dataset, seed: int) -> LanguageFollower:
        """A fresh follower.

        Args:
            model: hub id or folder of the policy to start from, which is also the reference.
            prompts: with a "prompt" column.
            seed: of prompt order and sampling.

        Raises:
            InputError: as the follower does.
        """
        if self.trainer == "tilted":
            return TiltedFollower(model, prompts, self.temperature, max_completion_length=self.max_completion_length)
        kind = RLOOFollower if self.trainer == "rloo" else GRPOFollower
        return kind(
            model,
            prompts,
            self.temperature,
            max_completion_length=self.max_completion_length,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule.build(),
            seed=seed,
            peft_config=None if self.lora is None else _lora(self.lora),
            settings={**self.settings, **({"use_vllm": True} if self.vllm else {})},
        )


def _lora(rank: int) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"follower.lora: rank {rank} needs peft; pip install 'align-cbrl[peft]'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
