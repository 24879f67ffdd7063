"""How the leader climbs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from align_cbrl import HPGDConfig, Natural
from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Leader

_RATE = 0.1


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class HPGDSettings:
    """The leader's steps; see `HPGDConfig` and `Natural`.

    Attributes:
        steps: leader steps.
        step: natural, on the newest batches of completions that were judged; or gradient, of Adam.
        nats: longest natural step: how far the best response moves, at most.
        memory: batches that a natural step uses; null: 64, and 4 for a leader of more than 8192 parameters, such as a
            reward model that is trained by LoRA or as a whole, which scores all of them anew at every step.
        learning_rate: of Adam, with step: gradient; null: 0.1.
        replays: further updates of Adam after each leader step, on batches judged before.
        correction: of samples of a follower that lags: on, off or auto. Off, the leader steers the policy that is
            trained, such as towards shares that it should hit; otherwise the best response, which it approaches.
        max_gradient_norm: of Adam's steps: the leader's gradient is scaled down to this norm; null leaves it.
        checkpoint_every: leader steps between checkpoints.
    """

    steps: Count = 30
    step: Literal["natural", "gradient"] = "natural"
    nats: Positive = Natural.nats
    memory: Count | None = None
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
                    "nats and which use completions judged before anyway; remove it, or set step: gradient"
                )
        if self.step == "gradient" and self.memory is not None:
            raise InputError(
                f"memory: belongs to step: natural, got {self.memory} with gradient steps, which use batches judged "
                "before by replays; remove it, or set step: natural"
            )

    def build(self, contexts_per_step: int, group_size: int, seed: int) -> HPGDConfig:
        """The configuration of the loop, on batches of this size."""
        return HPGDConfig(
            steps=self.steps,
            contexts_per_step=contexts_per_step,
            group_size=group_size,
            max_gradient_norm=self.max_gradient_norm,
            correction=self.correction,
            natural=Natural(nats=self.nats, memory=self.memory) if self.step == "natural" else None,
            replays=self.replays,
            seed=seed,
            checkpoint_every=self.checkpoint_every,
        )

    def optimizer(self, leader: Leader) -> torch.optim.Optimizer | None:
        """Adam over the leader's trainable parameters, in ascent; None for natural steps."""
        if self.step == "natural":
            return None
        moving = [p for p in leader.parameters() if p.requires_grad]
        return torch.optim.Adam(moving, lr=self.learning_rate or _RATE, maximize=True)
