"""The site builds without a warning, can be searched, and its API reference has an entry for every public name."""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("align_cbrl", "align_cbrl.llm", "toy_cmdp")

if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


def test_every_package_has_a_page() -> None:
    for package in PACKAGES:
        assert f"::: {package}\n" in (ROOT / f"docs/api/{package}.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_documents_every_public_name_and_can_be_searched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    assert [record.getMessage() for record in caplog.records] == []
    for package in PACKAGES:
        module = importlib.import_module(package)
        text = (tmp_path / f"site/api/{package}/index.html").read_text(encoding="utf-8")
        entries = {html.unescape(name) for name in re.findall(r'<h\d id="([^"]+)"', text)}
        names = [name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)]
        assert [name for name in names if f"{package}.{name}" not in entries] == []
    index = json.loads((tmp_path / "site/search/search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"]: entry["text"] for entry in index["docs"]}
    assert {"trl_script/", "llm_judge/", "own_problem/", "api/toy_cmdp/#toy_cmdp.four_rooms"} <= set(found)
    assert "Boltzmann" in found["trl_script/#best-response-or-next-step"]  # the text, and not headings only
