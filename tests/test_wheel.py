"""The wheel: what it installs, and that it works from an empty folder, whatever else is called `recipes`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def called(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building needs the build backend, which no test may download")
    folder = tmp_path_factory.mktemp("wheel")
    called(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", folder, ROOT),
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds the wheel's files, and beside them a broken package named recipes."""
    target = tmp_path_factory.mktemp("site")
    called(*(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel))
    (target / "recipes").mkdir()
    (target / "recipes" / "__init__.py").write_text("raise RuntimeError('another library')\n")
    return {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}


def program(installed: dict[str, str]) -> Path:
    return Path(installed["PYTHONPATH"], "bin", "align-cbrl")


def test_the_wheel_installs_two_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    information = f"align_cbrl-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"align_cbrl", "toy_cmdp", information}
    assert len(names) == len(set(names))
    carried = {"py.typed", "recipes/study.py", "recipes/four_rooms/smoke.yaml", "recipes/tune_weights/README.md"}
    carried |= {f"runs/templates/{name}" for name in ("report.html", "report.css", "samples.js")}
    assert {f"align_cbrl/{name}" for name in carried} <= set(names)
    sources = {
        f"align_cbrl/{file.relative_to(ROOT).as_posix()}"
        for file in (ROOT / "recipes").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file != ROOT / "recipes" / "__init__.py"
    }
    assert sources <= set(names)


def test_a_recipe_runs_from_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    code = "import align_cbrl.recipes as r; print(r.__file__, *r.__path__)"
    where = called(sys.executable, "-c", code, env=installed, cwd=tmp_path)
    assert str(ROOT) not in where and installed["PYTHONPATH"] in where
    called(program(installed), "run", "four_rooms", "--config", "smoke.yaml", env=installed, cwd=tmp_path)
    assert (tmp_path / "runs" / "four_rooms-smoke" / "report.html").is_file()


def test_a_users_recipe_runs_from_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.py").write_text(
        "import dataclasses\nfrom align_cbrl.runs.run_folder import claim, write_summary\n"
        "@dataclasses.dataclass\nclass Config:\n    steps: int = 1\n"
        "def run(config, out, resume):\n    claim(out, config, recipe='mine')\n"
        "    write_summary(out, {'rows': [{'steps': config.steps}]})\n"
        "def report(out):\n    (out / 'report.html').write_text('done')\n"
    )
    (mine / "config.yaml").write_text("steps: 3\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    called(program(installed), "run", mine, env=installed, cwd=empty)
    called(program(installed), "report", empty / "runs" / "mine", env=installed, cwd=tmp_path)
    assert (empty / "runs" / "mine" / "report.html").read_text() == "done"
