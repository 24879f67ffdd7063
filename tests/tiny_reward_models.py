"""Reward models of a few thousand weights, in the architectures that people use, saved locally."""

from __future__ import annotations

from pathlib import Path

import enumerable_lm as lm
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def build(path: Path, architecture: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 3) -> Path:
    """Save a classifier with one label and random weights, and a tokenizer with a chat template."""
    source = lm.build(path.parent / f"{path.name}_tokens")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(_config(architecture)).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _config(architecture: str) -> PretrainedConfig:
    common = {"vocab_size": len(lm.VOCABULARY), "num_labels": 1, "pad_token_id": 0, "eos_token_id": lm.EOS}
    if architecture == "gpt2":
        # Its usual dropout of 0.1 stays: leaders must switch it off.
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, initializer_range=0.2,
                          **common)  # fmt: skip
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    extra = {"head_dim": 8} if architecture == "qwen3" else {}
    return kinds[architecture](
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=None, initializer_range=0.2, **extra, **common,
    )  # fmt: skip
