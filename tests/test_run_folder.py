"""A run's folder: what it says of itself, and whom it refuses."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs import files, run_folder
from align_cbrl.runs.config import load_config
from align_cbrl.runs.facts import differences, flat
from align_cbrl.runs.run_folder import Clock, Rows, claim, read_about, read_summary, write_summary


@dataclasses.dataclass
class Inner:
    steps: int = 3
    seed: int = 5


@dataclasses.dataclass
class Config:
    seed: int = 0
    name: str | None = None
    rates: tuple[float, ...] = (0.1, 1e-05)
    inner: Inner = dataclasses.field(default_factory=Inner)


def git(*arguments: str) -> str:
    names = {f"GIT_{role}_{what}": "x@y" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True, env={**os.environ, **names}
    ).stdout.strip()


def test_a_folder_describes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    Path("file").write_text("a")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/align-cbrl", "run", "mine", "--set", "name=a b"])
    out = tmp_path / "out"
    claim(out, Config(name="ä"), recipe="mine")

    assert load_config(Config, out / "config.yaml") == Config(name="ä")
    about = json.loads((out / "run.json").read_text())
    assert about["recipe"] == "mine" and about["seeds"] == {"seed": 0, "inner.seed": 5}
    (session,) = about["sessions"]
    assert session["command"] == "align-cbrl run mine --set 'name=a b'"
    assert session["versions"]["python"] == platform.python_version()
    assert session["versions"]["torch"] == metadata.version("torch")
    assert set(session["versions"]) == {"python", *run_folder.PACKAGES}
    assert session["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert session["platform"] == platform.platform()
    assert session["ended"] is None
    started = datetime.datetime.fromisoformat(session["started"])
    assert abs((datetime.datetime.now(datetime.UTC) - started).total_seconds()) < 60

    Path("file").write_text("b")
    claim(out, Config(name="ä"), recipe="mine")
    write_summary(out, {"rows": [{"value": float("nan")}]})
    first, second = read_about(out)["sessions"]
    assert first["ended"] is None and not first["git"]["dirty"]
    assert second["git"]["dirty"] and second["started"] <= second["ended"]
    assert read_summary(out) == {"recipe": "mine", "rows": [{"value": None}], "config": about["config"]}
    assert sorted(file.name for file in out.iterdir()) == ["config.yaml", "run.json", "summary.json"]


def test_outside_a_checkout_there_is_no_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    claim(tmp_path, Config(), recipe="mine")
    assert read_about(tmp_path)["sessions"][0]["git"] is None
    monkeypatch.setenv("PATH", "")  # nor without git
    claim(tmp_path, Config(), recipe="mine")
    assert read_about(tmp_path)["sessions"][1]["git"] is None


def test_a_package_that_is_not_installed_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PACKAGES", ("no-such-package",))
    claim(tmp_path, Config(), recipe="mine")
    assert read_about(tmp_path)["sessions"][0]["versions"]["no-such-package"] is None


def test_another_configurations_folder_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    claim(tmp_path, Config(), recipe="mine", free=["inner.steps"])
    (tmp_path / "part.json").write_text("{}")
    before = (tmp_path / "run.json").read_text()
    other = Config(seed=1, inner=Inner(steps=9, seed=6))
    with pytest.raises(CheckpointError, match=r"different: seed was 0, is 1; inner\.seed was 5, is 6\)"):
        claim(tmp_path, other, recipe="mine", free=["inner.steps"])
    with pytest.raises(CheckpointError, match=r"different: seed was 0, is 1\); .* choose another --out"):
        claim(tmp_path, other, recipe="mine", free=["inner"])
    with pytest.raises(CheckpointError, match=r"holds a run of the recipe mine; choose another --out"):
        claim(tmp_path, Config(), recipe="yours")
    assert (tmp_path / "run.json").read_text() == before
    longer = Config(inner=Inner(steps=9))
    claim(tmp_path, longer, recipe="mine", free=["inner.steps"])
    assert load_config(Config, tmp_path / "config.yaml") == longer


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, Config(), recipe="mine")
    before = (tmp_path / "run.json").read_text()

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_summary(tmp_path, {"rows": []})
    assert (tmp_path / "run.json").read_text() == before and not (tmp_path / "summary.json").exists()


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "is_main", lambda: False)
    claim(tmp_path, Config(), recipe="mine")
    Rows(tmp_path / "rows.json").add("a", {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: there is no such folder"):
        read_about(tmp_path / "none")
    with pytest.raises(InputError, match=r"not the folder of a run: it has no run\.json"):
        read_about(tmp_path)
    claim(tmp_path, Config(), recipe="mine")
    (tmp_path / "part.json").write_text("{}")
    with pytest.raises(InputError, match=r"has not ended, there are no rows yet; continue it with align-cbrl run mine"):
        read_summary(tmp_path)
    for text in ("{", "[]", '{"recipe": "mine"}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json: is damaged"):
            claim(tmp_path, Config(), recipe="mine")


def test_rows_and_seconds_survive_an_interruption(tmp_path: Path) -> None:
    Rows(tmp_path / "rows.json").add("plain", {"judge": 0.5})
    rows = Rows(tmp_path / "rows.json")
    rows.add("hpgd", {"judge": 0.7})
    assert Rows(tmp_path / "rows.json").done == {"plain": {"judge": 0.5}, "hpgd": {"judge": 0.7}}
    clock = Clock(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), clock.measure("hpgd"):
        raise KeyboardInterrupt
    first = Clock(tmp_path / "seconds.json").seconds["hpgd"]
    with Clock(tmp_path / "seconds.json").measure("hpgd"):
        pass
    assert 0 < first < Clock(tmp_path / "seconds.json").seconds["hpgd"]


def test_differences_are_dotted_and_know_what_is_missing() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": [1], "e": {}}) == {"a.b.c": 1, "d": [1], "e": {}}
    assert differences([{"a": 1}, {"a": 1}]) == {}
    assert differences([{"a": None, "b": {"c": 1}}, {"b": {"c": 1}}, {"b": {"c": 2}, "d": []}]) == {
        "b.c": [1, 1, 2],
        "d": [None, None, []],
    }
