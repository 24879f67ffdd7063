"""How far long work is: a bar on a terminal, and a line now and then where there is none, such as in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Iterator

from tqdm import tqdm

_EVERY = 15.0  # seconds between two lines


class Progress:
    """Shows the steps of one piece of work on standard error, as a context manager.

    On a terminal it is a bar. Elsewhere it is a line every fifteen seconds: the step, of how many, the newest figures,
    and the time that is left at the pace so far. Work that is shorter than that prints nothing.

    Args:
        total: steps in all.
        name: of the work.
        done: steps that an earlier process has taken.
        shown: show nothing, where false.

    Example:
        >>> with Progress(2, "policy") as progress:
        ...     progress.update(loss=0.5)
        ...     progress.update(loss=0.4)
    """

    def __init__(self, total: int, name: str, done: int = 0, shown: bool = True) -> None:
        self.total, self.name, self.shown = total, name, shown
        self._first = self._done = done
        self._began = self._told = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=name) if shown and sys.stderr.isatty() else None

    def update(self, **figures: float) -> None:
        """One step more.

        Args:
            **figures: numbers to be shown beside it, by name; those that are not finite are left out.
        """
        self._done += 1
        shown = {name: f"{value:.4g}" for name, value in figures.items() if math.isfinite(value)}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self.shown and self._done < self.total and (now := time.monotonic()) - self._told >= _EVERY:
            self._told = now
            left = (now - self._began) / (self._done - self._first) * (self.total - self._done)
            figures_shown = "".join(f", {name} {value}" for name, value in shown.items())
            line = f"{self.name}: step {self._done} of {self.total}{figures_shown}, {duration(left)} left"
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def beside_bars() -> Iterator[None]:
    """Take the bars away while the block writes lines of its own, and put them back below these."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield


def warn_beside_bars(message: str, stacklevel: int = 2) -> None:
    """`warnings.warn`, on a line of its own where a bar is shown."""
    with beside_bars():
        warnings.warn(message, stacklevel=stacklevel + 1)


def duration(seconds: float) -> str:
    """A time in words, to the precision that an estimate of it has.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 42, 100, 4000, 90_000)]
        ['1 s', '42 s', '1 min 40 s', '1 h 7 min', '25 h']
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{hours} h"
