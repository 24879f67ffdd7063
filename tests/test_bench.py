"""The bench: what one run finds again of another is what it would have made itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from align_cbrl.recipes.worlds.bench import Bench, BenchSettings, MeasureSettings
from align_cbrl.recipes.worlds.world import Replies

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

    def prompt_ids(tokenizer: Any, prompts: Any, switches: Any = None) -> list[list[int]]:
        asked.append(switches)
        return ids(tokenizer, prompts, switches)

    monkeypatch.setattr(sampling, "prompt_ids", prompt_ids)
    bench = Bench(settings, 0, tmp_path / "seed-0", tmp_path / "cache")
    bench.measure(bench.follower(0), None, 2)
    bench.plain()
    assert len(asked) >= 2 and all(switches == {"enable_thinking": False} for switches in asked)


def test_recipes_sample_by_the_follower_only() -> None:
    """Whose settings of the prompt and the length `sample_completions` would not know."""
    folder = Path(__file__).parents[1] / "recipes"
    assert not [file for file in folder.rglob("*.py") if "sample_completions" in file.read_text()]
