"""Signals that ask a run to stop, and processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align_cbrl.runs.interrupt import SIGNALS, acting_interrupt, noted_interrupt


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_handlers_are_put_back(number: int) -> None:
    before = handlers()
    with noted_interrupt() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.asked and interrupt.stop().args == (number,)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # repeated by a scheduler, or passed on by a launcher
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_elsewhere_a_signal_acts_at_once_and_only_once(number: int) -> None:
    before, told = handlers(), []
    with acting_interrupt(first=told.append):
        with pytest.raises(KeyboardInterrupt) as stopped:
            os.kill(os.getpid(), number)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)
        with noted_interrupt() as interrupt:  # leader steps inside
            os.kill(os.getpid(), number)
        assert interrupt.asked
    assert stopped.value.args == (number,) and told == [number] and handlers() == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with noted_interrupt() as interrupt, acting_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_noted() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with noted_interrupt() as interrupt, acting_interrupt():
            seen.append((interrupt.asked, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    rank = (
        "import time; from align_cbrl.runs.interrupt import end_with_launcher; end_with_launcher()\n"
        f"while True:\n    open({str(beat)!r}, 'a').write('1'); time.sleep(0.1)"
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", launcher], env={**os.environ, "TORCHELASTIC_RUN_ID": "none"})
    deadline = time.monotonic() + 120
    while not (beat.exists() and beat.stat().st_size > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)
    after = beat.stat().st_size
    time.sleep(1)
    assert beat.stat().st_size == after > 2
