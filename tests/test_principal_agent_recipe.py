"""The recipe `principal_agent` on its smoke settings: the rows it promises, resumed parts, refused settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from align_cbrl.recipes.principal_agent.recipe import Config, instance, run
from rebuilt import report_is_rebuilt

from align_cbrl.cli import main
from align_cbrl.errors import CheckpointError, InputError
from toy_cmdp import leader_value


def test_smoke_run_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "principal_agent", "--config", "smoke", "--out", str(out)]
    assert main(command) == 0
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["name"]: row["profit"]["mean"] for row in summary["rows"]}
    assert list(rows) == ["start", "no response term", "ascent", "ascent with cooling", "grid search"]
    assert rows["start"] < rows["no response term"] < rows["ascent with cooling"] <= rows["grid search"] + 1e-6
    assert rows["ascent with cooling"] == pytest.approx(rows["grid search"], abs=5e-3)
    for row in summary["closed_form"]:
        assert row["profit"] == pytest.approx(row["closed_profit"], abs=0.02)
    payments = summary["contract"]["learned"]["payments"]
    assert max(payments) == payments[3]  # only what tells effort best is paid for
    assert max(payments[:3]) < 0.3 < payments[3]
    assert "<img" in (out / "report.html").read_text()
    assert report_is_rebuilt(out)

    (out / "contract.json").unlink()
    kept = (out / "instances.json").stat().st_mtime_ns
    assert main([*command, "--resume"]) == 0
    assert (out / "contract.json").is_file()
    assert (out / "instances.json").stat().st_mtime_ns == kept
    with pytest.raises(CheckpointError, match="another configuration"):
        run(Config(seed=7), out, resume=True)


def test_instances_are_what_their_seed_says() -> None:
    assert leader_value(instance(3, 0.1)).item() == leader_value(instance(3, 0.1)).item()
    assert leader_value(instance(3, 0.1)).item() != leader_value(instance(4, 0.1)).item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instances": 1}, "instances: expected at least 2, got 1"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"grid": 1}, "grid: expected at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"temperatures": ()}, "temperatures: expected positive numbers that fall"),
        ({"temperatures": (0.1, 0.2)}, r"temperatures: expected positive numbers that fall, got \[0.1, 0.2\]"),
        ({"temperatures": (0.1, 0.0)}, "temperatures: expected positive numbers that fall"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**settings)  # type: ignore[arg-type]
