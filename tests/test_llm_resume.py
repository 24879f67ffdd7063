"""A run that is continued repeats the uninterrupted one: bit-identical weights on a CPU, also past the first epoch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, InputError, PolicyResponse, Problem, Rollouts, RunStopped
from align_cbrl.llm import GRPOFollower, RLOOFollower, Schedule, TrainedFollower, train_follower
from align_cbrl.llm.followers.prompt_order import PromptOrder
from align_cbrl.runs.checkpoints import load_checkpoint, save_checkpoint

TEMPERATURE = 2.0
OUTSIDE = Schedule(interval=2, warmup=1, inside=False)
Make = Callable[..., TrainedFollower]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture
def make(folder: Path) -> Make:
    """Followers whose epoch is two steps: four prompts, two a step."""

    def build(kind: type[TrainedFollower] = RLOOFollower, **options: Any) -> TrainedFollower:
        return kind(
            folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
            prompts_per_step=2, group_size=4, learning_rate=1e-3, **options,
        )  # fmt: skip

    return build


def new_leader() -> lm.LinearLeader:
    return lm.LinearLeader(lm.Enumeration.random(1), torch.tensor([0.5, -0.3, 0.2, 0.1, -0.6], dtype=torch.float64))


def weights(follower: TrainedFollower) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in follower.policy.parameters()])


def assert_same_bits(first: TrainedFollower, second: TrainedFollower) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    assert first.steps == second.steps


def through_a_file(follower: TrainedFollower, folder: Path) -> dict[str, Any]:
    save_checkpoint(folder, 1, follower.state_dict(), fingerprint="f")
    found = load_checkpoint(folder, fingerprint="f")
    assert found is not None
    return found[1]


def test_every_epoch_visits_every_prompt_in_an_order_of_its_own() -> None:
    order = PromptOrder(count=12, per_step=4, seed=3)
    epochs = [[row for place in range(3) for row in order(3 * epoch + place)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert PromptOrder(12, 4, seed=3)(7) == order(7) != PromptOrder(12, 4, seed=4)(7)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (RLOOFollower, {}),
        (GRPOFollower, {}),
        (RLOOFollower, {"gradient_accumulation_steps": 2}),
    ],
    ids=["rloo", "grpo", "accumulated"],
)
def test_training_in_two_parts_is_training_in_one(
    make: Make, tmp_path: Path, kind: type[TrainedFollower], settings: dict[str, Any]
) -> None:
    """Stopped in the middle of the second epoch, and continued by another object."""
    whole, first, second = (make(kind, settings=settings) for _ in range(3))
    whole.train(new_leader(), 6)
    first.train(new_leader(), 3)
    torch.rand(5)  # the caller's own random numbers change nothing
    second.load_state_dict(through_a_file(first, tmp_path))
    second.train(new_leader(), 3)
    assert_same_bits(whole, second)
    assert second.completions_seen == whole.completions_seen == 48
    third = make(kind, settings=settings)
    third.train(new_leader(), 3)
    assert not torch.equal(weights(third), weights(whole))


def test_each_step_draws_other_completions(make: Make) -> None:
    follower, seen = make(), []
    follower.train(new_leader(), 4, lambda step: not seen.append(follower.newest))
    assert len({str(rollouts.steps["completion_ids"]) for rollouts in seen}) == 4
    assert all(set(seen[i].contexts.tolist()) | set(seen[i + 1].contexts.tolist()) == {0, 1, 2, 3} for i in (0, 2))


class Stop(BaseException):
    """A stand-in for a kill, which no code may catch and repair."""


class Judge:
    """The enumeration's utility, until it is told to break."""

    identity = "the enumeration's utility"  # whether and how it breaks does not make it another one

    def __init__(self, breaks_at: int | None = None, error: type[BaseException] = Stop) -> None:
        self.calls, self.breaks_at, self.error = 0, breaks_at, error

    def __call__(self, leader: Any, rollouts: Rollouts) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise self.error("now")
        return leader.enumeration.judge(leader, rollouts)


def hpgd(follower: TrainedFollower, judge: Judge, out: Path | None, every: int = 1) -> HPGD:
    leader = new_leader()
    return HPGD(
        Problem(leader, ExpectedUtility(judge), follower),
        torch.optim.Adam(leader.parameters(), lr=0.05, maximize=True),
        PolicyResponse(),
        HPGDConfig(steps=5, contexts_per_step=2, group_size=4, checkpoint_every=every, progress=False, seed=5),
        out=out,
    )


SCHEDULES = pytest.mark.parametrize(
    "schedule",
    [
        Schedule(interval=2, warmup=1),
        OUTSIDE,
        Schedule(interval=1, tolerance=0.05, limit=3),
    ],
    ids=["inside", "outside", "until close"],
)


@SCHEDULES
@pytest.mark.parametrize("error", [Stop, RunStopped, ZeroDivisionError], ids=["killed", "stopped", "a mistake"])
def test_hpgd_around_a_follower_resumes_to_the_same_bits(
    make: Make, tmp_path: Path, schedule: Schedule, error: type[BaseException]
) -> None:
    """Killed: from the last checkpoint. Stopped by the judge: from the response that it was asked about."""
    whole = hpgd(make(schedule=schedule), Judge(), None)
    whole.run()
    with pytest.raises(error):
        hpgd(make(schedule=schedule), Judge(4, error), tmp_path, every=2).run()
    judge = Judge()
    resumed = hpgd(make(schedule=schedule), judge, tmp_path, every=2)
    resumed.run(resume=True)
    assert_same_bits(whole.problem.follower, resumed.problem.follower)
    torch.testing.assert_close(resumed.problem.leader.x, whole.problem.leader.x, rtol=0, atol=0)
    assert [row["objective"] for row in resumed.history] == [row["objective"] for row in whole.history]
    if error is not Stop:  # nothing that was paid for is paid for again
        assert judge.calls == 2


@SCHEDULES
@pytest.mark.parametrize("at", [2, 3, 9])
def test_a_reward_that_raises_in_the_middle_of_a_response_loses_no_step_of_it(
    make: Make, tmp_path: Path, schedule: Schedule, at: int
) -> None:
    """Also in the warm-up, before the leader's first step; the optimizer steps that were taken are not taken again."""
    whole = hpgd(make(schedule=schedule), Judge(), None)
    whole.run()
    broken = hpgd(make(schedule=schedule), Judge(), tmp_path, every=100)
    score, calls = broken.problem.leader.score, []

    def breaking(*arguments: Any, **columns: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError
        return score(*arguments, **columns)

    broken.problem.leader.score = breaking
    with pytest.raises(ZeroDivisionError):
        broken.run()
    found = load_checkpoint(tmp_path / "checkpoints", fingerprint=broken.fingerprint)
    assert found is not None
    assert found[1]["follower"]["completions"] == broken.problem.follower.completions_seen > 0
    resumed = hpgd(make(schedule=schedule), Judge(), tmp_path, every=100)
    resumed.run(resume=True)
    assert_same_bits(whole.problem.follower, resumed.problem.follower)
    torch.testing.assert_close(resumed.problem.leader.x, whole.problem.leader.x, rtol=0, atol=0)
    assert resumed.problem.follower.completions_seen == whole.problem.follower.completions_seen


def test_a_stopped_run_goes_on_in_the_same_process(make: Make) -> None:
    judge = Judge(3, RunStopped)
    run, whole = hpgd(make(interval=2), judge, None), hpgd(make(interval=2), Judge(), None)
    with pytest.raises(RunStopped):
        run.run()
    run.run()
    whole.run()
    assert_same_bits(whole.problem.follower, run.problem.follower)


def test_plain_rlhf_resumes_to_the_same_bits(make: Make, tmp_path: Path) -> None:
    whole, killed, resumed = make(), make(), make()
    arguments = {"fingerprint": "f", "log_every": 2, "checkpoint_every": 3, "progress": False}
    train_follower(whole, new_leader(), 8, out=tmp_path / "whole", **arguments)

    calls = 0

    def monitor(rollouts: Rollouts) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop
        return {}

    with pytest.raises(Stop):
        train_follower(killed, new_leader(), 8, out=tmp_path / "parts", monitor=monitor, **arguments)
    train_follower(resumed, new_leader(), 8, out=tmp_path / "parts", **arguments)
    assert_same_bits(whole, resumed)
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_the_state_of_another_policy_is_refused(make: Make) -> None:
    follower = make()
    follower.train(new_leader(), 1)
    state = follower.state_dict()
    state["policy"] = {f"other.{name}": value for name, value in state["policy"].items()}
    with pytest.raises(InputError, match=r"state: expected a policy with model.embed_tokens.weight"):
        follower.load_state_dict(state)


SCRIPT = """
import sys, logging; logging.disable(logging.WARNING)
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_llm_resume as t, enumerable_lm as lm, torch
from align_cbrl.llm import RLOOFollower, Schedule
torch.set_num_threads(1)
follower = RLOOFollower(Path({model!r}), lm.prompt_dataset(), t.TEMPERATURE, max_completion_length=lm.LENGTH,
    prompts_per_step=2, group_size=4, learning_rate=1e-3, schedule={schedule})
run = t.hpgd(follower, t.Judge(), Path({out!r}))
run.run(resume=True)
torch.save([t.weights(follower), run.problem.leader.x.detach()], {result!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["Schedule(interval=2, warmup=1)", "t.OUTSIDE"])
def test_a_process_killed_at_random_moments_ends_at_the_same_bits(folder: Path, tmp_path: Path, schedule: str) -> None:
    def start(out: str) -> subprocess.Popen[bytes]:
        code = SCRIPT.format(
            tests=str(Path(__file__).parent), model=str(folder), out=str(tmp_path / out),
            result=str(tmp_path / f"{out}.pt"), schedule=schedule,
        )  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})

    began = time.monotonic()
    assert start("whole").wait(600) == 0
    lasts = time.monotonic() - began
    moments, kills = random.Random(0), 0
    for _ in range(30):
        process = start("killed")
        try:
            if process.wait(moments.uniform(0.3, 1.0) * lasts) == 0:
                break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    whole, killed = (torch.load(tmp_path / f"{out}.pt", weights_only=True) for out in ("whole", "killed"))
    for a, b in zip(whole, killed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
