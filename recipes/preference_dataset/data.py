"""Where the pairs come from by default, and how they are divided between those who must not share them."""

from __future__ import annotations

import dataclasses
import math
import random

from datasets import Dataset, DatasetDict

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import Preferences, load_preferences
from align_cbrl.llm.scoring import ScoreFunction

from ..worlds.annotators import TextUtility
from ..worlds.replies.data import desk_log
from ..worlds.replies.judge import reply_judge
from ..worlds.replies.proxy import biased_utility

_NOISE = 0.15
"""Temperature of an annotator's logistic choice, in points of the judge: people slip."""


def annotated_replies(hurried: int = 1500, careful: int = 900) -> DatasetDict:
    """Pairs of replies of the support desk, and which of the two an annotator preferred.

    The train split is by many who are in a hurry and like what is long and sounds big; the test split by few who want
    what the judge of that world wants. Both choose by the logistic of the difference. No prompt is in both.

    Args:
        hurried: pairs of the train split.
        careful: pairs of the test split.

    Returns:
        The columns `prompt`, `chosen` and `rejected`.

    Raises:
        InputError: fewer than one pair of either.
    """
    if min(hurried, careful) < 1:
        raise InputError(f"hurried, careful: expected at least one pair of each, got {hurried} and {careful}")
    rng = random.Random(0)
    replies: dict[str, set[str]] = {}
    for row in desk_log(14_000, seed=17):
        replies.setdefault(row["prompt"], set()).add(row["completion"])
    several = sorted(prompt for prompt, texts in replies.items() if len(texts) > 1)
    rng.shuffle(several)
    cut = len(several) * hurried // (hurried + careful)

    def labelled(prompts: list[str], count: int, utility: TextUtility) -> Dataset:
        rows = []
        for _ in range(count):
            prompt = rng.choice(prompts)
            a, b = rng.sample(sorted(replies[prompt]), 2)
            of_a, of_b = utility([prompt, prompt], [a, b])
            prefers_a = rng.random() < 1 / (1 + math.exp((of_b - of_a) / _NOISE))
            rows.append({"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a})
        return Dataset.from_list(rows)

    return DatasetDict(
        train=labelled(several[:cut], hurried, biased_utility), test=labelled(several[cut:], careful, reply_judge)
    )


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
        InputError: whatever `load_preferences` refuses, shares that are not positive, or a part with fewer than 2
            prompts.
    """
    if not all(0 < share < 1 for share in shares):
        raise InputError(f"shares: expected shares of the prompts in (0, 1), got {shares}")
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
