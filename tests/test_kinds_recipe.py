"""The recipe of kinds of answers: figures at equal divergence, the threshold reward, and a whole small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from align_cbrl.recipes.kinds.recipe import Config, best_moment, most, shares
from align_cbrl.recipes.kinds.threshold import Threshold
from align_cbrl.recipes.worlds.replies.judge import day, sooner_judge
from align_cbrl.recipes.worlds.replies.rewards import manner
from rebuilt import report_is_rebuilt

from align_cbrl import InputError, Rollouts
from align_cbrl.cli import main
from align_cbrl.llm import RewardMixture
from align_cbrl.runs.config import load_config
from align_cbrl.runs.imports import recipe_folder

FOLDER = recipe_folder("kinds")


def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["run", "kinds", "--config", "smoke.yaml", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    rivals = {"plain 1", "equal 1", "refit 1", "threshold 1", "tpe"}
    assert {row["name"] for row in summary["rows"]} == {"base", "in_training", "hpgd", *rivals}
    methods = {"plain", "equal", "refit", "threshold", "tpe"}
    moments = {f"{method}, its best moment" for method in methods}
    assert set(summary["gains"]) == {"in_training", "hpgd", *methods, *moments} and summary["best_rival"] in methods
    assert len(summary["comparisons"]) == 2 * len(methods)
    assert report_is_rebuilt(out)


def test_rivals_are_compared_at_no_more_than_a_divergence() -> None:
    ends = [{"kl": {"mean": k}, "objective": {"mean": j}, "curve": [{"kl": k / 2, "objective": 2 * j}]}
            for k, j in ((3.0, 0.5), (1.0, 0.4))]  # fmt: skip
    assert most(ends, 0.2, 2.0) == pytest.approx(0.45)  # between two strengths
    assert most(ends, 0.2, 0.5) == pytest.approx(0.3)  # from the base model on
    assert most(ends, 0.2, 9.0) == 0.5  # farther than any went
    assert most(ends, 0.7, 9.0) == 0.7  # no strength is better than the reference
    assert best_moment(ends, 0.2, 2.0) == 1.0 and best_moment(ends, 0.2, 1.0) == 0.8
    assert best_moment(ends, 0.2, 0.1) == 0.2


def test_the_threshold_is_of_a_prompts_own_mean() -> None:
    inner = RewardMixture({"length": length}, {"length": 1.0})
    threshold = Threshold(inner, {"a": 2.0}, strength=3.0, slope=0.5)
    scores = threshold.score(["a", "a", "b"], ["xx", "xxxx", "xxxx"])
    expected = 3.0 * torch.sigmoid(0.5 * torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for p in threshold.parameters())


def test_the_threshold_is_saved_with_its_reward(tmp_path: Path) -> None:
    threshold = Threshold(RewardMixture({"length": length}, {"length": 1.0}), {"a": 2.0}, strength=3.0, slope=0.5)
    record = threshold.record(tmp_path)
    again = RewardMixture({"length": length}, {"length": 1.0})
    assert (tmp_path / "inner").is_dir() and Threshold(again, record["means"], 3.0, 0.5).means == {"a": 2.0}


@pytest.mark.parametrize("file", ["config.yaml", "targets.yaml", "smoke.yaml"])
def test_its_files_are_configurations(file: str) -> None:
    assert isinstance(load_config(Config, FOLDER / file), Config)


def test_shares_of_kinds() -> None:
    config = load_config(Config, FOLDER / "config.yaml")
    steps = {"prompt": ["q"] * 4, "completion": ["today .", "friday , not today .", "soon .", "today ."]}
    batch = Rollouts.bandit(contexts=torch.zeros(4, dtype=torch.long), steps=steps)
    found = {name: share(batch) for name, share in shares(config).items()}
    assert found == {"share of today": 0.5, "share of tomorrow": 0.0, "share of monday": 0.0, "share of friday": 0.25,
                     "share of none": 0.25}  # fmt: skip


def test_what_the_customers_and_the_reader_see() -> None:
    request = "angry buyer : refund for the laptop . reply : "
    replies = [f"sorry . we will refund the laptop {word} ." for word in ("today", "monday", "soon")]
    assert day([request] * 3, replies) == ["today", "monday", "none"]
    assert sooner_judge([request] * 3, replies) == pytest.approx([1.0, 0.9, 0.86 * 0.6])
    assert manner([""] * 3, ["it is free .", "wait .", "we will refund the laptop today . thanks ."]) == [
        "promise", "short", "full",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["objective={kind: expected}"], "expected kind targets, or kind set with an answer"),
        (["objective={kind: set, size: 4, score: best}"], "expected kind targets, or kind set with an answer"),
        (["measure.every=null"], "measure.every: expected a number"),
        (["leader={kind: reward_model, budget: 1.0}"], "leader: expected a mixture"),
        (
            ["objective={kind: targets, answer: align_cbrl.recipes.worlds.replies.judge.day, shares: {today: 1.0}}"],
            "methods: refit and threshold describe a judge",
        ),
    ],
)
def test_what_it_cannot_compare_is_refused(values: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(Config, FOLDER / "config.yaml", values)
