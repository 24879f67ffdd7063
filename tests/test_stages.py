"""Which stage is under way, of how many, and how long it will take."""

from __future__ import annotations

from pathlib import Path

import pytest
from align_cbrl.recipes.stages import Stages, announced
from align_cbrl.recipes.worlds.cache import cached

from align_cbrl.recipes import stages


def test_a_stage_takes_as_long_as_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    def study(sizes: object) -> list[str]:
        told = Stages("seed 0", {"base": 0, "plain": 100, "fresh": 50}, guess=1.0, kept=tmp_path, sizes=sizes,
                      fixed={"base": 7.0})  # fmt: skip
        for name, seconds in (("base", 3.0), ("plain", 200.0), ("fresh", 90.0)):
            with told.stage(name):
                now[0] += seconds
        return capsys.readouterr().out.splitlines()

    assert study({"group_size": 8}) == [
        "seed 0, stage 1 of 3, base: perhaps 7 s",
        "seed 0, stage 2 of 3, plain: perhaps 1 min 40 s",
        "seed 0, stage 2 of 3, plain: done in 3 min 20 s",
        "seed 0, stage 3 of 3, fresh: about 1 min 40 s",  # at the pace of the stage before
        "seed 0, stage 3 of 3, fresh: done in 1 min 30 s",
    ]
    assert study({"group_size": 8})[::2] == [
        "seed 0, stage 1 of 3, base: about 3 s, as the last time",
        "seed 0, stage 2 of 3, plain: done in 3 min 20 s",
        "seed 0, stage 3 of 3, fresh: done in 1 min 30 s",
    ]
    assert study({"group_size": 16})[1] == "seed 0, stage 2 of 3, plain: perhaps 1 min 40 s"


def test_a_damaged_file_of_durations_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "durations.json").write_text("{")
    with (
        pytest.warns(UserWarning, match=r"durations\.json: is damaged"),
        Stages("seed 0", {"plain": 1}, guess=1.0, kept=tmp_path).stage("plain"),
    ):
        pass
    assert "perhaps" in capsys.readouterr().out


def test_what_the_cache_holds_is_no_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Stages("seed 0", {"policy": 0, "plain": 10}, guess=1.0, fixed={"policy": 60.0})
    for _ in range(2):
        with announced(told, "policy"):
            cached(tmp_path, "base", {"seed": 0}, lambda folder: (folder / "model").touch())
    assert capsys.readouterr().out.splitlines() == [
        "seed 0, stage 1 of 2, policy: perhaps 1 min",
        "seed 0, stage 1 of 2, policy: finished before",
    ]
    cached(tmp_path, "base", {"seed": 1}, lambda folder: (folder / "model").touch())
    assert capsys.readouterr().out.startswith(f"making {tmp_path / 'base-'}")
