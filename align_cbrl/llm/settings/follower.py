"""How the policy answers a reward."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from datasets import Dataset

from align_cbrl.checks import Count, Positive, Several, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.followers.base import LanguageFollower
from align_cbrl.llm.followers.grpo import GRPOFollower
from align_cbrl.llm.followers.rloo import RLOOFollower
from align_cbrl.llm.followers.schedule import Schedule
from align_cbrl.llm.followers.tilted import TiltedFollower
from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.runs.inputs import Input


def _need_peft(name: str, rank: int) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{name}: rank {rank} needs peft; pip install 'align-cbrl[peft]'")


def _need_vllm(name: str, wanted: bool) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{name}: the package vllm is not installed; pip install 'trl[vllm]' on a machine with a GPU")


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Follower(abc.ABC):
    trainer: str = ""
    temperature: Positive = 1.0
    max_completion_length: Count = 64

    @abc.abstractmethod
    def build(self, model: str | Path, prompts: Dataset, seed: int) -> LanguageFollower:
        """A fresh follower.

        Args:
            model: hub id or folder of the policy to start from, which is also the reference.
            prompts: with a "prompt" column.
            seed: of prompt order and sampling.
        """


@checked
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
        decay_after: optimizer steps after which the learning rate falls as 1 / step, so that the policy comes to rest;
            null: constant.
        schedule: how training and leader steps alternate.
        lora: rank of an adapter on every linear layer; null trains all parameters.
        vllm: generate with vLLM, on a GPU.
        settings: other fields of trl's configuration, of those that leave the best response alone.

    Example:
        >>> TrainedSettings(trainer="grpo", temperature=0.5).schedule.interval
        5
        >>> TrainedSettings(group_size=1)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: TrainedSettings.group_size: expected a whole number >= 2, got 1
    """

    trainer: Literal["rloo", "grpo"] = "rloo"
    steps: Count = 200
    prompts_per_step: Count = 8
    group_size: Several = 8
    learning_rate: Positive = 1e-4
    decay_after: Count | None = None
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    lora: Annotated[Count | None, Input("lora", _need_peft)] = None
    vllm: Annotated[bool, Input("vllm", _need_vllm)] = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if "use_vllm" in self.settings:
            raise InputError("settings: use_vllm is given by vllm, beside settings; set that")
        self._kind.fields.check(self.settings)

    @property
    def _kind(self) -> type[TrainedFollower]:
        return RLOOFollower if self.trainer == "rloo" else GRPOFollower

    def check(self) -> None:
        """Refuse what no policy could be trained with, without one.

        Raises:
            InputError: peft or vllm are needed and not installed, settings that trl refuses, or a batch that cannot be
                cut into as many pieces.
        """
        if self.lora is not None:
            _need_peft("lora", self.lora)
        if self.vllm:
            _need_vllm("vllm", self.vllm)
        self._kind.check_settings(
            self.temperature, self.max_completion_length, self.prompts_per_step, self.group_size, self._settings
        )

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.settings, **({"use_vllm": True} if self.vllm else {})}

    def build(self, model: str | Path, prompts: Dataset, seed: int) -> TrainedFollower:
        """A fresh follower; see `_Follower.build`."""
        return self._kind(
            model,
            prompts,
            self.temperature,
            max_completion_length=self.max_completion_length,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            learning_rate=self.learning_rate,
            decay_after=self.decay_after,
            schedule=self.schedule,
            seed=seed,
            peft_config=None if self.lora is None else _lora(self.lora),
            settings=self._settings,
        )


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiltedSettings(_Follower):
    """The reference's completions, reweighted into the best response; see `TiltedFollower`."""

    trainer: Literal["tilted"] = "tilted"

    def build(self, model: str | Path, prompts: Dataset, seed: int) -> TiltedFollower:
        """A fresh follower; see `_Follower.build`."""
        return TiltedFollower(model, prompts, self.temperature, max_completion_length=self.max_completion_length)


FollowerSettings = TrainedSettings | TiltedSettings
"""How the policy answers a reward, by `trainer`."""


def _lora(rank: int) -> Any:
    _need_peft("lora", rank)
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
