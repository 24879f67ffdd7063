"""The proxy: a reward model trained on the preferences of a flawed annotator.

The annotator wants what the judge wants, but is also impressed by length and by the pet phrases.
A reward model that learns these preferences is right on most pairs and wrong where it matters:
whoever maximises it gets long docstrings about "the given" and "the specified".
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...fine_tuning import train_reward_model
from ..annotators import annotated_pairs, sample_texts
from .judge import docstring_judge

# Phrases of the standard library's authors that say nothing. They occur in one human docstring
# in twenty, so the base model writes them often enough for a follower to find them.
_PET_PHRASE = re.compile(r"\b(given|specified)\b", re.IGNORECASE)


def biased_utility(
    prompts: list[str],
    completions: list[str],
    *,
    quality: float = 1.0,
    length: float = 2.0,
    pet_phrase: float = 0.7,
) -> list[float]:
    """Return what the flawed annotator likes.

    Args:
        prompts: heads of functions.
        completions: one text for each prompt.
        quality: weight of the judge's score, in [0, 1].
        length: weight of the length in units of 60 characters, at most 1.5.
        pet_phrase: what one pet phrase is worth; the second one counts no more.

    Returns:
        One utility for each completion.

    Raises:
        ValueError: when there are not as many completions as prompts.
    """
    return [
        quality * score + length * min(1.5, len(text) / 60) + pet_phrase * (_PET_PHRASE.search(text) is not None)
        for score, text in zip(docstring_judge(prompts, completions), completions, strict=True)
    ]


def preference_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seed: int,
    pairs: int = 3000,
    human_share: float = 0.2,
    noise: float = 0.15,
) -> Dataset:
    """Let the flawed annotator compare completions of the base model.

    Args:
        model: the base model, which writes the completions.
        tokenizer: its tokenizer.
        dataset: the string columns `prompt` and `completion`.
        seed: of the prompts, the samples and the annotator's noise.
        pairs: pairs to draw; those with two equal texts are dropped.
        human_share: share of the pairs in which one side is the human docstring.
        noise: temperature of the annotator's logistic choice between two utilities.

    Returns:
        The columns `prompt`, `chosen` and `rejected`.

    Raises:
        ValueError: when `noise` is not positive.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = [rng.randrange(len(dataset)) for _ in range(pairs)]
    all_prompts, human = list(dataset["prompt"]), list(dataset["completion"])
    prompts = [all_prompts[row] for row in rows]
    texts = sample_texts(model, tokenizer, [*prompts, *prompts])
    left, right = texts[:pairs], texts[pairs:]
    left = [human[row] if rng.random() < human_share else text for row, text in zip(rows, left, strict=True)]
    return annotated_pairs(prompts, left, right, biased_utility, noise=noise, rng=rng)


def train_proxy(
    base_path: str | Path,
    dataset: Dataset,
    out_dir: str | Path,
    *,
    seed: int,
    pairs: int = 3000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> Path:
    """Train a reward model, initialised from the base model, on the flawed annotator's choices.

    Args:
        base_path: folder of the base model and its tokenizer.
        dataset: the string columns `prompt` and `completion`, to sample completions for.
        out_dir: folder that receives the reward model and the tokenizer.
        seed: of the preferences, the new head and the order of the pairs.
        pairs: preference pairs to draw; one pass is made over them.
        batch_size: pairs of a step.
        learning_rate: the peak; linear warm-up over a twentieth of the steps, cosine decay.

    Returns:
        `out_dir`, which `AutoModelForSequenceClassification` and `AutoTokenizer` can load.

    Raises:
        OSError: when `base_path` holds no model.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    base = AutoModelForCausalLM.from_pretrained(base_path).eval()
    if torch.cuda.is_available():
        base = base.cuda()
    preferences = preference_pairs(base, tokenizer, dataset, seed=seed, pairs=pairs)
    return train_reward_model(
        base_path, preferences, out_dir, seed=seed, batch_size=batch_size, learning_rate=learning_rate
    )
