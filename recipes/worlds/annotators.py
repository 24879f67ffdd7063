"""Flawed annotators: texts are sampled from a policy, and pairs of them labelled by somebody with a weakness."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cbrl.llm.sampling import generation_config, sampled_by

TextUtility = Callable[[list[str], list[str]], list[float]]
"""utility(prompts, completions): what an annotator likes, one number for each completion."""


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 256,
) -> list[str]:
    """One completion of each prompt at temperature 1, drawn from torch's global generator, without special tokens."""
    texts: list[str] = []
    config = generation_config(model, tokenizer, max_new_tokens)
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True).to(model.device)
        with sampled_by(model, config):
            tokens = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(new, skip_special_tokens=True))
    return texts


def annotated_pairs(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    utility: TextUtility,
    *,
    noise: float,
    rng: random.Random,
) -> Dataset:
    """An annotator's logistic choices between two texts: `prompt`, `chosen`, `rejected`; equal texts are left out.

    Args:
        prompts: what both texts answer.
        first: texts.
        second: other texts.
        utility: what the annotator likes.
        noise: > 0, temperature of the choice, in units of utility.
        rng: draws the choices, one number for each pair.

    Raises:
        ValueError: when `noise` is not positive.
    """
    if noise <= 0:
        raise ValueError(f"noise must be positive, got {noise}")
    rows = []
    utilities = zip(utility(list(prompts), list(first)), utility(list(prompts), list(second)), strict=True)
    for prompt, a, b, (of_a, of_b) in zip(prompts, first, second, utilities, strict=True):
        prefers_a = rng.random() < float(torch.sigmoid(torch.tensor((of_a - of_b) / noise)))
        if a != b:
            rows.append({"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a})
    return Dataset.from_list(rows)
