"""`Journal`: which requests were answered, and the completions that wait for a leader step, on disk."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_cbrl.errors import CheckpointError

REMEMBERED = 4096
"""Requests whose answers are kept; one that comes again is answered alike, and counted once."""

_NUMBER = "number INTEGER PRIMARY KEY AUTOINCREMENT"
_TABLES = (
    f"requests ({_NUMBER}, digest TEXT UNIQUE, version INTEGER, rewards TEXT)",
    f"rows ({_NUMBER}, period INTEGER, request INTEGER, row TEXT)",
    "counts (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID",
)
_COUNTS = ("period", "seen", "completions", "requests", "repeated", "taking_period", "taking_step")


class Answer(NamedTuple):
    """What a request was answered: its rewards, and the leader's version that they are of."""

    rewards: list[float]
    version: int


class Journal:
    """An SQLite database of a server's requests.

    Completions are counted in periods, at the end of each of which a leader step is due. Those that the leader learns
    from wait here with the number of their period. A request is written in one transaction, before it is answered: a
    killed process loses none of it. After a power cut the last ones may be missing, and are then asked again.

    Args:
        path: of the database, which is made if need be.

    Raises:
        CheckpointError: it cannot be written, or is no such database.

    Example:
        >>> import tempfile
        >>> journal = Journal(Path(tempfile.mkdtemp()) / "requests.sqlite")
        >>> journal.keep("digest", Answer([0.5, 1.0], 0), [{"prompt": "a"}, {"prompt": "a"}], count=2, period=2)
        >>> journal.answer("digest"), journal.due(), len(journal.rows(0))
        (Answer(rewards=[0.5, 1.0], version=0), 0, 2)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._in_words():
            # One connection; whoever owns the journal sees to it that one thread uses it at a time.
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            with self._transaction():
                for table in _TABLES:
                    self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                self._database.executemany("INSERT OR IGNORE INTO counts VALUES (?, 0)", [(name,) for name in _COUNTS])
            self.counts: dict[str, int] = dict(self._database.execute("SELECT name, value FROM counts"))

    def answer(self, digest: str) -> Answer | None:
        """What a request was answered; None where it is new, or too old."""
        with self._in_words():
            found = self._database.execute("SELECT rewards, version FROM requests WHERE digest = ?", (digest,))
            row = found.fetchone()
            if row is None:
                return None
            self._set(repeated=self.counts["repeated"] + 1)
        return Answer(json.loads(row[0]), row[1])

    def keep(self, digest: str, answer: Answer, rows: Sequence[dict[str, Any]], *, count: int, period: int) -> None:
        """Write down a request.

        Args:
            digest: of it.
            answer: that it gets.
            rows: of it, that the leader learns from; possibly none.
            count: completions in it.
            period: completions of a period, the present one of which ends where it is reached.
        """
        now = self.counts["period"]
        seen = self.counts["seen"] + count
        with self._in_words(), self._transaction():
            values = (digest, answer.version, json.dumps(answer.rewards))
            number = self._database.execute("INSERT INTO requests VALUES (NULL, ?, ?, ?)", values).lastrowid
            self._database.executemany(
                "INSERT INTO rows VALUES (NULL, ?, ?, ?)", [(now, number, json.dumps(row)) for row in rows]
            )
            self._database.execute("DELETE FROM requests WHERE number <= ?", ((number or 0) - REMEMBERED,))
            self._set(
                period=now + (seen >= period),
                seen=seen if seen < period else 0,
                completions=self.counts["completions"] + count,
                requests=self.counts["requests"] + 1,
            )

    def due(self) -> int | None:
        """The newest period that has ended and whose completions wait for a step; None where there is none."""
        with self._in_words():
            found = self._database.execute(
                "SELECT MAX(period) FROM rows WHERE period < ?", (self.counts["period"],)
            ).fetchone()
        return None if found[0] is None else int(found[0])

    def rows(self, period: int) -> list[tuple[int, dict[str, Any]]]:
        """The completions of a period in the order in which they came, each with the number of its request."""
        with self._in_words():
            found = self._database.execute("SELECT request, row FROM rows WHERE period = ? ORDER BY number", (period,))
            return [(request, json.loads(row)) for request, row in found]

    def taking(self, period: int, step: int) -> None:
        """Note that leader step `step` + 1 is being taken on a period, so that a restart knows whether it was."""
        with self._in_words(), self._transaction():
            self._set(taking_period=period, taking_step=step + 1)

    def drop(self, period: int) -> None:
        """Forget the completions of a period, and of those before it, which are of older policies."""
        with self._in_words(), self._transaction():
            self._database.execute("DELETE FROM rows WHERE period <= ?", (period,))

    def restarted(self, step: int) -> None:
        """Drop what the last leader step was taken on, where a kill came between its checkpoint and `drop`."""
        if self.counts["taking_step"] and step >= self.counts["taking_step"]:
            self.drop(self.counts["taking_period"])

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _set(self, **counts: int) -> None:
        self._database.executemany("UPDATE counts SET value = ? WHERE name = ?", [(v, n) for n, v in counts.items()])
        self.counts.update(counts)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        before = dict(getattr(self, "counts", {}))
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            self.counts = before
            raise

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{self.path}: {error}; make room or repair that, and start again: the leader's checkpoints and the "
                "judge's scores are in files of their own"
            ) from error
