"""How the leader climbs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from align_cbrl import HPGDConfig
from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.problem import Leader


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class HPGDSettings:
    """The leader's steps; see `HPGDConfig`.

    Attributes:
        steps: leader steps.
        learning_rate: of the leader's Adam.
        replays: further updates after each leader step, on batches judged before.
        correction: of samples of a follower that lags: on, off or auto.
        max_gradient_norm: the leader's gradient is scaled down to this norm; null leaves it.
        checkpoint_every: leader steps between checkpoints.
    """

    steps: Count = 30
    learning_rate: Positive = 0.1
    replays: Whole = 0
    correction: Literal["auto", "on", "off"] = "auto"
    max_gradient_norm: Positive | None = 1.0
    checkpoint_every: Count = 5

    def build(self, contexts_per_step: int, group_size: int, seed: int) -> HPGDConfig:
        """The configuration of the loop, on batches of this size."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "learning_rate"}
        return HPGDConfig(contexts_per_step=contexts_per_step, group_size=group_size, seed=seed, **own)

    def optimizer(self, leader: Leader) -> torch.optim.Optimizer:
        """Adam over the leader's trainable parameters, in ascent."""
        moving = [p for p in leader.parameters() if p.requires_grad]
        return torch.optim.Adam(moving, lr=self.learning_rate, maximize=True)
