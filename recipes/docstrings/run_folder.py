"""The run's own folder: what it was configured with, which rows are finished, what took how long."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cbrl.config import fingerprint, to_dict
from align_cbrl.errors import CheckpointError
from recipes.docstrings.config import Config


def claim(out: Path, config: Config) -> None:
    """Make `out` this configuration's folder. Raises CheckpointError when it is already another one's."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.json"
    if file.exists():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(to_dict(config)))
        if fingerprint(theirs) != fingerprint(ours):
            differing = sorted(key for key in ours if ours[key] != theirs.get(key))
            raise CheckpointError(
                f"{out}: holds a run of another configuration (different: {', '.join(differing)}); choose another "
                "--out, or go back to its settings"
            )
    else:
        write_json(file, to_dict(config))


def write_json(file: Path, value: Any) -> None:
    """Write whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


class Rows:
    """The evaluated policies, kept in a file so that a resumed run does not evaluate them again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.done[name] = row
        write_json(self.file, self.done)


class Clock:
    """Seconds by stage, added up over interruptions."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add what happens inside to `stage`, also when it is interrupted."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, self.seconds)
