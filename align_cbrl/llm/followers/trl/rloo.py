"""trl's RLOO trainer, observed. Its KL is in the reward, sequence by sequence, so its fixed point is Boltzmann."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from align_cbrl.errors import InputError
from align_cbrl.llm.followers.trl.observed import ObservedTrainer, build_config
from align_cbrl.llm.followers.trl.settings import Fields

FIELDS = Fields(
    RLOOConfig,
    "RLOO",
    allowed=frozenset({"num_iterations"}),
    fixed={
        "normalize_advantages": (
            (False,),
            "divides by the batch's spread, so the reward's scale, and with it the leader's gradient, is lost; GRPO's "
            "scale_rewards does the same",
        ),
        "reward_clip_range": ((None,), "another reward than the leader's (0.17 nats)"),
    },
    refused={},
)
"""What may be set, and what is."""


class ObservedRLOOTrainer(ObservedTrainer, RLOOTrainer):
    """RLOO that keeps its newest batch of completions, with their log-probabilities, for the leader to see."""

    @property
    def reference(self) -> PreTrainedModel | None:
        """See `ObservedTrainer.reference`."""
        return None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.beta = self.kl_price()
        return super()._generate_and_score_completions(inputs)


def boltzmann_config(temperature: float, /, **settings: Any) -> Any:
    """RLOO settings under which the policy converges to the Boltzmann response at `temperature`.

    Args:
        temperature: lambda, trl's beta.
        **settings: any other field of `RLOOConfig`.

    Raises:
        InputError: an unknown field, or one that biases the response (which, and by how much where measured).
    """
    config = build_config(FIELDS, {"beta": temperature, "num_iterations": 1, **settings})
    if config.beta <= 0:
        raise InputError(f"beta={config.beta}: without a KL price the best response is undefined (lambda = beta)")
    return config
