"""Writes docs/api/*.md, a page for each package: every public name, its signature, and what it is.

Run `python docs/build_api.py`; `tests/test_api_pages.py` fails while a page is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("align_cbrl", "align_cbrl.llm", "toy_cmdp")
FOLDER = Path(__file__).parent / "api"
_WIDTH = 100  # of a signature in one line


def pages() -> dict[str, str]:
    """The text of every page by file name."""
    return {f"{name}.md": page(importlib.import_module(name)) for name in PACKAGES}


def page(package: ModuleType) -> str:
    """One package: a section for each module that defines public names, in the order in which they are listed."""
    modules: dict[str, list[str]] = {}
    for name in package.__all__:
        thing = getattr(package, name)
        where = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", package.__name__)
        modules.setdefault(where, []).append(name)
    parts = [f"# {package.__name__}", summary(package), "Written by `python docs/build_api.py` from the docstrings."]
    for where, names in modules.items():
        parts.append(f"## {where}")
        parts += [summary(importlib.import_module(where))]
        for name in names:
            thing = getattr(package, name)
            if not inspect.ismodule(thing):
                parts += entry(name, thing)
    return "\n\n".join(parts) + "\n"


def entry(name: str, thing: Any) -> list[str]:
    """A class with its own public methods and properties, a function, or a value."""
    if not callable(thing):
        return [f"### {name}", f"A {type(thing).__name__}."]
    parts = [f"### {name}", f"```text\n{signature(name, thing)}\n```", summary(thing)]
    if inspect.isclass(thing):
        members = []
        for member, value in vars(thing).items():
            if isinstance(value, property):
                members.append(f"- `{member}`: {summary(value)}")
            elif not member.startswith("_") and callable(function := getattr(value, "__func__", value)):
                members.append(f"- `{signature(member, function, width=None)}`: {summary(function)}")
        if members:
            parts.append("\n".join(members))
    return parts


def signature(name: str, function: Any, width: int | None = _WIDTH) -> str:
    """`name(parameters) -> result`; longer than `width`, one parameter a line."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return name
    words: list[str] = []
    kinds = [p.kind for p in found.parameters.values()]
    for i, parameter in enumerate(found.parameters.values()):
        if parameter.name in ("self", "cls") and i == 0:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words and parameter.VAR_POSITIONAL not in kinds:
            words.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        word = f"{stars}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            word += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            equals = " = " if parameter.annotation is not parameter.empty else "="
            word += f"{equals}{default(parameter.default)}"
        words.append(word)
    result = "" if found.return_annotation in (found.empty, None, "None") else found.return_annotation
    arrow = f" -> {annotation(result)}" if result and not inspect.isclass(function) else ""
    line = f"{name}({', '.join(words)}){arrow}"
    if width is None or len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){arrow}"


def annotation(given: Any) -> str:
    """A type as it is written in the source."""
    return given if isinstance(given, str) else getattr(given, "__name__", str(given))


def default(value: Any) -> str:
    """A default value, without the address that a function's repr would show."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return str(value.__name__)
    text = repr(value)
    return "..." if re.search(r"<factory>| at 0x|object", text) else text


def summary(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    text = inspect.getdoc(thing) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
