"""Prompts x G completions, sampled from a causal language model, as `Rollouts` of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from align_cbrl.errors import InputError
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Completions:
    """Completions of prompts, G in a row for each prompt: row i answers prompt i // G.

    Attributes:
        context: long [B], the index of each row's prompt in its dataset.
        columns: the dataset's columns, repeated for each row; "prompt" is among them.
        token_ids: completion tokens of each row, unpadded, with the end-of-sequence token where one was sampled.
        text: the decoded completions, without special tokens.
        log_policy: float64 [B], log-probability (nats) of the whole completion under the sampling policy.
        log_prior: float64 [B], the same under the reference policy.
    """

    context: Tensor
    columns: Mapping[str, list[Any]]
    token_ids: list[list[int]]
    text: list[Any]
    log_policy: Tensor
    log_prior: Tensor

    def rollouts(self, weight: Tensor | None = None) -> Rollouts:
        """As `Rollouts` with T = 1: the action is the whole completion, the decision point its prompt.

        `steps` holds the dataset's columns, "completion" and "completion_ids".
        """
        return Rollouts.bandit(
            contexts=self.context,
            steps={**self.columns, "completion": self.text, "completion_ids": self.token_ids},
            log_policy=self.log_policy,
            log_prior=self.log_prior,
            weight=weight,
        )


def score_arguments(rollouts: Rollouts) -> dict[str, list[Any]]:
    """The keyword arguments that a trl reward function expects: prompts, completions, and every other column."""
    columns = {name: list(value) for name, value in rollouts.steps.items() if name not in ("prompt", "completion")}
    return {"prompts": list(rollouts.steps["prompt"]), "completions": list(rollouts.steps["completion"]), **columns}


def check_prompts(prompts: Dataset, needed: int) -> None:
    """Raise InputError unless `prompts` has a "prompt" column and at least `needed` rows.

    Args:
        prompts: the contexts of a language model.
        needed: distinct prompts in one generation batch.
    """
    if "prompt" not in prompts.column_names:
        raise InputError(
            f"prompts: expected a dataset with a 'prompt' column, got columns {prompts.column_names}; rename one with "
            "dataset.rename_column(old, 'prompt')"
        )
    if len(prompts) < needed:
        raise InputError(
            f"prompts: expected at least {needed} rows, the prompts of one generation batch, got {len(prompts)}; add "
            "prompts or lower prompts_per_step"
        )


def repeat_columns(prompts: Dataset, context: Sequence[int]) -> dict[str, list[Any]]:
    """The dataset's columns at the rows `context`, repetitions included."""
    distinct = sorted(set(context))
    place = {row: i for i, row in enumerate(distinct)}
    columns = prompts[distinct]
    return {name: [values[place[row]] for row in context] for name, values in columns.items()}


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel,
    prior: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    context: Sequence[int],
    group_size: int,
    max_completion_length: int,
    seed: int,
    batch_size: int = 256,
) -> Completions:
    """`group_size` completions of each prompt, from the policy itself: temperature 1, no truncation of its support.

    Args:
        policy: the model sampled from.
        prior: the reference model; None when it is the policy.
        tokenizer: of both.
        prompts: a dataset with a "prompt" column of texts.
        context: rows of `prompts` to answer.
        group_size: completions per prompt, G.
        max_completion_length: in tokens; longer completions are cut there, and the cut text is the action.
        seed: of the sampling; torch's global generator is left as it was.
        batch_size: rows generated together.

    Returns:
        B = len(context) * group_size completions.
    """
    rows = [row for row in context for _ in range(group_size)]
    columns = repeat_columns(prompts, rows)
    token_ids: list[list[int]] = []
    log_policy, log_prior = [], []
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
    )
    training = policy.training
    policy.eval()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(policy)):
            torch.manual_seed(seed)
            for start in range(0, len(rows), batch_size):
                texts = columns["prompt"][start : start + batch_size]
                encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
                encoded = {name: encoded[name].to(policy.device) for name in ("input_ids", "attention_mask")}
                output = policy.generate(**encoded, generation_config=config)
                width = encoded["input_ids"].shape[1]
                ids = [_cut(row, tokenizer.eos_token_id) for row in output[:, width:].tolist()]
                token_ids.extend(ids)
                log_policy.append(completion_log_probs(policy, encoded, ids))
                log_prior.append(log_policy[-1] if prior is None else completion_log_probs(prior, encoded, ids))
    finally:
        policy.train(training)
    return Completions(
        context=torch.tensor(rows),
        columns=columns,
        token_ids=token_ids,
        text=tokenizer.batch_decode(token_ids, skip_special_tokens=True),
        log_policy=torch.cat(log_policy),
        log_prior=torch.cat(log_prior),
    )


@torch.no_grad()
def completion_log_probs(model: PreTrainedModel, prompt: Mapping[str, Tensor], token_ids: list[list[int]]) -> Tensor:
    """log p(completion | prompt) in nats, summed over tokens: float64 [B] on the CPU.

    Args:
        model: a causal language model.
        prompt: "input_ids" and "attention_mask" [B, P], padded on the left.
        token_ids: B completions, unpadded.
    """
    length = max(len(ids) for ids in token_ids)
    device = prompt["input_ids"].device
    padded = torch.zeros(len(token_ids), length, dtype=torch.long, device=device)  # [B, L]
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, device=device)
        mask[row, : len(ids)] = 1
    input_ids = torch.cat([prompt["input_ids"], padded], dim=1)  # [B, P + L]
    attention = torch.cat([prompt["attention_mask"], mask], dim=1)
    logits = model(input_ids=input_ids, attention_mask=attention, logits_to_keep=length + 1).logits[:, :-1]
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, padded[..., None])[..., 0]  # [B, L]
    return (chosen * mask).double().sum(1).cpu()


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cut `count` rows into pieces of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _cut(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
