"""trl's RLOO trainer, observed: the one file that touches trl's private methods.

Written against trl 1.16. What is relied upon: `_generate_and_score_completions` asks
`_get_per_token_logps_and_entropies` for the policy first and the reference second, and `_calculate_rewards` once in
between and the end, all on the unshuffled batch, in which the completions of a prompt stand side by side.
tests/test_llm_followers.py trains a follower on an enumerable model and fails if any of it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RLOOConfig, RLOOTrainer

from align_cbrl.errors import InputError
from align_cbrl.llm.completions import Completions

CONTEXT = "context"
"""Name of the dataset column that carries each prompt's row number through trl."""


class ObservedRLOOTrainer(RLOOTrainer):
    """RLOO that keeps its newest batch of completions, with their log-probabilities, for the leader to see."""

    observed: Completions | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._log_probs_seen: list[Tensor] = []
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        completions, token_ids = self._scored
        mask = output["completion_mask"].to(torch.float64)
        policy, prior = ((seen.double() * mask).sum(1).cpu() for seen in self._log_probs_seen[:2])  # [B, L] -> [B]
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != CONTEXT}
        self.observed = Completions(
            context=torch.tensor([row[CONTEXT] for row in inputs]),
            columns=columns,
            token_ids=token_ids,
            text=completions,
            log_policy=policy,
            log_prior=prior,
        )
        self._log_probs_seen = []
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._log_probs_seen.append(result[0].detach())
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._scored = (list(completions), [list(ids) for ids in completion_ids_list])
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards

    def forget_buffer(self) -> None:
        """Drop completions generated for an earlier train() call, which an earlier reward has scored."""
        self._step = 0
        self._buffered_inputs = None


class AfterEachStep(TrainerCallback):
    """Calls a function after every optimizer step; training ends when it returns False."""

    def __init__(self, function: Callable[[int], bool]) -> None:
        self.function = function

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Called by transformers."""
        if not self.function(state.global_step):
            control.should_training_stop = True
        return control


def boltzmann_config(temperature: float, /, **settings: Any) -> RLOOConfig:
    """RLOO settings under which the policy converges to the Boltzmann response at `temperature`.

    Args:
        temperature: lambda, trl's beta.
        **settings: any other field of `RLOOConfig`.

    Raises:
        InputError: an unknown field, or one that biases the response (which, and by how much where measured).
    """
    defaults: dict[str, Any] = {
        "beta": temperature,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "num_iterations": 1,
        "steps_per_generation": 1,
        "normalize_advantages": False,
        "mask_truncated_completions": False,
        "reward_clip_range": None,
        "sync_ref_model": False,
        "disable_dropout": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if not torch.cuda.is_available():  # defaults of trl that only pay on an accelerator
        defaults |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    try:
        config = RLOOConfig(**{**defaults, **settings})
    except TypeError as error:
        raise InputError(f"RLOO settings: {error}; see trl.RLOOConfig for the fields") from error
    check_boltzmann(config)
    return config


def check_boltzmann(config: RLOOConfig) -> None:
    """Raise InputError for settings under which the best response is not Boltzmann, so that lambda is undefined."""
    problems = {
        f"beta={config.beta}: without a KL price the best response is undefined (lambda = beta)": config.beta <= 0,
        "normalize_advantages=True: divides by the batch's spread, so the reward's scale, and with it the leader's "
        "gradient, is lost; GRPO's scale_rewards does the same": config.normalize_advantages,
        f"temperature={config.temperature}: samples are not the policy's (0.7 left 0.046 nats)": config.temperature
        != 1,
        f"top_k={config.top_k}: cuts the policy's support (4 left 0.30 nats)": config.top_k not in (0, None),
        f"top_p={config.top_p}: cuts the policy's support": config.top_p not in (1.0, None),
        f"min_p={config.min_p}: cuts the policy's support": bool(config.min_p),
        f"repetition_penalty={config.repetition_penalty}: samples are not the policy's": config.repetition_penalty != 1,
        f"reward_clip_range={config.reward_clip_range}: another reward than the leader's (0.17 nats)": (
            config.reward_clip_range is not None
        ),
        "mask_truncated_completions=True: worse than no training (0.97 nats)": config.mask_truncated_completions,
        "sync_ref_model=True: the prior moves, so the best response does": config.sync_ref_model,
        f"num_generations={config.num_generations}: the baseline needs at least 2": config.num_generations < 2,
        f"steps_per_generation={config.steps_per_generation}: the leader would see stale samples (0.046 nats at 4)": (
            config.steps_per_generation not in (None, config.gradient_accumulation_steps)
        ),
    }
    if found := [text for text, wrong in problems.items() if wrong]:
        raise InputError("RLOO settings that keep the policy from its Boltzmann response: " + "; ".join(found))
