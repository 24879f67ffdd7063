"""Reward functions and reward models inside a saved leader: written beside it, and found again."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.import_names import is_importable
from align_cbrl.llm.leaders.trust import code_is_trusted, given_term, own_function
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.scoring import ScoreFunction
from align_cbrl.runs.imports import load_object


def save_terms(terms: Mapping[str, ScoreFunction], folder: Path) -> dict[str, dict[str, Any]]:
    """Write terms into `folder`; returns the records, by name, that `load_term` reads.

    Reward models are copied. Functions are named by their dotted path; the source file of a function from outside any
    package is copied.

    Args:
        terms: by name, which may be any text: folders are named after its letters, digits, `_` and `-` only.
        folder: where the leader is saved.

    Raises:
        InputError: a term that cannot be found again, such as a lambda or a method.
    """
    records: dict[str, dict[str, Any]] = {}
    copied: dict[str, Path] = {}  # sources by the name of their copy; two files may have the same name
    for i, (name, term) in enumerate(terms.items()):
        if isinstance(term, RewardModel):
            place = f"term_{i}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:64]}"
            term.save_pretrained(folder / place)
            records[name] = {"reward_model": place, "max_length": term.max_length}
        else:
            records[name] = {"function": _dotted_path(name, term, folder, copied)}
    return records


def load_term(name: str, record: Mapping[str, Any], folder: Path) -> ScoreFunction:
    """A term that `save_terms` wrote, or the one that the caller of `load_leader` gave in its place.

    Raises:
        InputError: the record names a function whose code is not trusted, points outside the folder, or does not load.
    """
    if (given := given_term(name)) is not None:
        return given
    if "reward_model" in record:
        length = {"max_length": record["max_length"]} if "max_length" in record else {}  # of version 0.1: the default
        return RewardModel(inside(folder, record["reward_model"], f"term {name!r}"), **length)
    path: str = record["function"]
    if (own := own_function(path)) is not None:
        return own
    if not code_is_trusted():
        raise InputError(
            f"term {name!r}: is the function {path!r}, and loading it would run code that this folder names; if you "
            f"trust it, pass trust_code=True, or pass a function of your own: terms={{{name!r}: function}}"
        )
    file, _, attribute = path.rpartition(":")
    function: ScoreFunction = load_object(
        f"{inside(folder, file, f'term {name!r}')}:{attribute}" if file.endswith(".py") else path
    )
    return function


def inside(folder: Path, name: str, what: str) -> Path:
    """`folder / name`, refused unless it is directly inside the folder: a downloaded record is not to be trusted.

    Example:
        >>> inside(Path("reward"), "../../secret", "term 'a'")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: term 'a': expected a name inside the saved leader's folder, got '../../secret'
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise InputError(f"{what}: expected a name inside the saved leader's folder, got {name!r}")
    return folder / name


def _dotted_path(name: str, term: ScoreFunction, folder: Path, copied: dict[str, Path]) -> str:
    """How to import `term` again; the source file of a function from outside any package is copied to `folder`."""
    module, qualified = getattr(term, "__module__", None), getattr(term, "__qualname__", "<lambda>")
    if module is not None and "<" not in qualified:
        if is_importable(module) and getattr(importlib.import_module(module), qualified, None) is term:
            return f"{module}.{qualified}"
        # Of a script, or loaded from a file by path: carry the file along.
        if (code := getattr(term, "__code__", None)) is not None and (source := Path(code.co_filename)).is_file():
            return f"{_copy(source, folder, copied)}:{qualified}"
    raise InputError(
        f"term {name!r}: expected a reward model or a function defined at the top of a module, so that the reward can "
        f"be saved, got {term!r}"
    )


def _copy(source: Path, folder: Path, copied: dict[str, Path]) -> str:
    """The name of the copy of `source` in `folder`: its own, numbered if another source has it."""
    names = (f"{source.stem}{f'_{i}' if i else ''}{source.suffix}" for i in range(len(copied) + 1))
    name = next(name for name in names if copied.get(name, source) == source)
    copied[name] = source
    if not (folder / name).exists() or not (folder / name).samefile(source):
        shutil.copyfile(source, folder / name)
    return name
