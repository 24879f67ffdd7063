"""A follower whose every completion is known: samples and exact expectations of any policy, without generation."""

from __future__ import annotations

import dataclasses

import enumerable_lm as lm
import torch
from torch import Tensor

from align_cbrl import Critic, Critique, Follower, Leader, Problem, Rollouts
from align_cbrl.problem import temperature_of


class Samples(Follower):
    """Whose samples a test makes itself; no more than its temperature is needed."""

    temperature, discount = 0.5, 0.0

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        raise NotImplementedError

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        raise NotImplementedError


class Known(Follower):
    """Any policy over the completions of an enumerable language model, [P, N] log-probabilities; nothing is generated.

    It starts as the reference; `respond` makes it the best response, and tests may set `log_policy` to what they like.
    """

    discount = 0.0

    def __init__(self, enumeration: lm.Enumeration, log_prior: Tensor, temperature: float) -> None:
        self.enumeration, self.temperature = enumeration, temperature
        self.log_prior = torch.log_softmax(log_prior.detach().double(), -1)
        self.log_policy = self.log_prior

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.arange(count) % len(lm.PROMPTS)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        self.log_policy = self.best_response(leader)
        return {}

    def best_response(self, leader: Leader) -> Tensor:
        """log pi* [P, N]."""
        with torch.no_grad():
            reward = leader.reward(self.everything())[:, 0].view(self.log_prior.shape)
            return torch.log_softmax(self.log_prior + reward / temperature_of(leader, self), -1)

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        answer = torch.multinomial(self.log_policy.exp()[contexts], group_size, replacement=True, generator=generator)
        group = torch.arange(len(contexts)).repeat_interleave(group_size)
        return self._rollouts(contexts.repeat_interleave(group_size), answer.reshape(-1), group)

    def everything(self) -> Rollouts:
        """Every completion of every prompt, weighted by its probability."""
        prompts, count = self.log_policy.shape
        prompt = torch.arange(prompts).repeat_interleave(count)
        rollouts = self._rollouts(prompt, torch.arange(count).repeat(prompts), prompt)
        return dataclasses.replace(rollouts, weight=count * self.log_policy.exp().reshape(-1))

    def _rollouts(self, prompt: Tensor, answer: Tensor, group: Tensor) -> Rollouts:
        ids = [self.enumeration.completions[a] for a in answer.tolist()]
        steps = {"prompt": [lm.PROMPTS[p] for p in prompt.tolist()], "completion": ids, "completion_ids": ids}
        where = (prompt, answer)
        rollouts = Rollouts.bandit(
            contexts=prompt, steps=steps, log_policy=self.log_policy[where], log_prior=self.log_prior[where]
        )
        return dataclasses.replace(rollouts, group=group[:, None])


class EnumeratedCritic(Critic):
    """Centres under the probabilities themselves: among all completions none is compared with itself too often."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        place, weight = rollouts.group[:, 0], rollouts.path_weight()
        count = place.bincount()
        mean = torch.zeros(len(count), dtype=torch.float64).index_add(0, place, weight * credit[:, 0]) / count
        return Critique(credit - mean[place][:, None])
