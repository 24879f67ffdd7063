"""Metrics as JSON lines: flushed, finite, and cut back on resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align_cbrl.errors import InputError
from align_cbrl.runs.metrics import MetricsLog


def test_every_row_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(3):
        log.append({"step": step})
        assert MetricsLog.read(path)[-1] == {"step": step}
    log.close()


def test_numbers_become_finite_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(
            {
                "step": 0,
                "inf": float("inf"),
                "tensor": torch.tensor([0.5]),
                "nan": torch.tensor(float("nan")),
                "numpy": np.float32(0.25),
                "weights": {"a": 1.0, "b": [float("-inf"), None, True, "x"]},
            }
        )
    assert json.loads(path.read_text()) == {
        "step": 0,
        "inf": None,
        "tensor": 0.5,
        "nan": None,
        "numpy": 0.25,
        "weights": {"a": 1.0, "b": [None, None, True, "x"]},
    }


@pytest.mark.parametrize("value", [object(), torch.zeros(2)])
def test_what_is_no_number_is_named(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match=r"metrics\['bad'\]: expected"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"bad": value})


def test_resuming_drops_the_rows_to_be_redone_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "val')
    log = MetricsLog(path)
    log.truncate_after(2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    log.append({"step": 2, "value": 1.0})
    log.close()
    assert [row["step"] for row in MetricsLog.read(path)] == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_is_never_glued_to_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"ste')
    with MetricsLog(path) as log:
        log.append({"step": 1})
    assert [row["step"] for row in MetricsLog.read(path)] == [0, 1]


def test_truncating_nothing_does_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(0)
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there are no metrics here"):
        MetricsLog.read(tmp_path / "metrics.jsonl")
    for text in ("hello\n", "[1]\n"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + text)
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
            MetricsLog.read(tmp_path / "metrics.jsonl")
