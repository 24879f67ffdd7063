"""The command line: what it runs, what it refuses, and its exit codes."""

from __future__ import annotations

import ast
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import align_cbrl.recipes
from align_cbrl import cli
from align_cbrl.runs import lock
from align_cbrl.runs.run_folder import read_about

RECIPE = """
import dataclasses, os, signal
from pathlib import Path
from align_cbrl.errors import CheckpointError, InputError, RunStopped
from align_cbrl.runs.run_folder import claim, read_summary, write_summary

@dataclasses.dataclass
class Config:
    steps: int = 1
    end: str = "done"

def run(config: Config, out: Path, resume: bool) -> None:
    claim(out, config, recipe="toy", free=["steps"])
    if config.end == "wrong":
        raise InputError("judge: no such file")
    (out / "ran.txt").write_text(f"{config.steps} {config.end} {resume}")
    if config.end == "interrupt":
        raise KeyboardInterrupt
    if config.end == "stop":
        raise RunStopped("the judge keeps failing")
    if config.end == "checkpoint":
        raise CheckpointError("it belongs to another configuration")
    if config.end == "mistake":
        raise ZeroDivisionError("in a recipe's own code, with api_key=v3ry-s3cret")
    if config.end == "full":
        raise OSError(28, "No space left on device", "weights.bin")
    if config.end == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    if config.end == "late":
        raise InputError("leader: its reward is NaN")
    write_summary(out, {"rows": [{"name": "hpgd", "judge": config.steps / 10}], "leader": {"reward": "proxy +1"}})
    report(out)

def report(out: Path) -> None:
    (out / "report.html").write_text(f"the judge gives {read_summary(out)['rows'][0]['judge']}")
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe `toy` beside the installed ones, and a working directory of its own."""
    folder = tmp_path / "recipes" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "config.yaml").write_text("steps: 5\n")
    (folder / "smoke.yaml").write_text("steps: 2\n")
    (tmp_path / "recipes" / "no_recipe").mkdir()
    monkeypatch.setattr(align_cbrl.recipes, "__path__", [str(tmp_path / "recipes")])
    for name in [n for n in sys.modules if n.startswith("align_cbrl.recipes.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.startswith("align_cbrl.recipes.")]:
        del sys.modules[name]  # those of this folder; monkeypatch brings back what was there before


@pytest.mark.parametrize(
    ("arguments", "out", "ran"),
    [
        ([], "runs/toy", "5 done False"),
        (["--config", "smoke.yaml"], "runs/toy-smoke", "2 done False"),
        (["--config", "smoke"], "runs/toy-smoke", "2 done False"),
        (["--config", "mine.yaml", "--out", "here"], "here", "9 done False"),
        (["--set", "steps=7", "end=done", "--set", "steps=8", "--resume"], "runs/toy", "8 done True"),
    ],
)
def test_run_hands_the_recipe_its_configuration(arguments: list[str], out: str, ran: str) -> None:
    Path("mine.yaml").write_text("steps: 9\n")
    assert cli.main(["run", "toy", *arguments]) == 0
    assert Path(out, "ran.txt").read_text() == ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "there is no recipe 'toi'; did you mean 'toy'? There are: toy"),
        (["toy", "--set", "stps=1"], "--set stps=1: stps: unknown key; did you mean 'steps'? There are: end, steps"),
        (["toy", "--set", "steps=x"], "--set steps=x: steps: expected an integer, got the string 'x'"),
        (
            ["toy", "--config", "smok.yaml"],
            "no such file, here or in the recipe; did you mean 'smoke.yaml' or 'config.yaml'?",
        ),
        (["toy", "--out", "file"], "--out file: expected a folder, this is a file"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("runs").exists()


def test_an_earlier_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy"]) == 0
    assert cli.main(["run", "toy", "--set", "steps=6"]) == 2
    assert "already holds a run: continue it with --resume, choose another --out" in capsys.readouterr().err
    assert Path("runs/toy/ran.txt").read_text() == "5 done False"
    assert cli.main(["run", "toy", "--resume"]) == 0


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("interrupt", 130, "stopped; resume with: align-cbrl run toy --set end=interrupt --out 'my runs' --resume\n"),
        ("stop", 3, "stopped: the judge keeps failing\nresume with: align-cbrl run toy --set end=stop --out"),
        ("checkpoint", 3, "error: it belongs to another configuration\n"),
        ("signal", 143, "stopped; resume with: align-cbrl run toy --set end=signal --out 'my runs' --resume\n"),
        (
            "full",
            3,
            "stopped: the disk is full (weights.bin); repair that\nresume with: align-cbrl run toy --set end=full",
        ),
    ],
)
def test_a_run_that_ends_early_says_how_to_go_on(
    end: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "toy", "--set", f"end={end}", "--out", "my runs"]) == code
    assert capsys.readouterr().err.startswith(message)


def test_a_mistake_in_anybodys_code_is_shown_and_the_run_can_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 would say that a validation failed."""
    assert cli.main(["run", "toy", "--set", "end=mistake"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "in run" in error and "s3cret" not in error
    assert error.endswith("--resume\n") and "stopped by ZeroDivisionError: in a recipe's own code" in error


@pytest.mark.parametrize(("number", "code"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 3)])
def test_a_folder_that_cannot_be_written_to_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def refused(path: object, *arguments: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(lock.os, "open", refused)
    assert cli.main(["run", "toy"]) == code
    assert "cannot write to runs/toy: " in capsys.readouterr().err


def test_a_run_that_is_under_way_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    with lock.only_here(Path("runs/toy")):
        for more in ([], ["--resume"]):
            assert cli.main(["run", "toy", *more]) == 3
            assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert cli.main(["run", "toy"]) == 0


def test_what_was_in_the_folder_before_stays_when_the_start_fails() -> None:
    Path("mine").mkdir()
    Path("mine/notes.tmp").write_text("of somebody's")
    assert cli.main(["run", "toy", "--set", "end=wrong", "--out", "mine"]) == 2
    assert Path("mine/notes.tmp").read_text() == "of somebody's"


def test_a_mistake_found_at_the_start_leaves_no_folder_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy", "--set", "end=wrong"]) == 2
    assert not Path("runs/toy").exists()
    assert cli.main(["run", "toy"]) == 0
    assert cli.main(["run", "toy", "--set", "end=late", "--out", "late"]) == 2  # something was done: nothing is lost
    assert Path("late/ran.txt").exists()


def test_report_is_written_again_from_the_folder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy"]) == 0
    Path("runs/toy").rename("moved")
    Path("moved/report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", "moved"]) == 0
    assert capsys.readouterr().out == "report: moved/report.html\n"
    assert Path("moved/report.html").read_text() == "the judge gives 0.5"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: there is no such folder; expected one that `align-cbrl run` has written"),
        ("recipes", "recipes: not the folder of a run: it has no run.json"),
        ("unfinished", "the run of toy has not ended, there are no rows yet; continue it with align-cbrl run toy"),
        ("foreign", "foreign: there is no recipe 'toi'; did you mean 'toy'? There are: toy"),
    ],
)
def test_what_has_no_report_is_named(folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy", "--set", "end=stop", "--out", "unfinished"]) == 3
    assert cli.main(["run", "toy", "--out", "foreign"]) == 0
    for name in ("run.json", "summary.json"):
        file = Path("foreign", name)
        file.write_text(file.read_text().replace('"toy"', '"toi"'))
    capsys.readouterr()
    assert cli.main(["report", folder]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["compare", "foreign", folder]) == 2


OWN = """
'''Count to a number.'''
import dataclasses
import json
from typing import Literal
from .words import WORD

@dataclasses.dataclass
class Up:
    '''Upwards.'''
    kind: Literal["up"] = "up"
    limit: int = 3

@dataclasses.dataclass
class Down:
    '''Downwards.

    Attributes:
        limit: where it stops,
            in units.
    '''
    kind: Literal["down"] = "down"
    limit: int = 0

@dataclasses.dataclass
class Config:
    '''What to count.

    Attributes:
        steps: at most.
        way: up or down.
    '''
    steps: int
    way: Up | Down = dataclasses.field(default_factory=lambda: Up(limit=5))

def run(config, out, resume):
    (out / "summary.json").write_text(json.dumps({"rows": [{"name": WORD, "steps": config.steps}]}))

def report(out):
    (out / "report.html").write_text(WORD)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's recipe, which knows nothing of run folders."""
    folder = tmp_path / "mine" / "counting"
    folder.mkdir(parents=True)
    (folder / "recipe.py").write_text(OWN)
    (folder / "words.py").write_text("WORD = 'counted'\n")
    (folder / "config.yaml").write_text("steps: 5\n")
    (folder / "long.yaml").write_text("steps: 50\n")
    return folder


def test_a_users_recipe_runs_by_path_and_is_found_again(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "mine/counting/"]) == 0
    assert cli.main(["run", "mine/counting", "--config", "long", "--set", "way.kind=down"]) == 0
    assert read_about(Path("runs/counting"))["recipe"] == str(own)
    assert read_about(Path("runs/counting-long"))["config"] == {"steps": 50, "way": {"kind": "down", "limit": 0}}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = [str(tmp_path / "runs" / name) for name in ("counting", "counting-long")]
    assert cli.main(["report", runs[0]]) == 0
    assert Path(runs[0], "report.html").read_text() == "counted"
    assert cli.main(["compare", *runs]) == 0
    assert "counted  steps" in capsys.readouterr().out
    assert cli.main(["run", str(own), "--out", runs[0], "--resume"]) == 0
    own.rename(tmp_path / "gone")
    assert cli.main(["report", runs[0]]) == 2
    assert (
        f"expected a recipe's name, or a folder with a recipe.py, got no {own / 'recipe.py'}" in capsys.readouterr().err
    )


def test_a_users_recipe_that_claims_its_folder_is_recorded_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "toy2"
    folder.mkdir(parents=True)
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "config.yaml").write_text("steps: 5\n")
    assert cli.main(["run", "mine/toy2"]) == 0
    about = read_about(Path("runs/toy2"))
    assert about["recipe"] == str(folder) and len(about["sessions"]) == 1 and about["sessions"][0]["ended"]
    assert cli.main(["run", "mine/toy2", "--set", "steps=6", "--resume"]) == 0  # free to grow
    assert cli.main(["report", "runs/toy2"]) == 0


def test_a_recipe_without_what_it_needs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert cli.main(["run", "./mine"]) == 2
    assert "recipe './mine': expected a recipe's name, or a folder with a recipe.py" in capsys.readouterr().err
    (tmp_path / "mine" / "recipe.py").write_text("Config = dict\n")
    (tmp_path / "mine" / "config.yaml").write_text("")
    assert cli.main(["run", "./mine"]) == 2
    assert "recipe './mine': its recipe.py has no run" in capsys.readouterr().err


def test_a_users_recipe_may_look_before_it_runs(own: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a preflight of its own, the files that it names are loaded all the same."""
    assert cli.main(["check", "mine/counting"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is missing"
    assert not (tmp_path / "runs").exists()
    (own / "recipe.py").write_text(
        OWN.replace("    steps: int\n", "    steps: int\n    judge: str = 'words.py:WORD'\n")
        + "from align_cbrl.errors import InputError\n"
        "def preflight(config, notes):\n"
        "    notes.found('steps', f'{config.steps} of them')\n"
        "    with notes.about('way'):\n"
        "        raise InputError('limit: expected another')\n"
        "    with notes.about('steps'):\n"
        "        raise InputError('steps: expected more')\n"
    )
    for name in [n for n in sys.modules if n.startswith("align_cbrl_by_path_")]:
        del sys.modules[name]
    assert cli.main(["check", "mine/counting", "--set", "way.limit=7"]) == 2
    (first,) = capsys.readouterr().err.splitlines()
    assert first.startswith("error: mine/counting/config.yaml: judge (its default): 'words.py:WORD': there is no file")
    judge = f"judge={own}/words.py:WORD"
    assert cli.main(["check", "mine/counting", "--set", "way.limit=7", judge]) == 2
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == "steps  5 of them"
    second, third = output.err.splitlines()
    assert second == "error: --set way.limit=7: way.limit: expected another"
    assert third == "error: mine/counting/config.yaml: steps: expected more"


def test_a_configuration_that_its_source_alone_cannot_make_is_left_to_the_recipe(own: Path) -> None:
    """A property of another class is not there before the recipe is imported."""
    text = OWN.replace(
        "    limit: int = 3\n", "    limit: int = 3\n\n    @property\n    def most(self):\n        return 9\n"
    )
    text = text.replace(
        "Up(limit=5))\n", "Up(limit=5))\n\n    def __post_init__(self):\n        assert self.way.most\n"
    )
    (own / "recipe.py").write_text(text)
    assert cli.main(["run", "mine/counting"]) == 0


def test_ls_has_a_line_for_every_recipe_and_configuration(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe / "recipe.py").write_text(f'"""Toys, for a test."""{RECIPE}')
    (recipe / "smoke.yaml").write_text("# As Thoma et al. (2024) have it. More\n# of it.\nsteps: 2\n")
    assert cli.main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "toy: Toys, for a test.",
        "    config.yaml",
        "    smoke.yaml           As Thoma et al. (2024) have it",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"align-cbrl {align_cbrl.__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("align-cbrl va", ["validate"]),
        ("align-cbrl run t", ["toy"]),
        ("align-cbrl cp ", ["toy"]),
        ("align-cbrl run toy --config ", ["config.yaml", "here.yaml", "smoke.yaml"]),
        ("align-cbrl check toy --config s", ["smoke.yaml"]),
    ],
)
def test_the_shell_completes_commands_recipes_and_configurations(line: str, words: list[str]) -> None:
    argcomplete = pytest.importorskip("argcomplete")
    Path("here.yaml").write_text("")
    parser = cli._parser()
    finder = argcomplete.CompletionFinder(parser)
    before, _, prefix = line.rpartition(" ")
    found = finder._get_completions(before.split(), prefix, "", None)
    assert [word.strip() for word in found if not word.startswith("-")] == words


def test_run_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run"])
    assert stop.value.code == 2
    assert "expected a recipe: one of toy, or a folder with a recipe.py" in capsys.readouterr().err


def test_help_of_a_recipe_lists_every_key_with_its_meaning(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "mine/counting", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: align-cbrl run mine/counting ") and "Count to a number." in text
    assert "files for --config: config.yaml, long.yaml" in text
    assert text.split("defaults:\n\n")[1].splitlines() == [
        "steps: an integer; required",
        "    at most.",
        "way: by its kind, one of up, down",
        "    up or down.",
        "  way with kind: up, the default. Upwards.",
        "    way.limit: an integer; default 5",
        "  way with kind: down. Downwards.",
        "    way.limit: an integer; default 0",
        "        where it stops, in units.",
    ]


def test_a_renamed_recipe_says_so_and_runs(recipe: Path) -> None:
    recipe.rename(recipe.with_name("tune_weights"))
    recipe.with_name("tune_weights").joinpath("replies_smoke.yaml").write_text("steps: 4\n")
    message = "the recipe reward_weights is now tune_weights --config replies_smoke.yaml; the old name stops working"
    with pytest.warns(FutureWarning, match=message):
        assert cli.main(["run", "reward_weights", "--config", "smoke.yaml"]) == 0
    assert Path("runs/tune_weights-replies_smoke/ran.txt").read_text() == "4 done False"


PROBLEM = """
import dataclasses
import toy_cmdp
def seeded(seed): return toy_cmdp.random_cmdp(seed=seed, contexts=2, horizon=2)
def plain(): return toy_cmdp.random_cmdp(horizon=2)
def nothing(): return 3
def other():
    problem = toy_cmdp.random_cmdp()
    exact = problem.follower
    follower = toy_cmdp.SoftValueIteration(exact.cmdp, exact.temperature, exact.discount, iterations=1)
    return dataclasses.replace(problem, follower=follower)
number = 3
"""


def test_validate_takes_a_problem_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "problems.py").write_text(PROBLEM)
    assert cli.main(["validate", "problems.py:seeded", "problems.py:plain", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["problem"] for row in rows} == {"problems.py:seeded", "problems.py:plain"}
    assert {"implicit", "finite_differences", "sampled_exact_critic"} <= {row["route"] for row in rows}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "problems.py:nothing: expected a function that returns an align_cbrl.Problem, got 3"),
        ("other", "problems.py:other: expected a problem whose follower is a toy_cmdp.ExactFollower"),
        ("number", "problems.py:number: expected a function that returns a problem, got 3"),
        ("seded", "has no 'seded'; did you mean 'seeded'"),
    ],
)
def test_what_is_no_problem_is_named(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problems.py").write_text(PROBLEM)
    assert cli.main(["validate", f"problems.py:{name}"]) == 2
    assert message in capsys.readouterr().err


def test_compare_prints_tables_and_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "toy", "--out", "a"]) == 0
    assert cli.main(["run", "toy", "--set", "steps=6", "--out", "b"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", "a", "b", "--out", "page"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Settings that differ",
        "setting  a  b",
        "steps    5  6",
        "",
        "What they reached",
        "row   figure    a    b",
        "hpgd  judge   0.5  0.6",
        "",
        "Differences",
        "row   figure  b less a",
        "hpgd  judge       +0.1",
        "",
        "Learned rewards",
        "run  reward",
        "a    proxy +1",
        "b    proxy +1",
        "",
        "report: page/compare.html",
    ]
    assert "proxy +1" in Path("page/compare.html").read_text()
    assert cli.main(["compare", "a"]) == 2
    assert "error: compare: expected at least two folders" in capsys.readouterr().err


@dataclasses.dataclass
class Row:
    problem: str
    route: str
    relative_error: float = 1e-9
    standard_error: float = float("nan")
    z: float = float("nan")
    passed: bool = True
    seconds: float = 0.1
    allowance: float = 0.0
    p: float = 1.0


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for toy_cmdp.validate: four_rooms passes, random fails."""
    module = ModuleType("toy_cmdp.validate")
    problems = {"four_rooms": None, "random": None}

    def validate(problems: dict[str, object]) -> list[Row]:
        return [Row(n, route, passed=n != "random") for n in problems for route in ("implicit", "sampled")]

    monkeypatch.setattr(module, "PROBLEMS", problems, raising=False)
    monkeypatch.setattr(module, "validate", validate, raising=False)
    monkeypatch.setitem(sys.modules, "toy_cmdp.validate", module)
    return module


def test_validate_prints_an_aligned_table(validation: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate"]) == 1
    output = capsys.readouterr()
    head, first, second, *_ = output.out.splitlines()
    assert head.startswith("problem ") and first.endswith("ok") and second.startswith(" ")
    assert first.index("implicit") == second.index("sampled") == head.index("route")
    assert "FAILED" in output.out and output.err == "2 of 4 checks failed\n"


def test_a_forgiven_bias_is_shown_beside_the_z_it_lowers(
    validation: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("p", "exact", standard_error=0.0, z=0.0), Row("p", "fitted", 0.02, 0.01, 0.5, allowance=0.05, p=0.4)]
    monkeypatch.setattr(validation, "validate", lambda names: rows)
    assert cli.main(["validate"]) == 0
    _, exact, fitted = capsys.readouterr().out.splitlines()
    assert exact.split() == ["p", "exact", "1.0e-09", "-", "-", "-", "-", "0.10", "ok"]
    assert fitted.split() == ["fitted", "2.0e-02", "1.0e-02", "5.0e-02", "0.50", "0.4", "0.10", "ok"]


def test_validate_gives_json_without_nan(validation: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "four_rooms", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["route"] for row in rows] == ["implicit", "sampled"]
    assert rows[0]["z"] is None and rows[0]["passed"] is True


def test_an_unknown_problem_lists_the_near_ones(validation: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "four_room"]) == 2
    assert "there is no problem 'four_room'; did you mean 'four_rooms'?" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        word in text
        for word in ("leader", "follower", "judge", "context", "examples:", "--resume", "report", "compare", "validate")
    )
    assert len(text.splitlines()) <= 52 and max(map(len, text.splitlines())) <= 100
    assert cli.main(["run", "--help"]) == 0
    assert "recipes: toy" in capsys.readouterr().out


def test_a_recipe_of_ones_own_by_its_folder(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "elsewhere" / "mine"
    own.mkdir(parents=True)
    (own / "recipe.py").write_text("from .helper import NAME\n" + RECIPE.replace('"toy"', "NAME"))
    (own / "helper.py").write_text("NAME = 'mine'\n")
    (own / "config.yaml").write_text("steps: 5\n")
    assert cli.main(["run", str(own), "--set", "steps=3"]) == 0
    assert (tmp_path / "runs" / "mine" / "ran.txt").read_text() == "3 done False"
    (tmp_path / "runs" / "mine" / "report.html").unlink()
    assert cli.main(["report", "runs/mine"]) == 0 and (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert cli.main(["run", str(own), "--set", "steps=4", "--resume"]) == 0
    assert cli.main(["run", str(own.parent)]) == 2
    assert "expected a recipe's name, or a folder with a recipe.py" in capsys.readouterr().err


def test_validate_takes_a_function_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from toy_cmdp.validate import PROBLEMS\n"
        "def small(seed):\n    return PROBLEMS['four_rooms'](seed)\n"
        "def nothing(seed):\n    return 3\n"
    )
    assert cli.main(["validate", "mine.py:nothing"]) == 2
    assert "expected a function that returns an align_cbrl.Problem" in capsys.readouterr().err
    assert cli.main(["validate", "mine.py:small", "--json"]) == 0
    assert {row["problem"] for row in json.loads(capsys.readouterr().out)} == {"mine.py:small"}


def test_every_recipe_can_be_run_and_reported() -> None:
    """By their source: importing all of them would take the time of a test suite."""
    folders = [file.parent for file in Path(__file__).parents[1].glob("recipes/*/recipe.py")]
    assert len(folders) >= 7
    for folder in folders:
        tree = ast.parse((folder / "recipe.py").read_text())
        names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        names |= {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        assert {"Config", "preflight", "run", "report"} <= names, f"{folder.name}: lacks one of these"
