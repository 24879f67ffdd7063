"""`RemoteJudge`: a judge on a server, which gets one POST of JSON per batch, at a limited rate."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.scoring import is_number
from align_cbrl.runs.secrets import HIDDEN, redact

_LARGEST_ANSWER = 64 * 2**20  # bytes
_LARGEST_SCORE = 1e30  # its square, and sums of those, are still numbers
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JudgeUnavailable(RuntimeError):
    """A remote judge did not answer; another attempt may succeed.

    Attributes:
        retry_after: seconds that the server asks to wait, or None.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Refused(Exception):
    """A status that says no, with what the server said beside it."""

    def __init__(self, error: urllib.error.HTTPError, detail: str) -> None:
        super().__init__(detail)
        self.error, self.detail = error, detail


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and would carry the token to another host."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


@checked
class RemoteJudge:
    """A scoring function that sends completions to a server. `Judge` adds cache, budget, batches and retries.

    The body of a request is a JSON object of lists of equal length: "prompts", "completions" ("completions_a" and
    "completions_b" for a `PairwiseJudge`) and the requested columns. The server answers with a list of numbers, or with
    an object that has one under "scores".

    Args:
        url: https; http is allowed without a token, or to this machine.
        columns: columns of the data that are sent along.
        rate: largest number of requests per second; None: no limit.
        timeout: seconds after which a request fails, from the connection to the last byte of the answer.
        token_variable: name of the environment variable that holds a bearer token. It is read anew for every request
            and not stored.
        version: of the judge on the server, which is part of its identity in a cache. Change it when the judge changes.

    Raises:
        InputError: a URL that is neither http nor https or that holds a password, a token that would be sent
            unencrypted, or a rate or timeout that is not positive.

    Example:
        >>> RemoteJudge("https://judge.example/score", rate=2.0).identity
        'https://judge.example/score version 1'
    """

    def __init__(
        self,
        url: str,
        *,
        columns: Sequence[str] = (),
        rate: Positive | None = None,
        timeout: Positive = 60.0,
        token_variable: str | None = None,
        version: str = "1",
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"RemoteJudge.url: expected http://... or https://..., got {redact(url)!r}")
        if HIDDEN in url:
            raise InputError("RemoteJudge.url: its key was left out when it was written down; put it in again")
        if parts.username or parts.password:
            raise InputError(
                "RemoteJudge.url: expected no password in it; name an environment variable in token_variable"
            )
        if token_variable is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise InputError(f"RemoteJudge.url: {redact(url)!r} would carry the token unencrypted; use https")
        if token_variable is not None and not (_VARIABLE.fullmatch(token_variable) or token_variable in os.environ):
            raise InputError(
                "RemoteJudge.token_variable: expected the name of an environment variable, such as JUDGE_TOKEN, got "
                "something else; the token itself belongs into that variable"
            )
        for name, value in (("rate", rate), ("timeout", timeout)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"RemoteJudge.{name}: expected a positive number, got {value}")
        self.url = url
        self._name = f"judge {redact(url)}"
        self.columns = list(columns)
        self.rate = rate
        self.timeout = timeout
        self.token_variable = token_variable
        self.identity = f"{redact(url)} version {version}"
        self._next = 0.0  # earliest time of the next request that the rate allows
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, **arguments: Sequence[Any]) -> list[Any]:
        """The server's scores of one batch, as it sent them; `Judge` checks them.

        Raises:
            JudgeUnavailable: no connection, no answer in time, an answer that is not JSON, or a status of 408, 425, 429
                or 5xx, after which another attempt may succeed.
            InputError: another status, since the request or the token is wrong; an answer without scores; or an
                environment variable that is not set.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        token = ""
        if self.token_variable is not None:
            token = os.environ.get(self.token_variable, "").strip()
            if not token:
                raise InputError(f"{self._name}: expected a token in the environment variable {self.token_variable}")
            headers["Authorization"] = f"Bearer {token}"
        body = json.dumps(arguments, default=_plain).encode()

        def said(text: str) -> str:  # a server may echo what it was sent
            return redact(text.replace(token, HIDDEN) if token else text)

        self._wait_for_the_rate()
        try:
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            text = self._answer(request)
        except _Refused as refused:
            error = refused.error
            message = said(f"{self._name}: status {error.code} {error.reason}: {refused.detail}")
            if error.code in (408, 425, 429) or error.code >= 500:
                raise JudgeUnavailable(message, _seconds(error.headers.get("Retry-After"))) from None
            raise InputError(f"{message}; repair the request, the URL or the token") from None
        except (OSError, http.client.HTTPException) as broken:  # refused, reset, timed out or incomplete
            raise JudgeUnavailable(said(f"{self._name}: no answer: {broken}")) from None
        if len(text) > _LARGEST_ANSWER:
            raise InputError(f"{self._name}: its answer is longer than {_LARGEST_ANSWER} bytes")
        start = said(repr(text[:80]))
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, nested without end, or a number of thousands of digits
            raise JudgeUnavailable(f"{self._name}: expected JSON, got {start}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise InputError(
                f"{self._name}: expected a list of numbers or an object with one under 'scores', got {start}"
            )
        # JSON's true is no score, though Python counts it among the numbers, and no square of 1e200 is finite. `Judge`
        # refuses texts, and keeps the other scores of the batch.
        return [
            str(score) if isinstance(score, bool) or (is_number(score) and abs(score) > _LARGEST_SCORE) else score
            for score in scores
        ]

    def _answer(self, request: urllib.request.Request) -> bytes:
        """The body of the answer, within `timeout` in all: a socket's own begins anew with every byte.

        The request is made in a thread, which is left behind where a server drips on; what it gets is dropped.
        """
        found: list[bytes | Exception] = []

        def ask() -> None:
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    found.append(response.read(_LARGEST_ANSWER + 1))
            except urllib.error.HTTPError as error:
                with error:
                    found.append(_Refused(error, error.read(200).decode(errors="replace").strip()))
            except Exception as error:  # raised again where the judge was asked
                found.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not found:
            raise TimeoutError(f"timed out after {self.timeout:g} s")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _wait_for_the_rate(self) -> None:
        if self.rate is None:
            return
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + 1 / self.rate


def _seconds(retry_after: str | None) -> float | None:
    """The seconds from now that a Retry-After header asks for, which it gives as a number or as a date.

    Example:
        >>> _seconds("3"), _seconds("soon")
        (3.0, None)
    """
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise InputError(f"remote judge: a {type(value).__name__} cannot be sent as JSON; leave its column out")
