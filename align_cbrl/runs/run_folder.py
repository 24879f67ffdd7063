"""A run's folder describes itself: what was configured, which versions, which commit, when; and what came out."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from align_cbrl.distributed import is_main
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs.checkpoints import UNMOVED
from align_cbrl.runs.config import to_dict
from align_cbrl.runs.facts import UNREADABLE, differences_in_words, facts_of, flat, versions
from align_cbrl.runs.files import read_json, write_whole
from align_cbrl.runs.imports import recipe_of
from align_cbrl.runs.lock import LOCK
from align_cbrl.runs.metrics import finite
from align_cbrl.runs.secrets import redact, redacted

ABOUT = "run.json"
CONFIG = "config.yaml"
SUMMARY = "summary.json"
DESCRIPTION = frozenset({ABOUT, CONFIG, LOCK})
"""What every run's folder has from its start."""
PACKAGES = ("align-cbrl", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy")
"""Packages whose versions are kept; one that is not installed has null."""


def claim(out: Path, config: Any, *, recipe: str, free: Collection[str] = ()) -> None:
    """Make `out` this configuration's folder, and note who works in it from now on.

    Writes config.yaml, which `align-cbrl run RECIPE --config` reads again, and run.json: the recipe, the configuration,
    what its numbers depend on besides (`facts_of`), its seeds, and a list of sessions. A session is one start or
    resumption: command line, versions, git commit of the working directory and whether it was dirty (null where there
    is no checkout), platform, and when it started and ended (null while it runs, and for ever if it was killed).

    Args:
        out: the run's folder; made if need be.
        config: an instance of a dataclass.
        recipe: whose run it is: the name that `align-cbrl run` takes. Where the class of `config` was loaded from the
            folder of a user's recipe, the absolute path of that folder is recorded instead, so that `report` and
            `--resume` find it again from anywhere.
        free: keys (`steps`, `hpgd.steps`) that may differ when a run is resumed, because it may be longer, say.

    Raises:
        CheckpointError: `out` holds a run of another recipe or configuration, or one of other code or data or versions
            (what differs, what it was and is), or a damaged one. A start that left nothing behind is no run.

    Example:
        >>> import dataclasses, tempfile
        >>> @dataclasses.dataclass
        ... class Config:
        ...     seed: int = 0
        >>> out = Path(tempfile.mkdtemp())
        >>> claim(out, Config(), recipe="mine")
        >>> write_json(out / "row.json", {})
        >>> claim(out, Config(seed=1), recipe="mine")
        Traceback (most recent call last):
        ...
        align_cbrl.errors.CheckpointError: ...: holds a run of another configuration (different: seed was 0, is 1); ...
    """
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(type(config)) or recipe
    ours = json.loads(json.dumps(redacted(to_dict(config))))
    facts = redacted(facts_of(config))
    sessions = _refuse_another(out, recipe, ours, facts, free) if (out / ABOUT).exists() else []
    for key in (key for key, value in facts.items() if value == UNREADABLE):
        warnings.warn(
            f"{key}: it cannot be read, so that a resumed run will not notice when it has changed", stacklevel=2
        )
    write_text(out / CONFIG, yaml.safe_dump(ours, sort_keys=False, allow_unicode=True))
    seeds = {key: value for key, value in flat(ours).items() if key.split(".")[-1] in ("seed", "seeds")}
    about = {"recipe": recipe, "config": ours, "facts": facts, "seeds": seeds, "sessions": [*sessions, _session()]}
    write_json(out / ABOUT, about)


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, with the folder's recipe and configuration, and note when the session ended.

    Args:
        out: a claimed folder.
        summary: what the run found. Under `rows`, a list of dictionaries, one a policy, a cell or an instance; a
            figure is a number or `{"mean": m, "se": s}`. Under `seconds`, how long it took. Numbers that are not
            finite become null.
    """
    about = read_about(out)
    write_json(out / SUMMARY, {"recipe": about["recipe"], **summary, "config": about["config"]})
    finish(out)


def nothing_kept(out: Path) -> bool:
    """Whether a folder holds no more than a start leaves that failed: no finished part, no step of a leader.

    Scores that a judge was paid for do not count: they are found again by what was judged, and by whom.
    """
    return not any(file.is_file() and not _of_a_start(file) for file in out.rglob("*"))


def _of_a_start(file: Path) -> bool:
    described = file.name in DESCRIPTION or file.name.endswith((".tmp", ".sqlite", ".sqlite-journal"))
    return described or file.stat().st_size == 0 or file.parent.name.startswith(UNMOVED)


def finish(out: Path) -> None:
    """Note that the latest session of a claimed folder has ended."""
    about = read_about(out)
    about["sessions"][-1]["ended"] = _now()
    write_json(out / ABOUT, about)


def read_about(out: Path) -> dict[str, Any]:
    """What `claim` wrote in run.json.

    Raises:
        InputError: `out` is no folder of a run.
        CheckpointError: run.json is damaged.
    """
    file = out / ABOUT
    if not file.is_file():
        what = "there is no such folder" if not out.exists() else f"not the folder of a run: it has no {ABOUT}"
        raise InputError(f"{out}: {what}; expected one that `align-cbrl run` has written")
    try:
        about = read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).partition(';')[0]}; restore it, or start again in another --out") from error
    if not isinstance(about, dict) or not {"recipe", "config", "sessions"} <= set(about):
        raise CheckpointError(f"{file}: is damaged (keys are missing); restore it, or start again in another --out")
    return about


def read_summary(out: Path) -> dict[str, Any]:
    """What `write_summary` wrote.

    Raises:
        InputError: `out` is no folder of a run, or its run has not ended yet.
    """
    about = read_about(out)
    if not (out / SUMMARY).is_file():
        raise InputError(
            f"{out}: the run of {about['recipe']} has not ended, there are no rows yet; continue it with "
            f"align-cbrl run {shlex.quote(about['recipe'])} --out {shlex.quote(str(out))} --resume"
        )
    summary: dict[str, Any] = read_json(out / SUMMARY)
    return summary


def write_json(file: Path, value: Any) -> None:
    """Write JSON as `write_text` does; numbers that are not finite become null."""
    write_text(file, json.dumps(finite(value, file.name), indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write as `files.write_whole`; of several processes the first one writes."""
    if is_main():
        write_whole(file, text)


def read_kept(file: Path) -> Any:
    """What a JSON file of a finished part holds; None where there is none, or, with a warning, where it is damaged."""
    if not file.exists():
        return None
    try:
        return read_json(file)
    except CheckpointError as error:
        warnings.warn(f"{str(error).partition(';')[0]}; it is made again", stacklevel=2)
        return None


class Rows:
    """Finished parts of a run by name, kept in a file so that a resumed run does not do them again.

    Args:
        file: a JSON file, read if it is there.

    Attributes:
        done: the rows by name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, dict[str, Any]] = read_kept(file) or {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.done[name] = row
        write_json(self.file, self.done)


class Clock:
    """Seconds by stage, added up over interruptions.

    Args:
        file: a JSON file, read if it is there.

    Attributes:
        seconds: by stage.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = read_kept(file) or {}

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


def _refuse_another(
    out: Path, recipe: str, config: dict[str, Any], facts: dict[str, Any], free: Collection[str]
) -> list[dict[str, Any]]:
    """The sessions of the run that `out` holds; raises CheckpointError where it is another one, and something of it."""
    if nothing_kept(out):
        with contextlib.suppress(CheckpointError):
            return list(read_about(out)["sessions"])
        return []
    about = read_about(out)
    if about["recipe"] != recipe:
        raise CheckpointError(f"{out}: holds a run of the recipe {about['recipe']}; choose another --out")
    before, now = (
        {key: value for key, value in flat(of).items() if not _covers(free, key)} for of in (about["config"], config)
    )
    if differing := differences_in_words(before | about.get("facts", facts), now | facts):
        raise CheckpointError(
            f"{out}: holds a run of another configuration (different: {differing}); its rows would come from both: "
            "choose another --out, or go back"
        )
    return list(about["sessions"])


def _session() -> dict[str, Any]:
    return {
        "command": redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "started": _now(),
        "ended": None,
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "git": _git(),
        "platform": platform.platform(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the working directory's checkout and whether tracked files differ from it; None outside one."""
    try:
        commit = _git_output("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_output("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_output(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _covers(free: Collection[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in free)
