"""Modules of 0.1.0 by their old names: the same objects, with a warning that names the new module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from align_cbrl.moved import MODULES, recipe

ROOT = Path(__file__).parents[1]


def fresh(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_old_names_give_the_same_objects_and_name_the_new_module() -> None:
    done = fresh(
        "import toy_cmdp\n"
        "from align_cbrl.config import load_config\n"
        "from align_cbrl.hypergradient import DirectOnly, Hypergradient, PolicyResponse\n"
        "from toy_cmdp.rivals.amd import AMD\n"
        "from toy_cmdp.four_rooms import four_rooms\n"
        "import align_cbrl, align_cbrl.runs.config as config, align_cbrl.metrics\n"
        "assert load_config is config.load_config and config.__spec__.name == 'align_cbrl.runs.config'\n"
        "assert (DirectOnly, PolicyResponse, Hypergradient) == "
        "(align_cbrl.DirectOnly, align_cbrl.PolicyResponse, align_cbrl.Hypergradient)\n"
        "assert AMD is toy_cmdp.AMD and align_cbrl.metrics.__name__ == 'align_cbrl.runs.metrics'\n"
        "assert toy_cmdp.four_rooms is four_rooms and callable(four_rooms)  # not hidden by the module of that name\n",
        "-W",
        "default",
    )
    assert done.returncode == 0, done.stderr
    for old, new in (
        ("align_cbrl.config", "align_cbrl.runs.config"),
        ("toy_cmdp.rivals.amd", "toy_cmdp.estimators.amd"),
        ("toy_cmdp.four_rooms", "toy_cmdp.problems.four_rooms"),
    ):
        assert f"FutureWarning: the module {old} is now {new}; the old name stops working in 0.3.0" in done.stderr
    assert "<string>:2: FutureWarning" in done.stderr  # the user's line, not the import system's


def test_old_names_of_the_language_models_packages() -> None:
    done = fresh(
        "from align_cbrl.llm.completions import Completions, score_arguments\n"
        "from align_cbrl.llm.judges import Judge, PairwiseJudge, call_score_function, check_scores, judge_identity\n"
        "from align_cbrl.llm.reward_mixture import RewardMixture\n"
        "from align_cbrl.objectives import CVaR, ExpectedUtility, KLPriced, pair_likelihood\n"
        "import align_cbrl.llm as llm\n"
        "assert (Completions, score_arguments, Judge, RewardMixture) == "
        "(llm.Completions, llm.score_arguments, llm.Judge, llm.RewardMixture)\n",
        "-W",
        "ignore",
    )
    assert done.returncode == 0, done.stderr


def test_every_old_name_leads_to_modules_that_exist() -> None:
    for old, new in MODULES.items():
        for name in (old, *new):
            assert name.startswith(("align_cbrl.", "toy_cmdp."))
        for name in new:
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{old} -> {name}"
        path = ROOT / old.replace(".", "/")
        assert not path.with_suffix(".py").is_file(), f"{old} still exists"


def test_the_library_itself_uses_no_old_name() -> None:
    assert fresh("import align_cbrl.llm, align_cbrl.cli, toy_cmdp.validate", "-W", "error").returncode == 0


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("docstrings", None, ("tune_weights", "docstrings.yaml")),
        ("docstrings", "reward_model.yaml", ("tune_weights", "head.yaml")),
        ("docstrings", "smoke", ("tune_weights", "smoke")),
        ("reward_weights", None, ("tune_weights", "replies.yaml")),
        ("reward_weights", "smoke", ("tune_weights", "replies_smoke.yaml")),
        ("reward_weights", "mine.yaml", ("tune_weights", "mine.yaml")),
    ],
)
def test_old_recipes_are_files_of_the_new_one(name: str, config: str | None, expected: tuple[str, str | None]) -> None:
    with pytest.warns(FutureWarning, match=f"the recipe {name} is now tune_weights"):
        assert recipe(name, config) == expected
    folder = ROOT / "recipes" / "tune_weights"
    renamed = expected[1] or "config.yaml"
    assert config == "mine.yaml" or any((folder / f).is_file() for f in (renamed, f"{renamed}.yaml"))
