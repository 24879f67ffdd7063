"""What a run's numbers depend on: settings, code by its content, data, versions. Two runs of the same facts are one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.errors import InputError
from align_cbrl.identity import content_digest, identity_of
from align_cbrl.runs.config import to_dict
from align_cbrl.runs.imports import load_object

PACKAGES = ("align-cbrl", "torch", "transformers", "trl")
"""Whose versions change numbers."""
FILES = ("data", "model", "proxy", "reward_model", "template")
"""Last parts of the keys under which a configuration names files and folders."""
PRACTICAL_OF_JUDGE = (
    *("budget", "cache", "retries", "wait", "rate", "timeout", "token_variable", "concurrency", "attempts", "prices"),
    *("max_calls", "max_tokens", "max_cost"),
)
"""Settings of a judge that change no score, so that a run may be resumed with others: a larger budget, say."""
UNREADABLE = "what it does cannot be read"
_OWN_FILE = re.compile(r".+\.py:[A-Za-z_][\w.]*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_SAMPLED = 64 * 2**20  # bytes; of a larger file, places all over it are read
_DEEP = 12


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """The installed versions of packages; null for one that is not installed."""
    return {name: _version(name) for name in names}


def facts_of(config: Any) -> dict[str, Any]:
    """What a configuration's numbers depend on besides its own values: what it names, by content, and versions.

    Args:
        config: an instance of a dataclass. A value `file.py:function` or `package.module.function` is code; one under a
            key of `FILES` that is a file or a folder is data.

    Returns:
        `UNREADABLE` stands for code without an identity, such as a function that holds a connection.

    Raises:
        InputError: `file.py:function` names a file or function that does not load.

    Example:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     judge: str = "os.path.basename"
        >>> sorted(facts_of(Config()))
        ['content of judge', 'version of align-cbrl', 'version of torch', 'version of transformers', 'version of trl']
    """
    found: dict[str, Any] = {f"version of {name}": version for name, version in versions().items()}
    for key, value in _texts(to_dict(config), ()):
        content = _named_code(value)
        if content is None and key[-1] in FILES:
            content = _files(value)
        if content is not None:
            found[f"content of {'.'.join(key)}"] = content
    return found


def settings_of(thing: Any, practical: bool = False) -> Any:
    """What an object was made with, as plain data: the arguments of its constructor that it keeps under their names.

    Numbers that training moves are left out: of parameters only the shapes count. Functions are their content.

    Args:
        thing: any object.
        practical: with settings that change no number, such as a judge's budget, and those that a run moves.

    Example:
        >>> settings_of(torch.nn.Linear(2, 1))["in_features"]
        2
        >>> settings_of({"a": torch.zeros(2)}) == settings_of({"a": torch.ones(2)})
        False
    """
    return _Settings(practical).of(thing, _DEEP)


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Kind and settings of an optimizer, one a group where they differ."""
    groups = [{k: v for k, v in group.items() if k in optimizer.defaults} for group in optimizer.param_groups]
    own = [settings_of(group) for group in groups]
    return {"kind": type(optimizer).__name__, "groups": own[0] if all(g == own[0] for g in own) else own}


def differences_in_words(before: Any, now: Any) -> str:
    """Where facts differ: key, what it was, and what it is.

    Example:
        >>> differences_in_words({"seed": 0, "hpgd": {"steps": 3}}, {"seed": 1, "hpgd": {"steps": 3}})
        'seed was 0, is 1'
    """
    return "; ".join(
        f"{key} was {_short(was)}, is {_short(now_is)}" for key, (was, now_is) in differences([before, now]).items()
    )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries under dotted names.

    Example:
        >>> flat({"seed": 0, "hpgd": {"steps": 3}})
        {'seed': 0, 'hpgd.steps': 3}
    """
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def differences(trees: list[Any]) -> dict[str, list[Any]]:
    """Dotted names whose values are not the same in all configurations, with the values; a missing one is None.

    Example:
        >>> differences([{"seed": 0, "hpgd": {"steps": 3}}, {"seed": 0, "hpgd": {"steps": 4}}])
        {'hpgd.steps': [3, 4]}
    """
    leaves = [flat(tree) for tree in trees]
    values = {name: [tree.get(name) for tree in leaves] for tree in leaves for name in tree}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


class _Settings:
    """Objects as plain data; one that contains itself ends there."""

    def __init__(self, practical: bool) -> None:
        self._practical = practical
        self._inside: set[int] = set()

    def of(self, value: Any, depth: int) -> Any:
        if isinstance(value, float):
            return float(value)  # plain, also of a class of its own
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if depth == 0 or id(value) in self._inside:
            return type(value).__name__
        self._inside.add(id(value))
        try:
            return self._plain(value, depth - 1)
        finally:
            self._inside.discard(id(value))

    def _plain(self, value: Any, depth: int) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad):
            return list(value.shape)
        if isinstance(value, Tensor):
            return value.tolist() if value.numel() <= 8 else f"tensor {content_digest(value)[:12]}"
        if isinstance(value, Mapping):
            return {str(k): self.of(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset, nn.ModuleList)):
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            return [self.of(item, depth) for item in items]
        if isinstance(value, nn.ModuleDict):
            return {name: self.of(module, depth) for name, module in value.items()}
        if hasattr(value, "column_names") and hasattr(value, "__len__"):  # a dataset
            rows = hashlib.sha256()
            for start in range(0, len(value), 1000):  # columns of many rows, which are read much faster than rows
                columns = value[start : start + 1000]
                rows.update(json.dumps(columns, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
            return f"{len(value)} rows {rows.hexdigest()[:12]}"
        if inspect.isroutine(value) or inspect.isclass(value):
            return identity_of(value) or UNREADABLE
        if not isinstance(value, nn.Module) and hasattr(value, "identity"):  # a judge, say, however often it is asked
            names = ("columns", "both_orders", *(PRACTICAL_OF_JUDGE if self._practical else ()))
            besides = {name: self.of(getattr(value, name), depth) for name in names if hasattr(value, name)}
            return {"identity": value.identity or UNREADABLE, **besides}
        return {"kind": type(value).__qualname__, **self._arguments(value, depth)}

    def _arguments(self, value: Any, depth: int) -> dict[str, Any]:
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
        else:
            try:
                names = list(inspect.signature(type(value)).parameters)
            except (TypeError, ValueError):
                names = []
        left_out = set() if self._practical else _moving(value)
        kept = {name: getattr(value, name) for name in names if hasattr(value, name) and name not in left_out}
        found = {name: self.of(part, depth) for name, part in kept.items() if not isinstance(part, torch.dtype)}
        if isinstance(value, nn.Module):
            found["parameters"] = {name: list(p.shape) for name, p in value.named_parameters() if p.requires_grad}
        return found


def _moving(value: Any) -> set[str]:
    """Arguments that a run changes: what a checkpoint restores; and a follower's seed, which is the run's."""
    if isinstance(value, nn.Module) or not hasattr(value, "state_dict"):
        return set()
    if hasattr(value, "rollout"):  # its state is large
        return {"seed"}
    return {name for name, part in value.state_dict().items() if isinstance(part, (int, float))}


def _texts(tree: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """All texts in a configuration, with where they stand."""
    if isinstance(tree, str):
        yield at, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, (*at, str(key)))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _texts(value, (*at, str(i)))


@functools.cache  # a file is executed once in a process: what it has become since is not what was loaded
def _named_code(path: str) -> str | None:
    """The content of the function that a text names; None where it names none."""
    if _OWN_FILE.fullmatch(path):
        return identity_of(load_object(path)) or UNREADABLE
    if not _DOTTED.fullmatch(path) or importlib.util.find_spec(path.partition(".")[0]) is None:
        return None
    try:
        named = load_object(path)
    except InputError:  # whoever needs it will say so
        return None
    return identity_of(named) or UNREADABLE


def _files(name: str) -> str | None:
    """A digest of a file or of all files in a folder; None where there is neither, such as for a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        return _digest(path)
    if not path.is_dir():
        return None
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        whole.update(f"{file.relative_to(path).as_posix()} {_digest(file)}\n".encode())
    return whole.hexdigest()[:16]


def _digest(file: Path) -> str:
    digest, size = hashlib.sha256(), file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as content:
        if size <= _SAMPLED:
            digest.update(content.read())
        else:
            for part in range(64):
                content.seek(part * (size - 2**20) // 63)
                digest.update(content.read(2**20))
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
