"""Ctrl-C between leader steps: the first one is noted, the second one acts as usual."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupt:
    """Whether somebody has asked a run to stop after the step under way.

    Attributes:
        asked: true from the first SIGINT on.
    """

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def noted_interrupt() -> Iterator[Interrupt]:
    """Turn the first SIGINT into a note that is read between steps; the second one raises KeyboardInterrupt at once.

    Outside the main thread, where no handler may be set, nothing is noted.

    Example:
        >>> with noted_interrupt() as interrupt:
        ...     interrupt.asked
        False
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> Any:
        interrupt.asked = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
