"""The loop: resume, interruption, full disks, other configurations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_cmdp
from align_cbrl import (
    HPGD,
    CheckpointError,
    HPGDConfig,
    InputError,
    PolicyResponse,
    Problem,
    Rollouts,
    RunStopped,
)
from align_cbrl.runs import checkpoints
from align_cbrl.runs.metrics import MetricsLog


def run_of(out: Path | None, steps: int = 12, temperature: float = 0.5, **settings: Any) -> HPGD:
    problem = toy_cmdp.random_cmdp(seed=1, temperature=temperature)
    optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.05, maximize=True)
    config = HPGDConfig(
        **{
            "steps": steps,
            "contexts_per_step": 4,
            "group_size": 2,
            "checkpoint_every": 3,
            "progress": False,
            **settings,
        }
    )
    return HPGD(problem, optimizer, PolicyResponse(toy_cmdp.exact.ExactCritic()), config, out)


def weights(run: HPGD) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.problem.parameters])


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("leader_seconds", "follower_seconds", "leader_share")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_exact_ascent_raises_the_objective() -> None:
    run = run_of(None, steps=60, contexts_per_step=64, group_size=8)
    before = toy_cmdp.exact.leader_value(run.problem).item()
    run.run()
    assert toy_cmdp.exact.leader_value(run.problem).item() > before + 0.05
    assert run.step == len(run.history) == 60


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole")
    whole.run()
    run_of(tmp_path / "parts", steps=5).run()
    parts = run_of(tmp_path / "parts")
    parts.run(resume=True)
    assert torch.equal(weights(whole), weights(parts))
    rows = [MetricsLog.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert without_times(rows[0]) == without_times(rows[1])
    assert [row["step"] for row in rows[1]] == list(range(1, 13))


def test_ctrl_c_finishes_the_step_and_can_be_resumed(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole")
    whole.run()
    run = run_of(tmp_path / "stopped")
    rollout = run.problem.follower.rollout

    def interrupting(*arguments: Any) -> Any:
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return rollout(*arguments)

    run.problem.follower.rollout = interrupting  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.step == 8  # the step under way was finished
    again = run_of(tmp_path / "stopped")
    again.run(resume=True)
    assert torch.equal(weights(whole), weights(again))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_schedulers_send_is_a_first_ctrl_c(tmp_path: Path, number: int) -> None:
    """Repeated, as a launcher passes on what its group has got too; and the handlers are put back."""
    mine = signal.signal(number, handler := lambda *_: None)
    run = run_of(tmp_path, checkpoint_every=100)
    rollout = run.problem.follower.rollout

    def interrupting(*arguments: Any) -> Any:
        if run.step == 7:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return rollout(*arguments)

    run.problem.follower.rollout = interrupting  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            run.run()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, mine)
    assert stopped.value.args == (number,)
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000008"]
    assert [row["step"] for row in MetricsLog.read(tmp_path / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("where", ["reward", "utility", "observer", "rollout", "disk"])
def test_every_exception_leaves_the_last_whole_step_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = run_of(None)
    whole.run()
    run = run_of(tmp_path, checkpoint_every=100)

    def broken(*arguments: Any, **named: Any) -> Any:
        raise ZeroDivisionError("now")

    def broken_from(step: int, usual: Any) -> Any:
        return lambda *a, **k: broken() if run.step >= step else usual(*a, **k)

    if where == "observer":
        run.observers = (lambda row, rollouts: broken() if row["step"] == 5 else None,)
    elif where == "rollout":
        monkeypatch.setattr(run.problem.follower, "rollout", broken_from(5, run.problem.follower.rollout))
    elif where == "reward":
        monkeypatch.setattr(run.problem.leader, "prepare", broken_from(5, run.problem.leader.prepare))
    elif where == "utility":
        monkeypatch.setattr(run.hypergradient, "backward", broken_from(5, run.hypergradient.backward))
    else:
        monkeypatch.setattr(MetricsLog, "append", broken_from(5, lambda self, row: None))
    with pytest.raises(ZeroDivisionError):
        run.run()
    monkeypatch.undo()
    assert [c.name for c in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000005"]
    again = run_of(tmp_path)
    again.run(resume=True)
    # The follower may answer the same leader twice, hence to the solver's tolerance.
    torch.testing.assert_close(weights(whole), weights(again), rtol=1e-12, atol=0)
    assert [row["step"] for row in MetricsLog.read(tmp_path / "metrics.jsonl")] == list(range(1, 13))


def test_a_step_that_broke_down_half_way_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)

    def broken() -> None:
        if run.step == 4:  # the optimizer has moved the leader already
            raise ZeroDivisionError

    monkeypatch.setattr(run.problem.leader, "project", broken)
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert max(c.name for c in (tmp_path / "checkpoints").glob("step-*")) == "step-00000003"


def test_a_run_is_not_destroyed_by_another(tmp_path: Path) -> None:
    run_of(tmp_path, steps=3).run()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(InputError, match=r"holds a run already, .*run\(resume=True\) continues it"):
        run_of(tmp_path, steps=3).run()
    assert {file: file.read_bytes() for file in before} == before


def test_an_emptied_log_is_written_again_from_the_checkpoint(tmp_path: Path) -> None:
    run_of(tmp_path, steps=6).run()
    rows = MetricsLog.read(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nno JSON\n')
    run_of(tmp_path, steps=7).run(resume=True)
    assert MetricsLog.read(tmp_path / "metrics.jsonl")[:6] == rows


def test_a_judge_that_stops_the_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_of(tmp_path / "whole")
    whole.run()
    run = run_of(tmp_path / "stopped")
    backward = PolicyResponse.backward

    def failing(self: PolicyResponse, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        if run.step == 4:
            raise RunStopped("judge: raised TimeoutError on all 4 attempts")
        return backward(self, problem, rollouts)

    monkeypatch.setattr(PolicyResponse, "backward", failing)
    with pytest.raises(RunStopped):
        run.run()
    monkeypatch.undo()
    again = run_of(tmp_path / "stopped")
    again.run(resume=True)
    # Its follower answers the same leader twice, hence to the solver's tolerance instead of bit by bit.
    torch.testing.assert_close(weights(whole), weights(again), rtol=1e-12, atol=0)


def test_a_full_disk_leaves_the_previous_checkpoint_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, steps=12)
    write, calls = checkpoints.write_synced, []

    def filling(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > 4:  # two files a checkpoint: the third one fails
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_synced", filling)
    with pytest.raises(CheckpointError, match=r"(?i)space|disk"):
        run.run()
    monkeypatch.undo()
    again = run_of(tmp_path)
    again._restore(tmp_path)
    assert again.step == 6
    again.run(resume=True)
    whole = run_of(None)
    whole.run()
    assert torch.equal(weights(whole), weights(again))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, steps=3).run()
    with pytest.raises(CheckpointError, match="another configuration"):
        run_of(tmp_path, temperature=0.7).run(resume=True)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run_of(tmp_path, steps=6).run()
    newest = max((tmp_path / "checkpoints").iterdir())
    for file in newest.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    again = run_of(tmp_path)
    with pytest.warns(UserWarning, match=r"truncated|damaged"):
        again.run(resume=True)
    whole = run_of(None)
    whole.run()
    assert torch.equal(weights(whole), weights(again))


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_identical(tmp_path: Path) -> None:
    """Five kills at moments of their own choosing, in a process of their own."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
            from pathlib import Path
            from test_hpgd import run_of
            run = run_of(Path(sys.argv[1]), steps=400)
            step = run.leader_step
            def slow(*arguments):
                time.sleep(0.005)
                return step(*arguments)
            run.leader_step = slow
            run.run(resume=True)
            """
        )
    )
    out = tmp_path / "killed"

    def reached() -> int:
        return max((int(p.name.split("-")[1]) for p in (out / "checkpoints").glob("step-*[0-9]")), default=0)

    for delay in torch.rand(5, generator=torch.Generator().manual_seed(4)).mul(0.2).tolist():
        before, deadline = reached(), time.monotonic() + 60
        with subprocess.Popen([sys.executable, str(script), str(out)]) as process:
            while reached() == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)  # until it has come further than the last time, and then a random while
            time.sleep(delay)
            process.kill()
    assert 0 < reached() < 400
    resumed = run_of(out, steps=400)
    resumed.run(resume=True)
    whole = run_of(tmp_path / "whole", steps=400)
    whole.run()
    assert torch.equal(weights(whole), weights(resumed))
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 401))


def test_a_descending_optimizer_is_refused() -> None:
    problem = toy_cmdp.random_cmdp(seed=1)
    with pytest.raises(InputError, match="expected maximize=True"):
        HPGD(problem, torch.optim.SGD(problem.leader.parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["steps", "contexts_per_step", "group_size", "checkpoint_every"])
def test_settings_are_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"HPGDConfig.{name}: expected a whole number >= 1, got 0"):
        HPGDConfig(**{name: 0})
