"""What a run's numbers depend on: a change of any of it is found, and said in words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_cmdp
from align_cbrl import (
    HPGD,
    CheckpointError,
    Constrained,
    CVaR,
    ExpectedUtility,
    GroupCritic,
    HPGDConfig,
    InputError,
    PolicyResponse,
    Problem,
)
from align_cbrl.runs import facts, run_folder
from align_cbrl.runs.facts import UNREADABLE, differences_in_words, facts_of, settings_of
from align_cbrl.runs.run_folder import claim, read_about


@dataclasses.dataclass
class Config:
    judge: str = ""
    data: str = ""
    model: str = ""
    seed: int = 0


def claimed(folder: Path, config: Config) -> str:
    """What `claim` says in a process of its own, in which code is read anew: nothing where it accepts."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_facts as t\n"
        "from align_cbrl.runs.run_folder import claim\n"
        "try: claim(Path(sys.argv[2]), t.Config(*sys.argv[3:6]), recipe='mine')\n"
        "except Exception as error: print(error)"
    )
    arguments = [str(Path(__file__).parent), str(folder), config.judge, config.data, config.model]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    (folder / "part.json").write_text("{}")
    return done.stdout


def test_an_edit_between_stop_and_resume_is_refused_by_what_was_edited(tmp_path: Path) -> None:
    own, data, model = tmp_path / "own.py", tmp_path / "rows.jsonl", tmp_path / "model"
    model.mkdir()
    own.write_text("import helper\ndef judge(completions):\n    return [helper.grade(c) for c in completions]\n")
    (tmp_path / "helper.py").write_text("def grade(text):\n    return 1.0\n")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    data.write_text('{"prompt": "a"}')
    (model / "weights").write_bytes(b"1" * 1000)
    config = Config(f"{own}:judge", str(data), str(model))
    out = tmp_path / "out"
    try:
        assert claimed(out, config) == "" == claimed(out, config)
        helper, weights = tmp_path / "helper.py", model / "weights"
        for file, key in ((own, "judge"), (helper, "judge"), (data, "data"), (weights, "model")):
            before = file.read_bytes()
            file.write_bytes(before.replace(b"1", b"2").replace(b'"a"', b'"b"').replace(b"grade(c)", b"grade(c) + 0"))
            said = claimed(out, config)
            assert f"different: content of {key} was " in said and ", is " in said, file
            file.write_bytes(before)
        assert claimed(out, config) == ""
    finally:
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]


def test_another_version_is_refused_and_a_run_of_before_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, Config(), recipe="mine")
    (tmp_path / "part.json").write_text("{}")
    monkeypatch.setattr(facts, "_version", lambda name: "9.9" if name == "trl" else None)
    with pytest.raises(CheckpointError, match=r"version of trl was '[\d.]+', is '9\.9'"):
        claim(tmp_path, Config(), recipe="mine")
    about = read_about(tmp_path)
    del about["facts"]  # as 0.1.0 left it
    run_folder.write_json(tmp_path / "run.json", about)
    claim(tmp_path, Config(), recipe="mine")


def test_a_start_that_left_nothing_may_be_corrected(tmp_path: Path) -> None:
    claim(tmp_path, Config(seed=3), recipe="mine")
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "judge_cache.sqlite").write_bytes(b"scores that were paid for")
    claim(tmp_path, Config(seed=4), recipe="mine")
    assert read_about(tmp_path)["config"]["seed"] == 4
    (tmp_path / "seed-0" / "base.json").write_text("{}")
    with pytest.raises(CheckpointError, match="seed was 4, is 5"):
        claim(tmp_path, Config(seed=5), recipe="mine")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import threading\nLOCK = threading.Lock()\ndef judge(c):\n    return LOCK\n")
    config = Config(judge=f"{tmp_path / 'own.py'}:judge")
    assert facts_of(config)["content of judge"] == UNREADABLE
    with pytest.warns(UserWarning, match="content of judge: it cannot be read"):
        claim(tmp_path / "out", config, recipe="mine")
    with pytest.raises(InputError, match="there is no file"):  # before anything is made
        claim(tmp_path / "other", Config(judge="nowhere.py:judge"), recipe="mine")


def run_of(out: Path, objective: Callable[[Any], Any] = lambda score: score, **changes: Any) -> HPGD:
    problem = toy_cmdp.random_cmdp(seed=1, temperature=changes.get("temperature", 0.5))
    problem = Problem(problem.leader, objective(problem.objective), problem.follower)
    optimizer = changes.get("optimizer", torch.optim.Adam)(
        problem.leader.parameters(), lr=changes.get("lr", 0.05), maximize=True
    )
    config = HPGDConfig(steps=changes.get("steps", 2), contexts_per_step=2, group_size=2, progress=False)
    return HPGD(problem, optimizer, PolicyResponse(changes.get("critic", toy_cmdp.exact.ExactCritic())), config, out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.1}, r"optimizer\.groups\.lr was 0\.05, is 0\.1"),
        ({"optimizer": torch.optim.SGD}, "optimizer.kind was 'Adam', is 'SGD'"),
        ({"critic": GroupCritic()}, "hypergradient.critic.kind was 'ExactCritic', is 'GroupCritic'"),
        ({"temperature": 0.7}, r"follower\.temperature was 0\.5, is 0\.7"),
        ({"objective": lambda score: CVaR(score, 0.5)}, "objective.kind was 'ExpectedUtility', is 'CVaR'"),
    ],
)
def test_a_leader_run_of_other_settings_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run_of(tmp_path).run()
    with pytest.raises(CheckpointError, match=words):
        run_of(tmp_path, steps=4, **changes).run(resume=True)
    run_of(tmp_path, steps=4).run(resume=True)


def test_what_a_run_itself_moves_is_no_other_setting() -> None:
    problem = toy_cmdp.random_cmdp(seed=1)
    cost = problem.objective
    objective = Constrained(problem.objective, cost, bound=0.1, rate=0.5)
    response = PolicyResponse(GroupCritic())
    before = settings_of(problem.leader), settings_of(objective), settings_of(response)
    objective.multiplier, response.chunks = 3.0, 2
    with torch.no_grad():
        problem.parameters[0].add_(1.0)
    assert (settings_of(problem.leader), settings_of(objective), settings_of(response)) == before
    assert settings_of(Constrained(problem.objective, cost, bound=0.2, rate=0.5)) != before[1]


def test_two_utilities_are_two_settings() -> None:
    one, other = (ExpectedUtility(function) for function in (lambda x, r: r.mask * 1.0, lambda x, r: r.mask * 2.0))
    assert settings_of(one) != settings_of(other)
    assert "utility_function" in differences_in_words(settings_of(one), settings_of(other))
