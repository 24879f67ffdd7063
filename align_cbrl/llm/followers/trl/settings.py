"""Which fields of trl's configurations may be set: those that are known to leave the policy's fixed point alone.

Every field of the trl that is installed is in one of four tables, and tests/test_trl_settings.py fails for one that is
not. What a later trl adds is refused until somebody has decided about it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.runs.config import nearest

ALLOWED = frozenset(
    # The update: at the best response every advantage is zero, whatever its size and moments.
    """
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm gradient_accumulation_steps
    """
    # Where and how fast the same numbers are computed.
    """
    bf16 fp16 tf32 use_cpu full_determinism activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps use_cache pad_to_multiple_of model_init_kwargs ds3_gather_for_generation
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout
    """
    # The engine that generates; its samples are tested against the policy's log-probabilities like any others.
    """
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    """
    # The prompt, in training and in measuring.
    """
    chat_template_kwargs
    """
    # What is told of it.
    """
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id skip_memory_metrics debug log_completions log_multimodal
    num_completions_to_print log_unique_prompts
    """.split()
)
"""Fields with any value."""

FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((1.0,), "samples are not the policy's (0.7 left 0.046 nats)"),
    "top_k": ((0, None), "cuts the policy's support (4 left 0.30 nats)"),
    "top_p": ((1.0, None), "cuts the policy's support"),
    "min_p": ((None, 0.0), "cuts the policy's support"),
    "repetition_penalty": ((1.0,), "samples are not the policy's"),
    "generation_kwargs": ((None, {}), "samples are not the policy's (suppress_tokens left 1.94 nats)"),
    "cache_implementation": ((None,), "a quantized cache is another policy"),
    "reward_weights": ((None,), "another reward than the leader's; weigh its terms in the leader"),
    "weight_decay": ((0.0,), "pulls the policy to zero weights, away from its best response"),
    "optim": (
        ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
         "sgd"),
        "not shown to keep the policy where its gradient is zero",
    ),
    "mask_truncated_completions": ((False,), "worse than no training (0.97 nats)"),
    "sync_ref_model": ((False,), "the prior moves, so the best response does"),
    "disable_dropout": ((True,), "the log-probabilities are not the sampling policy's"),
    "neftune_noise_alpha": ((None,), "noise: the log-probabilities are not the sampling policy's"),
    "router_aux_loss_coef": ((0.0,), "balancing experts is another objective"),
    "steps_per_generation": ((None,), "the leader would see stale samples (0.046 nats at 4)"),
    "remove_unused_columns": ((False,), "rewards and judges read the prompts' columns"),
    "lr_scheduler_type": (
        ("constant",),
        "starts again at every call of the trainer; only 'constant' is the same after a resume. The follower's own "
        "decay_after lets the rate fall",
    ),
}  # fmt: skip
"""Fields, the values that they may have, of which the first is set, and what is wrong with others."""

OWN: Mapping[str, str] = {
    "learning_rate": "learning_rate",
    "beta": "temperature",
    "num_generations": "group_size",
    "max_completion_length": "max_completion_length",
    **dict.fromkeys(("per_device_train_batch_size", "generation_batch_size"), "prompts_per_step and group_size"),
    **dict.fromkeys(("max_steps", "num_train_epochs"), "schedule, and the steps that train() is asked for"),
    **dict.fromkeys(("seed", "data_seed"), "seed"),
}
"""Fields that follow from the follower's own arguments."""

REFUSED: Mapping[str, str] = {
    name: reason
    for reason, names in {
        "the learning rate is constant, and an optimizer's further options may decay weights": (
            "lr_scheduler_kwargs warmup_steps optim_args optim_target_modules label_smoothing_factor "
            "average_tokens_across_devices auto_find_batch_size"
        ),
        "clips the policy's ratios; where samples are reused, trl's own bounds are those that were measured": (
            "epsilon epsilon_high"
        ),
        "the follower's state is saved with the run, by state_dict, and its policy by save_pretrained": (
            "output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit "
            "enable_jit_checkpoint resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint "
            "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
        ),
        "nothing is evaluated by trl; measure with rollout or a recipe": (
            "do_train do_eval do_predict eval_strategy eval_steps eval_delay per_device_eval_batch_size "
            "num_generations_eval prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object "
            "eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval "
            "load_best_model_at_end metric_for_best_model greater_is_better"
        ),
        "the order of prompts is a function of the seed and the step, so that runs can be resumed": (
            "shuffle_dataset train_sampling_strategy length_column_name label_names dataloader_drop_last "
            "dataloader_in_order"
        ),
        "belongs in accelerate's configuration, which the run is launched with (recipes/accelerate)": (
            "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank"
        ),
        "not tested with the followers": (
            "use_liger_kernel liger_kernel_config use_transformers_continuous_batching "
            "transformers_continuous_batching_config use_transformers_paged ref_model_mixup_alpha ref_model_sync_steps"
        ),
        "cuts the policy's support": "vllm_structured_outputs_regex",
        "runs code that comes with the model": "trust_remote_code",
    }.items()
    for name in names.split()
}
"""Fields that may not be set, and why."""

MODEL_SETTINGS = frozenset({"dtype", "attn_implementation", "device_map", "use_kernels"})
"""What `model_init_kwargs` may say; anything else may make another model of the folder than is the reference."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of one of trl's configurations: the tables above, and what that trainer has besides.

    Attributes:
        config: trl's class.
        name: of the trainer, in messages.
        allowed, fixed, refused: further entries of `ALLOWED`, `FIXED` and `REFUSED`.
    """

    config: type[Any]
    name: str
    allowed: frozenset[str]
    fixed: Mapping[str, tuple[tuple[Any, ...], str]]
    refused: Mapping[str, str]

    def decided(self) -> set[str]:
        """Names of all fields that somebody has decided about."""
        return {*ALLOWED, *self.allowed, *FIXED, *self.fixed, *OWN, *REFUSED, *self.refused}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse what the policy's fixed point, or the follower, does not leave to the user.

        Raises:
            InputError: an unknown field, one that follows from an argument of the follower, one that moves the fixed
                point (by how much where measured), one that nobody has decided about, or a number that is not finite.
        """
        names = {field.name for field in dataclasses.fields(self.config)}
        refused = {**REFUSED, **self.refused}
        problems = []
        for name, value in settings.items():
            if name not in names:
                raise InputError(
                    f"{self.name} settings: {name!r} is no field of trl.{self.config.__name__}; "
                    + nearest(str(name), names)
                )
            if name in OWN:
                raise InputError(f"settings: {name} follows from the follower's own arguments; set its {OWN[name]}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"settings: {name}: expected a finite number, got {value}")
            if name in refused:
                problems.append(f"{name}={value!r}: {refused[name]}")
            elif name not in self.decided():
                problems.append(
                    f"{name}={value!r}: nobody has shown that this field of trl {importlib.metadata.version('trl')} "
                    "leaves the fixed point alone"
                )
        self.check_fixed(settings, problems)
        if not isinstance(settings.get("chat_template_kwargs") or {}, Mapping):
            raise InputError(
                "settings: chat_template_kwargs: expected arguments of the template, such as {'enable_thinking': "
                f"False}}, got {settings['chat_template_kwargs']!r}"
            )
        for name in ("gradient_accumulation_steps", "num_iterations"):
            value = settings.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"settings: {name}: expected a positive integer, got {value!r}")
        if further := set(settings.get("model_init_kwargs") or {}) - MODEL_SETTINGS:
            raise InputError(
                f"settings: model_init_kwargs: expected some of {sorted(MODEL_SETTINGS)}, got {sorted(further)}, which "
                "may make another policy of the model than the reference that was named; save it, as it is meant, to a "
                "folder of its own"
            )

    def check_fixed(self, settings: Mapping[str, Any], problems: list[str] | None = None) -> None:
        """Refuse values that move the fixed point, and raise for `problems` found before."""
        problems = problems or []
        for name, (values, reason) in {**FIXED, **self.fixed}.items():
            if name in settings and not any(settings[name] == value for value in values):
                problems.append(f"{name}={settings[name]!r}: {reason}")
        if problems:
            raise InputError(
                f"{self.name} settings that are not known to leave the policy its Boltzmann response: "
                + "; ".join(problems)
            )

    def defaults(self) -> dict[str, Any]:
        """The values that are set."""
        return {name: values[0] for name, (values, _) in {**FIXED, **self.fixed}.items()}
