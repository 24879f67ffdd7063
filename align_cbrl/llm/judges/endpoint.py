"""`Endpoint`: a URL that is asked in JSON, with a token from the environment, a limited rate and a deadline."""

from __future__ import annotations

import atexit
import email.utils
import functools
import json
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2

from align_cbrl.errors import InputError
from align_cbrl.runs.secrets import HIDDEN, redact

_LARGEST_ANSWER = 64 * 2**20  # bytes
_LOOKED_AT = 10_000  # bytes of an answer that a message is made of
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


class _Answer(NamedTuple):
    status: int
    reason: str
    retry_after: str | None
    body: bytes


class Endpoint:
    """Where JSON is posted and JSON comes back. Several threads may post at once.

    Retries are the caller's: `Judge` asks again whatever raises `JudgeUnavailable`, as it does with any function.

    Args:
        owner: whose arguments these are, for messages.
        url: https; http is allowed without a token, or to this machine.
        rate: largest number of requests per second; None: no limit.
        timeout: seconds after which a request fails, from the connection to the last byte of the answer.
        token_variable: name of the environment variable that holds a bearer token. It is read anew for every request
            and not stored.

    Attributes:
        name: of the judge behind it, for messages, without secrets.

    Raises:
        InputError: a URL that is neither http nor https or that holds a password, a token that would be sent
            unencrypted, or something else than a name where the variable's is expected.

    Example:
        >>> Endpoint("RemoteJudge", "https://judge.example/score?api_key=abc").name
        'judge https://judge.example/score?api_key=***'
    """

    def __init__(
        self,
        owner: str,
        url: str,
        *,
        rate: float | None = None,
        timeout: float = 60.0,
        token_variable: str | None = None,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            httpx2.URL(url)
        except (ValueError, httpx2.InvalidURL) as error:
            raise InputError(f"{owner}.url: {redact(url)!r:.200} is no URL ({error})") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{owner}.url: expected http://... or https://..., got {redact(url)!r}")
        if HIDDEN in url:
            raise InputError(f"{owner}.url: its key was left out when it was written down; put it in again")
        if parts.username or parts.password:
            raise InputError(f"{owner}.url: expected no password in it; name an environment variable in token_variable")
        if token_variable is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise InputError(f"{owner}.url: {redact(url)!r} would carry the token unencrypted; use https")
        if token_variable is not None and not (_VARIABLE.fullmatch(token_variable) or token_variable in os.environ):
            raise InputError(
                f"{owner}.token_variable: expected the name of an environment variable, such as JUDGE_TOKEN, got "
                "something else; the token itself belongs into that variable"
            )
        self.url, self.rate, self.timeout, self.token_variable = url, rate, timeout, token_variable
        self.name = f"judge {redact(url)}"
        self._next = 0.0  # earliest time of the next request that the rate allows
        self._turn = threading.Lock()

    def token(self) -> str | None:
        """The bearer token, None where there is none to be sent.

        Raises:
            InputError: the environment variable is not set.
        """
        if self.token_variable is None:
            return None
        token = os.environ.get(self.token_variable, "").strip()
        if not token:
            raise InputError(f"{self.name}: expected a token in the environment variable {self.token_variable}")
        if not (token.isascii() and token.isprintable()):
            raise InputError(
                f"{self.name}: the token in the environment variable {self.token_variable} holds characters that no "
                "header can; put it in again"
            )
        return token

    def hidden(self, text: str) -> str:
        """A text without the token, which a server may echo, and without other secrets."""
        token = None if self.token_variable is None else os.environ.get(self.token_variable, "").strip()
        return redact(text.replace(token, HIDDEN) if token else text)

    def post(self, body: Mapping[str, Any]) -> Any:
        """What the server answers, as plain data.

        Raises:
            JudgeUnavailable: no connection, no whole answer in time, an answer that is not JSON, or a status of 408,
                425, 429 or 5xx, after which another attempt may succeed.
            InputError: another status, since the request or the token is wrong; a body that is not plain data; or an
                environment variable that is not set.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if (token := self.token()) is not None:
            headers["Authorization"] = f"Bearer {token}"
        content = json.dumps(body, default=_plain).encode()
        self._wait_for_the_rate()
        try:
            answer = self._answer(content, headers)
        except (OSError, httpx2.HTTPError, httpx2.StreamError) as broken:  # refused, reset, timed out or incomplete
            raise JudgeUnavailable(self.hidden(f"{self.name}: no answer: {broken or type(broken).__name__}")) from None
        if not 200 <= answer.status < 300:
            # Hidden first and shortened then: of a token that is cut in two, neither part would be known.
            detail = self.hidden(answer.body[:_LOOKED_AT].decode(errors="replace").strip())[:200]
            message = f"{self.name}: status {answer.status} {self.hidden(answer.reason)}: {detail}"
            if answer.status in (408, 425, 429) or answer.status >= 500:
                raise JudgeUnavailable(message, _seconds(answer.retry_after))
            raise InputError(f"{message}; repair the request, the URL or the token")
        if len(answer.body) > _LARGEST_ANSWER:
            raise InputError(f"{self.name}: its answer is longer than {_LARGEST_ANSWER} bytes")
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):  # no JSON, nested without end, or a number of thousands of digits
            raise JudgeUnavailable(f"{self.name}: expected JSON, got {self.brief(answer.body)}") from None

    def brief(self, answer: Any) -> str:
        """The beginning of an answer, as messages show it."""
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return self.hidden(repr(text[:_LOOKED_AT]))[:80]

    def _answer(self, content: bytes, headers: Mapping[str, str]) -> _Answer:
        """The server's answer, within `timeout` in all: a socket's own begins anew with every byte.

        The request is made in a thread, which is left behind where a server drips on; what it gets is dropped.
        """
        found: list[_Answer | Exception] = []

        def ask() -> None:
            try:
                with _ONE_CLIENT:
                    client = _client(os.getpid())
                with client.stream("POST", self.url, content=content, headers=headers, timeout=self.timeout) as answer:
                    body = bytearray()
                    for part in answer.iter_bytes():
                        body += part
                        if len(body) > _LARGEST_ANSWER:
                            break
                after = answer.headers.get("Retry-After")
                found.append(_Answer(answer.status_code, answer.reason_phrase, after, bytes(body)))
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
        with self._turn:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 1 / self.rate
        if at > now:
            time.sleep(at - now)


_ONE_CLIENT = threading.Lock()
"""Held while the client is looked up: threads that ask for it first together would make one each, and leak theirs."""


@functools.cache
def _client(process: int) -> httpx2.Client:
    """The connections of a process, kept open between requests: those of a parent process are not to be used."""
    # Of as many as there are threads: a request that was left behind holds its own, and no other is to wait for it.
    client = httpx2.Client(limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64))
    atexit.register(lambda: client.close() if os.getpid() == process else None)  # not a parent's, in its child
    return client


def _without_secrets(record: logging.LogRecord) -> bool:
    """httpx2 logs every URL, in which a key may stand."""
    if isinstance(record.args, tuple):
        record.args = tuple(redact(str(a)) if isinstance(a, httpx2.URL) else a for a in record.args)
    return True


logging.getLogger("httpx2").addFilter(_without_secrets)


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
