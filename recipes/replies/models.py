"""Policies of several families and sizes that write replies, and a reward model that misreads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from ..docstrings.proxy import sample
from ..fine_tuning import fine_tune, train_reward_model
from .data import PROMISES, desk_log, vocabulary
from .judge import reply_judge

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


def biased_utility(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """What the flawed annotator likes: what the judge likes, length, and big words."""
    return [
        score + 0.8 * min(1.5, len(text.split()) / 12) + 0.35 * min(2, sum(word in PROMISES for word in text.split()))
        for score, text in zip(reply_judge(list(prompts), list(completions)), completions, strict=True)
    ]


def preference_pairs(
    policy: str | Path, prompts: Sequence[str], *, seed: int, pairs: int, noise: float = 0.1
) -> Dataset:
    """The flawed annotator's choices between two replies of a policy: `prompt`, `chosen`, `rejected`.

    Args:
        policy: folder of the model that writes the replies.
        prompts: drawn from with replacement.
        seed: of the prompts, the replies and the annotator's noise.
        pairs: how many to draw; those with two equal replies are dropped.
        noise: temperature of the annotator's logistic choice between two utilities.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy).eval()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    drawn = [rng.choice(prompts) for _ in range(pairs)]
    texts = sample(model, tokenizer, [*drawn, *drawn], max_new_tokens=24)
    left, right = texts[:pairs], texts[pairs:]
    rows = []
    utilities = zip(biased_utility(drawn, left), biased_utility(drawn, right), strict=True)
    for prompt, a, b, (of_a, of_b) in zip(drawn, left, right, utilities, strict=True):
        prefers_a = rng.random() < 1 / (1 + 2.718281828 ** ((of_b - of_a) / noise))
        if a != b:
            rows.append({"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a})
    return Dataset.from_list(rows)


def train_proxy(
    policy: str | Path, prompts: Sequence[str], out_dir: str | Path, *, seed: int, pairs: int = 4000
) -> Path:
    """A reward model trained on the flawed annotator's choices."""
    preferences = preference_pairs(policy, prompts, seed=seed, pairs=pairs)
    return train_reward_model(policy, preferences, out_dir, seed=seed)
