"""The tabular recipe from the command line: published local optima, and kill -9 without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rebuilt import report_is_rebuilt

import toy_cmdp
from align_cbrl.cli import main
from align_cbrl.runs.metrics import MetricsLog

TIMES = ("leader_seconds", "follower_seconds", "leader_share")


@pytest.mark.parametrize(("temperature", "price", "value"), [(0.001, 1.0, 0.583), (0.003, 3.0, 0.396)])
def test_exact_ascent_ends_where_it_was_measured_to_end(
    tmp_path: Path, temperature: float, price: float, value: float
) -> None:
    settings = [f"temperature={temperature}", f"price={price}"]
    assert main(["run", "four_rooms", "--out", str(tmp_path / "run"), "--set", *settings]) == 0
    (row,) = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert row["value"] == pytest.approx(value, abs=0.003)
    assert report_is_rebuilt(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "steps"), [("true", 1000), ("false", 600)])
def test_five_kills_at_random_moments_leave_no_trace(tmp_path: Path, exact: str, steps: int) -> None:
    settings = [f"exact={exact}", f"steps={steps}", "paths=4"]

    def arguments(name: str) -> list[str]:
        return ["run", "four_rooms", "--out", str(tmp_path / name), "--resume", "--set", *settings]

    def reached() -> int:
        folders = (tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")
        return max((int(folder.name.split("-")[1]) for folder in folders), default=0)

    code = "import sys; from align_cbrl.cli import main; sys.exit(main())"
    for delay in torch.rand(5, generator=torch.Generator().manual_seed(2)).mul(0.3).tolist():
        before, deadline = reached(), time.monotonic() + 60
        with subprocess.Popen([sys.executable, "-c", code, *arguments("killed")], cwd=Path(__file__).parents[1]) as job:
            while reached() == before and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)  # until it has come further than the last time, and then a random while
            time.sleep(delay)
            job.kill()
    assert 0 < reached() < steps
    assert main(arguments("killed")) == 0
    assert main(arguments("whole")) == 0
    weights = [json.loads((tmp_path / name / "weights.json").read_text()) for name in ("killed", "whole")]
    assert weights[0] == weights[1]  # to the last bit
    logs = [MetricsLog.read(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    bare = [[{k: v for k, v in row.items() if k not in TIMES} for row in log] for log in logs]
    assert bare[0] == bare[1]


# --- the table ---------------------------------------------------------------------------------------------------

TINY = [
    "table.temperatures=[0.003]",
    "table.prices=[1.0, 5.0]",
    "table.seeds=[100, 101]",
    "table.starts=3",
    "table.halving.steps=12",
    "table.halving.cuts=[[4, 2], [8, 1]]",
]


def table(out: Path, *settings: str, resume: bool = False) -> int:
    """Run a tiny table into `out`; returns the exit code."""
    return main(["run", "four_rooms", "--out", str(out), "--set", *TINY, *settings, *(["--resume"] if resume else [])])


def searches(out: Path) -> dict[str, dict[str, object]]:
    """What each search found, by name; times left out."""
    read = {file.stem: json.loads(file.read_text()) for file in sorted((out / "units").glob("*.json"))}
    return {name: {k: v for k, v in record.items() if not k.endswith("seconds")} for name, record in read.items()}


def test_a_table_has_a_row_a_cell_and_shows_its_maps(tmp_path: Path) -> None:
    assert table(tmp_path / "run", "table.processes=1") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(row["temperature"], row["price"]) for row in summary["rows"]] == [(0.003, 1.0), (0.003, 5.0)]
    found = searches(tmp_path / "run")
    for row in summary["rows"]:
        values = [float(str(r["value"])) for r in found.values() if r["price"] == row["price"]]
        assert row["mean"] == pytest.approx(sum(values) / 2) == pytest.approx(row["median"])
        assert row["se"] == pytest.approx(abs(values[0] - values[1]) / 2)
        assert (row["min"], row["max"]) == (min(values), max(values))
    for record in found.values():  # the weights are those of the value that is reported
        problem = toy_cmdp.four_rooms(temperature=0.003, price=float(str(record["price"])))
        with torch.no_grad():
            problem.parameters[0].copy_(torch.tensor(record["weights"], dtype=torch.float64))
        assert toy_cmdp.leader_value(problem).item() == pytest.approx(record["value"], abs=1e-12)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 3  # fines, and a map of each cell
    assert page.count('<svg viewBox="0 0 3') == 2  # curves of each cell
    assert report_is_rebuilt(tmp_path / "run")
    assert len(MetricsLog.read(tmp_path / "run" / "metrics.jsonl")) == 4


def test_a_table_continues_with_the_searches_that_are_missing(tmp_path: Path) -> None:
    one_cell = ["table.prices=[1.0]", "table.processes=1"]
    assert table(tmp_path / "run", *one_cell) == 0
    whole, units = searches(tmp_path / "run"), sorted((tmp_path / "run" / "units").glob("*.json"))
    units[1].unlink()
    before = units[0].stat().st_mtime_ns
    # More seeds are welcome, and those that are there are not searched again.
    assert table(tmp_path / "run", *one_cell, "table.seeds=[100, 101, 102]", resume=True) == 0
    after = searches(tmp_path / "run")
    assert len(after) == 3
    assert {name: after[name] for name in whole} == whole  # to the last bit
    assert units[0].stat().st_mtime_ns == before
    assert table(tmp_path / "run", *one_cell, "table.scale=1.0", resume=True) == 3  # another search


def test_a_sampled_table_says_how_much_it_sampled(tmp_path: Path) -> None:
    assert table(tmp_path / "run", "table.processes=1", "table.environment_steps=900", "table.prices=[1.0]") == 0
    for record in searches(tmp_path / "run").values():
        assert 0.6 * 900 <= float(str(record["environment_steps"])) <= 1.1 * 900


@pytest.mark.parametrize(
    ("setting", "message"), [("table.starts=0", "starts: expected a positive"), ("table.seeds=[]", "seeds: expected")]
)
def test_a_table_of_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert table(tmp_path / "run", setting) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    assert table(tmp_path / "one", "table.processes=1") == 0
    code = "import sys; from align_cbrl.cli import main; sys.exit(main())"  # workers import what was started
    arguments = ["run", "four_rooms", "--out", str(tmp_path / "two"), "--set", *TINY, "table.processes=2"]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[1], check=True)
    assert searches(tmp_path / "one") == searches(tmp_path / "two")
