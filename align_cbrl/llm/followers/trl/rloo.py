"""trl's RLOO trainer, observed. Its KL is in the reward, sequence by sequence, so its fixed point is Boltzmann."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from align_cbrl.llm.followers.trl.observed import ObservedTrainer, build_config, common_problems, refuse


class ObservedRLOOTrainer(ObservedTrainer, RLOOTrainer):
    """RLOO that keeps its newest batch of completions, with their log-probabilities, for the leader to see."""

    @property
    def reference(self) -> PreTrainedModel | None:
        """See `ObservedTrainer.reference`."""
        return None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.beta = self.kl_price()
        return super()._generate_and_score_completions(inputs)


def boltzmann_config(temperature: float, /, **settings: Any) -> RLOOConfig:
    """RLOO settings under which the policy converges to the Boltzmann response at `temperature`.

    Args:
        temperature: lambda, trl's beta.
        **settings: any other field of `RLOOConfig`.

    Raises:
        InputError: an unknown field, or one that biases the response (which, and by how much where measured).
    """
    defaults = {"beta": temperature, "normalize_advantages": False, "reward_clip_range": None}
    config = build_config(RLOOConfig, "RLOO", defaults, settings)
    check_boltzmann(config)
    return config


def check_boltzmann(config: RLOOConfig) -> None:
    """Raise InputError for settings under which the best response is not Boltzmann, so that lambda is undefined."""
    refuse(
        "RLOO",
        {
            f"beta={config.beta}: without a KL price the best response is undefined (lambda = beta)": config.beta <= 0,
            "normalize_advantages=True: divides by the batch's spread, so the reward's scale, and with it the leader's "
            "gradient, is lost; GRPO's scale_rewards does the same": config.normalize_advantages,
            f"reward_clip_range={config.reward_clip_range}: another reward than the leader's (0.17 nats)": (
                config.reward_clip_range is not None
            ),
            **common_problems(config),
        },
    )
