"""Completions that somebody else's engine sampled, as rollouts: from memory, or from the rows of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.llm.conversations import is_conversation
from align_cbrl.llm.data import load_rows
from align_cbrl.llm.prompts import RESERVED, check_rows
from align_cbrl.llm.scoring import copied, is_number
from align_cbrl.rollouts import Rollouts

LOG_PROBS = ("log_policy", "log_prior")
"""Columns with log p(completion | prompt) under the policy that sampled it and under the reference, in nats."""

_ROUNDING = 0.01  # of a log-probability of zero
_OWN = ("prompt", "completion", "group", *LOG_PROBS)


def completion_rollouts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    group: Tensor,
    log_probs: tuple[Tensor, Tensor] | None = None,
) -> Rollouts:
    """Completions as rollouts of one step. Contexts are the prompts, by a hash that is the same everywhere.

    Args:
        prompts: texts or conversations, B.
        completions: likewise.
        columns: of the data, B values each.
        group: long [B]; completions with the same number are independent samples for one prompt.
        log_probs: of the completions under policy and reference, [B] each.

    Example:
        >>> rollouts = completion_rollouts(["a", "a"], ["yes", "no"], {}, torch.tensor([0, 0]))
        >>> rollouts.group[:, 0].tolist(), bool(rollouts.contexts[0] == rollouts.contexts[1])
        ([0, 0], True)
    """
    digests = [hashlib.blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=8) for prompt in prompts]
    policy, prior = (None, None) if log_probs is None else (value[:, None] for value in log_probs)
    return Rollouts(
        contexts=torch.tensor([int.from_bytes(digest.digest(), "big") >> 1 for digest in digests]),
        mask=torch.ones(len(prompts), 1, dtype=torch.bool),
        group=group[:, None],
        steps={name: copied(list(values)) for name, values in
               {**columns, "prompt": prompts, "completion": completions}.items()},
        log_policy=policy,
        log_prior=prior,
    )  # fmt: skip


@checked
def load_rollouts(source: str | Path) -> Rollouts:
    r"""Completions from a file of logs, one a row.

    Columns are "prompt", "completion", "log_policy" and "log_prior" (both or neither: log p(completion | prompt) under
    the policy that sampled it and under the reference, in nats, summed over tokens), and "group"; all others reach
    rewards and judges by their names. Without a column "group" the completions of one prompt form a group.

    Args:
        source: a jsonl, json, csv or parquet file.

    Raises:
        InputError: nothing loads, a column is missing or its name is taken, or a row is not what its column says; the
            message names the row.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "logs.jsonl"
        >>> _ = file.write_text(
        ...     '{"prompt": "a", "completion": "yes", "score": 1}\n{"prompt": "a", "completion": "no", "score": 0}\n'
        ... )
        >>> rollouts = load_rollouts(file)
        >>> rollouts.size, rollouts.steps["score"]
        (2, [1, 0])
    """
    name = f"rollouts {str(source)!r}"
    rows = load_rows(str(source))
    columns = {column: rows[column][:] for column in rows.column_names}
    for needed in ("prompt", "completion"):
        if needed not in columns:
            raise InputError(f"{name}: expected a column {needed!r}, got columns {sorted(columns)}; rename one")
    if len(rows) == 0:
        raise InputError(f"{name}: expected at least one row, got none")
    data = {column: values for column, values in columns.items() if column not in _OWN}
    if taken := sorted(set(data) & set(RESERVED)):
        raise InputError(f"{name}: got a column {taken[0]!r}, a name under which {RESERVED[taken[0]]}; rename it")
    check_rows(columns["prompt"])
    check_completions(columns["completion"], name)
    given = [column for column in LOG_PROBS if column in columns]
    log_probs = check_log_probs({column: columns[column] for column in given}, len(rows), name)
    keys = columns.get("group", columns["prompt"])
    numbers: dict[str, int] = {}
    group = torch.tensor([numbers.setdefault(json.dumps(key, default=repr), len(numbers)) for key in keys])
    return completion_rollouts(columns["prompt"], columns["completion"], data, group, log_probs)


def check_completions(completions: Sequence[Any], name: str) -> None:
    """Raise InputError unless every completion is a text, or a list of messages as trl makes them.

    Example:
        >>> check_completions(["yes", None], "request")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: request: completion 1: expected a text or a list of messages, got None, a NoneType
    """
    for i, completion in enumerate(completions):
        whole = is_conversation(completion) and all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn for turn in completion
        )
        if not isinstance(completion, str) and not whole:
            raise InputError(
                f"{name}: completion {i}: expected a text or a list of messages, got {completion!r:.60}, a "
                f"{type(completion).__name__}"
            )


def check_log_probs(given: Mapping[str, Sequence[Any]], count: int, name: str) -> tuple[Tensor, Tensor] | None:
    """Log-probabilities under policy and reference, float64 [count] each; None where none are given.

    Args:
        given: values by the names of `LOG_PROBS`.
        count: completions.
        name: of where they come from, for messages.

    Raises:
        InputError: one without the other, another number of values, or one that is no log-probability.

    Example:
        >>> check_log_probs({"log_policy": [0.5], "log_prior": [-1.0]}, 1, "request")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: request: log_policy 0: expected a finite number of nats, at most 0, got 0.5
    """
    if not given:
        return None
    if missing := [column for column in LOG_PROBS if column not in given]:
        raise InputError(f"{name}: expected log_policy and log_prior together, got no {missing[0]}; add it, or neither")
    found = []
    for column in LOG_PROBS:
        values = given[column]
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != count:
            raise InputError(f"{name}: {column}: expected a list of {count} numbers, got {values!r:.60}")
        for i, value in enumerate(values):
            if isinstance(value, bool) or not is_number(value) or value > _ROUNDING:
                raise InputError(
                    f"{name}: {column} {i}: expected a finite number of nats, at most 0, got {value!r:.60}"
                )
        found.append(torch.tensor([float(value) for value in values], dtype=torch.float64))
    return found[0], found[1]
