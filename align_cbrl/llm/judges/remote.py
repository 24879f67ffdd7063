"""`RemoteJudge`: a judge on a server, which gets one POST of JSON per batch, at a limited rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.llm.judges.endpoint import Endpoint
from align_cbrl.llm.scoring import is_number
from align_cbrl.runs.secrets import redact

_LARGEST_SCORE = 1e30  # its square, and sums of those, are still numbers


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
        self._endpoint = Endpoint("RemoteJudge", url, rate=rate, timeout=timeout, token_variable=token_variable)
        self.url = url
        self.columns = list(columns)
        self.rate = rate
        self.timeout = timeout
        self.token_variable = token_variable
        self.identity = f"{redact(url)} version {version}"

    def __call__(self, **arguments: Sequence[Any]) -> list[Any]:
        """The server's scores of one batch, as it sent them; `Judge` checks them.

        Raises:
            JudgeUnavailable: no connection, no answer in time, an answer that is not JSON, or a status of 408, 425, 429
                or 5xx, after which another attempt may succeed.
            InputError: another status, since the request or the token is wrong; an answer without scores; or an
                environment variable that is not set.
        """
        answer = self._endpoint.post(arguments)
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise InputError(
                f"{self._endpoint.name}: expected a list of numbers or an object with one under 'scores', got "
                f"{self._endpoint.brief(answer)}"
            )
        # JSON's true is no score, though Python counts it among the numbers, and no square of 1e200 is finite. `Judge`
        # refuses texts, and keeps the other scores of the batch.
        return [
            str(score) if isinstance(score, bool) or (is_number(score) and abs(score) > _LARGEST_SCORE) else score
            for score in scores
        ]
