"""What a judge has said, on disk: nothing is paid for twice, and what was spent is known after a kill."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align_cbrl.errors import InputError, RunStopped

_AT_ONCE = 500  # keys in one query


class JudgeCache:
    """Scores by the key of what was judged, and how many were paid for, by judge.

    On disk it is an SQLite database. `add` returns when the scores are on the disk itself (fsync), and a score is used
    only after that. What a kill can lose is the answer to a question that was under way. Stages and
    processes may share one file. It holds keys and scores, no texts.

    Args:
        path: of the database, made when it is missing; None keeps everything in memory, about 200 bytes a score.

    Raises:
        InputError: the file is there, but is no such database.
        RunStopped: it cannot be written, because the disk is full, say.

    Example:
        >>> cache = JudgeCache()
        >>> cache.add("my judge", {"k1": 0.5, "k2": 1.0})
        >>> cache.get(["k1", "k3"]), cache.spent("my judge")
        ({'k1': 0.5}, 2)
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._scores: dict[str, float] = {}
        self._spent: Counter[str] = Counter()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._database() as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL) WITHOUT ROWID")
                database.execute("CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, completions INTEGER)")

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """The scores of those `keys` that are known."""
        if self.path is None:
            return {key: self._scores[key] for key in keys if key in self._scores}
        found: dict[str, float] = {}
        with self._database() as database:
            for start in range(0, len(keys), _AT_ONCE):
                some = list(keys[start : start + _AT_ONCE])
                marks = ", ".join("?" * len(some))
                found.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", some))
        return found

    def add(self, judge: str, scores: Mapping[str, float]) -> None:
        """Keep scores that `judge` has just been paid for, all of them or none."""
        if self.path is None:
            self._scores.update(scores)
            self._spent[judge] += len(scores)
            return
        with self._database() as database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", list(scores.items()))
            database.execute(
                "INSERT INTO spent VALUES (?, ?) ON CONFLICT (judge) DO UPDATE SET "
                "completions = completions + excluded.completions",
                (judge, len(scores)),
            )

    def spent(self, judge: str) -> int:
        """How many scores `judge` was paid for, in all runs that shared this cache."""
        if self.path is None:
            return self._spent[judge]
        with self._database() as database:
            row = database.execute("SELECT completions FROM spent WHERE judge = ?", (judge,)).fetchone()
        return 0 if row is None else int(row[0])

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction. A connection of its own, so that nothing stays open across forks and kills."""
        assert self.path is not None
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except sqlite3.OperationalError as error:
            raise RunStopped(
                f"judge cache {self.path}: {error}; repair that and resume, nothing before is lost"
            ) from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"judge cache {self.path}: expected a cache that align-cbrl wrote, got another file, or a damaged one "
                f"({error}); move it away or name another path"
            ) from error
