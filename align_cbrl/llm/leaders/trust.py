"""What loading a saved leader may run: nothing that its folder names, unless the caller says so."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from align_cbrl.errors import InputError
from align_cbrl.llm.scoring import ScoreFunction


@dataclasses.dataclass(frozen=True)
class Trust:
    """What the caller of `load_leader` allows; leaders that are saved inside another one are loaded with the same.

    Attributes:
        code: whether classes and functions that the folder names are imported, which runs their modules.
        terms: reward functions by the name of their term, used in place of what the folder names.
        used: the terms that were asked for.
    """

    code: bool = False
    terms: Mapping[str, ScoreFunction] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)


_PRESENT: contextvars.ContextVar[Trust] = contextvars.ContextVar("trust")


@contextlib.contextmanager
def trusting(code: bool, terms: Mapping[str, ScoreFunction]) -> Iterator[Trust]:
    """Load with this trust; inside another `trusting`, with what that allows as well.

    Raises:
        InputError: terms that nothing has asked for, once everything is loaded.
    """
    outer = _PRESENT.get(Trust())
    trust = Trust(code or outer.code, {**outer.terms, **terms})
    token = _PRESENT.set(trust)
    try:
        yield trust
    finally:
        _PRESENT.reset(token)
    if unused := sorted(set(terms) - trust.used):
        raise InputError(f"load_leader.terms: the saved leader has no terms named {unused}")
    outer.used.update(trust.used)


def given_term(name: str) -> ScoreFunction | None:
    """What the caller gave for the term, if anything."""
    trust = _PRESENT.get(Trust())
    if name not in trust.terms:
        return None
    trust.used.add(name)
    return trust.terms[name]


def code_is_trusted() -> bool:
    """Whether modules that the folder names may be imported."""
    return _PRESENT.get(Trust()).code


def own_function(path: str) -> ScoreFunction | None:
    """A reward function that this library itself defines; None for every other name, which is not looked up.

    It has to be a public function, defined where its name says, that takes `completions`: an attribute of an attribute,
    such as `align_cbrl.cli.sys.exit`, and a function that does anything else are none of them.

    Example:
        >>> own_function("align_cbrl.recipes.worlds.replies.rewards.length")(["Hi?"], ["Hello."]) != []
        True
        >>> own_function("subprocess.getoutput") is own_function("align_cbrl.cli.main") is None
        True
    """
    module, _, name = path.rpartition(".")
    if not path.startswith("align_cbrl.") or name.startswith("_") or not all(p.isidentifier() for p in path.split(".")):
        return None
    try:
        found: Any = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    if not isinstance(found, FunctionType) or (found.__module__, found.__qualname__) != (module, name):
        return None
    return found if "completions" in inspect.signature(found).parameters else None
