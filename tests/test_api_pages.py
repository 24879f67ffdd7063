"""The API pages say what the code says, and nothing public is undocumented."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "build_api.py"

if not SCRIPT.is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(builder: ModuleType) -> None:
    pages = builder.pages()
    assert {file.name for file in builder.FOLDER.glob("*.md")} == set(pages)
    stale = [name for name, text in pages.items() if (builder.FOLDER / name).read_text(encoding="utf-8") != text]
    assert not stale, f"{stale}: run `python docs/build_api.py`"


def test_every_public_name_is_there_and_says_what_it_is(builder: ModuleType) -> None:
    for package in builder.PACKAGES:
        text = builder.pages()[f"{package}.md"]
        module = importlib.import_module(package)
        heads = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
        modules = [name for name in module.__all__ if isinstance(getattr(module, name), ModuleType)]
        assert sorted(heads + modules) == sorted(module.__all__)
        assert "`: \n" not in text and not text.endswith("`: ")  # a method without a docstring
        for name in heads:
            entry = text.split(f"### {name}\n\n", 1)[1].split("\n#", 1)[0]
            assert [part for part in entry.split("```")[-1].split("\n\n") if part.strip()], f"{package}.{name}"


def test_signatures_are_as_written(builder: ModuleType) -> None:
    def function(a: int, *, flag: bool = True, call: object = len, **rest: str | None) -> list[int]:
        return [a]

    assert builder.signature("f", function, width=None) == (
        "f(a: int, *, flag: bool = True, call: object = <built-in function len>, **rest: str | None) -> list[int]"
    )
    assert builder.signature("f", function, width=40) == (
        "f(\n    a: int,\n    *,\n    flag: bool = True,\n    call: object = <built-in function len>,\n"
        "    **rest: str | None,\n) -> list[int]"
    )
    assert builder.default(object()) == "..."
    assert builder.default(function) == "function"
