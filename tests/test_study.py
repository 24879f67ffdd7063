"""Seeds side by side: kept parts, workers that stop with their parent, and signals that reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from align_cbrl.recipes.statistics import interval
from align_cbrl.recipes.study import Study, compared, curves, difference, each_seed, kept, minutes, samples

from align_cbrl.errors import CheckpointError
from align_cbrl.runs import run_folder
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Intervals, Table


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


def of_prompts(*judged: float) -> dict[str, Any]:
    """A part of a seed: the judge's mean score of each test prompt."""
    return {"judge": {"mean": sum(judged) / len(judged), "se": 0.1}, "by_prompt": {"judge": list(judged)}}


def test_one_seed_is_compared_by_prompt_and_several_by_seed() -> None:
    one = {"a": [of_prompts(0.5, 0.7, 0.9)], "b": [of_prompts(0.4, 0.6, 0.2)]}
    found = difference(one, "a", "b")
    assert found.pop("over") == "prompts" and found == pytest.approx(interval([0.1, 0.1, 0.7]))
    two = {name: [part[0], of_prompts(1.0, 1.0, 1.0)] for name, part in one.items()}
    found = difference(two, "a", "b")
    assert found["over"] == "seeds" and found["n"] == 2 and found["mean"] == pytest.approx(0.15)
    searched = {"a": one["a"], "b": [{"judge": {"mean": 0.5, "se": None}}]}  # has no figures of prompts
    assert difference(searched, "a", "b")["n"] == 1


def study(**settings: Any) -> Study:
    figures = {"judge": "judge", "kl": "KL"}
    return Study("mine", dict, lambda *_: None, lambda *_: {}, lambda *_: [], lambda *_: ("", ""), figures, **settings)


def test_the_best_row_is_set_off_and_no_other() -> None:
    rows = [
        {"name": "plain", "judge": {"mean": 0.75, "se": 0.1}},
        {"name": "hpgd", "judge": {"mean": 0.5, "se": 0.1}},
        {"name": "lost", "judge": {"mean": None, "se": None}},
    ]
    of = interval([0.25, 0.5, 0.75])
    config = {"seeds": [0, 1]}
    found = {"rows": rows, "comparisons": {"a minus b": of}, "config": config}
    table, drawn = study(best_by="judge").result(found, "A caption.")
    assert isinstance(table, Table) and table.highlight == "plain"  # although it is not HPGD
    assert table.caption.startswith("A caption. Mean and standard error over seeds. Set off: the highest judge")
    assert isinstance(drawn, Intervals) and list(drawn.rows) == [("a minus b", of["mean"], of["low"], of["high"])]
    (table,) = study().result({"rows": rows, "config": {"seeds": [0]}}, "")
    assert isinstance(table, Table) and table.highlight is None
    assert table.caption.endswith("over test prompts, of one seed.")
    level = [row | {"judge": {"mean": 0.5, "se": 0.1}} for row in rows]
    (table,) = study(best_by="judge").result({"rows": level, "config": config}, "")
    assert isinstance(table, Table) and table.highlight is None


def test_what_intervals_are_over_is_said() -> None:
    known, unknown = interval([1.0, 2.0]), {"mean": 1.0, "low": None, "high": None}
    assert "over seeds." in compared({"a": known, "b": unknown}).caption
    assert "over worlds." in compared({"a": known}, "worlds").caption
    assert "over test prompts of one seed" in compared({"a": {**known, "over": "prompts"}}).caption
    assert compared({"b": unknown}).caption == "Differences without an interval: more seeds would give one."


def test_curves_end_where_a_seed_does(tmp_path: Path) -> None:
    def points(count: int) -> list[dict[str, Any]]:
        return [{"step": step, "judge": float(count), "kl": None if step else 0.0} for step in range(count)]

    panels = [(name, "steps", name, "step", name) for name in ("judge", "kl", "gap")]
    drawn = curves(tmp_path, panels, {"hpgd": [points(4), points(2)], "plain": [points(3), points(3)]})
    judge, kl, gap = drawn.panels
    assert judge.curves["hpgd"][:2] == ([0, 1], [3.0, 3.0])  # and no cliff to 4 at step 2
    assert judge.note == "hpgd: the mean over 2 seeds ends at 1; the last seed goes on to 3"
    assert kl.curves["hpgd"][:2] == ([0], [0.0]) and gap.curves == {}
    assert (tmp_path / "curves.png").is_file()


def test_minutes_are_of_all_seeds(tmp_path: Path) -> None:
    for seed, seconds in enumerate((60.0, 120.0)):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "hpgd.json").write_text(json.dumps({"seconds": seconds}))
        (tmp_path / f"seed-{seed}" / "other.json").write_text("[]")
    (table,) = minutes(tmp_path, [0, 1]).content
    assert isinstance(table, Table) and table.rows == [["hpgd", "3.0", "2.0"]]
    assert table.caption.startswith("3.0 minutes in all, of 2 seeds")


def test_samples_have_the_scores_that_are_known() -> None:
    sample = {"prompt": "p", "completion": "c"}
    parts = {"a": [{"samples": [{**sample, "scores": {"judge": 0.5, "words": -1.0}}]}], "b": [{"samples": [sample]}]}
    (found,) = samples(parts, {"a": "A", "b": "B"}, ["a", "b", "c"])
    assert found.completions == {"A": "c", "B": "c"} and found.scores == {"A": {"judge": 0.5, "words": -1.0}}
