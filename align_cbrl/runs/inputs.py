"""What a configuration names: a file, folder or module that is not there is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from align_cbrl.errors import InputError
from align_cbrl.runs.config import near_path
from align_cbrl.runs.imports import load_object
from align_cbrl.runs.preflight import Preflight

DATA_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""The loaders of datasets for files, by suffix."""


def check_file(what: str, source: str) -> None:
    """Refuse a file of data that is not there; a folder, a hub id or a function is left to whoever loads it.

    Raises:
        InputError: there is no such file; with those beside it that have a similar name.

    Example:
        >>> check_file("data", "promts.jsonl")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: data 'promts.jsonl': there is no such file
    """
    path = Path(source).expanduser()
    if path.suffix in DATA_FORMATS and not path.is_file():
        raise InputError(f"{what} {source!r}: there is no such file{near_path(path)}")


def check_folder(what: str, path: str) -> None:
    """Refuse a folder that is not there, without asking the hub, which may take a minute to be out of reach.

    A folder is meant by a path that begins with a slash, a dot or a tilde, and by one whose parent is a folder here.

    Raises:
        InputError: there is no such folder; with those beside it that have a similar name.

    Example:
        >>> check_folder("model", "./polici")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: model './polici': there is no such folder
    """
    folder = Path(path).expanduser()
    meant = path.startswith(("/", ".", "~")) or (len(folder.parts) > 1 and folder.parent.is_dir())
    if meant and not folder.is_dir():
        raise InputError(f"{what} {path!r}: there is no such folder{near_path(path)}")


def check_name(what: str, path: str) -> None:
    """Refuse a function whose file fails or lacks it, and one of a package that is not installed; import no package.

    Raises:
        InputError: as `load_object`, which finds the rest.

    Example:
        >>> check_name("judge", "my_jugde.judge")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        align_cbrl.errors.InputError: 'my_jugde.judge': there is no module 'my_jugde'; ...
    """
    top = path.partition(".")[0]
    if ":" in path or not top.isidentifier() or importlib.util.find_spec(top) is None:
        load_object(path)


@dataclasses.dataclass(frozen=True)
class Input:
    """For `Annotated`: what a value names or needs, and who refuses one for which that is not there."""

    what: str
    check: Callable[[str, Any], None]


Data = Annotated[str, Input("data", check_file)]
"""A field of a configuration: a file of data, a folder, a function or a hub id."""

Policy = Annotated[str, Input("model", check_folder)]
"""A folder or a hub id of a language model."""

Proxy = Annotated[str, Input("reward model", check_folder)]
"""A folder or a hub id of a reward model."""


Name = Annotated[str, Input("function", check_name)]
"""A function, as `package.module.function` or `file.py:function`."""


def check_inputs(config: Any, notes: Preflight) -> None:
    """Note what a configuration names in fields of these types, or in mappings to them, and what is not there."""
    for key, value, named in _inputs(config, ""):
        with notes.about(key):
            named.check(named.what, value)


def _inputs(config: Any, at: str) -> Iterator[tuple[str, Any, Input]]:
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _inputs(value, f"{at}{name}.")
        parts = {f"{at}{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {}
        for key, part in (parts or {f"{at}{name}": value}).items():
            if part:  # neither null nor empty
                yield from ((key, part, named) for named in _marks(hint))


def _marks(hint: Any) -> Iterator[Input]:
    if get_origin(hint) is Annotated:
        yield from (extra for extra in get_args(hint)[1:] if isinstance(extra, Input))
    else:
        for part in get_args(hint):
            yield from _marks(part)
