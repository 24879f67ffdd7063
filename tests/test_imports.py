"""Objects named by dotted path or by file."""

from __future__ import annotations

import math
import os.path
from pathlib import Path

import pytest

from align_cbrl.errors import InputError
from align_cbrl.runs.imports import load_object


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("math.sqrt", math.sqrt),
        ("os.path.join", os.path.join),
        ("align_cbrl.errors.InputError", InputError),
        ("pathlib.Path.exists", Path.exists),
    ],
)
def test_a_dotted_path_gives_the_object(path: str, expected: object) -> None:
    assert load_object(path) == expected


def test_a_file_gives_the_object_and_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Judge:\n    name: str = 'a'\n    @staticmethod\n    def score(): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = load_object("judges.py:Judge")
    assert judge().name == "a"
    assert load_object(f"{tmp_path / 'judges.py'}:Judge") is judge
    assert load_object("judges.py:Judge.score")() == 1.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("matth.sqrt", r"'matth\.sqrt': there is no module 'matth'; did you mean .*'math'.*file\.py:attribute"),
        ("math.sqtr", r"'math\.sqtr': the module math has no 'sqtr'; did you mean 'sqrt'"),
        ("align_cbrl.erors.InputError", r"the module align_cbrl has no 'erors'; did you mean .*'errors'"),
        ("pathlib.Path.exist", r"Path has no 'exist'; did you mean .*'exists'"),
        ("math", r"'math': expected package\.module\.attribute or file\.py:attribute"),
        ("a:b", r"expected package\.module\.attribute or file\.py:attribute"),
        ("", r"expected package\.module\.attribute"),
        ("judge.py:score", r"there is no file .*judge\.py; did you mean .*'judges\.py'"),
        ("judges.py:scor", r"the file .*judges\.py has no 'scor'; did you mean 'score'"),
        ("broken.py:score", r"running .*broken\.py failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    (tmp_path / "judges.py").write_text("def score(): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_object(path)


def test_a_module_whose_own_import_is_missing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_module.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"needy_module needs the module 'not_there_at_all', which is not installed"):
        load_object("needy_module.score")
