"""A reward model of replies that likes length and big words as well as what the judge likes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...fine_tuning import train_reward_model
from ..annotators import annotated_pairs, sample_texts
from .data import PROMISES
from .judge import reply_judge


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
    texts = sample_texts(model, tokenizer, [*drawn, *drawn])
    return annotated_pairs(drawn, texts[:pairs], texts[pairs:], biased_utility, noise=noise, rng=rng)


def train_proxy(
    policy: str | Path, prompts: Sequence[str], out_dir: str | Path, *, seed: int, pairs: int = 4000
) -> Path:
    """A reward model trained on the flawed annotator's choices."""
    preferences = preference_pairs(policy, prompts, seed=seed, pairs=pairs)
    return train_reward_model(policy, preferences, out_dir, seed=seed)
