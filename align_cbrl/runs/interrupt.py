"""Signals that ask a run to stop: noted between leader steps, and acted on at once elsewhere.

Ctrl-C sends SIGINT. A scheduler that is about to kill a job sends SIGTERM or SIGUSR1, a terminal that closes SIGHUP.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What asks a run to stop; Windows has fewer of them."""


class Interrupt:
    """Whether somebody has asked a run to stop after the step under way.

    Attributes:
        asked: true from the first signal on.
        signal: its number; None where none arrived in this process.
    """

    def __init__(self) -> None:
        self.asked = False
        self.signal: int | None = None

    def stop(self) -> KeyboardInterrupt:
        """What a run that stops because of it raises, with the number of the signal where it is known."""
        return KeyboardInterrupt(*([] if self.signal is None else [self.signal]))


@contextlib.contextmanager
def noted_interrupt() -> Iterator[Interrupt]:
    """Turn signals into a note that is read between steps. Ctrl-C after another one raises KeyboardInterrupt at once.

    Schedulers repeat theirs, and launchers pass them on, so that of those the second one changes nothing. What is
    ignored, as SIGHUP under nohup, stays ignored. Outside the main thread, where no handler may be set, nothing is
    noted.

    Example:
        >>> with noted_interrupt() as interrupt:
        ...     interrupt.asked
        False
    """
    interrupt = Interrupt()

    def note(number: int) -> None:
        if interrupt.asked and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        interrupt.asked = True
        interrupt.signal = interrupt.signal or number

    with _handled_by(note):
        yield interrupt


@contextlib.contextmanager
def acting_interrupt(first: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Let every one of these signals raise KeyboardInterrupt, as Ctrl-C does by itself, with its number.

    Only the first one, and Ctrl-C, so that what is done on the way out is not interrupted by a repeated one.

    Args:
        first: called with the number before the first one raises.
    """
    interrupt = Interrupt()

    def act(number: int) -> None:
        if not interrupt.asked:
            interrupt.asked = True
            first(number)
        elif number != signal.SIGINT:
            return
        raise KeyboardInterrupt(number)

    with _handled_by(act):
        yield


@contextlib.contextmanager
def _handled_by(handle: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    # None: installed by something that is not Python, and could not be put back.
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    usual = {number: before for number, before in usual.items() if before not in (signal.SIG_IGN, None)}
    for number in usual:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


def pass_on(number: int) -> None:
    """Ask the worker processes of this one to stop too: a scheduler may have told this one only."""
    for child in multiprocessing.active_children():
        child.terminate()


@functools.cache  # once a process
def end_with_launcher() -> None:
    """Let this rank end when torchrun is gone, which cannot end it any more: there is nobody to give the work to."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """Let this worker process end at once when the one that started it is gone, be it killed.

    Otherwise it would go on working, and paying a judge, for nobody.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def end() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
