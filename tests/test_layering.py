"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import align_cbrl
import toy_cmdp
from align_cbrl.runs.imports import recipes_folder

HEAVY = {"accelerate", "datasets", "peft", "tokenizers", "transformers", "trl"}
AGENTS = {"gymnasium", "stable_baselines3"}
CORE = Path(align_cbrl.__file__).parent
TOYS = Path(toy_cmdp.__file__).parent
LAYERS = (
    "align_cbrl.errors",
    "align_cbrl.checks",
    "align_cbrl.identity",
    "align_cbrl.moved",
    "align_cbrl.distributed",
    "align_cbrl.plain",
    "align_cbrl.groups",
    "align_cbrl.functional",
    "align_cbrl.rollouts",
    "align_cbrl.problem",
    "align_cbrl.objectives",
    "align_cbrl.estimators",
    "align_cbrl.runs",
    "align_cbrl.hpgd",
    "align_cbrl",
    "align_cbrl.gym",
    "align_cbrl.llm.*",
    "align_cbrl.llm.leaders",
    "align_cbrl.llm.judges",
    "align_cbrl.llm.trackers",
    "align_cbrl.llm.followers",
    "align_cbrl.llm",
    "align_cbrl.llm.settings",
    "align_cbrl.llm.engines",
    "toy_cmdp.tables",
    "toy_cmdp.environments",
    "toy_cmdp.followers",
    "toy_cmdp.problems",
    "toy_cmdp.referee",
    "toy_cmdp.estimators",
    "toy_cmdp",
    "toy_cmdp.validate",
    "align_cbrl.recipes",
    "align_cbrl.cli",
)
"""The rooms, from the ground up: each may import itself and those before it. A package's own __init__.py is a room too,
which shows what lies below. `align_cbrl.llm.*` are the files beside it, but for the trackers of leaders and judges."""


def room(module: str) -> str:
    """The room of a module of the tree."""
    parts = module.split(".")
    if parts[:2] != ["align_cbrl", "llm"] or len(parts) == 2:
        return ".".join(parts[:2])
    if (CORE / "llm" / f"{parts[2]}.py").is_file() and parts[2] != "trackers":
        return "align_cbrl.llm.*"
    return ".".join(parts[:3])


def import_graph() -> dict[str, set[str]]:
    """Who imports whom, at the top of a file or inside a function: modules of the tree, by absolute names."""
    files: dict[str, Path] = {}
    for top, name in ((CORE, "align_cbrl"), (TOYS, "toy_cmdp"), (recipes_folder(), "align_cbrl.recipes")):
        for file in top.rglob("*.py"):
            parts = file.relative_to(top).with_suffix("").parts
            module = ".".join((name, *parts)).removesuffix(".__init__")
            if module != "align_cbrl.recipes":
                files[module] = file

    def known(module: str) -> str:
        while module and module not in files:
            module = module.rpartition(".")[0]
        return module

    graph = {}
    for module, file in files.items():
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {known(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                found |= {known(f"{base}.{alias.name}") for alias in node.names}
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.endswith("__")]
                if private and known(base):
                    assert room(base) == room(module), f"{module} imports {private} of {base}, another room's own"
        graph[module] = found - {"", module}
    return graph


def test_there_is_no_circle_no_arrow_upwards_and_no_import_of_a_private_name() -> None:
    graph = import_graph()
    assert len(graph) > 120
    level = {name: i for i, name in enumerate(LAYERS)}
    arrows: dict[str, set[str]] = {name: set() for name in LAYERS}
    for module, used in graph.items():
        for other in used:
            arrows[room(module)].add(room(other))
            assert level[room(other)] <= level[room(module)], f"{module} imports {other}, which stands above it"
    for name, below in arrows.items():
        print(f"{name:<26} -> {', '.join(sorted(below - {name}, key=level.__getitem__)) or '-'}")
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the files


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


BELOW_LLM = [f for f in sorted(CORE.rglob("*.py")) if f.relative_to(CORE).parts[0] not in ("llm", "recipes")]


@pytest.mark.parametrize("file", BELOW_LLM, ids=lambda f: f.relative_to(CORE).as_posix())
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


def test_trl_is_imported_in_its_own_package_only() -> None:
    users = {file.relative_to(CORE).as_posix() for file in CORE.rglob("*.py") if under(imported(file), {"trl"})}
    wrong = {user for user in users if not user.startswith("llm/followers/trl/")}
    assert users and not wrong, f"trl is imported in {sorted(wrong)}; only llm/followers/trl/ may touch it"


def fresh(code: str) -> str:
    """What `code` prints in a fresh process."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_the_package_imports_nothing_heavy_and_its_names_torch_only() -> None:
    show = "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    modules = fresh(f"import sys; import align_cbrl; assert 'HPGD' in dir(align_cbrl); {show}").split()
    assert not set(modules) & (HEAVY | {"torch", "numpy"})
    modules = fresh(f"import sys; from align_cbrl import HPGD; {show}").split()
    assert "torch" in modules
    assert not set(modules) & (HEAVY | AGENTS)


def test_agents_are_imported_when_they_are_asked_for() -> None:
    show = "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    assert not set(fresh(f"import sys; import align_cbrl.gym, toy_cmdp; {show}").split()) & (HEAVY | AGENTS)


def test_help_needs_nothing_heavy() -> None:
    modules = fresh(
        "import sys, contextlib, io; from align_cbrl.cli import main\n"
        "for words in (['--help'], ['--version'], ['ls'], ['run', '--help'], ['check', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(words)\n"
        "print(*sys.modules)"
    )
    assert not {m.split(".")[0] for m in modules.split()} & (HEAVY | {"torch", "numpy"})
