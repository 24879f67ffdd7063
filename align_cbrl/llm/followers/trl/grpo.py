"""trl's GRPO trainer, observed, with the KL in the reward.

GRPO's own KL is a term of the loss, token by token, which gives no token credit for the divergence that follows it.
Its fixed point is Boltzmann for completions of one token only; two tokens left 0.019 to 0.025 nats. So its beta is 0
here, and lambda times the sequence's log-ratio is taken from the reward, as RLOO does. What is left of the difference
is the baseline: the group's mean, which includes the completion itself, so that gradients are (G - 1) / G of RLOO's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    pad,
    use_adapter,
)

from align_cbrl.llm.followers.trl.observed import ObservedTrainer, build_config
from align_cbrl.llm.followers.trl.settings import Fields

FIELDS = Fields(
    GRPOConfig,
    "GRPO",
    allowed=frozenset({"log_completions_hub_repo"}),
    fixed={
        "beta": (
            (0.0,),
            "GRPO's own KL, token by token in the loss, has another fixed point (0.019 to 0.025 nats; exact for one "
            "token only); the follower's temperature is in the reward instead",
        ),
        "scale_rewards": (
            ("none", False),
            "acts as lambda times the spread, so the reward's scale, and with it the leader's gradient, is lost (0.11 "
            "nats)",
        ),
        "loss_type": (("dr_grpo",), "only 'dr_grpo' weighs every token of every completion alike"),
        "num_iterations": (
            (1,),
            "GRPO's ratios are a token's, not a completion's (RLOO, whose ratios are right, is left with 0.002 nats at "
            "2 and 0.015 at 4)",
        ),
        "importance_sampling_level": (("token",), "divides by the completion's length"),
        "top_entropy_quantile": ((1.0,), "leaves tokens untrained"),
        "entropy_coef": ((0.0,), "an entropy bonus is another objective than the KL's"),
        "use_adaptive_entropy": ((False,), "an entropy bonus is another objective than the KL's"),
        "off_policy_mask_threshold": ((None,), "leaves completions out"),
        "multi_objective_aggregation": (("sum_then_normalize",), "divides by the group's spread (0.11 nats)"),
        "delta": ((None,), "clips the policy's ratios"),
        "cast_lm_head_to_fp32": ((False,), "the log-probabilities are not the sampling policy's"),
        "vllm_importance_sampling_correction": ((False,), "truncated weights, which the leader does not see"),
    },
    refused={
        name: reason
        for reason, names in {
            "of a loss that is not 'dr_grpo'": (
                "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
            ),
            "an entropy bonus is another objective than the KL's": (
                "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
            ),
            "truncated weights, which the leader does not see": (
                "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
                "vllm_importance_sampling_cap"
            ),
            "GRPO's own KL is off": "use_bias_correction_kl",
            "the policy uses no tools": "max_tool_calling_iterations",
        }.items()
        for name in names.split()
    },
)
"""What may be set, and what is."""


class ObservedGRPOTrainer(ObservedTrainer, GRPOTrainer):
    """GRPO with lambda * (log policy - log reference) taken from the reward, and its newest batch kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reference = self._load_reference()  # with beta = 0 GRPO has none of its own

    @property
    def reference(self) -> PreTrainedModel | None:
        """See `ObservedTrainer.reference`."""
        return None if self._reference is None else self.accelerator.unwrap_model(self._reference)

    def _load_reference(self) -> Any:
        """As RLOO's trainer loads it."""
        if hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            return None
        settings = dict(self.args.model_init_kwargs or {})
        if self.args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
            settings["device_map"] = None
        settings.setdefault("dtype", self.model.dtype)
        reference = create_model_from_path(get_config_model_id(self.model.config), **settings)
        disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        self._prompt_ids = output[0]
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        penalty = self.kl_price() * self._log_ratio(completion_ids_list)
        return rewards - self.accelerator.gather(penalty)[:, None]  # [B] of every process -> [B, 1]

    @torch.no_grad()
    def _log_ratio(self, completion_ids: list[list[int]]) -> Tensor:
        """log policy - log reference of each completion of this process, [B]."""
        device, tokenizer = self.accelerator.device, self._tokenizer
        prompt, prompt_mask = self._padded(self._prompt_ids, tokenizer.pad_token_id, "left")
        completion, mask = self._padded(completion_ids, tokenizer.pad_token_id, "right")
        inputs = (
            torch.cat([prompt, completion], 1).to(device),
            torch.cat([prompt_mask, mask], 1).to(device),
            completion.shape[1],
            self.args.per_device_train_batch_size,
        )
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            policy, _, _ = self._get_per_token_logps_and_entropies(self.model, *inputs)
            if self._reference is not None:
                prior, _, _ = self._get_per_token_logps_and_entropies(self._reference, *inputs)
            else:
                with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
                    prior, _, _ = self._get_per_token_logps_and_entropies(self.model, *inputs)
        return ((policy - prior) * mask.to(device)).sum(1)

    def _padded(self, ids: list[list[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(row) for row in ids]
        settings = {"padding_side": side, "pad_to_multiple_of": self.pad_to_multiple_of}
        return (
            pad(rows, padding_value=value, **settings),
            pad([torch.ones_like(row) for row in rows], padding_value=0, **settings),
        )


def boltzmann_config(temperature: float, /, **settings: Any) -> Any:
    """GRPO settings under which, with the KL in the reward, the policy converges to the Boltzmann response.

    Args:
        temperature: lambda; it does not enter trl's configuration, whose beta stays 0.
        **settings: any other field of `GRPOConfig`.

    Raises:
        InputError: an unknown field, or one that biases the response (which, and by how much where measured).
    """
    return build_config(FIELDS, settings)
