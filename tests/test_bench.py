"""The bench: what one run finds again of another is what it would have made itself."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
from align_cbrl.recipes.worlds.bench import Bench, BenchSettings, MeasureSettings
from align_cbrl.recipes.worlds.world import Replies

from align_cbrl.llm import Schedule
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
