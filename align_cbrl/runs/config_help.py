"""What a configuration can hold, as text: every key with its type, default and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from align_cbrl.runs.config import default_of, tag, to_plain, type_name, variant_key

_WIDTH = 110
_ENTRY = re.compile(r" {4}(\w[\w, ]*): (.*)")


def describe(cls: type) -> str:
    """The dotted keys of a configuration, as `--set` takes them, with their types, defaults and documentation.

    Args:
        cls: a dataclass. The meaning of a field is read from the section "Attributes:" of its class's docstring, or of
            a base class's. Of a union of dataclasses every variant is listed, by its tag.

    Example:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     '''A job.
        ...
        ...     Attributes:
        ...         steps: of the leader.
        ...     '''
        ...     steps: int = 10
        ...     path: str | None = None
        >>> print(describe(Config))
        steps: an integer; default 10
            of the leader.
        path: a string or null; default null
    """
    return "\n".join(_lines(cls, "", None, skip=None))


def _lines(cls: Any, prefix: str, default: Any, skip: str | None) -> Iterator[str]:
    """The lines of one dataclass; `skip` is the tag that a heading has named already."""
    hints, meanings = get_type_hints(cls), _meanings(cls)
    for field in dataclasses.fields(cls):
        if not field.init or field.name == skip:
            continue
        name, hint = f"{prefix}{field.name}", hints[field.name]
        value = getattr(default, field.name) if default is not None else default_of(field)
        classes, below = _classes(hint, name)
        if not classes:
            yield f"{name}: {type_name(hint)}; {_shown(value)}"
            yield from _wrapped(meanings.get(field.name, ""))
            continue
        tagged = len(classes) > 1 and tag(classes[0])[1]
        if len(classes) == 1:
            needed = "" if value is not dataclasses.MISSING else " (required)"
            yield f"{name}: {'null, or ' if value is None else ''}a mapping of the keys below{needed}"
        elif tagged:
            names = ", ".join(str(v) for variant in classes for v in tag(variant)[1])
            yield f"{name}: by its {tag(classes[0])[0]}, one of {names}"
        else:
            names = ", ".join(variant_key(variant) for variant in classes)
            yield f"{name}: by the key that is given, one of {names}"
        yield from _wrapped(meanings.get(field.name, ""))
        for variant in classes:
            own = value if isinstance(value, variant) else None
            key, values = tag(variant) if tagged else ("", ())
            if len(classes) > 1:
                title = f"{key}: {' or '.join(map(str, values))}" if tagged else variant_key(variant)
                chosen = ", the default" if own is not None else ""
                yield f"  {name} with {title}{chosen}. {(inspect.getdoc(variant) or '').splitlines()[0]}"
            lines = _lines(variant, f"{below}.", own, skip=key if len(values) == 1 else None)
            yield from textwrap.indent("\n".join(lines), "  " if len(classes) == 1 else "    ").splitlines()


def _classes(hint: Any, name: str) -> tuple[list[Any], str]:
    """The dataclasses that a hint allows, and the dotted name of what holds their fields."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [_classes(member, name) for member in arguments]
        return [cls for classes, _ in found for cls in classes], next((at for c, at in found if c), name)
    if dataclasses.is_dataclass(hint):
        return [hint], name
    if origin in (list, tuple, Sequence) and arguments:
        return _classes(arguments[0], f"{name}.N")
    if origin in (dict, Mapping) and len(arguments) == 2:
        return _classes(arguments[1], f"{name}.NAME")
    return [], name


def _meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its fields; the nearest class has the last word."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        names: list[str] = []
        for line in section.splitlines():
            if line and not line.startswith(" "):
                break
            entry = _ENTRY.fullmatch(line)
            if entry:
                names = [name.strip() for name in entry[1].split(",")]
                found.update(dict.fromkeys(names, entry[2]))
            else:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return f"default {json.dumps(to_plain(value), ensure_ascii=False)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
