"""The commands that README, documentation and recipes print: all are taken, and the short ones run as printed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from align_cbrl.recipes.worlds.docstrings.shipped import POLICY, PROXY

from align_cbrl import cli
from align_cbrl.runs.config import load_config
from align_cbrl.runs.imports import recipe_folder
from align_cbrl.runs.outline import outline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]

if not (ROOT / "README.md").is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


def printed() -> dict[str, str]:
    """The commands in the pages' blocks, without comments, with the page that prints each first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removesuffix("&"), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and words[0] == "align-cbrl":
                    found.setdefault(shlex.join(words), page.relative_to(ROOT).as_posix())
    return found


def code_of(page: str, language: str, begins: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return next(block for block in blocks if block.startswith(begins))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages print, and with the policy and the reward model that come along."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "models").mkdir()
    (folder / "models/policy").symlink_to(POLICY)
    (folder / "models/reward").symlink_to(PROXY)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "def f{i}(a, b):"}}\n' for i in range(40)))
    for page, language, name in (
        ("docs/tune_reward_weights.md", "yaml", "my.yaml"),
        ("docs/tune_reward_weights.md", "python", "my_judge.py"),
        ("docs/llm_judge.md", "yaml", "chat.yaml"),
        ("docs/reward_hacking.md", "yaml", "hacked.yaml"),
        ("docs/own_problem.md", "python", "tolls.py"),
        ("docs/extending.md", "python", "my_recipe/recipe.py"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code_of(page, language, f"# {name}\n"))
    (folder / "my_recipe/config.yaml").write_text("steps: 3\n")
    return folder


@pytest.mark.parametrize("command", printed())
def test_every_command_that_is_printed_is_taken(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, recipes, configurations and what is set; nothing is run."""
    monkeypatch.chdir(workplace)
    options = cli._parser().parse_args(shlex.split(command)[1:])
    if getattr(options, "recipe", None) is not None and hasattr(options, "overrides"):
        folder = recipe_folder(options.recipe)
        load_config(outline(folder / "recipe.py"), cli._config_path(folder, options.config), options.overrides)


SHORT = [
    "align-cbrl ls",
    "align-cbrl check tune_weights --config my.yaml",
    "align-cbrl run my_recipe/",
]
"""Run as they are printed."""

SHRUNK = {
    "align-cbrl run tune_weights --config my.yaml --out runs/mine": "follower.steps=2 follower.prompts_per_step=2 "
    "follower.group_size=4 follower.max_completion_length=4 follower.schedule.interval=1 follower.schedule.warmup=1 "
    "hpgd.steps=2 measure.every=null measure.prompts=4 measure.final_group_size=2 world.reference_prompts=4",
}
"""Long as printed, since they train: run with these settings."""


@pytest.mark.parametrize("command", [*SHORT, *SHRUNK])
def test_commands_run(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert command in printed()
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    changes = ["--set", *SHRUNK[command].split()] if command in SHRUNK else []
    assert cli.main([*shlex.split(command)[1:], *changes]) == 0
    if command in SHRUNK:
        assert (workplace / "runs/mine/report.html").is_file()
        assert cli.main(["report", "runs/mine"]) == 0
