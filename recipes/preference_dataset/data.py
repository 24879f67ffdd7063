"""Where the pairs come from by default, and how they are divided between those who must not share them."""

from __future__ import annotations

import dataclasses
import math
import random

from datasets import Dataset, DatasetDict

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import Preferences, load_preferences
from align_cbrl.llm.judges import ScoreFunction
from recipes.replies.data import desk_log
from recipes.replies.judge import reply_judge

_NOISE = 0.15
"""Temperature of an annotator's logistic choice, in points of the judge: careful people, who slip."""


def annotated_replies(requests: int = 1200) -> Dataset:
    """Pairs of replies of the support desk, and which of the two an annotator preferred.

    The annotators want what the judge of that world wants, and choose between two replies by the logistic of the
    difference: nothing is wrong with the labels but that there are few, and that some are slips.

    Args:
        requests: how many are drawn; pairs of two equal replies are left out.

    Returns:
        The columns `prompt`, `chosen` and `rejected`.
    """
    rng = random.Random(0)
    replies: dict[str, list[str]] = {}
    for row in desk_log(12 * requests, seed=17):
        replies.setdefault(row["prompt"], []).append(row["completion"])
    several = sorted(prompt for prompt, texts in replies.items() if len(set(texts)) > 1)
    rows = []
    for _ in range(requests):
        prompt = rng.choice(several)
        a, b = rng.sample(sorted(set(replies[prompt])), 2)
        score_a, score_b = reply_judge([prompt, prompt], [a, b])
        prefers_a = rng.random() < 1 / (1 + math.exp((score_b - score_a) / _NOISE))
        rows.append({"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a})
    return Dataset.from_list(rows)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Pairs in three parts that share no prompt.

    Attributes:
        train: for the reward model, and whose prompts the policy is trained on.
        judge: for the model that judges, and the labels that tie the reward down.
        test: for measuring, by nobody else seen.
    """

    train: Dataset
    judge: Dataset
    test: Dataset

    def prompts(self) -> DatasetDict:
        """The prompts to train on and to measure on, each once."""
        return DatasetDict({"train": _prompts(self.train), "test": _prompts(self.test)})


def load_parts(source: str, shares: tuple[float, float], seed: int, scorer: ScoreFunction | None = None) -> Parts:
    """Divide preferences by prompt.

    Args:
        source: as for `load_preferences`. Its own test split, if it has one, becomes the two parts that are held out,
            less the prompts that it shares with the train split.
        shares: of the prompts, for the judge and for the test.
        seed: of the draw.
        scorer: an opinion on answers, by which swapped columns are noticed.

    Raises:
        InputError: whatever `load_preferences` refuses, or a part with fewer than 2 prompts.
    """
    data = load_preferences(source, test_share=sum(shares), seed=seed, scorer=scorer).data
    seen = {str(prompt) for prompt in data["train"]["prompt"]}
    held_out = sorted({str(prompt) for prompt in data["test"]["prompt"]} - seen)
    random.Random(seed).shuffle(held_out)
    count = round(len(held_out) * shares[0] / sum(shares))
    judge, test = set(held_out[:count]), set(held_out[count:])
    for name, found in (("train", seen), ("judge", judge), ("test", test)):
        if len(found) < 2:
            raise InputError(
                f"preferences {source!r}: expected at least 2 prompts in each part, got {len(found)} for {name}; give "
                "more prompts or other shares"
            )
    inside = [str(prompt) for prompt in data["test"]["prompt"]]
    parts = (data["test"].select([i for i, p in enumerate(inside) if p in part]) for part in (judge, test))
    return Parts(data["train"], *parts)


def pairs(rows: Dataset) -> tuple[Rollouts, Rollouts]:
    """Chosen and rejected answers as rollouts, the arguments of `PreferenceData`."""
    return Preferences(DatasetDict({"train": rows}), dropped=0).pairs()


def _prompts(rows: Dataset) -> Dataset:
    first = {str(prompt): i for i, prompt in reversed(list(enumerate(rows["prompt"])))}
    return rows.select(sorted(first.values())).remove_columns(["chosen", "rejected"])
