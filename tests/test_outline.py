"""A configuration is refused before its recipe is imported as it is after, in the same words, and no other is."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from align_cbrl.errors import InputError
from align_cbrl.runs.config import default_of, load_config
from align_cbrl.runs.imports import load_recipe, recipe_folder, recipe_names
from align_cbrl.runs.outline import outline

WRONG = {
    "tune_weights": [
        "hpgd.nat=0.3",
        "hpgd.steps=many",
        "hpgd.steps=0",
        "hpgd={step: natural, replays: 2}",
        "follower.temperature=0",
        "follower.schedule.interval=0",
        "follower.group_size=1",
        "objective.kind=cvr",
        "objective={kind: cvar}",
        "leader.beta={start: 3, low: 1, high: 2}",
        "leader.constraint=fre",
        "judge={functoin: a.b}",
        "judge.budget=-1",
        "judge={function: a.b, url: 'https://judge.example'}",
        "world.name=docstring",
        "world.rewards={proxy: a.b}",
        "world.proxy_pairs=1",
        "measure.prompts=1",
        "methods=[hpdg]",
        "methods=[refit]",
        "seeds=[]",
        "jobs=0",
        "search.trials=0",
        "tracking.every=0",
    ],
    "four_rooms": ["temprature=1", "exact=maybe", "table={seeds: []}", "table.halving.cut=[1]"],
    "lqr": ["stpes=1"],
    "kinds": ["threshold=[1]", "methods=[x]"],
    "preference_dataset": ["preferences=3", "test_share=2"],
}


def real(recipe: str) -> Any:
    return vars(load_recipe(recipe))["Config"]


def refusal(cls: Any, file: Path, overrides: list[str]) -> str | None:
    try:
        load_config(cls, file, overrides)
    except InputError as error:
        return str(error)
    return None


def fields(cls: Any, at: str = "") -> dict[str, Any]:
    """The dotted keys of a dataclass with their defaults, those of one that is made by default too."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value = default_of(field)
        found[at + field.name] = None if dataclasses.is_dataclass(value) else value
        if dataclasses.is_dataclass(value):
            found |= fields(type(value), f"{at}{field.name}.")
    return found


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_configuration_that_is_shipped_is_taken(recipe: str) -> None:
    outlined = outline(recipe_folder(recipe) / "recipe.py")
    assert fields(outlined) == fields(real(recipe))
    for file in recipe_folder(recipe).glob("*.yaml"):
        assert refusal(outlined, file, []) is None
    unknown = [name for name, hint in get_type_hints(outlined).items() if hint is Any]
    assert unknown == []


@pytest.mark.parametrize("recipe", WRONG)
@pytest.mark.parametrize("file", ["config.yaml", "smoke.yaml"])
def test_what_is_refused_is_refused_in_the_same_words(recipe: str, file: str) -> None:
    outlined, path = outline(recipe_folder(recipe) / "recipe.py"), recipe_folder(recipe) / file
    early = {override: refusal(outlined, path, [override]) for override in WRONG[recipe]}
    assert early == {override: refusal(real(recipe), path, [override]) for override in WRONG[recipe]}
    assert None not in early.values()


OWN = """
from __future__ import annotations
import dataclasses
from align_cbrl.checks import Positive, checked
from .parts import Inner
import heavy_package

@checked
@dataclasses.dataclass
class Config:
    rate: Positive = 0.1
    inner: Inner = dataclasses.field(default_factory=Inner)
    optimizer: heavy_package.Optimizer | None = None
    steps: int = heavy_package.STEPS

    def __post_init__(self) -> None:
        heavy_package.check(self.rate)
"""
PARTS = "import dataclasses\n\n\n@dataclasses.dataclass\nclass Inner:\n    size: int = 2\n"


def test_a_recipe_of_ones_own_takes_anything_where_its_types_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(OWN)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "config.yaml").write_text("steps: many\n")  # who knows what heavy_package.STEPS is
    cls, file = outline(tmp_path / "recipe.py"), tmp_path / "config.yaml"
    assert refusal(cls, file, ["optimizer=[1, 2]", "inner.size=3"]) is None
    assert "rate: expected a finite number > 0, got 0.0" in str(refusal(cls, file, ["rate=0"]))
    assert "did you mean 'size'" in str(refusal(cls, file, ["inner.siz=3"]))
    for text in (
        "Config = dict\n",
        "class Config:\n    pass\n",
        OWN.replace("class Config", "class Config(heavy_package.Config)"),
    ):
        (tmp_path / "recipe.py").write_text(text)
        assert outline(tmp_path / "recipe.py") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hpgd.stpes=3", "hpgd.stpes: unknown key; did you mean 'steps'"),
        (
            "world.data=promts.jsonl",
            "world.data: data 'promts.jsonl': there is no such file; did you mean 'prompts.jsonl'",
        ),
        ("world.model=./polici", "world.model: model './polici': there is no such folder; did you mean 'policy'"),
        ("judge.function=own.py:jugde", "judge.function: 'own.py:jugde': the file"),
        ("follower.vllm=true", "follower.vllm: the package vllm is not installed"),
        ("world.rewards.own=onw.judge", "world.rewards.own: 'onw.judge': there is no module 'onw'"),
    ],
)
def test_nothing_heavy_is_imported_before_a_mistake_is_found(override: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "policy").mkdir()
    (tmp_path / "own.py").write_text("def judge(completions):\n    return [0.0] * len(completions)\n")
    code = (
        "import sys; from align_cbrl.cli import main\n"
        f"code = main(['run', 'tune_weights', '--set', {override!r}, '--out', 'runs/mine'])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"--set {override}: {message}" in done.stderr
    assert not (tmp_path / "runs").exists()
