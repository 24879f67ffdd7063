"""What an engine asks: completions to be rewarded, read from JSON and looked at before anything is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.logs import LOG_PROBS, check_completions, check_log_probs
from align_cbrl.llm.prompts import check_rows
from align_cbrl.runs.config import nearest

_FIELDS = ("id", "prompts", "completions", "query", "labels", "columns", *LOG_PROBS, "learn")
_NAME = "request"


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Completions to be rewarded, B of them.

    Attributes:
        prompts: texts or conversations.
        completions: likewise.
        columns: of the data, B values each.
        log_probs: under policy and reference, float64 [B] each; None where they were not sent.
        learn: whether the leader may learn from them; false for an evaluation.
        digest: of all that was sent; a request that is sent again has the same.
    """

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    log_probs: tuple[Tensor, Tensor] | None
    learn: bool
    digest: str

    @property
    def size(self) -> int:
        """Number of completions, B."""
        return len(self.completions)


def read_request(
    body: bytes, *, columns: Sequence[str] = (), labels: str | None = None, ends: Sequence[str] = ()
) -> ScoreRequest:
    """The request in a body of JSON: ours, or OpenRLHF's.

    Ours has `prompts` and `completions`, and may have `columns` (lists by name), `log_policy` and `log_prior`
    (numbers), `learn` (false for an evaluation) and `id` (any text; requests with equal completions are one request
    unless their ids differ). OpenRLHF's has `query`, the prompts with their completions, `prompts` and `labels`.

    Args:
        body: of the request.
        columns: names that `columns` must have, and no others.
        labels: the one of them that `labels` are; None: labels are left out.
        ends: texts that end a completion; it is cut before the first of them.

    Raises:
        InputError: anything else; the message names the field and the row.

    Example:
        >>> request = read_request(b'{"query": ["1+1=2</s>"], "prompts": ["1+1="], "labels": ["2"]}', ends=["</s>"])
        >>> request.completions, request.columns
        (['2'], {})
        >>> read_request(b'{"prompts": ["a", "b"], "completions": ["c"]}')
        Traceback (most recent call last):
        align_cbrl.errors.InputError: request: completions: expected 2 values, one for each prompt, got 1
    """
    given = _parsed(body)
    for name in given:
        if name not in _FIELDS:
            raise InputError(f"{_NAME}: unknown field {name!r}; {nearest(name, _FIELDS)}")
    prompts = given.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise InputError(f"{_NAME}: prompts: expected a list that is not empty, got {_shown(prompts)}")
    count = len(prompts)
    check_rows(prompts)
    if ("query" in given) == ("completions" in given):
        raise InputError(f"{_NAME}: expected either completions, or OpenRLHF's query, got {sorted(given)}")
    if "query" in given:
        queries = _listed("query", given["query"], count)
        completions = [_after(prompt, query, i) for i, (prompt, query) in enumerate(zip(prompts, queries, strict=True))]
    else:
        completions = _listed("completions", given["completions"], count)
    check_completions(completions, _NAME)
    completions = [_cut(completion, ends) for completion in completions]
    data = _columns(given, columns, labels, count)
    learn, label = given.get("learn", True), given.get("id", "")
    if not isinstance(learn, bool):
        raise InputError(f"{_NAME}: learn: expected true or false, got {_shown(learn)}")
    if not isinstance(label, str):
        raise InputError(f"{_NAME}: id: expected a text, got {_shown(label)}")
    log_probs = check_log_probs({name: given[name] for name in LOG_PROBS if name in given}, count, _NAME)
    said = json.dumps([label, learn, prompts, completions, data], sort_keys=True)
    digest = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
    return ScoreRequest(prompts, completions, data, log_probs, learn, digest)


def row_of(request: ScoreRequest, i: int, fixed: Sequence[float] | None) -> dict[str, Any]:
    """A completion as plain data, for `rollout_columns` to put together again.

    Args:
        request: it is a part of.
        i: its number there.
        fixed: the leader's `fixed_scores` of it.
    """
    return {
        "prompt": request.prompts[i],
        "completion": request.completions[i],
        "columns": {name: values[i] for name, values in request.columns.items()},
        "log_probs": None if request.log_probs is None else [float(values[i]) for values in request.log_probs],
        "fixed": None if fixed is None else list(fixed),
    }


def rollout_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of `completion_rollouts`, but for the groups, from rows that `row_of` made.

    Log-probabilities are there if all rows have them.
    """
    known = all(row["log_probs"] is not None for row in rows)
    pairs = torch.tensor([row["log_probs"] for row in rows], dtype=torch.float64) if known else None
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [row["completion"] for row in rows],
        "columns": {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]},
        "log_probs": None if pairs is None else (pairs[:, 0], pairs[:, 1]),
    }


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body, parse_constant=_no_number)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end, a number of 5000 digits
        raise InputError(f"{_NAME}: expected a JSON object: {first_line(error)}") from error
    if not isinstance(given, dict):
        raise InputError(f"{_NAME}: expected a JSON object, got {_shown(given)}")
    return given


def _no_number(text: str) -> NoReturn:
    raise InputError(f"{_NAME}: expected finite numbers, got {text}")


def _listed(name: str, values: Any, count: int) -> list[Any]:
    if not isinstance(values, list):
        raise InputError(f"{_NAME}: {name}: expected a list, got {_shown(values)}")
    if len(values) != count:
        raise InputError(f"{_NAME}: {name}: expected {count} values, one for each prompt, got {len(values)}")
    return values


def _columns(given: Mapping[str, Any], names: Sequence[str], labels: str | None, count: int) -> dict[str, list[Any]]:
    columns = given.get("columns", {})
    if not isinstance(columns, Mapping):
        raise InputError(f"{_NAME}: columns: expected lists by name, got {_shown(columns)}")
    columns = dict(columns)
    if labels is not None and "labels" in given:
        columns[labels] = given["labels"]
    for name in columns:
        if name not in names:
            raise InputError(
                f"{_NAME}: unknown column {name!r}; {nearest(name, names)}; the server knows those under columns in "
                "its configuration"
            )
    if missing := [name for name in names if name not in columns]:
        raise InputError(f"{_NAME}: expected the column {missing[0]!r}, which the reward or the judge needs, got none")
    return {name: _listed(f"columns.{name}", columns[name], count) for name in names}


def _after(prompt: Any, query: Any, i: int) -> str:
    """What a query has after its prompt; white space does not count, which decoding may change."""
    if not isinstance(prompt, str) or not isinstance(query, str):
        raise InputError(f"{_NAME}: query {i}: expected texts, prompt and query, got {_shown(query)}")
    if query.startswith(prompt):
        return query[len(prompt) :]
    place = 0
    for character in prompt:
        if character.isspace():
            continue
        while place < len(query) and query[place].isspace():
            place += 1
        if place == len(query) or query[place] != character:
            raise InputError(
                f"{_NAME}: query {i}: expected a text that begins with its prompt, {prompt!r:.60}, got {query!r:.60}; "
                "was the prompt cut to fit the engine's limit on length?"
            )
        place += 1
    return query[place:]


def _cut(completion: Any, ends: Sequence[str]) -> Any:
    if not isinstance(completion, str):
        return completion
    places = [place for place in (completion.find(end) for end in ends) if place >= 0]
    return completion[: min(places)] if places else completion


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value!r:.60}, a {type(value).__name__}"
