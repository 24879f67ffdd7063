"""One process at a time in a folder, and what is shared is made once."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from align_cbrl.recipes.worlds.cache import cached

from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs import lock
from align_cbrl.runs.lock import in_turn, only_here


@contextlib.contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that says "here" when it is where the test wants it, and then sleeps."""
    script = f"import time\nfrom pathlib import Path\n{textwrap.dedent(code)}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def holder(folder: Path) -> str:
    return f"""
        from align_cbrl.runs.lock import only_here
        with only_here(Path({str(folder)!r})):
            print("here", flush=True)
            time.sleep(60)
    """


def test_a_second_process_is_refused_in_words_and_a_dead_ones_lock_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    with another_process(holder(tmp_path)) as process:
        refused = f"process {process.pid} on .* works in it; wait until that has ended"
        with pytest.raises(CheckpointError, match=refused), only_here(tmp_path):
            raise AssertionError
        process.kill()
        process.wait()
        with only_here(tmp_path):
            pass
    with only_here(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"), only_here(tmp_path):
        raise AssertionError  # not by another part of the same process either


def test_who_comes_right_after_a_kill_waits_for_the_last_of_it(tmp_path: Path) -> None:
    with another_process(holder(tmp_path)) as process:
        killing = threading.Timer(0.5, process.kill)
        killing.start()
        with only_here(tmp_path):
            killing.join()


def test_who_needs_the_same_waits_says_so_and_finds_it(tmp_path: Path) -> None:
    code = f"""
        from align_cbrl.runs.lock import in_turn
        with in_turn(Path({str(tmp_path / ".model.lock")!r})):
            print("here", flush=True)
            time.sleep(1)
            Path({str(tmp_path / "model")!r}).write_text("made")
    """
    with another_process(code) as process:
        said = rf"\.model\.lock: waiting for process {process.pid}"
        with pytest.warns(UserWarning, match=said), in_turn(tmp_path / ".model.lock"):
            assert (tmp_path / "model").read_text() == "made"


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with only_here(folder):
        (folder / lock.LOCK).unlink()  # as the owner does whose start failed
        with only_here(folder):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", none)
    with pytest.warns(UserWarning, match="no locks"), only_here(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EROFS, InputError, "it may not be written to: Read-only file system"),
        (errno.EACCES, InputError, "it may not be written to"),
        (errno.ENOSPC, CheckpointError, "the disk is full"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    def refused(path: object, *arguments: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(lock.os, "open", refused)
    with pytest.raises(kind, match=f"cannot write to .*{message}"), only_here(tmp_path):
        raise AssertionError


def test_a_model_that_two_runs_need_is_made_once(tmp_path: Path) -> None:
    """Both finish, whoever comes first; the other one waits."""
    code = f"""
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from align_cbrl.recipes.worlds.cache import cached
        def build(folder):
            time.sleep(0.5)
            (folder / "weights").write_text("1")
            with Path({str(tmp_path / "made")!r}).open("a") as file:
                file.write("x")
        found = cached(Path({str(tmp_path / "cache")!r}), "policy", {{"seed": 0}}, build)
        assert (found / "weights").read_text() == "1"
    """
    script = f"import time\nfrom pathlib import Path\n{textwrap.dedent(code)}"
    runs = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_what_is_made_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {cached(tmp_path, "policy", {"seed": 0}, lambda folder: (folder / "weights").touch()) for _ in range(2)}
    assert capsys.readouterr().out == f"making {found.pop()}, once for all runs beside this one\n"
