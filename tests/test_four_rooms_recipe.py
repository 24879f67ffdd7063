"""The tabular recipe from the command line: published local optima, and kill -9 without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from align_cbrl.cli import main
from align_cbrl.metrics import MetricsLog

TIMES = ("leader_seconds", "follower_seconds", "leader_share")


@pytest.mark.parametrize(("temperature", "price", "value"), [(0.001, 1.0, 0.583), (0.003, 3.0, 0.396)])
def test_exact_ascent_ends_where_it_was_measured_to_end(
    tmp_path: Path, temperature: float, price: float, value: float
) -> None:
    settings = [f"temperature={temperature}", f"price={price}"]
    assert main(["run", "four_rooms", "--out", str(tmp_path / "run"), "--set", *settings]) == 0
    (row,) = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert row["value"] == pytest.approx(value, abs=0.003)


@pytest.mark.parametrize(("exact", "steps"), [("true", 1000), ("false", 200)])
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
