"""How the policy of an engine that is not ours responds to the reward: what the leader's gradient goes through."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

from align_cbrl import PolicyResponse, StepResponse
from align_cbrl.checks import Positive, checked
from align_cbrl.estimators.step_response import Scale
from align_cbrl.llm.followers.trainer_response import TrainerResponse


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Response(abc.ABC):
    kind: str = ""

    @abc.abstractmethod
    def build(self) -> TrainerResponse:
        """The response, with the estimator that belongs to it."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class NextStepSettings(_Response):
    """The engine's next step on normalised advantages; see `StepResponse`.

    Attributes:
        scale: by what the engine divides a completion's reward less its group's mean: group, batch, or none.

    Example:
        >>> NextStepSettings().build().words
        "the engine's next step (scale 'group'); the certificate is not applicable"
    """

    kind: Literal["next_step"] = "next_step"
    scale: Scale = "group"

    def build(self) -> TrainerResponse:
        """See `_Response.build`."""
        words = f"the engine's next step (scale {self.scale!r}); the certificate is not applicable"
        return TrainerResponse(StepResponse(scale=self.scale), 1.0, words)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class BestResponseSettings(_Response):
    """The best response at a temperature, of an engine with a KL term and without scaled rewards; see `PolicyResponse`.

    Attributes:
        temperature: lambda, the engine's coefficient of KL(policy || reference) in units of reward.

    Example:
        >>> BestResponseSettings(temperature=0.05).build().temperature
        0.05
    """

    kind: Literal["best_response"] = "best_response"
    temperature: Positive

    def build(self) -> TrainerResponse:
        """See `_Response.build`."""
        return TrainerResponse(
            PolicyResponse(), self.temperature, f"the best response at temperature {self.temperature:g}"
        )


ResponseSettings = NextStepSettings | BestResponseSettings
"""How the policy responds, by `kind`."""
