"""User data as JSON: whatever a column may hold is written, and different values stay different."""

from __future__ import annotations

import datetime
import decimal
import json
import pathlib
import uuid
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import Judge
from align_cbrl.objectives import GroupLabel
from align_cbrl.plain import plain

RED, BLUE = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
VALUES: list[Any] = [
    None, "None", "null", float("nan"), "nan", True, "True", 0, 1.5, "1.5", "0", b"0", b"1", "", " ",
    datetime.date(2024, 5, 17), "2024-05-17", datetime.datetime(2024, 5, 17), datetime.time(12), "12:00:00",
    datetime.datetime(2024, 5, 17, tzinfo=datetime.UTC), datetime.timedelta(days=1), "1 day, 0:00:00",
    decimal.Decimal("2.5"), uuid.UUID(int=7), pathlib.Path("/a"), [1, 2], [1, "2"], {"a": 1}, {"a": "1"}, [], {},
    np.array(["x", "y"]), torch.tensor([1.0, 3.0]), RED, BLUE, pd.Timestamp("2031-01-01"), {3, 4}, "e\u0301", "\u00e9",
    "x" * 100_000, "x" * 100_001, 2**62, 2**62 + 1, "a\x00b", "a\x00c", "\ud800", ("t",),
]  # fmt: skip
"""All different, as names of groups and for a judge."""


def rollouts(values: list[Any]) -> Rollouts:
    steps = {"prompt": ["q"] * len(values), "completion": ["a"] * len(values), "user": values}
    return Rollouts.bandit(contexts=torch.arange(len(values)), steps=steps)


def test_every_value_is_written() -> None:
    nested = [{"value": value, "in": [value, {"deeper": (value,)}]} for value in VALUES]
    assert json.loads(json.dumps(plain(nested)))[15] == {
        "value": "2024-05-17",
        "in": ["2024-05-17", {"deeper": ["2024-05-17"]}],
    }
    assert plain([object(), 1]) == ["<object>", 1]


def test_different_names_are_different_groups() -> None:
    labels = GroupLabel("user").of(None, rollouts(VALUES))[:, 0].tolist()  # type: ignore[arg-type]  # no leader is asked
    assert len(set(labels)) == len(VALUES)
    again = GroupLabel("user").of(None, rollouts(list(reversed(VALUES))))[:, 0].tolist()  # type: ignore[arg-type]
    assert again == labels[::-1]


@pytest.mark.parametrize(
    "names",
    [
        [1, 1.0, np.int32(1), np.float64(1.0), torch.tensor(1)],
        [float("nan"), np.nan, float("nan")],
        ["law", "".join(("l", "aw")), np.str_("law")],
        [datetime.date(2024, 1, 1), datetime.date(2024, 1, 1)],
        [True, np.bool_(True)],
    ],
)
def test_equal_names_are_one_group(names: list[Any]) -> None:
    labels = GroupLabel("user").of(None, rollouts(names))[:, 0]  # type: ignore[arg-type]  # no leader is asked
    assert len(set(labels.tolist())) == 1
    as_tensor = GroupLabel("user").of(None, rollouts(torch.tensor([1, 1, 2])))[:, 0].tolist()  # type: ignore[arg-type]
    assert as_tensor[0] == as_tensor[1] != as_tensor[2]


def test_a_name_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"WorstGroup\.column: expected names of groups, got a object"):
        GroupLabel("user").of(None, rollouts([object(), object()]))  # type: ignore[arg-type]  # no leader is asked


def test_a_judge_gets_values_as_they_are_and_is_asked_about_each_once() -> None:
    seen: list[Any] = []

    def function(prompts: list[Any], completions: list[Any], user: list[Any]) -> list[float]:
        seen.extend(user)
        return [float(len(seen) - len(user) + i) for i in range(len(user))]

    scores = Judge(function)(None, rollouts([*VALUES, *VALUES]))[:, 0].tolist()
    assert scores[: len(VALUES)] == scores[len(VALUES) :] and len(seen) == len(set(scores))
    # A date is not told from the text that it is written as; no column of data holds both.
    assert len(VALUES) - len(seen) <= 4
    assert {type(value) for value in seen} >= {datetime.datetime, bytes, decimal.Decimal, np.ndarray, type(RED), dict}
