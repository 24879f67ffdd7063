"""Files written whole and durably; full disks and damaged files in words."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from align_cbrl.errors import CheckpointError
from align_cbrl.runs import files
from align_cbrl.runs.files import read_json, storage_failure, sync_tree, write_whole
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.run_folder import Clock, Rows


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(f"sync {Path(target).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    (tmp_path / "row.json").write_text("old")
    write_whole(tmp_path / "row.json", "{}")
    assert events == ["sync .row.json.tmp", "rename to row.json", f"sync {tmp_path.name}"]
    assert read_json(tmp_path / "row.json") == {}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    events.clear()
    sync_tree(tmp_path)
    assert set(events) == {"sync row.json", "sync model", "sync weights", f"sync {tmp_path.name}"}


@pytest.mark.parametrize("function", ["write_synced", "put_in_place"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "a file may not grow further"),
        (errno.EROFS, "it may not be written to: Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_refuses_is_said_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, words: str
) -> None:
    write_whole(tmp_path / "row.json", "{}")

    def refused(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, function, refused)
    with pytest.raises(CheckpointError, match=rf"cannot write .*row\.json: {words}"):
        write_whole(tmp_path / "row.json", '{"new": 1}')
    assert read_json(tmp_path / "row.json") == {}
    assert [file.name for file in tmp_path.iterdir()] == ["row.json"]


def test_a_limit_of_the_system_is_said(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"big\.json: a file may not grow further"):
            write_whole(tmp_path / "big.json", "x" * 5000)
        log = MetricsLog(tmp_path / "metrics.jsonl")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: a file may not grow further"), log:
            log.append({"text": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "big.json").exists()


def test_a_full_disk_is_found_behind_the_errors_of_other_libraries() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")
        except OSError as error:
            raise RuntimeError("enforce fail at inline_container.cc") from error
    except RuntimeError as error:
        assert storage_failure(error) == "the disk is full (weights.bin)"
    rust = RuntimeError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')
    assert storage_failure(rust) == "the disk is full"
    assert storage_failure(ZeroDivisionError()) is None and storage_failure(None) is None
    assert storage_failure(FileNotFoundError(errno.ENOENT, "No such file")) is None  # a mistake, not a disk


@pytest.mark.parametrize(
    ("content", "what"), [("", "is empty"), ('{"a": ', "is damaged"), ("[" * 99_999, "is damaged")]
)
def test_a_damaged_part_is_named_or_made_again(tmp_path: Path, content: str, what: str) -> None:
    for name in ("part.json", "rows.json", "seconds.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"part\.json: {what}.*; restore it, or remove it"):
        read_json(tmp_path / "part.json")
    with pytest.warns(UserWarning, match=rf"rows\.json: {what}.*; it is made again"):
        rows = Rows(tmp_path / "rows.json")
    rows.add("plain", {"judge": 0.5})
    assert json.loads((tmp_path / "rows.json").read_text()) == {"plain": {"judge": 0.5}}
    with pytest.warns(UserWarning, match="made again"):
        assert Clock(tmp_path / "seconds.json").seconds == {}
