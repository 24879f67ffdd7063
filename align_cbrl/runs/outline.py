"""A recipe's configuration without its imports: what is misspelt is refused before torch and trl are imported."""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cbrl.runs.imports import recipes_folder

_LIGHT = {"align_cbrl.checks", "align_cbrl.errors", "align_cbrl.runs.config", "align_cbrl.runs.imports"}
_LIGHT |= {"align_cbrl.runs.secrets", "align_cbrl.runs.inputs"}
"""Modules of this library whose import is cheap; besides them, the standard library is imported, and nothing else."""


class _Unknown(Exception):
    """What a name stands for cannot be said without the import of something heavy."""


def outline(recipe: Path) -> Any:
    """The class `Config` of a recipe, made of its source: the fields with their types, defaults and ranges.

    Only the statements that the class needs are executed, each in the namespace of its module: dataclasses without
    their methods, but for a `__post_init__` that needs nothing heavy, constants, and functions that these use. A field
    whose type or default cannot be known so takes anything. What the class refuses, the recipe's own one refuses in the
    same words; what it takes may still be refused there.

    Args:
        recipe: the file recipe.py, of this library or of somebody's own.

    Returns:
        A dataclass for `load_config`; None where there is none to be made, as of a `Config` that is no dataclass.

    Example:
        >>> from align_cbrl.runs.config import load_config
        >>> config = outline(recipes_folder() / "four_rooms" / "recipe.py")
        >>> load_config(config, None, ["temprature=1"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        align_cbrl.errors.InputError: --set temprature=1: temprature: unknown key; did you mean 'temperature'? ...
    """
    ours = recipe.parent.parent == recipes_folder()
    packages = {"_recipe": recipe.parent, "align_cbrl.recipes": recipes_folder()}
    for package in ("align_cbrl", "toy_cmdp"):
        packages |= {package: Path(str(spec.origin)).parent} if (spec := importlib.util.find_spec(package)) else {}
    name = f"align_cbrl.recipes.{recipe.parent.name}" if ours else "_recipe"
    try:
        found = _Reader(packages).module(f"{name}.recipe", recipe).get("Config")
    except (_Unknown, OSError, SyntaxError):
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


class _Reader:
    """The modules that were read, each once."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self._packages = dict(sorted(packages.items(), key=lambda item: -len(item[0])))  # the innermost first
        self._modules: dict[str, _Module] = {}

    def module(self, name: str, file: Path | None = None) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module(self, name, file or self._file(name))
        return self._modules[name]

    def _file(self, name: str) -> Path:
        for package, folder in self._packages.items():
            if name == package or name.startswith(f"{package}."):
                stem = folder.joinpath(*name.removeprefix(package).split(".")[1:])
                for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if file.is_file():
                        return file
        raise _Unknown(name)


class _Module:
    """The top level of a file, of which only what is asked for is executed."""

    def __init__(self, reader: _Reader, name: str, file: Path) -> None:
        self._reader, self._file = reader, file
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        self._values: dict[str, Any] = {"__name__": name, "__builtins__": builtins}
        self._statements = {n: node for node in _top(ast.parse(file.read_bytes())) for n in _bound(node)}
        self._unknown: set[str] = set()

    def get(self, name: str) -> Any:
        """What a name of this module stands for."""
        if name not in self._values:
            if name in self._unknown or name not in self._statements:
                raise _Unknown(name)
            self._unknown.add(name)  # until it is known; a definition that needs itself is not
            self._values[name] = self._make(name, self._statements[name])
            self._unknown.discard(name)
        return self._values[name]

    def _make(self, name: str, node: ast.stmt) -> Any:
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
            module = _imported(alias.name)
            return module if alias.asname else sys.modules[name]
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            parents = self._package.split(".")[: len(self._package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            if source in _LIGHT or source.partition(".")[0] in sys.stdlib_module_names:
                return getattr(_imported(source), original)
            try:
                return self._reader.module(source).get(original)
            except OSError as error:
                raise _Unknown(name) from error
        if isinstance(node, ast.ClassDef):
            node = self._sliced(node)
        else:
            self._need(node)
        self._execute(node)
        return self._values[name]

    def _sliced(self, node: ast.ClassDef) -> ast.ClassDef:
        """A dataclass with its fields, and what it refuses by itself."""
        decorators = [d for d in node.decorator_list if self._known(d)]
        if not any("dataclass" in ast.unparse(decorator) for decorator in decorators):
            raise _Unknown(node.name)
        bases = node.bases
        for base in bases:  # without one, its fields would be refused
            self._need(base)
        body: list[ast.stmt] = [self._field(part) for part in node.body if isinstance(part, ast.AnnAssign)]
        fields = {n for part in body for n in _bound(part)} | {n for base in bases for n in self._fields(base)}
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__post_init__":
                kept = _of_self(part) <= fields and self._known(part)
                body.append(part if kept else ast.parse("def __post_init__(self): pass").body[0])
        sliced = copy.copy(node)
        sliced.bases, sliced.keywords, sliced.body, sliced.decorator_list = bases, [], body or [ast.Pass()], decorators
        return sliced

    def _field(self, part: ast.AnnAssign) -> ast.AnnAssign:
        if self._known(part.annotation) and (part.value is None or self._known(part.value)):
            return part
        self._values["_anything"] = Any
        value = None if part.value is None else ast.Constant(None)
        return ast.AnnAssign(part.target, ast.Name("_anything", ast.Load()), value, part.simple)

    def _fields(self, base: ast.expr) -> list[str]:
        cls = eval(compile(ast.Expression(base), str(self._file), "eval"), self._values)
        return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []

    def _known(self, node: ast.AST) -> bool:
        try:
            self._need(node)
        except _Unknown:
            return False
        return True

    def _need(self, node: ast.AST) -> None:
        """Make what the names inside stand for, but for its own ones."""
        own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id not in own and not hasattr(builtins, part.id):
                self.get(part.id)
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                raise _Unknown(ast.unparse(part))

    def _execute(self, node: ast.stmt) -> None:
        module = ast.fix_missing_locations(ast.Module([node], []))
        # Without the file's own `from __future__ import annotations`: what is made here has no module to be found in.
        exec(compile(module, str(self._file), "exec", dont_inherit=True), self._values)


def _imported(name: str) -> types.ModuleType:
    if name not in _LIGHT and name.partition(".")[0] not in sys.stdlib_module_names:
        raise _Unknown(name)
    importlib.import_module(name)
    return sys.modules[name]


def _top(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if TYPE_CHECKING` too: what they import is named in annotations."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement gives a meaning to."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _of_self(node: ast.AST) -> set[str]:
    """The attributes of `self` that are used inside."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    return {part.attr for part in parts if isinstance(part.value, ast.Name) and part.value.id == "self"}
