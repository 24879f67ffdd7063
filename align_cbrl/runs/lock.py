"""One process at a time in a folder: a lock that is gone when its owner is, however it ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from align_cbrl.distributed import is_main
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs.files import full, in_words

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
_PATIENCE = 2.0  # seconds: the workers of a run that was killed just now end at once, but not before they notice
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems mounted without locks


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs. In several processes rank 0 holds it for all.

    The lock is the operating system's, on a file `.lock` in the folder: whatever ends its owner, a kill or a power cut,
    releases it. Python's child processes do not inherit it.

    Args:
        folder: is made if need be.

    Raises:
        CheckpointError: another process has it, with words about which; or the disk is full.
        InputError: the folder cannot be made, or not be written to.

    Example:
        >>> import tempfile
        >>> with only_here(Path(tempfile.mkdtemp())):
        ...     pass
    """
    if not is_main():
        yield
        return
    with _held(folder / LOCK, patience=_PATIENCE):
        yield


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold a lock file while the block runs, and wait for it as long as another process has it, saying so."""
    with _held(file, patience=None):
        yield


@contextlib.contextmanager
def _held(file: Path, patience: float | None) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(file, patience)
    except OSError as error:
        kind = CheckpointError if full(error) else InputError
        raise kind(f"cannot write to {file.parent}: {in_words(error)}") from error
    try:
        yield
    finally:
        os.close(descriptor)  # which releases it


def _acquired(file: Path, patience: float | None) -> int:
    began, told = time.monotonic(), False
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
            if _still_there(file, descriptor):
                _sign(descriptor)
                return descriptor
        except OSError as error:
            if error.errno in _UNKNOWN:
                warnings.warn(
                    f"{file.parent}: its file system has no locks ({error.strerror}); see to it that no other process "
                    "works in it",
                    stacklevel=2,
                )
                return descriptor
            if error.errno not in _BUSY:
                os.close(descriptor)
                raise
            if patience is not None and time.monotonic() - began > patience:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise CheckpointError(
                    f"{file.parent}: {owner} works in it; wait until that has ended, stop it, or choose another folder"
                ) from error
            if patience is None and not told:
                warnings.warn(f"{file.name}: waiting for {_owner(descriptor)}, which makes it", stacklevel=2)
                told = True
        os.close(descriptor)
        time.sleep(0.1)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _still_there(file: Path, descriptor: int) -> bool:
    """Whether the file was not removed, with its folder, between opening and locking it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say who has it; for messages only."""
    note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, note)


def _owner(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        note = json.loads(os.read(descriptor, 1000))
        return f"process {note['pid']} on {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not signed yet
        return "another process"
