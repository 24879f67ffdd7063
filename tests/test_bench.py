"""The bench: what one run finds again of another is what it would have made itself."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from align_cbrl.recipes.study import kept
from align_cbrl.recipes.worlds.bench import Bench, BenchSettings, MeasureSettings
from align_cbrl.recipes.worlds.world import Replies
from datasets import Dataset

from align_cbrl.llm import Schedule, sampling
from align_cbrl.llm.settings.follower import TrainedSettings
from align_cbrl.llm.settings.judge import FunctionSettings


def test_a_shared_policy_is_of_the_same_data_and_the_same_reward(tmp_path: Path) -> None:
    """Without a reward model, plain RLHF trains on the first of the rewards."""
    tiny_models.build(tmp_path / "model", "llama")
    for name in ("cats", "dogs"):
        rows = [{"prompt": f"{name} " * count} for count in range(1, 13)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "own.py").write_text(
        "def longer(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
        "def shorter(prompts, completions):\n    return [-float(len(c)) for c in completions]\n"
    )

    def shared(data: str, reward: str) -> set[str]:
        settings = BenchSettings(
            world=Replies(
                model=str(tmp_path / "model"), data=f"{tmp_path}/{data}.jsonl", reference_prompts=4,
                rewards={"own": f"{tmp_path}/own.py:{reward}"},
            ),
            judge=FunctionSettings(function=f"{tmp_path}/own.py:longer"),
            follower=TrainedSettings(
                steps=1, prompts_per_step=2, group_size=2, max_completion_length=2,
                schedule=Schedule(interval=1),
            ),
            measure=MeasureSettings(every=None, prompts=2),
        )  # fmt: skip
        bench = Bench(settings, 0, tmp_path / "seed-0", tmp_path / "cache")
        bench.train("plain", bench.plain(), 0, shared=True)
        return {folder.name for folder in (tmp_path / "cache").glob("plain-*")}

    assert len(shared("cats", "longer")) == 1
    assert len(shared("cats", "longer")) == 1  # found again
    assert len(shared("cats", "shorter")) == 2
    assert len(shared("dogs", "longer")) == 3


def test_figures_of_conversations_and_dates_are_of_what_was_said_and_of_json(tmp_path: Path) -> None:
    """Columns that nobody asked for are kept beside the figures, and words are those of the answer."""
    tiny_models.build(tmp_path / "model", "llama", chat=True)
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{'a ' * i}b"}], "when": start + datetime.timedelta(days=i),
            "raw": bytes([i]), "nested": {"day": (start + datetime.timedelta(days=i)).date(), "tags": ["x"]},
            "completion": "what somebody once answered",
        }
        for i in range(12)
    ]  # fmt: skip
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    (tmp_path / "own.py").write_text(
        "import datetime\n"
        "def long(prompts, completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def dated(prompts, completions, when, nested, raw):\n"
        "    assert all(isinstance(w, datetime.datetime) and isinstance(r, bytes) for w, r in zip(when, raw))\n"
        "    return [float(w.day + n['day'].day) for w, n in zip(when, nested)]\n"
    )
    settings = BenchSettings(
        world=Replies(
            model=str(tmp_path / "model"), data=str(tmp_path / "data"), reference_prompts=4,
            rewards={"own": f"{tmp_path}/own.py:long"},
        ),
        judge=FunctionSettings(function=f"{tmp_path}/own.py:dated"),
        follower=TrainedSettings(steps=1, prompts_per_step=2, group_size=2, max_completion_length=3),
        measure=MeasureSettings(every=None, prompts=2),
    )  # fmt: skip
    bench = Bench(settings, 0, tmp_path / "seed-0", tmp_path / "cache")
    found = kept(tmp_path / "base.json", lambda: bench.final(bench.follower(0)))
    assert found["groups"]["when"][0].startswith("2024-01-") and found["groups"]["raw"][0].startswith("sha256 ")
    assert found["groups"]["nested"][0]["day"] == found["groups"]["when"][0][:10]
    assert found["words"]["mean"] <= 3 and "completion" not in found["groups"]
    assert all(sample["prompt"].startswith("user: ") for sample in found["samples"])
    assert not any("role" in sample["completion"] for sample in found["samples"])
    bench.train("plain", bench.plain(), 0)  # whose fingerprint is of the first row


def test_a_policy_is_measured_on_the_prompts_that_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template's switches hold for the reference's completions and for the table's rows as in training."""
    tiny_models.build(tmp_path / "model", "llama", chat=True)
    rows = [{"prompt": [{"role": "user", "content": "a " * count}]} for count in range(1, 13)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "own.py").write_text(
        "def longer(prompts, completions):\n    return [float(len(c[-1]['content'])) for c in completions]\n"
    )
    settings = BenchSettings(
        world=Replies(
            model=str(tmp_path / "model"), data=f"{tmp_path}/prompts.jsonl", reference_prompts=4,
            rewards={"own": f"{tmp_path}/own.py:longer"},
        ),
        judge=FunctionSettings(function=f"{tmp_path}/own.py:longer"),
        follower=TrainedSettings(
            steps=1, prompts_per_step=2, group_size=2, max_completion_length=2,
            settings={"chat_template_kwargs": {"enable_thinking": False}},
        ),
        measure=MeasureSettings(every=None, prompts=2),
    )  # fmt: skip
    asked: list[Any] = []
    ids = sampling.prompt_ids

    def prompt_ids(tokenizer: Any, prompts: Any, switches: Any = None, **limits: Any) -> list[list[int]]:
        asked.append(switches)
        return ids(tokenizer, prompts, switches, **limits)

    monkeypatch.setattr(sampling, "prompt_ids", prompt_ids)
    bench = Bench(settings, 0, tmp_path / "seed-0", tmp_path / "cache")
    bench.measure(bench.follower(0), None, 2)
    bench.plain()
    assert len(asked) >= 2 and all(switches == {"enable_thinking": False} for switches in asked)
