"""How the policy answers a reward."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from align_cbrl.errors import InputError, check_number
from align_cbrl.llm.followers.base import LanguageFollower
from align_cbrl.llm.followers.schedule import Schedule
from align_cbrl.llm.followers.tilted import TiltedFollower
from align_cbrl.llm.followers.trained import GRPOFollower, RLOOFollower, TrainedFollower


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Follower(abc.ABC):
    trainer: str = ""
    temperature: float = 1.0
    max_completion_length: int = 64

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, low=0)
        _at_least("max_completion_length", self.max_completion_length, 1)

    @abc.abstractmethod
    def build(self, model: str | Path, prompts: Dataset, seed: int) -> LanguageFollower:
        """A fresh follower.

        Args:
            model: hub id or folder of the policy to start from, which is also the reference.
            prompts: with a "prompt" column.
            seed: of prompt order and sampling.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSettings(_Follower):
    """A policy trained by trl; see `TrainedFollower`.

    Attributes:
        trainer: rloo or grpo.
        temperature: lambda, trl's beta: reward per nat of divergence from the reference.
        max_completion_length: in tokens.
        steps: optimizer steps of training on a frozen reward.
        prompts_per_step: distinct prompts in each optimizer step.
        group_size: completions per prompt.
        learning_rate: of the policy's AdamW.
        schedule: how training and leader steps alternate.
        lora: rank of an adapter on every linear layer; null trains all parameters.
        vllm: generate with vLLM, on a GPU.
        settings: other fields of trl's configuration.

    Example:
        >>> TrainedSettings(trainer="grpo", temperature=0.5).schedule.interval
        5
        >>> TrainedSettings(group_size=1)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: group_size: expected at least 2, got 1
    """

    trainer: Literal["rloo", "grpo"] = "rloo"
    steps: int = 200
    prompts_per_step: int = 8
    group_size: int = 8
    learning_rate: float = 1e-4
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    lora: int | None = None
    vllm: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, low=0)
        for name, least in (("steps", 1), ("prompts_per_step", 1), ("group_size", 2)):
            _at_least(name, getattr(self, name), least)
        if self.lora is not None:
            _at_least("lora", self.lora, 1)

    def build(self, model: str | Path, prompts: Dataset, seed: int) -> TrainedFollower:
        """A fresh follower; see `_Follower.build`."""
        kind = RLOOFollower if self.trainer == "rloo" else GRPOFollower
        return kind(
            model,
            prompts,
            self.temperature,
            max_completion_length=self.max_completion_length,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            seed=seed,
            peft_config=None if self.lora is None else _lora(self.lora),
            settings={**self.settings, **({"use_vllm": True} if self.vllm else {})},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiltedSettings(_Follower):
    """The reference's completions, reweighted into the best response; see `TiltedFollower`."""

    trainer: Literal["tilted"] = "tilted"

    def build(self, model: str | Path, prompts: Dataset, seed: int) -> TiltedFollower:
        """A fresh follower; see `_Follower.build`."""
        return TiltedFollower(model, prompts, self.temperature, max_completion_length=self.max_completion_length)


FollowerSettings = TrainedSettings | TiltedSettings
"""How the policy answers a reward, by `trainer`."""


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: expected at least {least}, got {value}")


def _lora(rank: int) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"lora: rank {rank} needs peft; pip install 'align-cbrl[peft]'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
