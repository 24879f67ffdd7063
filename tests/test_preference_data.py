"""Preference data from files, folders and functions: forms, swapped and missing columns, and what becomes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from datasets import Dataset, DatasetDict

from align_cbrl import InputError, PreferenceData
from align_cbrl.llm import load_preferences


def rows(count: int = 20) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i} ", "chosen": f"good answer {i}", "rejected": f"bad {i}", "topic": i % 3} for i in range(count)
    ]


def write(path: Path, given: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in given))
    return str(path)


def longer(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def test_pairs_load_from_everywhere(tmp_path: Path) -> None:
    Dataset.from_list(rows()).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows(9)), "test": Dataset.from_list(rows(3))}).save_to_disk(
        tmp_path / "both"
    )
    (tmp_path / "mine.py").write_text(
        f"from datasets import Dataset\ndef load():\n    return Dataset.from_list({rows()!r})\n"
    )
    for source in (write(tmp_path / "d.jsonl", rows()), str(tmp_path / "saved"), f"{tmp_path / 'mine.py'}:load"):
        found = load_preferences(source, scorer=longer)
        assert {split: len(part) for split, part in found.data.items()} == {"train": 17, "test": 3}
        assert set(found.data["train"].column_names) == {"prompt", "chosen", "rejected", "topic"}
        assert not set(found.data["train"]["prompt"]) & set(found.data["test"]["prompt"])
        assert found.dropped == 0
    assert {s: len(p) for s, p in load_preferences(str(tmp_path / "both")).data.items()} == {"train": 9, "test": 3}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: hi\n\nAssistant: you there", "\n\nHuman: hi\n\nAssistant: you", "\n\nHuman: hi\n\nAssistant:"),
        ("Say yes now. Yes", "Say yes now. Yesterday", "Say yes now. "),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "hi"}],
        ),
    ],
)  # fmt: skip
def test_the_prompt_is_what_both_answers_begin_with(tmp_path: Path, chosen: Any, rejected: Any, prompt: Any) -> None:
    other = [{"role": "user", "content": "x"}] if isinstance(chosen, list) else "x "
    source = write(
        tmp_path / "d.jsonl",
        [{"chosen": chosen, "rejected": rejected}, {"chosen": other + chosen[-1:], "rejected": other + rejected[-1:]}],
    )
    found = load_preferences(source)
    parts = [row for split in found.data.values() for row in split]
    row = next(r for r in parts if r["prompt"] == prompt)
    assert row["prompt"] + row["chosen"] == chosen and row["prompt"] + row["rejected"] == rejected


def test_answers_that_repeat_their_prompt_lose_it(tmp_path: Path) -> None:
    repeated = [{**r, "chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows()]
    found = load_preferences(write(tmp_path / "d.jsonl", repeated))
    assert all(c.startswith("good") for c in found.data["train"]["chosen"])


def test_equal_answers_are_counted_and_dropped(tmp_path: Path) -> None:
    given = rows()
    for row in given[::4]:
        row["rejected"] = row["chosen"]
    found = load_preferences(write(tmp_path / "d.jsonl", given))
    assert found.dropped == 5
    assert sum(len(part) for part in found.data.values()) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"prompt": r["prompt"], "choosen": "a", "rejected": "b"}, r"rename_column\('choosen', 'chosen'\)"),
        (lambda r: {"prompt": r["prompt"], "chosen": "a", "loser": "b"}, r"rename_column\('loser', 'rejected'\)"),
        (lambda r: {"prompt": r["prompt"], "x": "a"}, r"got \['prompt', 'x'\]; rename one"),
        (lambda r: {**r, "rejected": r["chosen"]}, "none of 20 pairs is left whose answers differ"),
        (lambda r: {"chosen": "abc", "rejected": "xyz"}, "row 0: there is no 'prompt' column"),
        (
            lambda r: {**r, "prompt": [{"role": "user", "content": "hi"}]},
            "row 0: expected prompt and answers of one form",
        ),
        (
            lambda r: {**r, "chosen": 3, "rejected": 2},
            "row 0: expected two texts or two lists of messages, got int and int",
        ),
    ],
)
def test_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = write(tmp_path / "d.jsonl", [change(row) for row in rows()])
    with pytest.raises(InputError, match=message):
        load_preferences(source)


def test_swapped_columns_are_noticed_by_a_scorer(tmp_path: Path) -> None:
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows()]
    source = write(tmp_path / "d.jsonl", swapped)
    with pytest.raises(InputError, match=r"the chosen answer in 0 of the 17 pairs .*look swapped: rename them"):
        load_preferences(source, scorer=longer)
    load_preferences(source)  # nobody asked
    even = [r if i % 2 else s for i, (r, s) in enumerate(zip(rows(), swapped, strict=True))]
    load_preferences(write(tmp_path / "e.jsonl", even), scorer=longer)  # a scorer that cannot tell refuses nothing


def test_pairs_become_an_objective(tmp_path: Path) -> None:
    completions = lm.all_completions()
    given = [
        {"prompt": p, "chosen": "a", "rejected": "b", "tokens": completions[2 + i]} for i, p in enumerate(lm.PROMPTS)
    ]
    found = load_preferences(write(tmp_path / "d.jsonl", given), test_share=0.25)
    chosen, rejected = (
        dataclasses.replace(rollouts, steps={**rollouts.steps, "completion_ids": rollouts.steps["tokens"]})
        for rollouts in found.pairs()
    )
    assert (chosen.size, rejected.size) == (3, 3)
    assert chosen.steps["completion"] == ["a"] * 3 and rejected.steps["completion"] == ["b"] * 3
    leader = lm.LinearLeader(lm.Enumeration.random(0), torch.zeros(5, dtype=torch.float64))
    assert PreferenceData(chosen, rejected).likelihood(leader).item() == pytest.approx(torch.tensor(0.5).log().item())
