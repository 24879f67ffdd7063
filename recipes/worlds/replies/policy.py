"""Policies of several families and sizes that write replies."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from ...fine_tuning import fine_tune
from .data import desk_log, vocabulary

Family = Literal["llama", "gpt2"]  # transformers 5 loads another tokenizer than the saved one beside a Qwen model
BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the world, the same for every family."""
    words = [PAD, BOS, EOS, UNKNOWN, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, padding_side="left",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_policy(tokenizer: PreTrainedTokenizerFast, family: Family, hidden_size: int, layers: int) -> PreTrainedModel:
    """An untrained policy, drawn from torch's generator, without dropout."""
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=128, n_embd=hidden_size, n_layer=layers, n_head=4,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
            )
        )  # fmt: skip
    shape = {
        **size, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "attention_dropout": 0.0, "tie_word_embeddings": True,
        **tokens,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape))


def train_policy(
    out_dir: str | Path,
    *,
    seed: int,
    family: Family = "llama",
    hidden_size: int = 64,
    layers: int = 2,
    rows: int = 6000,
) -> Path:
    """A policy that replies as the desk did."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    return fine_tune(
        make_policy(tokenizer, family, hidden_size, layers), tokenizer, desk_log(rows, seed), out_dir,
        seed=seed, epochs=3, batch_size=64, learning_rate=4e-3,
    )  # fmt: skip
