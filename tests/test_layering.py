"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import align_cbrl
import toy_cmdp

HEAVY = {"accelerate", "datasets", "peft", "tokenizers", "transformers", "trl"}
CORE = Path(align_cbrl.__file__).parent
TOYS = Path(toy_cmdp.__file__).parent
# Each module may import the modules of its own line and of those above; the layer below the core is llm/.
LAYERS = (
    {"errors", "config", "imports", "functional", "distributed", "checkpoints", "metrics", "report"},
    {"run_folder", "compare"},
    {"rollouts"},
    {"problem"},
    {"random_numbers", "search", "critics", "objectives", "replay"},
    {"cross_fitted", "preference_data", "worst_group"},
    {"hypergradient"},
    {"certificate"},
    {"geometric", "myopic", "randomly_truncated", "zeroth_order"},
    {"hpgd"},
)


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, as an absolute dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def under(names: set[str], packages: set[str]) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages)}


@pytest.mark.parametrize("file", sorted(CORE.glob("*.py")), ids=lambda f: f.stem)
def test_the_core_imports_neither_the_language_model_stack_nor_what_is_built_on_it(file: Path) -> None:
    assert not under(imported(file), HEAVY | {"align_cbrl.llm", "recipes"})
    if file.stem != "cli":  # the command line is the top of everything
        assert not under(imported(file), {"toy_cmdp"})


@pytest.mark.parametrize("file", sorted(TOYS.rglob("*.py")), ids=lambda f: f.stem)
def test_the_tables_import_the_core_only(file: Path) -> None:
    assert not under(imported(file), HEAVY | {"align_cbrl.llm", "recipes"})


@pytest.mark.parametrize("file", sorted(CORE.joinpath("llm").rglob("*.py")), ids=lambda f: f.stem)
def test_the_language_model_layer_imports_no_recipe_and_no_table(file: Path) -> None:
    assert not under(imported(file), {"recipes", "toy_cmdp"})


def test_the_core_is_layered() -> None:
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for file in CORE.glob("*.py"):
        if file.stem not in level:
            continue
        used = {name.split(".")[1] for name in under(imported(file), {"align_cbrl"}) if "." in name}
        too_high = {name for name in used if level.get(name, -1) > level[file.stem]}
        assert not too_high, f"align_cbrl/{file.name} imports {sorted(too_high)}, which stand above it"


def test_trl_is_imported_in_its_own_package_only() -> None:
    users = {file.relative_to(CORE).as_posix() for file in CORE.rglob("*.py") if under(imported(file), {"trl"})}
    wrong = {user for user in users if not user.startswith("llm/followers/trl/")}
    assert users and not wrong, f"trl is imported in {sorted(wrong)}; only llm/followers/trl/ may touch it"


def fresh(code: str) -> str:
    """What `code` prints in a fresh process."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_the_package_imports_torch_only_and_fast() -> None:
    # Processor time, not wall time: on a machine that others use, the latter measures the others.
    code = (
        "import sys, time; import align_cbrl; "
        "print(time.process_time(), *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    seconds, *modules = fresh(code).split()
    assert "torch" in modules
    assert not set(modules) & HEAVY
    assert float(seconds) < 3, f"import align_cbrl took {seconds} s of processor time"


def test_help_needs_nothing_heavy() -> None:
    modules = fresh(
        "import sys, contextlib, io; from align_cbrl.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "print(*sys.modules)"
    )
    assert not {m.split(".")[0] for m in modules.split()} & HEAVY
