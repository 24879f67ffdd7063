"""The benchmark of a leader step: what it measures, and what it makes of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from align_cbrl.recipes.benchmarks.leader_step import Measurement, Phase, describe, main


def test_a_meter_reads_each_phase_alone() -> None:
    # In a process of its own: memory that earlier tests held may be given back while the meter looks.
    code = """
import json, time, torch
from align_cbrl.recipes.benchmarks.leader_step import Meter
meter = Meter(torch.device("cpu"))
block = torch.ones(16 * 2**20)  # 64 MiB, written to
held = meter.read()
time.sleep(0.05)
slept = meter.read()
print(json.dumps([held.memory, slept.memory, slept.seconds, slept.cpu_seconds]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, slept, seconds, cpu_seconds = json.loads(done.stdout.splitlines()[-1])
    assert seconds >= 0.05 > cpu_seconds
    if held is None:
        pytest.skip("this system does not let a process set back its peak")
    assert held >= 60 * 2**20 and slept is not None and slept < 16 * 2**20


def test_shares_are_step_by_step() -> None:
    follower = [Phase(s, 2 * s, None) for s in (1.0, 2.0, 4.0)]
    leader = [Phase(0.4, 0.2, 2**20), Phase(0.1, 0.2, 3 * 2**20), Phase(0.1, 0.2, None)]
    measurement = Measurement("192x2", 1_400_000, "mixture", 8, follower, leader)
    assert measurement.shares("seconds") == {"median": 0.05, "q90": 0.33, "max": 0.4}  # no mean hides the worst
    assert measurement.shares("cpu_seconds") == {"median": 0.05, "q90": 0.09, "max": 0.1}
    row = describe(measurement)
    assert row[0] == "192x2" and row[4] == "2000.0" and row[6] == "100.0" and row[-2:] == ["-", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "192"], "expected width x layers"),
        (["--sizes", "190x2"], "divisible by 4"),
        (["--leaders", "mixtur"], "mixture, head, lora, all"),
        (["--steps", "0"], "--steps: expected at least 1"),
    ],
)
def test_arguments_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
