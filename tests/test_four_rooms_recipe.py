"""The tabular recipe from the command line: published local optima, and kill -9 without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.mark.parametrize("exact", ["true", "false"])
def test_five_kills_at_random_moments_leave_no_trace(tmp_path: Path, exact: str) -> None:
    settings = [f"exact={exact}", "steps=600" if exact == "true" else "steps=60", "paths=8"]

    def arguments(name: str) -> list[str]:
        return ["run", "four_rooms", "--out", str(tmp_path / name), "--resume", "--set", *settings]

    reached = []
    code = "import sys; from align_cbrl.cli import main; sys.exit(main())"
    for delay in torch.rand(5, generator=torch.Generator().manual_seed(2)).mul(2.5).add(2.5).tolist():
        with subprocess.Popen(
            [sys.executable, "-c", code, *arguments("killed")], cwd=Path(__file__).parents[1]
        ) as process:
            try:
                process.wait(timeout=delay)
            except subprocess.TimeoutExpired:
                process.kill()
        reached += [int(p.name.split("-")[1]) for p in (tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")]
    assert any(0 < step < (600 if exact == "true" else 60) for step in reached), "no kill fell into the ascent"
    assert main(arguments("killed")) == 0
    assert main(arguments("whole")) == 0
    weights = [json.loads((tmp_path / name / "weights.json").read_text()) for name in ("killed", "whole")]
    assert weights[0] == weights[1]  # to the last bit
    logs = [MetricsLog.read(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    bare = [[{k: v for k, v in row.items() if k not in TIMES} for row in log] for log in logs]
    assert bare[0] == bare[1]
