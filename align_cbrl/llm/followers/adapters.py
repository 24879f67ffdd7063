"""Policies that are an adapter on a frozen model (LoRA, through peft)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from align_cbrl.errors import InputError


class WithoutAdapter(nn.Module):
    """A model with an adapter, as it is without: the reference policy, at no memory of its own.

    It can be called, sampled from, and asked for its configuration like the model itself.

    Args:
        model: a peft model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model_with_adapter = model

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        """The model's output with the adapter switched off."""
        with self.model_with_adapter.disable_adapter():
            return self.model_with_adapter(*arguments, **inputs)

    def generate(self, *arguments: Any, **inputs: Any) -> Any:
        """Samples of the model with the adapter switched off."""
        with self.model_with_adapter.disable_adapter():
            return self.model_with_adapter.generate(*arguments, **inputs)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model_with_adapter.config

    @property
    def device(self) -> Any:
        """Where the model lies."""
        return self.model_with_adapter.device

    @property
    def generation_config(self) -> Any:
        """The model's settings of generation."""
        return self.model_with_adapter.generation_config


# Of peft.LoraConfig: what leaves the policy without its adapter the model that was named, before and after training.
_LORA = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision r target_modules exclude_modules
    lora_alpha lora_dropout fan_in_fan_out use_rslora modules_to_save layers_to_transform layers_pattern rank_pattern
    alpha_pattern use_dora lora_bias trainable_token_indices runtime_config ensure_weight_tying
    """.split()
)


def check_adapter(adapter: Any) -> None:
    """Refuse adapters that would not be trained, or without which the policy is not the model that was named.

    Args:
        adapter: a `peft.PeftConfig`.

    Raises:
        InputError: not a LoRA configuration of peft's, an adapter on lm_head, or an option that changes the model below
            the adapter, which is the reference.
    """
    if not hasattr(adapter, "peft_type"):
        raise InputError(
            f"peft_config: expected a peft configuration such as peft.LoraConfig(r=16), got {type(adapter).__name__}"
        )
    if adapter.peft_type != "LORA":
        raise InputError(
            f"peft_config: expected a peft.LoraConfig, got {type(adapter).__name__}; only of LoRA is it known that the "
            "policy without its adapter, the reference, is the model that was named"
        )
    targets = getattr(adapter, "target_modules", None) or ()
    hits = re.fullmatch(targets, "lm_head") if isinstance(targets, str) else "lm_head" in targets
    if hits or "lm_head" in (getattr(adapter, "modules_to_save", None) or ()):
        raise InputError(
            "peft_config: expected no adapter on lm_head, whose weight trl reads directly to save memory, so that the "
            "adapter would never be trained; take 'lm_head' out of target_modules and modules_to_save"
        )
    plain = type(adapter)()
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        if field.name in _LORA or value == getattr(plain, field.name):
            continue
        if field.name == "init_lora_weights" and value in (False, "gaussian"):
            continue
        raise InputError(
            f"peft_config: {field.name}={value!r}: not known to leave the model below the adapter as it was named, "
            "which is the reference (some initialisations take a part of its weights away, and biases are trained in "
            "it); leave it at its default"
        )


def without_dropout(config: Any) -> dict[str, float]:
    """Settings that turn off all dropout of a model, by their names in its configuration.

    trl's disable_dropout reaches modules only. Llama's and Qwen's dropout on attention is an argument of a function,
    and a policy that is sampled without dropout and trained with it is not one policy.

    Args:
        config: a `transformers` configuration.

    Example:
        >>> from transformers import GPT2Config, LlamaConfig
        >>> without_dropout(LlamaConfig(attention_dropout=0.1))
        {'attention_dropout': 0.0}
        >>> sorted(without_dropout(GPT2Config()))
        ['attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'summary_first_dropout']
    """
    names = [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]
    return {name: 0.0 for name in sorted(names) if isinstance(value := getattr(config, name), float) and value > 0}
