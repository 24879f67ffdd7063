"""What a scoring function does to its arguments reaches nobody else: not the batch, the next term, the judge or trl."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from datasets import Dataset
from PIL import Image

from align_cbrl import Rollouts
from align_cbrl.llm import GRPOFollower, Judge, PairwiseJudge, RewardMixture, RLOOFollower, TrainedFollower
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.scoring import call_score_function, copied, score_arguments

TALK = [{"role": "user", "content": "a b"}]


def hostile(**arguments: Any) -> list[float]:
    """Scores, and then changes everything that can be changed in place."""
    scores = [float(len(str(completion))) for completion in arguments["completions"]]
    for name, value in arguments.items():
        if name.startswith(("trainer", "log")):
            continue
        for item in value:
            for turn in item if isinstance(item, list) else [item]:
                if isinstance(turn, dict):
                    turn.update(role="user", content="changed", further=1)
            if isinstance(item, list):
                item.reverse()
                item.append("changed")
            elif isinstance(item, dict):
                item.clear()
            elif isinstance(item, np.ndarray):
                item.fill(0)
            elif isinstance(item, torch.Tensor):
                item.zero_()
            elif isinstance(item, Image.Image):
                item.putpixel((0, 0), (9, 9, 9))
            elif isinstance(item, bytearray):
                item.clear()
        value.reverse()
        value.append("changed")
        value.pop(0)
    return scores


class HostileLeader(LanguageLeader):
    """A leader of the user's own, which is handed the same lists."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))

    def score(self, prompts: Any, completions: Any, **columns: Any) -> torch.Tensor:
        return self.weight * torch.tensor(hostile(prompts=prompts, completions=completions, **columns))

    def record(self, path: Path) -> dict[str, Any]:
        return {}

    @classmethod
    def from_record(cls, path: Path, record: Any) -> HostileLeader:
        return cls()


def batch() -> dict[str, Any]:
    return {
        "prompt": [copy.deepcopy(TALK), [{"role": "user", "content": "c"}]],
        "completion": [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]],
        "completion_ids": [[1, 2], [3]],
        "nested": [{"a": [1, {"b": 2}]}, {"a": [3, {"b": 4}]}],
        "array": [np.ones(2), np.arange(3.0)],
        "image": [Image.new("RGB", (1, 1), "red"), Image.new("RGB", (1, 1), "blue")],
        "tuple": [([1],), ([2],)],
        "raw": [bytearray(b"a"), bytearray(b"b")],
        "when": [datetime.datetime(2024, 1, 1), None],
        "number": torch.tensor([1.0, 2.0]),
    }


def test_no_route_to_a_function_lets_it_change_the_batch() -> None:
    steps, arguments = batch(), {}
    rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
    before = repr([[np.asarray(v).tolist() for v in column] for column in steps.values()])
    routes: list[Callable[[], Any]] = [
        lambda: hostile(**score_arguments(rollouts)),
        lambda: call_score_function(hostile, arguments),
        lambda: RewardMixture({"a": hostile, "b": hostile}, {"a": 0.5, "b": 0.5}).reward(rollouts),
        lambda: HostileLeader().reward(rollouts),
        lambda: Judge(hostile)(None, rollouts),
        lambda: PairwiseJudge(lambda completions_a, completions_b, **rest: [
            0.5 + 0.0 * score for score in hostile(completions=completions_a, other=completions_b, **rest)
        ])(rollouts, torch.tensor([0]), torch.tensor([1])),
    ]  # fmt: skip
    for route in routes:
        arguments.clear()
        arguments.update(score_arguments(rollouts))
        route()
        assert repr([[np.asarray(v).tolist() for v in column] for column in steps.values()]) == before


def test_the_next_term_is_asked_what_the_first_was() -> None:
    asked: list[Any] = []

    def kind(**arguments: Any) -> list[float]:
        asked.append(repr(arguments["prompts"]) + repr(arguments["completions"]) + repr(arguments["nested"]))
        return [1.0, 2.0]

    rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=batch())
    terms = {"a": kind, "b": hostile, "c": kind}
    RewardMixture(terms, dict.fromkeys(terms, 0.5)).reward(rollouts)
    Judge(kind)(None, rollouts)
    assert len(set(asked)) == 1 and len(asked) == 3


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
@pytest.mark.parametrize("leader", [lambda: HostileLeader(), lambda: RewardMixture({"a": hostile}, {"a": 0.1})])
def test_a_trainer_trains_on_what_was_said(
    tmp_path: Path, kind: type[TrainedFollower], leader: Callable[[], LanguageLeader]
) -> None:
    path = tiny_models.build(tmp_path / "chat", "llama", chat=True)

    def trained(by: LanguageLeader) -> tuple[TrainedFollower, dict[str, Any]]:
        rows = Dataset.from_dict({"prompt": [TALK, [{"role": "user", "content": "c d"}]], "nested": [{"a": [1]}] * 2})
        follower = kind(path, rows, 0.5, max_completion_length=3, prompts_per_step=2, group_size=2)
        follower.train(by, 2)
        return follower, follower.state_dict()["policy"]

    class Kind(HostileLeader):
        def score(self, prompts: Any, completions: Any, **columns: Any) -> torch.Tensor:
            return self.weight * torch.tensor([float(len(str(completion))) for completion in completions])

    (changed, policy), (_, same) = trained(leader()), trained(Kind())
    assert all(torch.equal(policy[name], same[name]) for name in policy)
    steps = changed.newest.steps
    assert all(turns[0]["role"] == "assistant" for turns in steps["completion"]) and steps["nested"] == [{"a": [1]}] * 4


def test_what_trl_hands_over_stays_the_same_object() -> None:
    state, seen = object(), []

    def function(completions: list[str], trainer_state: object, log_metric: object) -> list[float]:
        seen.extend([trainer_state, log_metric])
        return [0.0]

    call_score_function(function, {"completions": ["a"], "trainer_state": state, "log_metric": print})
    assert seen[0] is state and seen[1] is print


def test_what_cannot_be_copied_is_passed_on(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        assert copied([file])[0] is file
