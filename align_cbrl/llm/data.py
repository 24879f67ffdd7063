"""Prompts and preferences from wherever they are: a function, a file, a folder, or the hub."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from align_cbrl.checks import Range, Whole, checked
from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.prompts import check_prompts
from align_cbrl.llm.scoring import ScoreFunction, call_score_function, check_scores
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.inputs import DATA_FORMATS, check_file

_ASSISTANT = "Assistant:"
# What other data sets call the two columns.
_ALIASES = {
    "chosen": ("preferred", "winner", "better", "response_chosen", "completion_a"),
    "rejected": ("dispreferred", "loser", "worse", "response_rejected", "completion_b"),
}


TestShare = Annotated[float, Range(0, 1, open="low high")]
"""The share of the prompts that is set aside; something is left on both sides."""


@checked
def load_prompts(source: str, *, test_share: TestShare = 0.15, seed: Whole = 0) -> DatasetDict:
    """Train and test prompts, with the columns that come along.

    Args:
        source: `package.module.function` or `file.py:function`, called without arguments; a file (json, jsonl, csv,
            parquet, or txt with a prompt a line); a folder written by `save_to_disk` or of data files; or a hub id.
        test_share: share of the rows set aside when the source has no "test" split.
        seed: of that split.

    Returns:
        "train" and "test", whose prompts are disjoint.

    Raises:
        InputError: nothing loads from `source`; it has no train split; `check_prompts` refuses its columns or one of
            its rows; a share that is not in (0, 1), or that leaves nothing to train on; or all test prompts are among
            the training prompts.
    """
    data = _load(source)
    for split in ("train", "test"):
        if split in data:
            check_prompts(data[split], 2 if split == "train" else 1, completions=True)
    if "test" not in data:
        data = _split(data["train"], test_share, seed)
    seen = {str(prompt) for prompt in data["train"]["prompt"]}
    test = data["test"].select([i for i, p in enumerate(data["test"]["prompt"]) if str(p) not in seen])
    if len(test) == 0:
        raise InputError(f"data {source!r}: every test prompt also occurs among the training prompts")
    return DatasetDict({"train": data["train"], "test": test})


@checked
@dataclasses.dataclass(frozen=True)
class Preferences:
    """Labelled pairs, split by prompt.

    Attributes:
        data: "train" and "test", with columns "prompt", "chosen" and "rejected", and those that came along. Answers are
            what follows the prompt; texts, or lists of messages.
        dropped: rows left out because both answers were the same.
    """

    data: DatasetDict
    dropped: int

    def pairs(self, split: str = "train") -> tuple[Rollouts, Rollouts]:
        """Chosen and rejected answers as rollouts, the arguments of `PreferenceData`."""
        rows = self.data[split]
        columns = {n: list(rows[n]) for n in rows.column_names if n not in ("chosen", "rejected")}
        contexts = torch.arange(len(rows))
        chosen, rejected = (
            Rollouts.bandit(contexts=contexts, steps={**columns, "completion": list(rows[name])})
            for name in ("chosen", "rejected")
        )
        return chosen, rejected


@checked
def load_preferences(
    source: str, *, test_share: TestShare = 0.15, seed: Whole = 0, scorer: ScoreFunction | None = None
) -> Preferences:
    """Pairs of a preferred and another answer to the same prompt.

    Where there is no "prompt" column, the prompt is what both answers begin with: the messages that they share, or the
    text up to the last "Assistant:" that they share, or else up to the last space of what they share.

    Args:
        source: as for `load_prompts`.
        test_share: share of the prompts set aside when the source has no "test" split.
        seed: of that split.
        scorer: an opinion on answers, such as a judge's function. Asked about 512 pairs at most, it tells whether the
            columns are swapped.

    Raises:
        InputError: nothing loads, a column is missing (the message names the nearest), rows are of different or unknown
            form, no pair is left, `check_prompts` refuses a prompt or a column, a share as for `load_prompts`, or
            `scorer` prefers most of the rejected answers.
    """
    data = _load(source)
    dropped = 0
    for split in ("train", "test"):
        if split in data:
            data[split], same = _pairs(source, data[split])
            check_prompts(data[split], 1)
            dropped += same
    if "test" not in data:
        data = _split(data["train"], test_share, seed)
    data = DatasetDict({"train": data["train"], "test": data["test"]})
    if scorer is not None:
        _check_direction(source, data["train"], scorer)
    return Preferences(data, dropped)


def load_rows(source: str) -> Dataset:
    """All rows of a source, its "train" split where it has several; `source` as for `load_prompts`.

    Raises:
        InputError: nothing loads from it.
    """
    return _load(source)["train"]


def _pairs(source: str, rows: Dataset) -> tuple[Dataset, int]:
    """Rows with prompt, chosen and rejected, and how many were dropped because both answers were the same."""
    names = rows.column_names
    for wanted in ("chosen", "rejected"):
        if wanted not in names:
            others = [name for name in names if name not in ("chosen", "rejected", "prompt")]
            close = difflib.get_close_matches(wanted, others, n=1, cutoff=0.5) or [
                n for n in _ALIASES[wanted] if n in others
            ]
            old = close[0] if close else "OLD"
            raise InputError(
                f"preferences {source!r}: expected columns 'chosen' and 'rejected', got {names}; rename one with "
                f"dataset.rename_column({old!r}, {wanted!r})"
            )
    prompts, chosen, rejected, kept = [], [], [], []
    for i, row in enumerate(rows):
        good, bad = row["chosen"], row["rejected"]
        if type(good) is not type(bad) or not isinstance(good, (str, list)):
            raise InputError(
                f"preferences {source!r}: row {i}: expected two texts or two lists of messages, got "
                f"{type(good).__name__} and {type(bad).__name__}"
            )
        prompt = row.get("prompt")
        if prompt is None:
            prompt, good, bad = _implicit(good, bad)
        elif good[: len(prompt)] == prompt and bad[: len(prompt)] == prompt and type(prompt) is type(good):
            good, bad = good[len(prompt) :], bad[len(prompt) :]  # the answers repeat their prompt
        if good == bad:
            continue
        if not prompt:
            raise InputError(
                f"preferences {source!r}: row {i}: there is no 'prompt' column and the answers have no beginning in "
                "common; add a 'prompt' column"
            )
        if isinstance(prompt, str) is not isinstance(good, str):
            raise InputError(
                f"preferences {source!r}: row {i}: expected prompt and answers of one form, texts or lists of messages"
            )
        prompts.append(prompt)
        chosen.append(good)
        rejected.append(bad)
        kept.append(i)
    if not kept:
        raise InputError(f"preferences {source!r}: none of {len(rows)} pairs is left whose answers differ")
    others = [name for name in names if name not in ("prompt", "chosen", "rejected")]
    left = rows.select(kept).select_columns(others).to_dict() if others else {}
    columns = {"prompt": prompts, "chosen": chosen, "rejected": rejected, **left}
    return Dataset.from_dict(columns), len(rows) - len(kept)


def _implicit(good: Any, bad: Any) -> tuple[Any, Any, Any]:
    """Prompt and answers of two texts, or lists of messages, that begin alike."""
    shared = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    if isinstance(good, str):
        marker = good.rfind(_ASSISTANT, 0, shared)
        # Inside a word, or where both answers begin with the same ones, the prompt has to end earlier.
        shared = marker + len(_ASSISTANT) if marker >= 0 else good.rfind(" ", 0, shared) + 1
    return good[:shared], good[shared:], bad[shared:]


def _check_direction(source: str, rows: Dataset, scorer: ScoreFunction) -> None:
    """Raise unless the scorer likes about as many chosen as rejected answers, or more."""
    some = rows.select(range(min(len(rows), 512)))
    columns = {n: list(some[n]) for n in some.column_names if n not in ("prompt", "chosen", "rejected")}
    good, bad = (
        check_scores(
            "scorer",
            call_score_function(scorer, {"prompts": list(some["prompt"]), "completions": list(some[name]), **columns}),
            len(some),
        )
        for name in ("chosen", "rejected")
    )
    decided = int((good != bad).sum())
    agree = int((good > bad).sum())
    if decided and agree < decided / 2 - 2 * (decided / 4) ** 0.5:  # two standard errors below a coin
        raise InputError(
            f"preferences {source!r}: the scorer prefers the chosen answer in {agree} of the {decided} pairs that it "
            "tells apart; 'chosen' and 'rejected' look swapped: rename them, or leave the scorer out"
        )


def _load(source: str) -> DatasetDict:
    """What `source` names, with a train split."""
    path = Path(source).expanduser()
    try:
        if path.suffix in DATA_FORMATS:
            check_file("data", source)
            data = load_dataset(DATA_FORMATS[path.suffix], data_files=str(path))
            if path.suffix == ".txt":
                data = data.rename_column("text", "prompt")
        elif path.is_dir():
            saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
            data = load_from_disk(str(path)) if saved else load_dataset(str(path))
        elif source.partition(":")[0].endswith(".py") or ("/" not in source and "." in source):
            data = load_object(source)()
        else:
            data = load_dataset(source)
    except InputError:
        raise
    except Exception as error:  # the loading code of `datasets`, or of the user's function, raises what it likes
        raise InputError(
            f"data {source!r}: expected package.module.function, file.py:function, a data file, a folder or a hub id; "
            f"loading it raised {type(error).__name__}: {first_line(error.__cause__ or error)}"
        ) from error
    if isinstance(data, Dataset):
        data = DatasetDict({"train": data})
    if not isinstance(data, DatasetDict) or "train" not in data:
        got = list(data) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"data {source!r}: expected a Dataset, or a DatasetDict with a 'train' split, got {got}")
    return data


def _split(data: Dataset, test_share: float, seed: int) -> DatasetDict:
    """By distinct prompt, so that one that occurs twice does not fall on both sides."""
    prompts = sorted({str(prompt) for prompt in data["prompt"]})
    if len(prompts) < 2:
        raise InputError("data: expected at least 2 distinct prompts, one to train on and one to test on")
    order = Dataset.from_dict({"prompt": prompts}).shuffle(seed=seed)["prompt"]
    count = max(1, round(test_share * len(prompts)))
    if count == len(prompts):
        raise InputError(
            f"test_share: expected a share that leaves a prompt to train on, got {test_share} of {count} prompts"
        )
    held_out = set(order[:count])
    inside = [str(prompt) in held_out for prompt in data["prompt"]]
    return DatasetDict(
        {
            "train": data.select([i for i, test in enumerate(inside) if not test]),
            "test": data.select([i for i, test in enumerate(inside) if test]),
        }
    )
