"""`RLOOFollower`: a policy trained by trl's RLOO."""

from __future__ import annotations

from typing import Any

from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.llm.followers.trl import rloo
from align_cbrl.llm.followers.trl.observed import ObservedTrainer


class RLOOFollower(TrainedFollower):
    """A policy trained by trl's RLOO, whose fixed point is the Boltzmann response (trl's KL, in the reward, is exact).

    With an inside schedule the leader steps inside the trainer's own loop, every `interval` optimizer steps, on the
    completions just trained on: one train() call for the whole run. Otherwise every leader step waits for `interval`
    optimizer steps and sees fresh completions of freshly drawn prompts.

    Arguments and errors are those of `TrainedFollower`; `settings` are fields of `trl.RLOOConfig`.
    """

    fields = rloo.FIELDS

    @staticmethod
    def _make_config(temperature: float, /, **settings: Any) -> Any:
        return rloo.boltzmann_config(temperature, **settings)

    @staticmethod
    def _make_trainer(**arguments: Any) -> ObservedTrainer:
        return rloo.ObservedRLOOTrainer(**arguments)
