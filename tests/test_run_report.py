"""A run's report: what the leaders did, alarms first, what it was made with, and a folder that can be moved."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.report import Charts, Section, Table
from align_cbrl.runs.run_folder import claim, finish, read_about
from align_cbrl.runs.run_report import alarms, is_smoke, leader_logs, leader_sections, made_with, write_run_report


@dataclasses.dataclass
class Config:
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1])
    token: str = "sk-" + "a" * 40


def steps(file: Path, count: int, **more: Any) -> None:
    """Leader steps as HPGD logs them."""
    with MetricsLog(file) as log:
        for step in range(1, count + 1):
            row = {"step": step, "objective": 0.5, "weight of proxy": 1.0 - 0.1 * step, "leader_share": 0.25}
            log.append({**row, **{key: value(step) if callable(value) else value for key, value in more.items()}})


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two seeds, of which the second stopped earlier, beside a follower on a frozen reward."""
    monkeypatch.setattr(sys, "argv", ["align-cbrl", "run", "mine", "--config", "here/replies_smoke.yaml"])
    out = tmp_path / "run"
    claim(out, Config(), recipe="mine")
    certified = {
        "gap": 0.5,
        "effective_sample_size": lambda step: 0.9 - 0.1 * step,
        "judge_calls": lambda step: 64.0 * step,
    }
    steps(out / "seed-0" / "hpgd" / "metrics.jsonl", 3, alarm=lambda step: float(step == 2), **certified)
    steps(out / "seed-1" / "hpgd" / "metrics.jsonl", 2, alarm=1.0, sampler_evidence=7.5, **certified)
    with MetricsLog(out / "seed-0" / "plain" / "metrics.jsonl") as log:
        log.append({"step": 5, "judge": 0.5})
    finish(out)
    return out


def test_leaders_are_found_and_followers_are_not(out: Path) -> None:
    logs = leader_logs(out)
    assert {name: {seed: len(rows) for seed, rows in seeds.items()} for name, seeds in logs.items()} == {
        "hpgd": {"0": 3, "1": 2}
    }
    (section,) = leader_sections(logs)
    charts, table = section.content
    assert isinstance(charts, Charts) and isinstance(table, Table)
    (panel,) = charts.panels
    assert panel.curves["proxy"] == ([1, 2], pytest.approx([0.9, 0.8]), pytest.approx([0.0, 0.0]))
    assert panel.note == "proxy: the mean over 2 seeds ends at 2; the last seed goes on to 3"
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["with an alarm"] for row in rows] == [1, 2] and [row["completions judged"] for row in rows] == [
        "192",
        "128",
    ]
    assert [row["lowest effective sample size"] for row in rows] == pytest.approx([0.6, 0.7])
    assert leader_sections({}) == []


def test_alarms_come_first_and_say_what_is_wrong(out: Path) -> None:
    first, second = alarms(leader_logs(out))
    assert first.startswith("Alarm at 1 of 3 leader steps of hpgd, seed 0: the follower lags")
    assert (
        second.startswith("Alarm at 2 of 2 leader steps of hpgd, seed 1: completions are not samples")
        and "7.5" in second
    )
    page = write_run_report(out, title="Mine", sections=[Section("Result")]).read_text()
    assert page.index(first) < page.index(second) < page.index("<section")


@pytest.mark.parametrize(
    ("command", "smoke"),
    [
        ("align-cbrl run lqr --config smoke", True),
        ("align-cbrl run lqr --config=recipes/lqr/smoke.yaml --set steps=3", True),
        ("align-cbrl run lqr --config config.yaml --out runs/smoke.yaml", False),
        ("align-cbrl run smoke", False),
        ("script.py", False),
    ],
)
def test_a_smoke_test_is_stamped(out: Path, command: str, smoke: bool) -> None:
    assert is_smoke({"sessions": [{"command": command}]}) == smoke
    assert '<span class="stamp">smoke test</span>' in write_run_report(out, title="", sections=[]).read_text()


def test_what_it_was_made_with(out: Path) -> None:
    about = read_about(out)
    table, _ = made_with(about).content
    assert isinstance(table, Table)
    rows = dict(table.rows)  # type: ignore[arg-type]
    assert rows["command"] == "align-cbrl run mine --config here/replies_smoke.yaml" and rows["seeds"] == "[0, 1]"
    assert "torch 2." in rows["versions"] and "minutes in 1 session" in rows["wall time"]
    page = write_run_report(out, title="", sections=[]).read_text()
    assert Config().token not in page and "seeds:" in page
    about["sessions"][-1] |= {"git": {"commit": "0123456789abcdef", "dirty": True}, "ended": None}
    rows = dict(made_with(about).content[0].rows)  # type: ignore[union-attr]
    assert rows["commit"] == "0123456789 and changes" and rows["wall time"] == "0.0 minutes in 1 session"
    about["sessions"][-1]["git"] = None
    assert dict(made_with(about).content[0].rows)["commit"] == "not in a checkout"  # type: ignore[union-attr]


def test_a_folder_that_was_moved_has_the_same_page(out: Path, tmp_path: Path) -> None:
    page = write_run_report(out, title="Mine", sections=[]).read_bytes()
    moved = shutil.move(out, tmp_path / "elsewhere" / "deep")
    again = write_run_report(Path(moved), title="Mine", sections=[]).read_bytes()
    assert again == page and str(tmp_path).encode() not in page
