"""A reward server in a process that tests kill; forked from one that has imported everything already."""

from __future__ import annotations

import os
from pathlib import Path

from align_cbrl.llm.engines.http import serve
from align_cbrl.llm.engines.settings import ServeSettings
from align_cbrl.runs.config import load_config


def run(folder: str, port: int) -> None:
    """`align-cbrl serve leader.yaml --out out --port PORT` in a folder, and its address in the file `address`."""
    os.chdir(folder)
    config = load_config(ServeSettings, Path("leader.yaml"))
    serve(config, Path("out"), host="127.0.0.1", port=port, ready=lambda url, _: _note(Path("address"), url))


def _note(file: Path, url: str) -> None:
    file.with_suffix(".new").write_text(url)
    file.with_suffix(".new").rename(file)
