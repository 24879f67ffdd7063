"""`GRPOFollower`: a policy trained by trl's GRPO, where that has RLOO's fixed point."""

from __future__ import annotations

from typing import Any

from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.llm.followers.trl import grpo
from align_cbrl.llm.followers.trl.observed import ObservedTrainer


class GRPOFollower(TrainedFollower):
    """A policy trained by trl's GRPO in the one configuration whose fixed point is the Boltzmann response.

    trl's own beta stays 0, and lambda times the completion's log-ratio to the reference is taken from the reward;
    rewards are not divided by their spread, and the loss is "dr_grpo". Anything else is refused, with the bias that was
    measured. It then equals RLOO but for the baseline.

    Arguments and errors are those of `TrainedFollower`; `settings` are fields of `trl.GRPOConfig`.
    """

    fields = grpo.FIELDS

    @staticmethod
    def _make_config(temperature: float, /, **settings: Any) -> Any:
        return grpo.boltzmann_config(temperature, **settings)

    @staticmethod
    def _make_trainer(**arguments: Any) -> ObservedTrainer:
        return grpo.ObservedGRPOTrainer(**arguments)
