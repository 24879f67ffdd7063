"""What is looked at before anything is trained: all that a configuration names, and the room on the disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align_cbrl.errors import InputError, RunStopped
from align_cbrl.runs.config import Sources, named_in, to_dict
from align_cbrl.runs.imports import load_object, require_package

_OWN_FILE = re.compile(r".+\.py:[A-Za-z_][\w.]*")
_LEAST = 50 * 2**20  # bytes that any run may need for its tables, curves and report


class Preflight:
    """Collects everything that is wrong with a configuration, each with the key and where its value comes from.

    A recipe's function `preflight(config, notes)` is given one. Whatever it calls raises `InputError` as always; inside
    `about` that is noted, and the check goes on with what does not depend on it.

    Args:
        config: an instance of a dataclass.
        sources: where its values come from.
        out: the run's folder, which need not exist.

    Attributes:
        wrong: what was found to be wrong.
        right: what was found to be there, by key.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Config:
        ...     judge: str = "math.sqr"
        >>> notes = Preflight(Config(), Sources.read(None, ["judge=math.sqr"]), Path("runs/mine"))
        >>> with notes.about("judge"):
        ...     judge = load_object("math.sqr")
        >>> notes.wrong[0].partition(";")[0]
        "--set judge=math.sqr: judge: 'math.sqr': the module math has no 'sqr'"
    """

    def __init__(self, config: Any, sources: Sources, out: Path) -> None:
        self._tree, self._sources, self._out = to_dict(config), sources, out
        self.wrong: list[str] = []
        self.right: dict[str, str] = {}
        self._refused: set[str] = set()

    @contextlib.contextmanager
    def about(self, key: str) -> Iterator[None]:
        """Note what the block refuses, and go on after it; `key` is dotted, as `--set` takes it."""
        try:
            yield
        except (InputError, RunStopped) as error:
            named, message = named_in(str(error))
            deeper = ".".join([*([key] if key else []), *named])
            # A message that begins with the name of a field inside is about that field; or it repeats the key.
            if named and _reaches(self._tree, deeper):
                key = deeper
            elif not named or tuple(key.split("."))[-len(named) :] != named:
                message = str(error)
            self._refused.add(key)
            told = f"{self._sources.where(key)}: {message}"
            if told not in self.wrong:
                self.wrong.append(told)

    def refused(self, key: str) -> bool:
        """Whether something was wrong at `key`, so that what depends on it need not be looked at."""
        return key in self._refused

    def found(self, key: str, what: str) -> None:
        """Note what is there, in words for `align-cbrl check`."""
        self.right[key] = what

    def need_package(self, package: str, extra: str, purpose: str, key: str = "") -> None:
        """Note that an optional package is not installed; see `require_package`."""
        with self.about(key):
            require_package(package, extra, purpose)

    def need_room(self, size: float) -> None:
        """Note that the disk has less than the `size` bytes left that the run's folder will hold, or takes none."""
        folder = self._out.absolute()
        size = max(0.0, size - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())) + _LEAST
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            self.wrong.append(f"--out {self._out}: expected a folder that may be written, got {folder}, which may not")
            return
        free = shutil.disk_usage(folder).free
        if free < size:
            self.wrong.append(
                f"--out {self._out}: expected room for {_gigabytes(size)} on its disk, got {_gigabytes(free)}; make "
                "room, or choose an --out on another disk"
            )
        else:
            self.found("--out", f"{self._out}: {_gigabytes(size)} needed, {_gigabytes(free)} free")

    def conclude(self) -> None:
        """Raise InputError with everything that is wrong, a line each, if anything is."""
        if self.wrong:
            raise InputError("\nerror: ".join(self.wrong))


def check_paths(config: Any, notes: Preflight) -> None:
    """Load every function that a configuration names as `file.py:function`, whatever its keys are called."""
    for key, value in _texts(to_dict(config), ""):
        if _OWN_FILE.fullmatch(value):
            with notes.about(key):
                load_object(value)


def check_drawing(config: Any, notes: Preflight) -> None:
    """The `preflight` of a recipe that needs no more than to draw its curves."""
    notes.need_package("matplotlib", "plots", "curves")
    notes.need_room(0)


def _texts(tree: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield at, tree
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _texts(value, f"{at}.{key}" if at else str(key))


def _reaches(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        else:
            return False
    return True


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GB"
