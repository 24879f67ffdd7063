"""A follower that needs no training: samples of the reference, weighted into the best response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.functional import tilt_weights
from align_cbrl.llm.followers.base import LanguageFollower, language_leader
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.problem import Leader, temperature_of
from align_cbrl.rollouts import Rollouts


@checked
class TiltedFollower(LanguageFollower):
    """The best response without training: the reference's completions, reweighted by exp(r_x / lambda).

    Self-normalised importance sampling within each prompt's group: consistent as the group grows, and honest only
    while `effective_sample_size` is well above 1 / group size. It needs no gradient of the policy, so it answers what
    a leader's step is worth before anything is trained.

    Args:
        model, prompts, temperature, max_completion_length, chat_template_kwargs: as for `LanguageFollower`.
        batch_size: completions generated together.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: Dataset,
        temperature: float,
        *,
        max_completion_length: Count = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: Count = 256,
    ) -> None:
        super().__init__(
            model,
            prompts,
            temperature,
            max_completion_length=max_completion_length,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.batch_size = batch_size
        self._leader: LanguageLeader | None = None
        self._policy: PreTrainedModel | None = None

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Nothing to train: remembers whose reward to tilt by."""
        self._leader = language_leader(leader)
        return {}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Completions of the reference with weights [B] that stand for the best response.

        Raises:
            InputError: group size 1, which cannot be tilted, or no leader yet.
        """
        if group_size < 2:
            raise InputError(f"group_size: expected at least 2 completions a prompt, got {group_size}")
        if self._leader is None:
            raise InputError("TiltedFollower.rollout: call respond(leader, contexts) first")
        if self._policy is None:
            self._policy = self._load().eval()
        seed = int(torch.randint(2**31, (1,), generator=generator))
        sample = self.answers(
            self._policy,
            None,
            self.prompts,
            contexts.tolist(),
            group_size,
            seed,
            batch_size=self.batch_size,
            evidence=self._evidence,
        )
        untilted = self._leader.prepare(sample.rollouts())
        with torch.no_grad():
            temperature = float(temperature_of(self._leader, self))
            log_ratio = self._leader.reward(untilted)[:, 0].double().cpu() / temperature
        weight = tilt_weights(log_ratio, sample.context)
        # log(pi* / prior) = r / lambda - log Z, with Z estimated from the group: W_i = exp(r_i / lambda) / Z
        tilted = sample.log_prior + log_ratio - (log_ratio - weight.clamp(min=math.ulp(0.0)).log())
        return Rollouts.bandit(
            contexts=untilted.contexts,
            steps=untilted.steps,
            log_policy=tilted,
            log_prior=sample.log_prior,
            weight=weight,
        ).knowing(untilted.known)

    def state_dict(self) -> dict[str, Any]:
        """The evidence about its samples; the policy itself never changes."""
        return {"sampler": self._evidence.state_dict()} if self._evidence.batches else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            self._evidence.load_state_dict(state["sampler"])
