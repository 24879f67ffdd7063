"""A stand-in for a chat API: counts what it is asked and paid, and fails as often as it is told to."""

from __future__ import annotations

import collections
import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "v3ry-s3cret-chat-key"


class ChatServer:
    """What it has seen and said.

    Args:
        say: the reply to a question.
        faults: of every hundred requests, how many get a 429, a 500, a dropped connection, a malformed reply (paid).
        slow: seconds that an answer takes, at most.
    """

    def __init__(
        self,
        say: Callable[[str], str] = lambda question: f"Score: {length(question) % 10}",
        faults: tuple[int, int, int, int] = (0, 0, 0, 0),
        slow: float = 0.0,
    ) -> None:
        self.say, self.faults, self.slow = say, faults, slow
        self.url = ""
        self.seen: list[dict[str, Any]] = []
        self.statuses: collections.Counter[str] = collections.Counter()
        self.paid: collections.Counter[str] = collections.Counter()  # replies by question
        self.tokens = [0, 0]
        self.together = self.most_together = 0
        self.after: Callable[[int], None] = lambda paid: None  # called when a reply has been sent, with how many were
        self.before: Callable[[int], None] = lambda number: None  # called with the number of the request
        self.always: tuple[int, Any] | None = None  # status and body of every answer
        self.lock = threading.Lock()
        self._dice = random.Random(0)

    def fate(self) -> str:
        rolled = self._dice.randrange(100)
        for name, share in zip(("429", "500", "dropped", "malformed"), self.faults, strict=True):
            if rolled < share:
                return name
            rolled -= share
        return "good"

    @property
    def calls(self) -> int:
        return sum(self.paid.values())


def length(question: str) -> int:
    """Words of what is judged, which the tests' templates put between brackets."""
    return len(re.findall(r"\w+", question.rpartition("<<")[2].partition(">>")[0]))


@contextlib.contextmanager
def chat_server(*arguments: Any, **options: Any) -> Iterator[ChatServer]:
    api = ChatServer(*arguments, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real servers keep them

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with api.lock:
                number = len(api.seen)
                api.seen.append({"path": self.path, "body": body, "token": self.headers.get("Authorization")})
                api.together += 1
                api.most_together = max(api.together, api.most_together)
                fate, pause = api.fate(), api._dice.uniform(0, api.slow)
                api.statuses[fate] += 1
            try:
                api.before(number)
                time.sleep(pause)
                self.answer(body, fate)
            finally:
                with api.lock:
                    api.together -= 1

        def answer(self, body: dict[str, Any], fate: str) -> None:
            question = body["messages"][-1]["content"]
            if api.always is not None:
                self.send(*api.always)
                return
            if fate == "dropped":
                self.close_connection = True
                self.connection.close()
                return
            if fate in ("429", "500"):
                self.send(int(fate), {"error": f"no {self.headers.get('Authorization')}"}, {"Retry-After": "0"})
                return
            reply = "Well, that depends." if fate == "malformed" else api.say(question)
            used = {"prompt_tokens": len(question), "completion_tokens": len(reply)}
            said = {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}
            with api.lock:
                api.paid[question] += 1
                api.tokens = [api.tokens[0] + len(question), api.tokens[1] + len(reply)]
                calls = api.calls
            self.send(200, {**said, "usage": used})
            api.after(calls)

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            text = json.dumps(body).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().handle()

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        api.url = f"http://127.0.0.1:{http.server_port}/v1"
        try:
            yield api
        finally:
            http.shutdown()
            thread.join(timeout=10)
