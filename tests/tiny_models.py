"""Tiny causal language models of several families, made on the spot, with a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = ["<pad>", "<eos>", "<end>", "user", "assistant", *"abcdefgh"]
EOS, END_OF_TURN = 1, 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3")


def build(path: Path, family: str, *, chat: bool = False, size: int = 32, seed: int = 0, **config: Any) -> Path:
    """Save a one-layer model of a family, with the defaults that its real members come with."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="a")
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    if chat:
        fast.chat_template = TEMPLATE
    common = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": None}
    torch.manual_seed(seed)
    if family == "gpt2":  # its defaults have three kinds of dropout
        made: Any = GPT2Config(n_embd=size, n_layer=1, n_head=2, n_positions=64, **{**common, **config})
    else:
        kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
        shape = {
            "hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 128, "attention_dropout": 0.1,
            "initializer_range": 0.15,
        }  # fmt: skip
        made = kinds[family](**{**shape, **common, **config})
    model = AutoModelForCausalLM.from_config(made)
    # Instruct models declare an end of turn, and how they like to be sampled, which is not the policy.
    model.generation_config.eos_token_id = [END_OF_TURN, EOS]
    model.generation_config.update(do_sample=True, repetition_penalty=5.0, top_k=2, top_p=0.8, temperature=0.7)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def prompts(chat: bool) -> list[Any]:
    """Prompts of different lengths, so that batches are padded."""
    texts = ["a b", "c d e f g", "h a c", "b e f a"]
    return [[{"role": "user", "content": text}] for text in texts] if chat else texts
