"""Seeds side by side: kept parts, workers that stop with their parent, and signals that reach them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from align_cbrl.recipes.study import each_seed, kept

from align_cbrl.errors import CheckpointError
from align_cbrl.runs import run_folder
from align_cbrl.runs.metrics import MetricsLog


def working(config: dict[str, Any], seed: int, folder: Path, cache: Path) -> None:
    """A seed's work: pays for something ten times a second, and says when it is stopped."""
    try:
        for _ in range(600):
            with (folder / "paid").open("a") as file:
                file.write("1")
            time.sleep(0.1)
    except KeyboardInterrupt:
        (folder / "stopped").touch()
        raise


def stepping(config: dict[str, Any], seed: int, folder: Path, cache: Path) -> None:
    """A seed's leader steps."""
    from test_hpgd import run_of

    run = run_of(folder, steps=500, checkpoint_every=1000)
    step = run.leader_step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return step(*arguments)

    run.leader_step = slow  # type: ignore[method-assign]
    run.run(resume=True)


SCRIPT = """
import sys; sys.path[:0] = {paths!r}
from pathlib import Path
if __name__ == "__main__":
    import test_study
    from align_cbrl.recipes.study import each_seed
    each_seed(test_study.{work}, {{}}, Path({out!r}), [0, 1, 2], 2)
"""


def started(out: Path, work: str, beginning: str) -> subprocess.Popen[bytes]:
    """A run of three seeds, two at a time, once both have begun."""
    script, tests = out.parent / "job.py", Path(__file__).parent
    script.write_text(SCRIPT.format(paths=[str(tests), str(tests.parent)], work=work, out=str(out)))
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        files = [out / f"seed-{seed}" / beginning for seed in (0, 1)]
        if all(file.exists() and file.stat().st_size > 0 for file in files):
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the seeds have not begun, exit code {process.wait()}")


def paid(out: Path) -> list[int]:
    return [(out / f"seed-{seed}" / "paid").stat().st_size for seed in (0, 1)]


@pytest.mark.slow
def test_no_worker_pays_when_the_one_that_started_it_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, "working", "paid")
    process.kill()
    process.wait()
    time.sleep(2)
    after = paid(out)
    time.sleep(1)
    assert paid(out) == after
    assert not (out / "seed-2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_run_reaches_its_workers(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = started(out, "working", "paid")
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert (out / "seed-0" / "stopped").exists() and (out / "seed-1" / "stopped").exists()
    assert not (out / "seed-2").exists()  # what had not begun does not begin


@pytest.mark.slow
def test_leader_steps_in_workers_are_finished_and_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, "stepping", "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    for seed in (0, 1):
        taken = len(MetricsLog.read(out / f"seed-{seed}" / "metrics.jsonl"))
        assert (out / f"seed-{seed}" / "checkpoints" / f"step-{taken:08d}").is_dir() and taken < 500


@pytest.mark.parametrize("damage", ["", '{"judge": 0.', "[1]" * 3])
def test_a_part_that_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"judge": len(made)}

    file = tmp_path / "seed-0" / "base.json"
    assert kept(file, make)["judge"] == kept(file, make)["judge"] == 1
    file.write_text(damage)
    with pytest.warns(UserWarning, match=r"base\.json: .*; it is made again"):
        assert kept(file, make)["judge"] == 2
    assert kept(file, make)["judge"] == 2


def test_a_full_disk_keeps_no_half_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: str) -> None:
        raise CheckpointError(f"cannot write {file}: the disk is full")

    monkeypatch.setattr(run_folder, "write_whole", full)
    with pytest.raises(CheckpointError, match=r"base\.json: the disk is full"):
        kept(tmp_path / "base.json", lambda: {"judge": 1})
    assert list(tmp_path.iterdir()) == []


def test_one_job_works_in_this_process(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    each_seed(lambda config, seed, folder, cache: seen.append((seed, folder.name)), None, tmp_path, [3, 5], 1)
    assert seen == [(3, "seed-3"), (5, "seed-5")]
