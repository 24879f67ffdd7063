"""The door for prompts: every row is looked at once, before anything is trained, sampled or paid for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.conversations import content_text, is_conversation, shown_text

RESERVED = {
    **dict.fromkeys(("completion", "completion_ids"), "leaders and objectives find what the policy says"),
    **dict.fromkeys(
        ("prompts", "completions", "completions_a", "completions_b"),
        "reward functions and judges are given prompts and the policy's words",
    ),
    **dict.fromkeys(
        ("trainer_state", "log_extra", "log_metric", "environments"), "trl gives reward functions objects of its own"
    ),
    **dict.fromkeys(("self", "fixed"), "methods of leaders have an argument of their own"),
}
"""Names that no column of prompts may have, and what goes by each of them."""

_ANSWERED = ("assistant", "model", "bot", "gpt", "ai")
"""What templates call the one who answers."""


def check_prompts(prompts: Dataset, needed: int, *, completions: bool = False) -> None:
    """Look at every row of a dataset of prompts, without a tokenizer.

    Args:
        prompts: the contexts of a language model.
        needed: distinct prompts in one generation batch.
        completions: whether there may be a column "completion", for a policy to be trained on before.

    Raises:
        InputError: no dataset; no "prompt" column; a column with a name that is `RESERVED`; fewer than `needed` rows;
            or rows that are no prompts, as `check_rows`.
    """
    if not isinstance(prompts, Dataset):
        advice = f"; take one of its splits, {sorted(prompts)}" if isinstance(prompts, DatasetDict) else ""
        raise InputError(f"prompts: expected a datasets.Dataset, got {type(prompts).__name__}{advice}")
    names = prompts.column_names
    if "prompt" not in names:
        raise InputError(
            f"prompts: expected a dataset with a 'prompt' column, got columns {names}; rename one with "
            "dataset.rename_column(old, 'prompt')"
        )
    check_columns([name for name in names if not (completions and name == "completion")])
    check_count(prompts, needed)
    check_rows(prompts["prompt"][:])


def check_columns(names: Sequence[str]) -> None:
    """Raise InputError for a column whose name is `RESERVED`."""
    for name in names:
        if name in RESERVED:
            raise InputError(
                f"prompts: got a column {name!r}, the name under which {RESERVED[name]}; rename it, "
                f"dataset.rename_column({name!r}, 'data_{name}'), or drop it, dataset.remove_columns({name!r})"
            )


def check_count(prompts: Dataset, needed: int) -> None:
    """Raise InputError unless there are at least `needed` prompts."""
    if len(prompts) < needed:
        raise InputError(
            f"prompts: expected at least {needed} rows, the prompts of one generation batch, got {len(prompts)}; add "
            "prompts or lower prompts_per_step"
        )


def check_rows(prompts: Sequence[Any], rows: Sequence[int] | None = None) -> None:
    """Raise InputError unless every prompt is a text that is not empty, or every one a conversation to be answered.

    Args:
        prompts: from the "prompt" column.
        rows: the number of each in its dataset; None: they are all of them.

    Example:
        >>> check_rows(["Why?", None, ""])
        Traceback (most recent call last):
        align_cbrl.errors.InputError: prompts: row 1: expected a text or a list of messages, got None; leave such rows \
out (1 further rows are refused as well)
    """
    _refuse(prompts, rows, _no_prompt)
    if len({is_conversation(prompt) for prompt in prompts}) > 1:
        raise InputError("prompts: expected texts in all rows or conversations in all rows, got some of both")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    positions: int | None = None,
    max_completion_length: int = 0,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, unpadded, as trl makes them: texts as they are, conversations up to the assistant's turn.

    Args:
        tokenizer: of the policy.
        prompts: texts, or conversations.
        chat_template_kwargs: further arguments of the template, such as `enable_thinking`.
        positions: that the model has, see `positions_of`.
        max_completion_length: in tokens, for which the prompt has to leave positions.
        rows: the number of each prompt in its dataset; None: they are all of them.

    Raises:
        InputError: a row that `check_rows` or the template refuses, that makes no token, or that is too long; or
            conversations, and a tokenizer without a chat template.
    """
    check_rows(prompts, rows)
    check_chat_template(tokenizer, prompts[0])

    def encoded(some: Sequence[Any]) -> list[list[int]]:
        if not is_conversation(some[0]):
            ids: list[list[int]] = tokenizer(list(some))["input_ids"]
            return ids
        settings = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        for turns in some:
            parts = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
            if parts and any(str(part) in tokenizer.apply_chat_template(turns, tokenize=False, **settings)
                             for part in parts):  # fmt: skip
                raise InputError("it prints a content of parts as Python does; join the parts to one text")
        asked = tokenizer.apply_chat_template(list(some), tokenize=True, return_dict=True, **settings)
        ids = asked["input_ids"]
        return ids

    def refused(prompt: Any) -> str | None:
        try:
            encoded([prompt])
        except Exception as error:
            what = "the chat template refuses it" if is_conversation(prompt) else "the tokenizer refuses it"
            return f"{what}, {type(error).__name__}: {first_line(error)}; got {_shown(prompt)}"
        return None

    try:
        ids = encoded(prompts)
    except Exception:  # a template is anybody's program and raises what it likes
        _refuse(prompts, rows, refused)
        raise  # all together fail, and none alone
    special = set(tokenizer.all_special_ids)

    def unfit(i: int) -> str | None:
        prompt, count = prompts[i], len(ids[i])
        if count == 0 or (isinstance(prompt, str) and not prompt.strip() and special.issuperset(ids[i])):
            return f"makes no token, got {_shown(prompt)}; leave such rows out"
        if positions is not None and count + max_completion_length > positions:
            return (
                f"has {count} tokens, which with max_completion_length={max_completion_length} are "
                f"{count + max_completion_length} positions, and the model has {positions}; shorten one of them, "
                f"got {_shown(prompt)}"
            )
        return None

    _refuse(range(len(ids)), rows, unfit)
    return ids


def check_chat_template(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> None:
    """Raise InputError for a conversation that the tokenizer has no template for."""
    if is_conversation(prompt) and tokenizer.chat_template is None:
        raise InputError(
            f"prompts: expected texts, since the tokenizer {tokenizer.name_or_path!r} has no chat template, got a "
            f"conversation, {prompt!r:.100}; set tokenizer.chat_template and save it, or make the prompts texts"
        )


def positions_of(config: Any) -> int | None:
    """How many tokens a model reads at most; None where it has no such limit.

    A model whose every layer looks back through a sliding window only, or that has no positions at all, has none.
    Rotary positions that are stretched reach as far as they are stretched to.

    Args:
        config: of the model, as transformers loads it.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    layers = getattr(text, "layer_types", None) or ["sliding_attention"]
    window = getattr(text, "sliding_window", None) is not None and set(layers) == {"sliding_attention"}
    if positions is None or window or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]  # of all layers, or by their type
    reach = [(k.get("factor") or 1.0) * (k.get("original_max_position_embeddings") or positions) for k in kinds]
    return int(max(positions, *reach))


def _no_prompt(prompt: Any) -> str | None:
    """Why a value is neither a text that is not empty nor a conversation that the policy can answer; None if it is."""
    if isinstance(prompt, str):
        return None if prompt else "expected a text that is not empty, got ''; leave such rows out"
    if prompt is None or (isinstance(prompt, float) and math.isnan(prompt)):
        return f"expected a text or a list of messages, got {prompt}; leave such rows out"
    if not isinstance(prompt, list) or not prompt:
        return f"expected a text or a list of messages, got {_shown(prompt)}"
    for turn in prompt:
        if (reason := _no_message(turn)) is not None:
            return reason
    last = prompt[-1]
    if last["role"].strip().lower() in _ANSWERED:
        return (
            f"ends in a turn of the {last['role']}, {content_text(last['content'])!r:.60}, and the policy would answer "
            "after the answer; drop it, dataset.map(lambda row: {'prompt': row['prompt'][:-1]})"
        )
    if last["role"] == "user" and not content_text(last["content"]).strip():
        return "ends in a turn of the user that says nothing; leave such rows out"
    return None


def _no_message(turn: Any) -> str | None:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
        return f"expected messages {{'role': ..., 'content': ...}}, got {_shown(turn)}"
    content = turn["content"]
    if isinstance(content, str) or (content is None and turn.get("tool_calls")):
        return None
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        others = {part.get("type") for part in content if not isinstance(part.get("text"), str)}
        return f"expected a content of texts, got parts of type {sorted(map(str, others))}" if others else None
    return f"expected a text as the content of the {turn['role']}'s turn, got {_shown(content)}"


def _refuse(prompts: Sequence[Any], rows: Sequence[int] | None, reason_of: Callable[[Any], str | None]) -> None:
    """Raise for the first prompt that there is a reason against, and say how many others there are."""
    reasons = [reason_of(prompt) for prompt in prompts]
    found = [i for i, reason in enumerate(reasons) if reason is not None]
    if found:
        row = found[0] if rows is None else rows[found[0]]
        others = {i if rows is None else rows[i] for i in found} - {row}
        more = f" ({len(others)} further rows are refused as well)" if others else ""
        raise InputError(f"prompts: row {row}: {reasons[found[0]]}{more}")


def _shown(value: Any) -> str:
    """A value in a message; of a long prompt the beginning and the end, which tell it from others that begin alike."""
    if not (isinstance(value, str) or is_conversation(value)):
        return f"the {type(value).__name__} {value!r:.100}"
    try:
        text = repr(shown_text(value))
    except (TypeError, KeyError, AttributeError):  # a conversation that is none is why it is shown
        text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}"
