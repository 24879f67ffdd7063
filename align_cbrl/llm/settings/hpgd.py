"""How the leader climbs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from align_cbrl import HPGDConfig, Natural
from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.settings.leader import LeaderSettings
from align_cbrl.problem import Leader

_RATE = 0.1


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class HPGDSettings:
    """The leader's steps; see `HPGDConfig` and `Natural`.

    Attributes:
        steps: leader steps.
        step: natural, on all completions judged so far; or gradient, of Adam. A reward model that is trained by LoRA or
            as a whole has too many parameters for natural steps.
        nats: longest natural step: how far the best response moves, at most.
        learning_rate: of Adam, with step: gradient; null: 0.1.
        replays: further updates of Adam after each leader step, on batches judged before.
        correction: of samples of a follower that lags: on, off or auto.
        max_gradient_norm: of Adam's steps: the leader's gradient is scaled down to this norm; null leaves it.
        checkpoint_every: leader steps between checkpoints.
    """

    steps: Count = 30
    step: Literal["natural", "gradient"] = "natural"
    nats: Positive = Natural.nats
    learning_rate: Positive | None = None
    replays: Whole = 0
    correction: Literal["auto", "on", "off"] = "auto"
    max_gradient_norm: Positive | None = 1.0
    checkpoint_every: Count = 5

    def __post_init__(self) -> None:
        for name, value in (("learning_rate", self.learning_rate), ("replays", self.replays)):
            if self.step == "natural" and value:
                raise InputError(
                    f"{name}: belongs to step: gradient, got {value} with natural steps, whose length is bounded by "
                    "nats and which use all judged completions anyway; remove it, or set step: gradient"
                )

    def build(self, contexts_per_step: int, group_size: int, seed: int) -> HPGDConfig:
        """The configuration of the loop, on batches of this size."""
        return HPGDConfig(
            steps=self.steps,
            contexts_per_step=contexts_per_step,
            group_size=group_size,
            max_gradient_norm=self.max_gradient_norm,
            correction=self.correction,
            natural=Natural(nats=self.nats) if self.step == "natural" else None,
            replays=self.replays,
            seed=seed,
            checkpoint_every=self.checkpoint_every,
        )

    def check(self, leader: LeaderSettings) -> None:
        """Refuse natural steps of a leader that has too many parameters for them, before it is loaded.

        Raises:
            InputError: natural steps with a reward model that is trained by LoRA or as a whole.
        """
        part = getattr(leader, "trainable", None) or getattr(leader, "correction", None)
        if self.step == "natural" and part in ("lora", "all"):
            raise InputError(
                f"step: natural steps are for leaders of few parameters, such as weights or a head, got one that "
                f"trains a reward model's {part}; set hpgd.step: gradient"
            )

    def optimizer(self, leader: Leader) -> torch.optim.Optimizer | None:
        """Adam over the leader's trainable parameters, in ascent; None for natural steps."""
        if self.step == "natural":
            return None
        moving = [p for p in leader.parameters() if p.requires_grad]
        return torch.optim.Adam(moving, lr=self.learning_rate or _RATE, maximize=True)
