"""Names under which another process can import a module, a function or a class."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from align_cbrl.errors import InputError, first_line


def is_importable(module: str) -> bool:
    """Whether another process can import `module` by name; that this process has loaded it is not enough.

    A script that is being run and a file that was loaded by its path are loaded, and cannot be imported by name.

    Example:
        >>> is_importable("os"), is_importable("__main__")
        (True, False)
    """
    parent = module.rpartition(".")[0]
    if module == "__main__" or (parent and not is_importable(parent)):
        return False
    path = getattr(importlib.import_module(parent), "__path__", None) if parent else None
    if parent and path is None:
        return False
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(module, path) is not None for finder in finders)


def class_name(cls: type) -> str:
    """The name `module:QualName` by which `imported_class` finds `cls` in another process.

    Raises:
        InputError: the class is defined in a script, inside a function, or in a file that was loaded by its path; or
            its name stands for something else by now.

    Example:
        >>> from align_cbrl.llm import RewardMixture
        >>> class_name(RewardMixture)
        'align_cbrl.llm.leaders.mixture:RewardMixture'
    """
    module, qualified = cls.__module__, cls.__qualname__
    name = f"{module}:{qualified}"
    if module in ("__main__", "__mp_main__"):
        raise _not_importable(
            cls,
            "it is defined in the script or session that is running",
            "move it to a module of its own, such as my_leader.py beside the script, and import it from there",
        )
    if "<locals>" in qualified:
        raise _not_importable(cls, "it is defined inside a function", "define it at the top of a module")
    if not is_importable(module):
        raise _not_importable(
            cls,
            f"its module {module!r} was loaded from a file by its path",
            "put the file's folder on PYTHONPATH, or install it as a package, and import the class by name",
        )
    if _attribute(importlib.import_module(module), qualified) is not cls:
        raise _not_importable(
            cls, f"{name} is not this class: it was defined twice, or renamed", "import the class anew"
        )
    return name


def imported_class(name: str) -> type:
    """The class that `module:QualName` names. Imports its module, and so runs the module's code.

    Raises:
        InputError: the name has another form, the module cannot be imported, or it has no such class.

    Example:
        >>> imported_class("collections:OrderedDict").__name__
        'OrderedDict'
    """
    module, _, qualified = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *qualified.split("."))):
        raise InputError(f"{name!r} is not the name of a class; expected module:Class")
    try:
        found = _attribute(importlib.import_module(module), qualified)
    except Exception as error:  # whatever the module raises while it runs
        raise InputError(
            f"the module {module!r} cannot be imported ({type(error).__name__}: {first_line(error)}); install the "
            "package that defines it, or put the folder of its file on PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise InputError(f"the module {module!r} has no class {qualified!r}; was it renamed or moved?")
    return found


def _attribute(found: Any, qualified: str) -> Any:
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found


def _not_importable(cls: type, reason: str, advice: str) -> InputError:
    return InputError(
        f"{cls.__name__}: cannot be saved, since a saved leader names its class as module:Class, and another process "
        f"could not import this one: {reason}; {advice}"
    )
