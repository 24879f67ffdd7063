"""`JudgeCache`: stored scores of judges, so that nothing is paid for twice, also after a process was killed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align_cbrl.checks import checked
from align_cbrl.errors import InputError, RunStopped
from align_cbrl.llm.judges.usage import Usage
from align_cbrl.runs.files import in_words

_AT_ONCE = 500  # keys in one query
_COUNTS = [field.name for field in dataclasses.fields(Usage)]
_TABLES = {"scores": ["key", "score"], "spent": ["judge", "completions"], "usage": ["judge", *_COUNTS]}


@checked
class JudgeCache:
    """Scores by a key of what was scored, and the number of scores paid for and the tokens spent on them, by judge.

    On disk it is an SQLite database, which several stages of a run and several processes may share. `add` returns once
    the scores are physically on the disk (fsync), and a score is used only after that, so that a kill can lose no more
    than the calls that were running. The database holds keys, scores and counts, no texts.

    Args:
        path: of the database, which is created if it does not exist; None: everything is kept in memory, at about 200
            bytes per score.

    Raises:
        InputError: the file exists, but is not such a database.
        RunStopped: the database cannot be written, for example because the disk is full.

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
        self._usage: dict[str, Usage] = {}
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_file() and self.path.stat().st_size == 0:
                    warnings.warn(f"judge cache {self.path}: is empty; what was in it is asked again", stacklevel=2)
            except OSError as error:
                raise InputError(f"judge cache {self.path}: {in_words(error)}; name another path") from error
            with self._database() as database:
                self._refuse_another(database)
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL) WITHOUT ROWID")
                database.execute("CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, completions INTEGER)")
                counts = ", ".join(f"{name} INTEGER" for name in _COUNTS)
                database.execute(f"CREATE TABLE IF NOT EXISTS usage (judge TEXT PRIMARY KEY, {counts})")

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """The stored scores among `keys`, by key."""
        if self.path is None:
            return {key: self._scores[key] for key in keys if key in self._scores}
        found: dict[str, float] = {}
        with self._database() as database:
            for start in range(0, len(keys), _AT_ONCE):
                some = list(keys[start : start + _AT_ONCE])
                marks = ", ".join("?" * len(some))
                found.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", some))
        for key, score in found.items():
            if not (isinstance(score, float) and math.isfinite(score)):
                raise InputError(
                    f"judge cache {self.path}: expected a finite number for the key {key}, got {score!r:.60}; "
                    "something else has written into it; move it away or name another path"
                )
        return found

    def add(self, judge: str, scores: Mapping[str, float]) -> None:
        """Store scores by key and count them as paid for to `judge`, in one transaction."""
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
        """Number of scores paid for to `judge`, in all runs that share this cache."""
        if self.path is None:
            return self._spent[judge]
        with self._database() as database:
            row = database.execute("SELECT completions FROM spent WHERE judge = ?", (judge,)).fetchone()
        return 0 if row is None else int(row[0])

    def charge(self, judge: str, usage: Usage) -> None:
        """Add to what was spent on `judge`."""
        if self.path is None:
            self._usage[judge] = self.usage(judge) + usage
            return
        marks = ", ".join("?" * len(_COUNTS))
        sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in _COUNTS)
        with self._database() as database:
            database.execute(
                f"INSERT INTO usage VALUES (?, {marks}) ON CONFLICT (judge) DO UPDATE SET {sums}",
                (judge, *dataclasses.astuple(usage)),
            )

    def usage(self, judge: str) -> Usage:
        """What was spent on `judge`, in all runs that share this cache; zeros for one that is not paid by the request.

        Example:
            >>> cache = JudgeCache()
            >>> cache.charge("my judge", Usage(calls=1, prompt_tokens=90))
            >>> cache.usage("my judge").tokens, cache.usage("another").calls
            (90, 0)
        """
        if self.path is None:
            return self._usage.get(judge, Usage())
        with self._database() as database:
            row = database.execute(f"SELECT {', '.join(_COUNTS)} FROM usage WHERE judge = ?", (judge,)).fetchone()
        return Usage() if row is None else Usage(*row)

    def _refuse_another(self, database: sqlite3.Connection) -> None:
        """Another program's database is left as it is."""
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            columns = [row[1] for row in database.execute(f"SELECT * FROM pragma_table_info({name!r})")]
            if columns != _TABLES.get(name):
                raise InputError(
                    f"judge cache {self.path}: expected a cache that align-cbrl wrote, got a database with a table "
                    f"{name!r} of {columns}; name another path"
                )

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own, so that no connection is open when a process forks or dies."""
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
