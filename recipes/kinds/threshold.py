"""A reward for being good enough, and no more for being better: a soft threshold within each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.llm import LanguageLeader, load_leader
from align_cbrl.llm.conversations import shown_text

from ..worlds.bench import Bench


class Threshold(LanguageLeader):
    """strength sigma(slope (r - m)) with a reward r and m, its mean over the reference's completions of the prompt.

    Where several answers are good enough, it does not matter which is given, so that a policy need not choose one.
    Nothing in it is learned.

    Args:
        reward: r.
        means: m, by the prompt's text; 0, the mean of a standardised reward, for a prompt that is not named.
        strength: B, reward of a completion far above the threshold.
        slope: alpha, per unit of r.
    """

    def __init__(self, reward: LanguageLeader, means: Mapping[str, float], strength: float, slope: float) -> None:
        super().__init__()
        self.inner, self.means, self.strength, self.slope = reward.requires_grad_(False), dict(means), strength, slope

    @classmethod
    def around(cls, bench: Bench, reward: LanguageLeader, strength: float, slope: float) -> Threshold:
        """With the means over four completions of each training and test prompt by the world's policy."""
        group_size, follower = 4, bench.follower(bench.seed)
        means: dict[str, float] = {}
        for prompts in (follower.prompts, bench.test()):
            rows = range(len(prompts))
            drawn = follower.answers(follower.policy, None, prompts, rows, group_size, seed=bench.seed).rollouts()
            with torch.no_grad():
                scores = reward.reward(drawn)[:, 0].view(-1, group_size).mean(1)  # [P]
            means |= dict(zip(map(shown_text, drawn.steps["prompt"][::group_size]), scores.tolist(), strict=True))
        return cls(reward, means, strength, slope)

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        """The soft threshold of r [B]."""
        means = torch.tensor([self.means.get(shown_text(prompt), 0.0) for prompt in prompts], dtype=torch.float64)
        reward = self.inner.score(prompts, completions, **columns).double().cpu()
        return self.strength * torch.sigmoid(self.slope * (reward - means))

    def record(self, path: Path) -> Mapping[str, Any]:
        """The reward in a folder beside, and the rest as it is."""
        self.inner.save_pretrained(path / "inner")
        return {"means": self.means, "strength": self.strength, "slope": self.slope}

    @classmethod
    def from_record(cls, path: Path, record: Mapping[str, Any]) -> Threshold:
        """As saved."""
        return cls(load_leader(path / "inner"), record["means"], record["strength"], record["slope"])
