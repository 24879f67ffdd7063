"""Trackers: what TensorBoard holds after a run, and what is refused before one."""

from __future__ import annotations

import math
from pathlib import Path

import enumerable_lm as lm
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, Problem
from align_cbrl.errors import InputError
from align_cbrl.llm import Judge, RewardMixture, TiltedFollower
from align_cbrl.llm.trackers import Tracker, markdown
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.metrics import MetricsLog


def letters(completion: str) -> float:
    return sum(ord(letter) - ord("a") for letter in completion.replace(" ", ""))


def late(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [letters(completion) for completion in completions]


def tracked(tmp_path: Path, policy: Path, steps: int, resume: bool = False) -> tuple[list[int], RewardMixture]:
    """A run of the enumerable language model, tracked every second step: what its judge was asked, the leader."""
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abc" for b in "def"]})
    follower = TiltedFollower(policy, prompts, 0.5, max_completion_length=2)
    reward = RewardMixture({"late": late}, {"late": 0.1})
    judge = Judge(lambda prompts, completions: [letters(c) + 10.0 for c in completions], name="letters")
    asked: list[int] = []

    def utility(leader: Leader, rollouts: Rollouts) -> Tensor:
        asked.append(rollouts.size)
        return judge(leader, rollouts)

    optimizer = torch.optim.SGD(reward.parameters(), lr=0.01, maximize=True)
    config = HPGDConfig(steps=steps, contexts_per_step=4, group_size=4, checkpoint_every=2, progress=False)
    with Tracker("tensorboard", tmp_path, config={"seed": 0, "rewards": ["late"]}, leader=reward, every=2) as tracker:
        problem = Problem(reward, ExpectedUtility(tracker.watch(utility)), follower)
        HPGD(problem, optimizer, config=config, out=tmp_path, observers=[tracker]).run(resume=resume)
    return asked, reward


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    lm.build(folder)
    return folder


def test_tensorboard_holds_every_metric_and_samples_with_the_judges_score(tmp_path: Path, policy: Path) -> None:
    asked, reward = tracked(tmp_path, policy, steps=4)
    assert asked == [16] * 4  # the tracker asked for none
    events = EventAccumulator(str(tmp_path / "align-cbrl"), {"tensors": 0}).Reload()
    log = MetricsLog.read(tmp_path / "metrics.jsonl")
    for name in ("objective", "gradient_norm", "effective_sample_size", "leader_share"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [2, 4]
    head, _, *rows = texts[-1].tensor_proto.string_val[0].decode().splitlines()
    assert head == "| prompt | completion | judge | reward |" and len(rows) == 4
    for row in rows:
        prompt, completion, score, value = (cell.strip(" ") for cell in row.strip("|").split(" |"))
        assert len(prompt) == 3
        assert float(score) == letters(completion) + 10
        expected = reward.score([prompt], [completion]).item()
        assert float(value) == pytest.approx(expected, abs=6e-4)
    assert list((tmp_path / "align-cbrl").rglob("hparams.yml"))


def test_a_resumed_run_has_each_step_once(tmp_path: Path, policy: Path) -> None:
    tracked(tmp_path, policy, steps=3)
    for checkpoint in sorted((tmp_path / "checkpoints").glob("step-*"))[1:]:  # as if killed after the second step
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    tracked(tmp_path, policy, steps=4, resume=True)
    events = EventAccumulator(str(tmp_path / "align-cbrl")).Reload()
    assert [event.step for event in events.Scalars("objective")] == [1, 2, 3, 4]


class _Broken(GeneralTracker):
    name, requires_logging_directory = "broken", False

    def __init__(self, run_name: str) -> None:
        super().__init__(_blank=True)

    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        raise ConnectionError("the service is away")


def rollouts() -> Rollouts:
    return Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"prompt": ["p", "p"], "completion": ["a", "b"]})


def test_a_tracker_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "broken", _Broken)
    tracker = Tracker("broken")
    with pytest.warns(UserWarning, match=r"report_to \['broken'\]: step 3 was not tracked: .*the service is away"):
        tracker({"step": 3, "objective": 1.0}, rollouts())


class _Collecting(_Broken):
    name = "collecting"
    seen: list[object] = []  # noqa: RUF012

    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        self.seen.append((step, values))

    def log_table(self, name: str, columns: list[str], data: list[list[object]], step: int) -> None:
        self.seen.append((step, name, columns, data))


def test_trackers_with_tables_get_tables_and_numbers_that_are_none_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "collecting", _Collecting)
    monkeypatch.setattr(_Collecting, "seen", [])
    tracker = Tracker(["collecting"], every=1)

    def utility(leader: object, batch: Rollouts) -> Tensor:
        return torch.tensor([[0.25], [0.75]])

    tracker.watch(utility)(None, rollouts())  # type: ignore[arg-type]
    tracker({"step": 1, "objective": 1.0, "gap": math.nan}, rollouts())
    tracker({"step": 2, "objective": 1.0}, rollouts())  # no judge was asked: the score is not that of the step before
    columns = ["prompt", "completion", "judge", "reward"]
    assert _Collecting.seen == [
        (1, {"step": 1, "objective": 1.0}),
        (1, "samples", columns, [["p", "a", 0.25, None]]),
        (2, {"step": 2, "objective": 1.0}),
        (2, "samples", columns, [["p", "a", None, None]]),
    ]


def test_only_the_first_process_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "collecting", _Collecting)
    monkeypatch.setattr(_Collecting, "seen", [])
    monkeypatch.setattr("align_cbrl.llm.trackers.is_main", lambda: False)
    Tracker("collecting")({"step": 1}, rollouts())
    assert _Collecting.seen == []


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", r"report_to: unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"),
        ("wandb", r"report_to: wandb is not installed; pip install wandb, or set report_to to 'none' or to one of "),
        (["tensorboard", "none"], r"unknown tracker 'none'"),
    ],
)
def test_what_cannot_track_is_refused_before_the_run(
    report_to: str | list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align_cbrl.llm.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError, match=message):
        Tracker(report_to)


def test_counts_are_positive() -> None:
    with pytest.raises(InputError, match=r"every: expected a whole number >= 1, got 0"):
        Tracker(every=0)


def test_a_conversation_is_shown_turn_by_turn() -> None:
    turns = [{"role": "user", "content": "hi\nyou"}]
    batch = Rollouts.bandit(contexts=torch.tensor([0]), steps={"prompt": [turns], "completion": ["x"]})
    table = Tracker()._table(batch)
    assert markdown(["a", "b", "c", "d"], table).splitlines()[-1] == "| user: hi ↵ you | x | – | – |"
