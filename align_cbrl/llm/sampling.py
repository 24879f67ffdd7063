"""Prompts x G completions, sampled from a causal language model, as `Rollouts` of one step."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from align_cbrl.checks import Count, Whole, checked
from align_cbrl.estimators.sampler_evidence import SamplerEvidence
from align_cbrl.llm.conversations import is_conversation
from align_cbrl.llm.prompts import check_columns, positions_of, prompt_ids
from align_cbrl.rollouts import Rollouts

SHOWN_TOKENS = 512
"""Tokens of a batch that a test of the sampler looks at."""


@checked
@dataclasses.dataclass(frozen=True)
class Completions:
    """Completions of prompts, G in a row for each prompt: row i answers prompt i // G.

    Attributes:
        context: long [B], the index of each row's prompt in its dataset.
        columns: the dataset's columns, repeated for each row; "prompt" is among them.
        token_ids: completion tokens of each row, unpadded, with the end-of-sequence token where one was sampled.
        text: the decoded completions, without special tokens; where the prompts are conversations, each a list of one
            message, [{"role": "assistant", "content": text}], as trl hands it to reward functions.
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


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model declares, such as an end of turn."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return [*([] if tokenizer.eos_token_id in declared else [tokenizer.eos_token_id]), *declared]


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_completion_length: int
) -> GenerationConfig:
    """How completions are sampled, in training, for the leader and in measuring alike: from the policy itself.

    Temperature 1, the whole support, the length, and the special tokens; nothing else. Use it in `sampled_by`, or what
    it leaves open would come from the model's folder.

    Args:
        model: of its declarations, the tokens that end a completion are kept.
        tokenizer: of the model.
        max_completion_length: in tokens.
    """
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        disable_compile=True,
    )


@contextlib.contextmanager
def sampled_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """While it lasts, nothing but `config` acts on what `model` generates.

    A model's folder declares how it likes to be sampled (min_p, suppressed tokens, penalties, beams, ...), and
    `generate` takes from there whatever the configuration it is given leaves open. Sampled like that, completions are
    not the policy's, while their log-probabilities are: the follower settles elsewhere, and its gap says 0.
    """
    layers: list[Any] = [getattr(model, "model_with_adapter", model)]
    if hasattr(layers[0], "get_base_model"):  # peft copies its own declaration onto the model below at every call
        layers.append(layers[0].get_base_model())
    declared = [layer.generation_config for layer in layers]
    try:
        for layer in layers:
            layer.generation_config = config
        yield
    finally:
        for layer, own in zip(layers, declared, strict=True):
            layer.generation_config = own


def needs_position_ids(model: PreTrainedModel) -> bool:
    """Whether the model numbers positions from the left edge of the padding unless it is told better, as GPT-2 does.

    Rotary positions are relative, so padding on the left does not matter to them.
    """
    model = getattr(model, "model_with_adapter", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling")):
        return False
    return "position_ids" in inspect.signature(type(model).forward).parameters


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token within its text, [B, L], where the mask [B, L] has zeros on the left.

    Example:
        >>> positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist()
        [[0, 0, 0, 1], [0, 1, 2, 3]]
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def add_position_ids(model: PreTrainedModel) -> None:
    """Have a model that needs position ids make them itself, wherever it is called with an attention mask only."""
    if not needs_position_ids(model):
        return

    def complete(module: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = inputs.get("attention_mask")
        if inputs.get("position_ids") is None and inputs.get("past_key_values") is None and mask is not None:
            inputs = {**inputs, "position_ids": positions(mask)}
        return arguments, inputs

    model.register_forward_pre_hook(complete, with_kwargs=True)


def repeat_columns(prompts: Dataset, context: Sequence[int]) -> dict[str, list[Any]]:
    """The dataset's columns at the rows `context`, repetitions included."""
    distinct = sorted(set(context))
    place = {row: i for i, row in enumerate(distinct)}
    columns = prompts[distinct]
    return {name: [values[place[row]] for row in context] for name, values in columns.items()}


@checked
@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel,
    prior: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    context: Sequence[int],
    group_size: Count,
    max_completion_length: Count,
    seed: Whole,
    batch_size: Count = 256,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    evidence: SamplerEvidence | None = None,
) -> Completions:
    """`group_size` completions of each prompt, from the policy itself: temperature 1, no truncation of its support.

    Args:
        policy: the model sampled from.
        prior: the reference model; None when it is the policy.
        tokenizer: of both.
        prompts: a dataset with a "prompt" column of texts, or of conversations, which go through the chat template.
        context: rows of `prompts` to answer.
        group_size: completions per prompt, G.
        max_completion_length: in tokens; longer completions are cut there, and the cut text is the action.
        seed: of the sampling; torch's global generator is left as it was.
        batch_size: rows generated together.
        chat_template_kwargs: further arguments of the chat template.
        evidence: is shown a part of the completions, with the policy's probabilities.

    Returns:
        B = len(context) * group_size completions.

    Raises:
        InputError: a prompt that `prompt_ids` refuses, or a column with a name that is reserved.
    """
    check_columns(prompts.column_names)
    rows = [row for row in context for _ in range(group_size)]
    columns = repeat_columns(prompts, rows)
    token_ids: list[list[int]] = []
    log_policy, log_prior = [], []
    config = generation_config(policy, tokenizer, max_completion_length)
    ends = config.eos_token_id
    training = policy.training
    policy.eval()
    try:
        with sampled_by(policy, config), torch.random.fork_rng(devices=_cuda_devices(policy)):
            torch.manual_seed(seed)
            for start in range(0, len(rows), batch_size):
                piece = slice(start, start + batch_size)
                asked = prompt_ids(
                    tokenizer, columns["prompt"][piece], chat_template_kwargs,
                    positions=positions_of(policy.config), max_completion_length=max_completion_length,
                    rows=rows[piece],
                )  # fmt: skip
                encoded = pad_left(asked, tokenizer.pad_token_id, policy.device)
                output = policy.generate(**encoded, generation_config=config)
                width = encoded["input_ids"].shape[1]
                ids = [_cut(row, ends) for row in output[:, width:].tolist()]
                token_ids.extend(ids)
                padded, mask = _pad_right(ids, policy.device)
                logits = completion_logits(policy, encoded, padded, mask)
                if evidence is not None:
                    show_evidence(evidence, logits, encoded, padded, mask, ends)
                log_policy.append(_summed(logits, padded, mask))
                del logits  # the largest tensor there is, before the prior makes another
                log_prior.append(log_policy[-1] if prior is None else completion_log_probs(prior, encoded, ids))
    finally:
        policy.train(training)
    return Completions(
        context=torch.tensor(rows),
        columns=columns,
        token_ids=token_ids,
        text=decode(tokenizer, token_ids, is_conversation(columns["prompt"][0])),
        log_policy=torch.cat(log_policy),
        log_prior=torch.cat(log_prior),
    )


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]], conversational: bool) -> list[Any]:
    """Completions as reward functions see them: texts, or lists of one assistant message."""
    texts: list[str] = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts


def pad_left(token_ids: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Inputs "input_ids" and "attention_mask" [B, P] of texts of different lengths, padded on the left.

    Example:
        >>> pad_left([[5], [6, 7]], value=0)["input_ids"].tolist()
        [[0, 5], [6, 7]]
    """
    width = max(len(ids) for ids in token_ids)
    return {
        "input_ids": torch.tensor([[value] * (width - len(ids)) + list(ids) for ids in token_ids], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids], device=device),
    }


@torch.no_grad()
def completion_log_probs(model: PreTrainedModel, prompt: Mapping[str, Tensor], token_ids: list[list[int]]) -> Tensor:
    """log p(completion | prompt) in nats, summed over tokens: float64 [B] on the CPU.

    Args:
        model: a causal language model.
        prompt: "input_ids" and "attention_mask" [B, P], padded on the left.
        token_ids: B completions, unpadded.
    """
    padded, mask = _pad_right(token_ids, prompt["input_ids"].device)
    return _summed(completion_logits(model, prompt, padded, mask), padded, mask)


@torch.no_grad()
def completion_logits(model: Any, prompt: Mapping[str, Tensor], completion: Tensor, mask: Tensor) -> Tensor:
    """The model's logits before each token of completions, [B, L, V].

    Args:
        model: a causal language model.
        prompt: "input_ids" and "attention_mask" [B, P], padded on the left.
        completion: long [B, L], padded on the right.
        mask: [B, L].
    """
    input_ids = torch.cat([prompt["input_ids"], completion], dim=1)  # [B, P + L]
    attention = torch.cat([prompt["attention_mask"], mask], dim=1)
    further = {"position_ids": positions(attention)} if needs_position_ids(model) else {}
    output = model(input_ids=input_ids, attention_mask=attention, logits_to_keep=completion.shape[1] + 1, **further)
    logits: Tensor = output.logits[:, :-1]
    return logits


def shown_rows(rows: int, length: int) -> Tensor:
    """Which rows of a batch of completions a test of the sampler looks at: some 512 tokens, however large the batch.

    Example:
        >>> shown_rows(8, 256).tolist()
        [0, 7]
    """
    return torch.linspace(0, rows - 1, min(rows, max(1, SHOWN_TOKENS // length))).long()


def show_evidence(
    evidence: SamplerEvidence,
    logits: Tensor,
    prompt: Mapping[str, Tensor],
    completion: Tensor,
    mask: Tensor,
    ends: Sequence[int],
) -> None:
    """Show a part of a batch to a test of the sampler; of a long prompt its end, of a long completion its beginning.

    Args:
        evidence: the test.
        logits: [B, L, V] of the policy that was sampled.
        prompt: "input_ids" and "attention_mask" [B, P], padded on the left.
        completion: long [B, L], padded on the right.
        mask: [B, L].
        ends: tokens that end a completion.
    """
    rows = shown_rows(*completion.shape)
    evidence.add(
        logits[rows, :SHOWN_TOKENS],
        completion[rows, :SHOWN_TOKENS],
        mask[rows, :SHOWN_TOKENS],
        prompt["input_ids"][rows, -SHOWN_TOKENS // 2 :],
        prompt["attention_mask"][rows, -SHOWN_TOKENS // 2 :],
        ends,
    )


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cut `count` rows into pieces of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _pad_right(token_ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Completions and their mask, long [B, L]."""
    padded = torch.zeros(len(token_ids), max(len(ids) for ids in token_ids), dtype=torch.long, device=device)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, device=device)
        mask[row, : len(ids)] = 1
    return padded, mask


def _summed(logits: Tensor, completion: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of whole completions, float64 [B] on the CPU."""
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, completion[..., None])[..., 0]  # [B, L]
    return (chosen * mask).double().sum(1).cpu()


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
