"""What a run says of itself: rows of metrics, trackers, lines and bars."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, KLPriced, Problem
from align_cbrl.llm import Judge, RewardMixture, RLOOFollower, Schedule
from align_cbrl.llm.trackers import Tracker
from align_cbrl.runs import progress
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.progress import Progress, warn_beside_bars

pytestmark = pytest.mark.filterwarnings("ignore:the leader's gradient is zero", "ignore:leader step .* nats")


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def early(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("a" in text) for text in completions]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("policy"))


def run(policy: Path, out: Path, steps: int) -> tuple[HPGD, Judge]:
    prompts = Dataset.from_dict({"prompt": lm.PROMPTS})
    follower = RLOOFollower(
        policy, prompts, 0.5, max_completion_length=2, prompts_per_step=2, group_size=4, learning_rate=1e-3,
        schedule=Schedule(interval=2, warmup=1),
    )  # fmt: skip
    reward, judge = RewardMixture({"length": length, "early": early}, {"length": 0.5}), Judge(early)
    judge.scores({"prompts": ["a"], "completions": ["asked before the run"]})
    optimizer = torch.optim.SGD(reward.parameters(), lr=0.1, maximize=True)
    config = HPGDConfig(steps=steps, contexts_per_step=2, group_size=4, checkpoint_every=1, progress=False)
    with Tracker("tensorboard", out, leader=reward) as tracker:
        problem = Problem(reward, KLPriced(ExpectedUtility(tracker.watch(judge)), 0.01), follower)
        loop = HPGD(problem, optimizer, config=config, out=out, fingerprint="f", observers=[tracker])
        loop.run(resume=True)
    return loop, judge


def test_rows_and_trackers_hold_weights_judge_calls_and_trls_own_metrics(policy: Path, tmp_path: Path) -> None:
    loop, judge = run(policy, tmp_path / "whole", 3)
    rows = MetricsLog.read(tmp_path / "whole" / "metrics.jsonl")
    leader: Any = loop.problem.leader
    assert {name: rows[-1][f"weight of {name}"] for name in ("length", "early")} == leader.weights()
    assert rows[-1]["judge_calls"] == judge.calls - 1  # not what was asked before the run
    assert rows[0]["judge_calls"] <= rows[1]["judge_calls"] <= rows[2]["judge_calls"] and rows[0]["judge_calls"] > 0
    for row in rows:
        assert {"trl/reward", "trl/kl", "trl/completions/mean_length", "gap", "gap_se", "alarm"} <= set(row)
        # trl's KL is of the very batch that the leader was shown, and its reward is that less the price of it.
        assert row["trl/kl"] * row["trl/completions/mean_length"] == pytest.approx(row["kl"], abs=1e-4)
    events = EventAccumulator(str(tmp_path / "whole" / "align-cbrl")).Reload()
    for name in ("weight of early", "judge_calls", "trl/kl", "gap"):
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(row[name]) for row in rows]

    run(policy, tmp_path / "parts", 2)
    run(policy, tmp_path / "parts", 3)
    timed = ("leader_seconds", "follower_seconds", "leader_share", "judge_calls")  # a judge without a file forgets
    again = MetricsLog.read(tmp_path / "parts" / "metrics.jsonl")
    for row, other in zip(rows, again, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert again[2]["judge_calls"] > again[1]["judge_calls"] == rows[1]["judge_calls"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(100, "policy", done=10) as bar:
        for step in range(90):
            now[0] += 1.0
            bar.update(loss=step / 3, nothing=float("nan"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "policy: step 25 of 100, loss 4.667, 1 min 15 s left"
    assert [line.split(",")[0] for line in lines] == [f"policy: step {n} of 100" for n in (25, 40, 55, 70, 85)]


def test_short_work_and_what_is_not_to_be_shown_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with Progress(3, "policy", shown=shown) as bar:
            bar.update()
    assert capsys.readouterr().err == ""


def test_a_warning_stands_on_a_line_of_its_own_beside_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(warnings, "formatwarning", lambda message, *where, **more: f"warning: {message}\n")
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *where, **more: terminal.write(f"warning: {message}\n")
    )
    with Progress(10, "leader") as bar, warnings.catch_warnings():
        warnings.simplefilter("always")
        bar.update(objective=0.5)
        warn_beside_bars("the follower is far")
        bar.update(objective=0.6)
    shown = terminal.getvalue()
    assert "leader:" in shown and "objective=0.6" in shown
    before, _, after = shown.partition("warning: the follower is far\n")
    assert before.endswith("\r") and after  # the bar was taken away, and is drawn again below
