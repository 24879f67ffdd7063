"""Files that a run needs to go on: written whole and durably, and read with a word about what is damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from align_cbrl.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_OTHER = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ENOLCK)


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a file so that a kill, a full disk or a power cut at any moment leaves the old content or the new.

    The data go to a temporary file in the same folder, which is synced and renamed; then the folder is synced.

    Raises:
        CheckpointError: the disk is full or refuses.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_whole(folder / "row.json", "{}")
        >>> read_json(folder / "row.json")
        {}
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write_synced(temporary, data.encode() if isinstance(data, str) else data)
        put_in_place(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {file}: {in_words(error)}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a file or folder whose content is on the disk, and wait until that is on the disk too."""
    os.replace(temporary, target)
    sync_folder(target.parent)


def sync_tree(folder: Path) -> None:
    """Wait until all that other libraries wrote into a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk, where the system can do that (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it cannot be read, or is empty, cut short or no JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        size = file.stat().st_size if file.is_file() else None
        what = "is empty" if size == 0 else f"is damaged ({error})"
        raise CheckpointError(f"{file}: {what}; restore it, or remove it, and resume") from error


def storage_failure(error: BaseException | None) -> str | None:
    """What the disk or the file system refused, in words, where that is behind an error of any library; else None.

    Example:
        >>> storage_failure(OSError(errno.ENOSPC, "No space left on device", "run.json"))
        'the disk is full (run.json)'
        >>> storage_failure(OSError(errno.ENOENT, "No such file"))
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_FULL, *_REFUSED, *_OTHER):
            return in_words(error)
        if "os error 28" in str(error) or "StorageFull" in str(error):  # as libraries in Rust say it
            return "the disk is full"
        error = error.__cause__ or error.__context__
    return None


def full(error: OSError) -> bool:
    """Whether there is no room, which may change, rather than no permission."""
    return error.errno in _FULL


def in_words(error: OSError) -> str:
    """What an operating system's error means for the one who started the run."""
    where = f" ({error.filename})" if error.filename is not None else ""
    if full(error):
        return f"the disk is full{where}" if error.errno != errno.EFBIG else f"a file may not grow further{where}"
    if error.errno in _REFUSED:
        return f"it may not be written to: {error.strerror}{where}"
    return f"{error.strerror or error}{where}"
