"""Metrics as JSON lines: one row per outer step, readable while the run goes on, and cut back on resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from align_cbrl.distributed import is_main
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs.files import in_words, write_whole


class MetricsLog:
    """Appends rows to a JSON-lines file, readable at once, and on the disk when it is synced or closed.

    Numbers that are not finite become null: JSON has no word for them. In several processes rank 0 alone writes.

    Args:
        path: the file; its folder is created. Rows that are already there are kept.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsLog(path) as log:
        ...     log.append({"step": 0, "value": 0.5})
        ...     log.append({"step": 1, "value": float("nan")})
        >>> MetricsLog.read(path)
        [{'step': 0, 'value': 0.5}, {'step': 1, 'value': None}]
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it.

        Args:
            row: numbers, strings, booleans, None, one-element tensors, and lists and dictionaries of these.

        Raises:
            InputError: a value that JSON cannot hold.
            CheckpointError: the disk is full or refuses.
        """
        line = json.dumps(finite(row, "metrics"), allow_nan=False)
        if not is_main():
            return
        if self._file is None:
            with _in_words(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _drop_torn_line(self.path)
                self._file = self.path.open("a", encoding="utf-8")
        with _in_words(self.path):
            self._file.write(f"{line}\n")
            self._file.flush()

    def rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace whatever the file holds, be it damaged, by these rows."""
        self.close()
        if is_main():
            write_whole(self.path, "".join(f"{json.dumps(finite(row, 'metrics'), allow_nan=False)}\n" for row in rows))

    def truncate_after(self, step: int) -> None:
        """Drop the rows whose `step` is `step` or later, about to be redone, and a last line torn by a kill."""
        self.close()
        if not (is_main() and self.path.exists()):
            return
        kept = [row for row in self.read(self.path) if row.get("step", -1) < step]
        write_whole(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The rows of the file at `path`; a last line that is being written, or was torn by a kill, is left out.

        Raises:
            InputError: there is no such file, or a line before the last is not a JSON object.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError as error:
            raise InputError(f"{path}: there are no metrics here; has the run begun?") from error
        *lines, _torn = text.split("\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
            rows.append(row)
        return rows

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with _in_words(self.path), file:
                file.flush()
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self._file is not None:
            with _in_words(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {in_words(error)}") from error


def finite(value: Any, name: str) -> Any:
    """`value` as JSON holds it: one-element tensors as numbers, and null for numbers that are not finite.

    Args:
        value: numbers, strings, booleans, None, one-element tensors, and lists and mappings of these.
        name: what it is called in an error.

    Raises:
        InputError: a value that JSON cannot hold.

    Example:
        >>> finite({"value": float("nan"), "weights": (1.0, None)}, "row")
        {'value': None, 'weights': [1.0, None]}
    """
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): finite(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "size", None) is not None:  # a tensor or a NumPy scalar
        try:
            return finite(value.item(), name)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{name}: expected one number, got {type(value).__name__}: {error}") from error
    raise InputError(f"{name}: expected a number, a string or None, got {type(value).__name__}")


def _drop_torn_line(path: Path) -> None:
    """Cut the file back to its last complete line, lest the next row be glued to half a row."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
