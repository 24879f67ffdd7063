"""The pages for users name settings and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from align_cbrl.recipes.overoptimization.recipe import Config as OveroptimizationConfig
from align_cbrl.recipes.tune_weights.recipe import Config

from align_cbrl.cli import recipe_names
from align_cbrl.runs.config import load_config

ROOT = Path(__file__).parents[1]
TUNE, HACKED = ROOT / "docs/tune_reward_weights.md", ROOT / "docs/reward_hacking.md"
REPLIES = ROOT / "recipes/tune_weights/replies.yaml"

if not TUNE.is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


def file_of(page: Path, tmp_path: Path) -> Path:
    """The YAML file that the page shows."""
    (text,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_the_file_of_the_page_is_a_configuration(tmp_path: Path) -> None:
    file = file_of(TUNE, tmp_path)
    config = load_config(Config, file)
    assert config.world.proxy == "models/reward" and config.hpgd.steps == 40
    shared = [f"{name}={yaml.safe_dump(yaml.safe_load(file.read_text())[name], default_flow_style=True).strip()}"
              for name in ("world", "judge")]  # fmt: skip
    assert load_config(OveroptimizationConfig, None, shared).world == config.world  # as the other page says


@pytest.mark.parametrize("page", [TUNE, HACKED], ids=lambda page: page.stem)
def test_settings_in_the_text_are_accepted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    objectives = re.findall(r"(?:`objective: |or `)(\{kind: [^`]*\})`", text)
    assert objectives
    settings = [("objective", value) for value in objectives]
    settings += re.findall(r"`((?:follower|hpgd|leader|judge|measure)(?:\.\w+)*): ([^`]*)`", text)
    for name, value in settings:
        load_config(Config, REPLIES, [f"{name}={value}"])
    config = load_config(Config, REPLIES)
    for key in re.findall(r"`((?:follower|hpgd|leader|judge)(?:\.\w+)+)`", text):
        value = config
        for part in key.split("."):
            assert hasattr(value, part), key
            value = getattr(value, part)


@pytest.mark.parametrize("page", [TUNE, HACKED], ids=lambda page: page.stem)
def test_commands_name_recipes_and_files(page: Path) -> None:
    for recipe, rest in re.findall(r"align-cbrl run (\w+)([^\n`#]*)", page.read_text(encoding="utf-8")):
        assert recipe in recipe_names()
        for config in re.findall(r"--config (\S+)", rest):
            assert (
                f"# {config}\n" in page.read_text(encoding="utf-8")
                or config == "my.yaml"
                or ((ROOT / "recipes" / recipe / config).is_file())
            )
