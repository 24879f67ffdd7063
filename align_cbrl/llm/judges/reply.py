"""`ReplyReader`: the score in what a language model says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from align_cbrl.errors import InputError

_NUMBER = r"-?\d+(?:\.\d+)?"


class ReplyReader:
    r"""Finds the score in a reply: a number on a scale, which becomes one from 0 to 1, or one of several verdicts.

    By default it stands alone in a line, perhaps after a word and a colon, and with Markdown or brackets around it:
    "7", "Score: 7", "**Score:** 7/10" on a scale that ends with 10, "[[A]]". Of several the last one counts.

    Args:
        scale: the lowest and the highest number. A number outside is no score.
        verdicts: what may be said instead of a number, in any case, and the score that it stands for.
        pattern: a regular expression to look for instead, whose first group holds the number or the verdict; of several
            places the last one counts.

    Attributes:
        expected: what is looked for, in words.

    Raises:
        InputError: a scale that is empty, no verdicts, or a pattern that is no regular expression with a group.

    Example:
        >>> reader = ReplyReader((1, 10))
        >>> reader.read("It is short.\n**Score:** 7/10"), reader.read("Perhaps 7."), reader.read("Score: 11")
        (0.66..., None, None)
        >>> ReplyReader(verdicts={"A": 1.0, "B": 0.0, "tie": 0.5}).read("Both are good. [[Tie]]\n[[Tie]]")
        0.5
        >>> ReplyReader((0, 5), pattern='"score": *([0-9.]+)').read('{"score": 4, "why": "kind"}')
        0.8
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.0, 1.0),
        verdicts: Mapping[str, float] | None = None,
        pattern: str | None = None,
    ) -> None:
        low, high = scale
        if not low < high:
            raise InputError(f"scale: expected the lowest number and a higher one, got {low:g} and {high:g}")
        if verdicts is not None and not (verdicts and all(verdict.strip() for verdict in verdicts)):
            raise InputError(f"verdicts: expected words and their scores, such as {{A: 1, B: 0}}, got {dict(verdicts)}")
        self._scale = scale
        self._verdicts = None if verdicts is None else {v.strip().casefold(): float(s) for v, s in verdicts.items()}
        if len(self._verdicts or ()) < len(verdicts or ()):
            raise InputError(f"verdicts: expected words that differ not only in case, got {list(verdicts or ())}")
        if self._verdicts is None:
            self.expected = f"a number from {low:g} to {high:g}"
            value = rf"({_NUMBER})(?:\s*/\s*{re.escape(f'{high:g}')})?"
        else:
            self.expected = " or ".join(map(repr, verdicts or ()))
            value = f"({'|'.join(re.escape(v) for v in sorted(self._verdicts, key=len, reverse=True))})"
        self.expected += " in a line of its own" if pattern is None else f" where {pattern!r} has its first group"
        label = r"(?:[A-Za-z][A-Za-z ]{0,40}[^\w\n]{0,4}[:=][^\w\n-]*)?"
        try:
            self._pattern = re.compile(rf"(?im)^[^\w\n-]*{label}{value}[^\w\n]*$" if pattern is None else pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"pattern: {pattern!r:.80} is no regular expression ({error})") from error
        if self._pattern.groups < 1:
            raise InputError(
                f"pattern: expected a group around the score, such as 'Score: ([0-9]+)', got {pattern!r:.80}"
            )

    def read(self, reply: str) -> float | None:
        """The score, None where there is none."""
        found = list(self._pattern.finditer(reply))
        value = (found[-1][1] or "").strip() if found else ""
        if self._verdicts is not None:
            return self._verdicts.get(value.casefold())
        if not re.fullmatch(rf"[+-]?(?:{_NUMBER}|\d*\.\d+|\d+\.)", value):
            return None
        low, high = self._scale
        return (float(value) - low) / (high - low) if low <= float(value) <= high else None
