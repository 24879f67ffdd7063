"""Objects by `package.module.attribute` or `file.py:attribute`, and recipes by name or folder."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.runs.config import nearest

_BY_PATH = "align_cbrl_by_path_"  # packages that stand for folders; a module of one cannot be imported by name


def load_object(path: str) -> Any:
    """The object that `path` names.

    Args:
        path: `package.module.attribute` for what is installed (`math.sqrt`, or a class's method), or
            `file.py:attribute` for a file of one's own, absolute or relative to the working directory. A file is
            executed once, however often it is named.

    Raises:
        InputError: `path` has neither form, there is no such file, module or attribute (the message lists the near
            ones), or the module fails while it is imported.

    Example:
        >>> load_object("os.path.basename")("runs/docstrings")
        'docstrings'
    """
    filename, colon, attribute = path.rpartition(":")
    if colon and filename.endswith(".py") and attribute:
        return _attribute(_import_file(Path(filename), path), attribute.split("."), path)
    parts = path.split(".")
    if colon or len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InputError(f"{path!r}: expected package.module.attribute or file.py:attribute")
    module = _import(parts[0], path)
    if module is None:
        installed = [m.name for m in pkgutil.iter_modules()]
        raise InputError(
            f"{path!r}: there is no module {parts[0]!r}{_close(parts[0], installed)}; for a file of your own write "
            f"file.py:attribute"
        )
    for position, part in enumerate(parts[1:], start=1):
        submodule = None
        if not hasattr(module, part) and hasattr(module, "__path__"):
            submodule = _import(".".join(parts[: position + 1]), path)
        elif isinstance(sys.modules.get(f"{module.__name__}.{part}"), ModuleType) and position < len(parts) - 1:
            submodule = sys.modules[f"{module.__name__}.{part}"]
        if submodule is None:
            return _attribute(module, parts[position:], path)
        module = submodule
    return module


def _import(name: str, path: str) -> ModuleType | None:
    """The module `name`, or None when it does not exist."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise InputError(f"{path!r}: {name} needs the module {error.name!r}, which is not installed") from error
    except Exception as error:
        raise InputError(f"{path!r}: importing {name} failed: {type(error).__name__}: {error}") from error


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raise `InputError` unless an optional package is installed, before anything is done that will need it.

    Args:
        package: its name in an import.
        extra: of align-cbrl, with which it is installed.
        purpose: who needs it.

    Example:
        >>> require_package("json", "plots", "curves")
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{purpose}: need {package}, which is not installed: pip install 'align-cbrl[{extra}]'")


def load_recipe(recipe: str | None) -> ModuleType | None:
    """The module recipe.py of a recipe.

    Args:
        recipe: the name of one that comes with the library, or the folder of somebody's own. A folder is a package:
            its files may import each other relatively. Its modules have names that follow from its path, so that
            another process that has loaded it too can unpickle what is defined in it. None does nothing.

    Raises:
        InputError: there is no such recipe (the message lists the near names), or it fails while it is imported.

    Example:
        >>> load_recipe("four_rooms").__name__
        'align_cbrl.recipes.four_rooms.recipe'
    """
    if recipe is None:
        return None
    if recipe in recipe_names():
        return _import(f"align_cbrl.recipes.{recipe}.recipe", recipe)
    folder = Path(recipe).expanduser()
    if not folder.is_dir() and len(folder.parts) < 2:
        raise InputError(f"there is no recipe {recipe!r}; {nearest(recipe, recipe_names())}")
    file = folder / "recipe.py"
    if not file.is_file():
        raise InputError(f"recipe {recipe!r}: expected a recipe's name, or a folder with a recipe.py, got no {file}")
    return _import_file(file, recipe)


def recipe_folder(recipe: str) -> Path:
    """Where a recipe's YAML files lie; `recipe` as for `load_recipe`."""
    return recipes_folder() / recipe if recipe in recipe_names() else Path(recipe).expanduser()


def recipes_folder() -> Path:
    """The folder of the recipes that come with the library."""
    package: Any = importlib.import_module("align_cbrl.recipes")
    return Path(package.__path__[-1])


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(folder.name for folder in recipes_folder().iterdir() if (folder / "recipe.py").is_file())


def recipe_of(definition: Any) -> str | None:
    """The absolute folder from which a function or class was loaded by path; None where its module has a name."""
    module = sys.modules.get(definition.__module__)
    if module is None or not definition.__module__.startswith(_BY_PATH):
        return None
    return str(Path(str(module.__file__)).parent)


def _import_file(file: Path, path: str) -> ModuleType:
    """A file as a module of a package that stands for its folder, so that it may import its neighbours relatively."""
    resolved = file.expanduser().resolve()
    if not resolved.is_file():
        neighbours = [f.name for f in resolved.parent.glob("*.py")] if resolved.parent.is_dir() else []
        raise InputError(f"{path!r}: there is no file {resolved}{_close(resolved.name, neighbours)}")
    package = f"{_BY_PATH}{hashlib.sha256(str(resolved.parent).encode()).hexdigest()[:12]}"
    name = f"{package}.{resolved.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if package not in sys.modules:
        folder = ModuleType(package)
        folder.__path__ = [str(resolved.parent)]
        sys.modules[package] = folder
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InputError(f"{path!r}: {resolved} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path!r}: running {resolved} failed: {type(error).__name__}: {error}") from error
    return module


def _attribute(found: Any, names: list[str], path: str) -> Any:
    for name in names:
        if not hasattr(found, name):
            public = [n for n in dir(found) if not n.startswith("_")]
            if isinstance(found, ModuleType):
                public += [m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))]
                owner = f"the file {found.__file__}" if ":" in path else f"the module {found.__name__}"
            else:
                owner = f"{getattr(found, '__name__', type(found).__name__)}"
            raise InputError(f"{path!r}: {owner} has no {name!r}; {nearest(name, set(public))}")
        found = getattr(found, name)
    return found


def _close(word: str, options: list[str]) -> str:
    """What may have been meant, without the list of everything there is."""
    meant, question, _ = nearest(word, set(options)).partition("?")
    return f"; {meant}?" if question else ""
