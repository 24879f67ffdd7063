"""The reward server: `RewardService` over HTTP."""

from __future__ import annotations

import hmac
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tqdm import tqdm

from align_cbrl.errors import CheckpointError, InputError, RunStopped, first_line
from align_cbrl.llm.engines.requests import read_request
from align_cbrl.llm.engines.service import MissingLogProbsError, RewardService
from align_cbrl.llm.engines.settings import ServeSettings
from align_cbrl.runs.interrupt import acting_interrupt
from align_cbrl.runs.secrets import redact

_DRAINED = 4  # times the largest body: more is not even read
_WAITING = 2048  # connections that are not answered yet
_LEAVE = 5  # seconds that requests under way have when the server is stopped


class _Refused(Exception):
    """A status that says no, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def serve(
    settings: ServeSettings, out: Path, *, host: str, port: int, ready: Callable[[str, RewardService], None]
) -> None:
    """Answer requests until a signal ends it; then save the learned reward.

    Args:
        settings: the server's.
        out: its folder; a server that was there before is continued.
        host: address to bind to.
        port: 0 for any that is free.
        ready: called with the server's address once connections are accepted.

    Raises:
        InputError: a variable for the token that is not set, another machine that could come in without a token, an
            address that cannot be bound, or what `RewardService` refuses.
        CheckpointError: as `RewardService`.
        KeyboardInterrupt: stopped by a signal.
    """
    token = _token(settings)
    if token is None and not _is_loopback(host):
        raise InputError(
            f"--host {host}: expected token_variable in the configuration, since other machines could ask, and spend "
            "the judge's budget; name an environment variable that holds a token, or bind to 127.0.0.1"
        )
    with (
        acting_interrupt(),
        _bound(host, port) as listening,
        RewardService.opened(settings, out) as service,
    ):
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listening.getsockname()[1]}", service)
        config = uvicorn.Config(
            application(service, token, settings.largest_body * 2**20),
            log_level="warning", access_log=False, lifespan="off", backlog=_WAITING, timeout_graceful_shutdown=_LEAVE,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def application(service: RewardService, token: str | None, largest_body: int) -> Starlette:
    """The server's three addresses: POST /score and /get_reward, which are the same, and GET /status.

    Args:
        service: answers.
        token: that requests must carry; None: none.
        largest_body: of a request, in bytes.
    """

    async def score(request: Request) -> JSONResponse:
        try:
            _admit(request, token)
            return await run_in_threadpool(_scored, service, await _body(request, largest_body))
        except Exception as error:
            return _answer_to(error, service)

    async def status(request: Request) -> JSONResponse:
        try:
            _admit(request, token)
            return await run_in_threadpool(lambda: JSONResponse(service.status()))
        except Exception as error:
            return _answer_to(error, service)

    async def missing(request: Request, error: Exception) -> JSONResponse:
        code = getattr(error, "status_code", 404)
        return _reply(service, code, {"error": "expected POST /score, POST /get_reward or GET /status"})

    routes = [Route(path, score, methods=["POST"]) for path in ("/score", "/get_reward")]
    routes.append(Route("/status", status, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={404: missing, 405: missing})


def _scored(service: RewardService, body: bytes) -> JSONResponse:
    settings = service.settings
    try:
        request = read_request(body, columns=settings.columns, labels=settings.labels, ends=settings.ends)
    except InputError as error:
        raise _Refused(400, str(error)) from error
    answer = service.reward(request)
    logs = {"leader_version": [answer.version] * request.size, "leader_failed": [int(service.failure is not None)] *
            request.size}  # fmt: skip
    # OpenRLHF reads the first three. Its scores are what dynamic filtering looks at.
    content = {"rewards": answer.rewards, "scores": answer.rewards, "extra_logs": logs, "version": answer.version}
    return _reply(service, 200, content)


def _reply(service: RewardService, status: int, content: dict[str, Any]) -> JSONResponse:
    return JSONResponse({"version": service.version, **content}, status)


def _answer_to(error: Exception, service: RewardService) -> JSONResponse:
    """What is wrong, in words, with the status that says whose fault it is."""
    if isinstance(error, _Refused):
        return _reply(service, error.status, {"error": redact(error.reason)})
    if isinstance(error, MissingLogProbsError):
        return _reply(service, 400, {"error": redact(str(error))})
    if isinstance(error, (RunStopped, CheckpointError)):
        return _reply(service, 503, {"error": redact(str(error))})
    if not isinstance(error, InputError):
        tqdm.write(redact("".join(traceback.format_exception(error))))
    said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
    return _reply(service, 500, {"error": redact(said)})


def _admit(request: Request, token: str | None) -> None:
    if token is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
        raise _Refused(401, "expected the header Authorization: Bearer TOKEN, with the token that the server was given")


async def _body(request: Request, largest: int) -> bytes:
    """The body, of which no more is kept than may be.

    What is a little too large is read to its end and dropped: a client that is still sending would see a broken pipe
    instead of the answer.
    """
    too_large = _Refused(
        413, f"expected a body of at most {largest // 2**20} MiB; send fewer completions at a time, or set largest_body"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > _DRAINED * largest:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > _DRAINED * largest:
                raise too_large
            if size <= largest:
                parts.append(part)
    except ClientDisconnect as error:
        raise _Refused(400, "the connection was closed before the request was there") from error
    if size > largest:
        raise too_large
    return b"".join(parts)


def _token(settings: ServeSettings) -> str | None:
    if settings.token_variable is None:
        return None
    token = os.environ.get(settings.token_variable, "").strip()
    if not token:
        raise InputError(f"token_variable: expected a token in the environment variable {settings.token_variable}")
    return token


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_WAITING)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot be bound to: {first_line(error)}") from error
    with listening:
        yield listening
