"""Identities: equal where a function would score alike, different where it might not, none where it cannot be read."""

from __future__ import annotations

import functools
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_reward_models as reward_models
import torch

from align_cbrl import InputError
from align_cbrl.identity import content_digest, identity_of, require_identity
from align_cbrl.llm import RewardModel
from align_cbrl.runs.imports import load_object

WORDS = ["please"]


def polite(completions: list[str]) -> list[float]:
    return [float(any(word in text for word in WORDS)) for text in completions]


class Scale:
    unit = 1.0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.factor * self.unit * len(text) for text in completions]


def over(limit: float) -> Callable[..., list[float]]:
    return lambda completions: [float(len(text) > limit) for text in completions]


def default(completions: list[str], limit: int = 1) -> list[float]:
    return [float(len(text) > limit) for text in completions]


def test_functions_that_may_score_differently_have_different_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    # fmt: off
    one, two = (lambda completions: [1.0 for _ in completions]), (lambda completions: [2.0 for _ in completions])
    # fmt: on
    things: list[Any] = [
        one,
        two,
        over(1),
        over(2),
        over(1.0),
        polite,
        default,
        functools.partial(default, limit=2),
        functools.partial(default, limit=3),
        Scale(1.0),
        Scale(2.0),
        Scale(1.0).__call__,
        Scale,
        functools.lru_cache(polite),
        [1, 2],
        (1, 2),
        {1: 2},
        {1, 2},
        1,
        1.0,
        True,
        "1",
        b"1",
        re.compile("a"),
        re.compile("a", re.IGNORECASE),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(1, 2),
        random.Random(0),
        random.Random(1),
        len,
        torch.relu,
        Path("a"),
    ]  # fmt: skip
    found = [identity_of(thing) for thing in things]
    assert None not in found and len(set(found)) == len(things)
    assert [identity_of(thing) for thing in things] == found
    assert identity_of(over(1)) == found[2] and identity_of(Scale(1.0)) == found[9]

    monkeypatch.setattr(sys.modules[__name__], "WORDS", ["please", "thanks"])
    monkeypatch.setattr(default, "__defaults__", (2,))
    monkeypatch.setattr(Scale, "unit", 2.0)
    changed = {i for i, thing in enumerate(things) if identity_of(thing) != found[i]}
    assert changed == {things.index(thing) for thing in (polite, default, *things[7:14])}


def test_what_cannot_be_read_has_no_identity_unless_it_is_given_one() -> None:
    lock = threading.Lock()

    def guarded(completions: list[str]) -> list[float]:
        with lock:
            return [0.0]

    for thing in (guarded, functools.partial(default, lock), Scale(lock), [lock], (i for i in "a")):  # type: ignore[arg-type]
        assert identity_of(thing) is None
    with pytest.raises(InputError, match=r"my judge: .* since a lock in it cannot be read .* attribute `identity`"):
        require_identity("my judge", guarded)
    with pytest.raises(InputError, match="no digest: a lock in it"):
        content_digest({"a": lock})
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert identity_of(deep) is None
    guarded.identity = "guarded 1"  # type: ignore[attr-defined]
    assert identity_of(guarded) == "guarded 1"
    assert identity_of(lambda completions: guarded(completions)) is not None


def test_what_contains_itself_and_a_functions_own_memory() -> None:
    calls = 0

    def counting(completions: list[str], depth: int = 0) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(depth)] if depth else counting(completions, depth + 1)

    before = identity_of(counting)
    counting(["a"])
    assert before == identity_of(counting) is not None
    loop: list[Any] = [1]
    loop.append(loop)
    assert identity_of(loop) is not None


def test_the_modules_of_ones_own_belong_to_it_wherever_they_lie(tmp_path: Path) -> None:
    files = {
        "mine.py": """
            from . import helper
            def score(completions):
                return [helper.points(text) for text in completions]
            def late(completions):
                from .helper import points
                return [points(text) for text in completions]
            def alone(completions):
                return [1.0] * len(completions)
            """,
        "helper.py": "from .words import WEIGHT\ndef points(text):\n    return WEIGHT * len(text)\n",
        "words.py": "WEIGHT = 1.0\n",
    }
    edits = {"same": {}, "words": {"words.py": "WEIGHT = 2.0\n"}, "comment": {"mine.py": files["mine.py"] + "# more\n"}}
    found: dict[str, list[str | None]] = {}
    for edit, change in {"first": {}, **edits}.items():
        (tmp_path / edit).mkdir()
        for name, text in {**files, **change}.items():
            (tmp_path / edit / name).write_text(textwrap.dedent(text))
        path = tmp_path / edit / "mine.py"
        found[edit] = [identity_of(load_object(f"{path}:{name}")) for name in ("score", "late", "alone")]
    assert None not in found["first"] and len(set(found["first"])) == 3
    assert found["first"] == found["same"] == found["comment"]
    assert [a == b for a, b in zip(found["first"], found["words"], strict=True)] == [False, False, True]


def test_another_process_finds_the_same_identity() -> None:
    code = "from align_cbrl.recipes.worlds.replies.judge import reply_judge as f; from align_cbrl.identity import *; "
    found = {
        subprocess.run(
            [sys.executable, "-c", code + "print(identity_of(f), identity_of({'a', 'b', 'c'}))"], check=True, text=True,
            capture_output=True, env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(found) == 1 and "reply_judge" in found.pop()


def test_a_reward_models_identity_covers_what_a_score_depends_on(tmp_path: Path) -> None:
    path = reward_models.build(tmp_path / "rm")
    model = RewardModel(path)
    first = model.identity
    model(["a b"], ["c"])  # which sets truncation and padding inside the tokenizer
    assert model.identity == identity_of(model) == first == RewardModel(path, batch_size=2).identity
    others = {first, RewardModel(path, max_length=4).identity}
    others.add(RewardModel(reward_models.build(tmp_path / "other", seed=4)).identity)
    others.add(RewardModel(reward_models.build(tmp_path / "single", dtype=torch.float32)).identity)
    model.tokenizer.chat_template = "{{ messages }}"
    others.add(model.identity)
    assert len(others) == 5
    assert identity_of(lambda prompts, completions: model(prompts, completions)) is not None
