"""Judges that cost: cache, budget, batches, a server that misbehaves, a kill, pairs, settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_reward_models
import torch

from align_cbrl import (
    CrossFitted,
    CVaR,
    Distinct,
    FunctionOfMeans,
    InputError,
    KLPriced,
    Objective,
    PreferenceLikelihood,
    Rollouts,
    RunStopped,
    SetUtility,
)
from align_cbrl.llm import AnswerKind, Judge, JudgeCache, PairwiseJudge, RemoteJudge, SetJudge
from align_cbrl.llm.settings.judge import FunctionSettings, JudgeSettings, RewardModelJudgeSettings
from align_cbrl.llm.settings.objective import (
    ConstrainedSettings,
    ExpectedSettings,
    ObjectiveSettings,
    PreferenceSettings,
    SetSettings,
)
from align_cbrl.objectives import target_shares
from align_cbrl.runs.config import load_config


def rollouts(completions: list[str], **columns: list[Any]) -> Rollouts:
    steps = {"prompt": ["q"] * len(completions), "completion": completions, **columns}
    return Rollouts.bandit(contexts=torch.zeros(len(completions), dtype=torch.long), steps=steps)


def words(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(c.split())) for c in completions]


class Counting:
    """A judge that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.asked.append(list(completions))
        return [float(len(c)) for c in completions]


# ---- cache, budget, batches ----


def test_nothing_is_asked_twice() -> None:
    function = Counting()
    judge = Judge(function)
    assert judge(None, rollouts(["a", "bb", "a"])).tolist() == [[1.0], [2.0], [1.0]]
    assert judge(None, rollouts(["bb", "ccc"])).tolist() == [[2.0], [3.0]]
    assert function.asked == [["a", "bb"], ["ccc"]]
    assert (judge.calls, judge.cached) == (3, 2)


def test_what_a_judge_does_not_see_does_not_tell_rows_apart() -> None:
    function, by_answer = Counting(), Judge(lambda completions, answer: [float(a) for a in answer])
    judge = Judge(function)
    judge(None, rollouts(["a", "a"], answer=[1, 2]))
    assert function.asked == [["a"]]
    assert by_answer(None, rollouts(["a", "a"], answer=[1, 2])).tolist() == [[1.0], [2.0]]
    some = Judge(lambda **arguments: [float(len(arguments))] * len(arguments["completions"]), columns=["answer"])
    assert some(None, rollouts(["a"], answer=[1], other=[object()])).tolist() == [[3.0]]
    with pytest.raises(InputError, match=r"cannot tell its rows apart .*columns="):
        Judge(lambda **arguments: [0.0])(None, rollouts(["a"], other=[object()]))


def test_a_cache_on_disk_is_shared_and_knows_the_judge(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "cache.sqlite"
    first = Judge(words, cache=JudgeCache(path))
    first(None, rollouts(["a b", "a"]))
    second = Judge(words, cache=JudgeCache(path))
    assert second(None, rollouts(["a", "a b c"])).tolist() == [[1.0], [3.0]]
    assert (second.calls, second.cached, second.spent) == (1, 1, 3)
    other = Judge(lambda completions: [9.0] * len(completions), cache=JudgeCache(path), identity="other")
    assert other(None, rollouts(["a"])).item() == 9.0
    assert (other.spent, second.spent) == (1, 3)
    assert second(None, rollouts(["a"])).item() == 1.0
    with (
        path.open("rb") as connection,
        pytest.raises(InputError, match=r"whose scores go to .* since a BufferedReader"),
    ):
        Judge(lambda completions: [connection], cache=JudgeCache(path))
    (tmp_path / "bad.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 20)
    with pytest.raises(InputError, match="expected a cache that align-cbrl wrote"):
        JudgeCache(tmp_path / "bad.sqlite")


def test_many_keys_and_exact_scores(tmp_path: Path) -> None:
    scores = {f"key {i}": i / 7 for i in range(1234)}
    for cache in (JudgeCache(), JudgeCache(tmp_path / "cache.sqlite")):
        cache.add("me", scores)
        assert cache.get([*scores, "unknown"]) == scores
        assert cache.spent("me") == 1234


def test_judges_that_differ_share_no_scores() -> None:
    cache = JudgeCache()
    with Path(__file__).open() as connection:  # its content cannot be read, so that these two are told apart by nothing
        judges = [
            *(Judge(lambda completions, s=s: [s] * len(completions), cache=cache) for s in (1.0, 2.0)),
            *(Judge(lambda completions, s=s: [s, connection][:1], cache=cache) for s in (3.0, 4.0)),
        ]
    assert [judge(None, rollouts(["a"])).item() for judge in judges] == [1.0, 2.0, 3.0, 4.0]
    assert [judge.identity is None for judge in judges] == [False, False, True, True]


def test_a_budget_stops_before_the_call_and_a_larger_one_resumes(tmp_path: Path) -> None:
    function = Counting()

    def judge(budget: int) -> Judge:
        return Judge(function, cache=JudgeCache(tmp_path / "c.sqlite"), identity="counting", budget=budget)

    judge(3)(None, rollouts(["a", "b"]))
    with pytest.raises(RunStopped, match="2 of the budget of 3 completions are spent, and 2 more are needed"):
        judge(3)(None, rollouts(["c", "d", "a"]))
    assert function.asked == [["a", "b"]]
    assert judge(3)(None, rollouts(["a", "b", "a"])).shape == (3, 1)  # what is known is free
    judge(4)(None, rollouts(["c", "d", "a"]))
    assert function.asked[1:] == [["c", "d"]]


def test_what_was_said_before_a_failure_is_kept() -> None:
    function = Counting()

    def fails_at_d(prompts: list[str], completions: list[str]) -> list[Any]:
        scores: list[Any] = function(prompts, completions)
        return [float("nan") if c == "d" else s for c, s in zip(completions, scores, strict=True)]

    judge = Judge(fails_at_d, batch_size=2)
    with pytest.raises(InputError, match="judge: expected a finite number for each completion, got nan"):
        judge(None, rollouts(["a", "b", "c", "d", "e"]))
    assert function.asked == [["a", "b"], ["c", "d"]]
    judge.function = function
    judge(None, rollouts(["a", "b", "c", "d", "e"]))
    assert function.asked[2:] == [["d", "e"]]


@pytest.mark.parametrize("returned", [None, [1.0], ["x", "y"], [float("nan"), 0.0], "ab", {"a": 1, "b": 2}, 3.0])
def test_answers_refused(returned: Any) -> None:
    with pytest.raises(InputError, match="judge: expected"):
        Judge(lambda completions: returned)(None, rollouts(["a", "b"]))


def test_nothing_is_paid_twice_after_a_kill(tmp_path: Path) -> None:
    """A judge writes down what it is paid for; its process is killed between two batches, and another one goes on."""
    texts, paid = [f"c{i}" for i in range(10)], tmp_path / "paid.txt"

    def run(kill: bool) -> Judge:
        def pays(completions: list[str]) -> list[float]:
            if kill and paid.exists() and len(paid.read_text().split()) >= 6:
                os.kill(os.getpid(), signal.SIGKILL)
            with paid.open("a") as file:
                file.write("".join(f"{c}\n" for c in completions))
            return [float(c[1:]) for c in completions]

        judge = Judge(pays, cache=JudgeCache(tmp_path / "cache.sqlite"), identity="mine", batch_size=2)
        assert judge(None, rollouts(texts))[:, 0].tolist() == [float(i) for i in range(10)]
        return judge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the child ends by a kill
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run(kill=True)
        os._exit(1)  # never reached, unless the kill did not come
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(paid.read_text().split()) == 6
    judge = run(kill=False)
    assert (judge.calls, judge.cached, judge.spent) == (4, 6, 10)
    assert sorted(paid.read_text().split()) == texts


# ---- a server ----


Answer = Callable[[dict[str, Any], int], tuple[int, Any, dict[str, str]]]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A stand-in on this machine: answers POSTs by `answer(body, how many before) -> status, body, headers`."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"body": body, "token": self.headers.get("Authorization"), "time": time.monotonic()})
            status, said, headers = answer(body, len(seen) - 1)
            text = said if isinstance(said, bytes) else json.dumps(said).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/score", seen
        finally:
            http.shutdown()
            thread.join(timeout=10)


def good(body: dict[str, Any], before: int) -> tuple[int, Any, dict[str, str]]:
    return 200, {"scores": [float(len(c)) for c in body["completions"]]}, {}


def test_a_server_is_asked_in_batches_with_a_token_and_the_columns_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    with server(good) as (url, seen):
        remote = RemoteJudge(url, columns=["topic"], token_variable="JUDGE_TOKEN")
        judge = Judge(remote, batch_size=2)
        batch = rollouts(["a", "bb", "a", "ccc"], topic=["x", "y", "x", "z"], other=[object()] * 4)
        assert judge(None, batch)[:, 0].tolist() == [1.0, 2.0, 1.0, 3.0]
        assert [row["body"]["completions"] for row in seen] == [["a", "bb"], ["ccc"]]
        assert seen[0]["body"] == {"prompts": ["q", "q"], "completions": ["a", "bb"], "topic": ["x", "y"]}
        assert {row["token"] for row in seen} == {"Bearer secret"}
        assert "secret" not in repr(vars(remote)) + remote.identity
        monkeypatch.delenv("JUDGE_TOKEN")
        with pytest.raises(InputError, match="a token in the environment variable JUDGE_TOKEN"):
            judge(None, rollouts(["new"], topic=["x"]))
        with pytest.raises(InputError, match=r"no columns \['topic'\]"):
            judge(None, rollouts(["newer"]))


def test_a_server_that_recovers_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(body: dict[str, Any], before: int) -> tuple[int, Any, dict[str, str]]:
        faults: list[tuple[int, Any, dict[str, str]]] = [
            (503, b"busy", {}), (429, b"slow down", {"Retry-After": "7"}), (200, b"<html>", {})
        ]  # fmt: skip
        return faults[before] if before < len(faults) else good(body, before)

    waits: list[float] = []
    with server(answer) as (url, seen):
        monkeypatch.setattr("align_cbrl.llm.scoring.time.sleep", waits.append)
        judge = Judge(RemoteJudge(url), retries=3, wait=0.5)
        assert judge(None, rollouts(["abc"])).item() == 3.0
    assert len(seen) == 4 and judge.calls == 1
    assert 0.25 <= waits[0] <= 0.75 and waits[1] == 7.0 and 1.0 <= waits[2] <= 3.0


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ((200, {"scores": [float("nan")]}, {}), InputError, "got nan for completion 0"),
        ((200, {"scores": ["high"]}, {}), InputError, "got 'high' for completion 0"),
        ((200, {"scores": []}, {}), InputError, "expected 1 scores, one per completion, got 0"),
        ((200, {"scores": [True]}, {}), InputError, "got 'True' for completion 0"),
        ((200, {"scores": [1e200]}, {}), InputError, r"got '1e\+200' for completion 0"),
        ((200, b'{"scores": [1' + b"0" * 400 + b"]}", {}), InputError, "got 1000"),
        ((200, b'{"scores": [1' + b"0" * 9000 + b"]}", {}), RunStopped, "expected JSON"),
        ((200, b"[" * 100_000, {}), RunStopped, "expected JSON"),
        ((200, {"score": [1.0]}, {}), InputError, "an object with one under 'scores'"),
        ((401, b"who are you", {}), InputError, "status 401 .*who are you; repair"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), InputError, "status 302"),
        ((500, b"oops", {}), RunStopped, r"JudgeUnavailable on all 2 attempts \(judge http.*status 500.*resume"),
        ((429, b"", {"Retry-After": "86400"}), RunStopped, "asks to wait 86400 s"),
    ],
)
def test_a_server_that_does_not_recover(said: tuple[int, Any, dict[str, str]], error: type, message: str) -> None:
    with server(lambda body, before: said) as (url, seen):
        judge = Judge(RemoteJudge(url), retries=1, wait=0.0)
        with pytest.raises(error, match=message):
            judge(None, rollouts(["a"]))
        assert len(seen) == (2 if "JSON" in message or said[0] == 500 else 1)
        assert judge.calls == 0


def test_a_server_that_says_nothing_times_out() -> None:
    silent = threading.Event()

    def answer(body: dict[str, Any], before: int) -> tuple[int, Any, dict[str, str]]:
        silent.wait(timeout=10)
        return good(body, before)

    with server(answer) as (url, _):
        began = time.monotonic()
        with pytest.raises(RunStopped, match=r"no answer: .*timed out"):
            Judge(RemoteJudge(url, timeout=0.2), retries=1, wait=0.0)(None, rollouts(["a"]))
        assert time.monotonic() - began < 5
        silent.set()
    with pytest.raises(RunStopped, match="no answer"):  # and now nobody listens
        Judge(RemoteJudge(url, timeout=0.2), retries=0)(None, rollouts(["a"]))


@pytest.mark.parametrize("part", ["status", "header", "body"])
def test_a_server_that_drips_does_not_hold_the_run(part: str) -> None:
    """A byte every now and then would satisfy a socket's own timeout for ever."""
    stop = threading.Event()
    before = {
        "status": b"",
        "header": b"HTTP/1.1 200 OK\r\n",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n",
    }
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(before[part])
                while not stop.wait(0.05):
                    connection.sendall(b"1")

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        began = time.monotonic()
        with pytest.raises(RunStopped, match=r"timed out after 0\.3 s"):
            Judge(RemoteJudge(url, timeout=0.3), retries=0)(None, rollouts(["a"]))
        assert time.monotonic() - began < 3
        stop.set()
        thread.join()


def test_what_a_server_echoes_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_ACCESS", "v3ry-s3cret")  # the variable's name does not give it away

    def echo(body: dict[str, Any], before: int) -> tuple[int, Any, dict[str, str]]:
        answers: list[tuple[int, bytes]] = [
            (401, b"token v3ry-s3cret is wrong"),
            (200, b"v3ry-s3cret"),
            (200, b'"v3ry-s3cret"'),
        ]
        return *answers[before % 3], {}

    with server(echo) as (url, _):
        judge = Judge(RemoteJudge(f"{url}?api_key=4lso", token_variable="MY_ACCESS"), retries=0)
        for kind in (InputError, RunStopped, InputError):
            with pytest.raises(kind) as refused:
                judge(None, rollouts(["a"]))
            assert "s3cret" not in str(refused.value) and "4lso" not in str(refused.value)


def test_valid_scores_beside_an_invalid_one_are_kept() -> None:
    def mixed(body: dict[str, Any], before: int) -> tuple[int, Any, dict[str, str]]:
        return (200, {"scores": [1.0, True, 3.0]}, {}) if before == 0 else good(body, before)

    with server(mixed) as (url, seen):
        judge = Judge(RemoteJudge(url))
        with pytest.raises(InputError, match="got 'True' for completion 1"):
            judge(None, rollouts(["a", "bb", "ccc"]))
        assert judge(None, rollouts(["a", "bb", "ccc"]))[:, 0].tolist() == [1.0, 2.0, 3.0]
        assert seen[1]["body"]["completions"] == ["bb"]


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["CREATE TABLE songs (name TEXT)"], "a database with a table 'songs'"),
        (["CREATE TABLE scores (team TEXT, points INTEGER)"], "a table 'scores' of"),
        (["INSERT INTO scores VALUES ('k', 'high')"], "expected a finite number for the key k, got 'high'"),
        (["INSERT INTO scores VALUES ('k', NULL)"], "expected a finite number for the key k, got None"),
        (["INSERT INTO scores VALUES ('k', 9e999)"], "expected a finite number for the key k, got inf"),
    ],
)
def test_a_cache_of_foreign_content_is_refused_and_left_alone(
    tmp_path: Path, statements: list[str], message: str
) -> None:
    path = tmp_path / "cache.sqlite"
    if statements[0].startswith("INSERT"):
        JudgeCache(path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        JudgeCache(path).get(["k"])
    assert path.read_bytes() == before


def test_a_cache_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be read as one" * 100)
    for path, message in ((tmp_path / "text", "another file, or a damaged one"), (tmp_path / "text" / "c", "text/c: ")):
        with pytest.raises(InputError, match=message):
            JudgeCache(path)
    (tmp_path / "empty").touch()
    with pytest.warns(UserWarning, match="is empty; what was in it is asked again"):
        JudgeCache(tmp_path / "empty")


def test_the_rate_is_kept() -> None:
    with server(good) as (url, seen):
        Judge(RemoteJudge(url, rate=20.0), batch_size=1)(None, rollouts(list("abcde")))
    assert len(seen) == 5 and seen[-1]["time"] - seen[0]["time"] >= 0.9 * 4 / 20.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RemoteJudge("ftp://example.org"), "expected http://"),
        (lambda: RemoteJudge("file:///etc/hosts"), "expected http://"),
        (lambda: RemoteJudge("https://me:pw@example.org"), "expected no password"),
        (lambda: RemoteJudge("http://example.org", token_variable="T"), "unencrypted; use https"),
        (lambda: RemoteJudge("https://example.org", rate=0.0), "rate: expected a finite number > 0, got 0.0"),
        (lambda: Judge(words, budget=0), "budget: expected a whole number >= 1, got 0"),
        (lambda: Judge(words, batch_size=0), "batch_size"),
        (lambda: Judge(words, retries=-1), "retries: expected a whole number >= 0, got -1"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# ---- pairs ----


def test_a_judge_of_pairs_is_asked_about_each_pair_once_in_both_orders() -> None:
    asked: list[tuple[str, str]] = []

    def prefers_first(prompts: list[str], completions_a: list[str], completions_b: list[str]) -> list[float]:
        pairs = list(zip(completions_a, completions_b, strict=True))
        asked.extend(pairs)
        return [1.0 if len(a) > len(b) else 0.4 for a, b in pairs]  # and likes what it reads first

    judge = PairwiseJudge(prefers_first)
    batch = rollouts(["a", "bb", "ccc", "a"])
    evaluation = PreferenceLikelihood(preference=judge).evaluate(Constant(), batch)
    assert judge.calls == len(asked) == len(set(asked)) == 6  # three distinct pairs, two orders
    assert judge(batch, torch.tensor([1, 0, 0]), torch.tensor([0, 1, 3])).tolist() == pytest.approx([0.8, 0.2, 0.5])
    assert judge.calls == 6
    assert evaluation.value.item() == pytest.approx(torch.tensor(0.5).log().item())  # of a reward that is constant
    one = PairwiseJudge(prefers_first, both_orders=False)
    assert one(batch, torch.tensor([1]), torch.tensor([0])).tolist() == [1.0]
    with pytest.raises(InputError, match=r"expected numbers in \[0, 1\], got 1.5 for pair 0"):
        PairwiseJudge(lambda completions_a, completions_b: [1.5] * len(completions_a))(
            batch, torch.tensor([1]), torch.tensor([0])
        )


class Constant(torch.nn.Module):
    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        return torch.zeros(rollouts.size, 1, dtype=torch.float64)


# ---- sets ----


class Panel:
    """A judge of sets that remembers what it was asked."""

    def __init__(self, score: Callable[[list[str]], float]) -> None:
        self.score, self.asked = score, []

    def __call__(self, prompts: list[str], completions: list[list[str]]) -> list[float]:
        self.asked.extend(tuple(texts) for texts in completions)
        return [self.score(texts) for texts in completions]


def distinct(texts: list[str]) -> float:
    return float(len(set(texts)))


def test_a_judge_of_sets_is_asked_about_each_set_once_whatever_its_order() -> None:
    panel = Panel(distinct)
    judge = SetJudge(panel, identity="panel")
    batch = rollouts(["a", "bb", "ccc", "a"])
    objective = SetUtility(judge, size=3)
    value = objective.evaluate(Constant(), batch).value.item()
    assert value == pytest.approx((3 + 2 + 2 + 3) / 4)
    # {a, bb, ccc} occurs twice; the two others with "a" twice; and three, of which one is a copy, in another order.
    assert len(panel.asked) == len(set(panel.asked)) == judge.calls == 3 + 3
    objective.evaluate(Constant(), rollouts(["ccc", "a", "a", "bb"]))
    assert judge.calls == judge.spent == 6
    other = SetJudge(panel, identity="panel", cache=judge.cache)  # another process, or a resumed one
    assert SetUtility(other, size=3).evaluate(Constant(), batch).value.item() == value and other.calls == 0
    assert torch.equal(judge(batch, torch.tensor([[0, 1]])), judge(batch, torch.tensor([[1, 0]])))


def test_a_judge_of_sets_stops_at_its_budget_and_goes_on_from_its_cache(tmp_path: Path) -> None:
    batch, panel = rollouts(["a", "bb", "ccc", "dddd"]), Panel(distinct)

    def asked(budget: int, panel: Panel) -> SetUtility:
        cache = JudgeCache(tmp_path / "sets.sqlite")
        return SetUtility(SetJudge(panel, cache=cache, identity="1", budget=budget, batch_size=1), size=2)

    with pytest.raises(RunStopped, match=r"judge: 0 of the budget of 5 sets are spent, and 6 more are needed now"):
        asked(5, panel).evaluate(Constant(), batch)
    assert asked(10, panel).evaluate(Constant(), batch).value.item() == 2.0
    assert len(panel.asked) == 6 + 4  # six pairs, and four of them in another order
    again = Panel(distinct)
    assert asked(10, again).evaluate(Constant(), batch).value.item() == 2.0 and not again.asked


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [float(len(t[0])) for t in completions], r"panel: .* does not depend on the order of the"),
        (
            lambda completions: [float("nan")] * len(completions),
            "panel: expected a finite number for each set",
        ),
        (lambda completions: [0.0] * (len(completions) + 1), "panel: expected 6 scores, one per set, got 7"),
        (lambda completions: None, "panel: expected 6 scores, got None; return a list with one number per set"),
    ],
)
def test_a_judge_of_sets_that_is_wrong_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SetUtility(SetJudge(function, name="panel"), 2).evaluate(Constant(), rollouts(["a", "bb", "ccc", "dddd"]))


def first_letter(completions: list[str]) -> list[str]:
    return [text[0] for text in completions]


def twice_worst(score: Objective, share: float) -> Objective:
    """An objective of a user's own, for kind "function"."""
    return KLPriced(CrossFitted(CVaR(score, share), memory=0), price=0.1)


def test_kinds_of_answers_are_asked_once_and_only_known_ones_have_shares() -> None:
    asked: list[int] = []

    def kind(completions: list[str]) -> list[Any]:
        asked.append(len(completions))
        return first_letter(completions)

    batch = rollouts(["ab", "ba", "ac", "bd"])
    kinds = AnswerKind(kind)
    assert SetUtility(Distinct(kinds), 2).evaluate(None, batch).value.item() == pytest.approx((2 + 4 * 2) / 6)  # type: ignore[arg-type]
    objective = FunctionOfMeans(target_shares([0.5, 0.5]), kinds.shares(["a", "b"]))
    assert objective.evaluate(None, batch).value.item() == pytest.approx(0.0)  # type: ignore[arg-type]
    assert asked == [4]
    with pytest.raises(InputError, match=r"kind of answer: expected one of \['a', 'c'\], got 'b'"):
        FunctionOfMeans(target_shares([0.5, 0.5]), kinds.shares(["a", "c"])).evaluate(None, batch)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected 4 names, one per completion, got 1"):
        AnswerKind(lambda completions: ["a"])(None, batch)
    with pytest.raises(InputError, match="kind of answer: expected names, got a object"):
        AnswerKind(lambda completions: [object()] * 4)(None, batch)


# ---- settings ----


def test_settings_build_judges(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completions):\n    return [float(len(c)) for c in completions]\n"
        "def compare(completions_a, completions_b):\n    return [0.5 for _ in completions_a]\n"
    )
    judge = FunctionSettings(function=f"{tmp_path}/mine.py:score", budget=2).build(tmp_path / "run")
    assert judge(None, rollouts(["abc"])).item() == 3.0  # type: ignore[arg-type,call-arg]
    assert (tmp_path / "run/judge_cache.sqlite").is_file() and judge.spent == 1
    assert FunctionSettings(function=f"{tmp_path}/mine.py:score").build(tmp_path).cache.path is None
    model = tiny_reward_models.build(tmp_path / "model")
    kept = RewardModelJudgeSettings(reward_model=str(model)).build(tmp_path)
    assert kept.cache.path == tmp_path / "judge_cache.sqlite"  # so that a resumed run has the same bits
    pairs = FunctionSettings(function=f"{tmp_path}/mine.py:compare", pairwise=True, both_orders=False).build(tmp_path)
    assert isinstance(pairs, PairwiseJudge) and not pairs.both_orders
    assert isinstance(FunctionSettings(function=f"{tmp_path}/mine.py:score", sets=True).build(tmp_path), SetJudge)
    with pytest.raises(InputError, match="sets: expected either pairwise or sets, got both"):
        FunctionSettings(function=f"{tmp_path}/mine.py:score", pairwise=True, sets=True).build(tmp_path)
    with server(good) as (url, seen):
        (tmp_path / "judge.yaml").write_text(f"url: {url}\nbudget: 100\nrate: 50\ncolumns: [topic]\n")
        remote = load_config(JudgeSettings, tmp_path / "judge.yaml").build(tmp_path)
        assert isinstance(remote, Judge) and remote.batch_size == 16
        remote(None, rollouts(["a"], topic=["x"]))
        assert seen[0]["body"] == {"prompts": ["q"], "completions": ["a"], "topic": ["x"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected exactly one of function, reward_model, url, got"),
        (["function=a:b", "url=https://x.example"], "got .'function', 'url'"),
        (["reward_model=x", "pairwise=true"], "pairwise: unknown key; there are: batch_size"),
        (["function=a:b", "rate=2"], "rate: unknown key; did you mean 'wait'"),
        (["function=a:b", "budget=0"], "budget: expected a whole number >= 1, got 0"),
    ],
)
def test_settings_of_judges_refused(values: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(JudgeSettings, None, values)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["kind=expected"], "ExpectedUtility"),
        (["kind=kl_priced", "price=0.01"], "KLPriced"),
        (["kind=preference", "scale=0.5", "partners=2"], "PreferenceLikelihood"),
        (["kind=cvar", "share=0.25"], "CrossFitted(CVaR)"),
        (["kind=worst_group", "column=topic", "price=0.1"], "CrossFitted(WorstGroup)"),
        (["kind=mean_variance", "aversion=1", "memory=0"], "CrossFitted(MeanVariance)"),
        (["kind=constrained", "cost=length", "bound=3", "rate=0.1"], "Constrained"),
        (["kind=set", "size=4", "score=best"], "SetUtility(BestOf)"),
        (["kind=set", "size=4", "score=pass", "least=2", "price=0.1"], "KLPriced(SetUtility)"),
        (["kind=set", "size=4", "score=distinct", f"answer={__file__}:first_letter"], "SetUtility(Distinct)"),
        (["kind=targets", f"answer={__file__}:first_letter", "shares={a: 0.3, b: 0.7}"], "FunctionOfMeans"),
        (["kind=means", "function=harmonic_mean", "cost=length", "price=0.1"], "KLPriced(FunctionOfMeans)"),
        (["kind=function", f"function={__file__}:twice_worst", "arguments.share=0.5"], "KLPriced(CrossFitted)"),
        (["kind=function", "function=align_cbrl.KLPriced", "arguments={price: 0.1}"], "KLPriced(ExpectedUtility)"),
    ],
)
def test_one_line_swaps_objectives(values: list[str], kind: str) -> None:
    made = load_config(ObjectiveSettings, None, values).build(Judge(words), {"length": Judge(words)})
    inside = getattr(made, "score", None) if isinstance(made, SetUtility) else getattr(made, "objective", None)
    inner = f"({type(inside).__name__})" if "(" in kind else ""
    assert f"{type(made).__name__}{inner}" == kind
    batch = rollouts(["a b c", "b d", "b", "a", "b c d"], topic=["x"] * 5)
    batch = dataclasses.replace(batch, log_policy=-torch.ones(5, 1), log_prior=-torch.ones(5, 1))
    if "preference" not in values[0]:  # which asks for a reward
        leader = type("Still", (), {"log_prior": lambda self, r: None, "parameters": lambda self: []})()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one context says little of a risk
            assert torch.isfinite(made.evaluate(leader, batch).value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["kind=cvr"], "did you mean 'cvar'"),
        (["kind=cvar", "shaer=0.2"], "did you mean 'share'"),
        (["kind=cvar"], "share: is required: expected a number"),
        (["kind=cvar", "share=0.2", "scale=1"], "scale: unknown key; did you mean 'share'"),
        (["kind=cvar", "share=2"], r"share: expected a finite number > 0 and <= 1, got 2"),
        (["kind=constrained", "cost=c"], "bound: is required: expected a number"),
        (["kind=kl_priced", "price=-1"], "price: expected a finite number >= 0, got -1"),
        (["kind=expected", "share=0.3"], "share: unknown key; there are: kind"),
        (["kind=set", "size=0", "score=best"], "size: expected a whole number >= 1, got 0"),
        (["kind=set", "size=4", "score=distinct"], "answer: expected with score distinct"),
        (["kind=set", "size=4", "score=best", "least=1"], "least: expected with score pass or distinct"),
        (["kind=set", "size=4", "score=worst"], "expected 'pass' or 'best' or 'distinct'"),
        (
            ["kind=targets", "answer=a.b", "shares={a: 0.3, b: 0.6}"],
            r"expected shares that sum to one, got \[0.3, 0.6\]",
        ),
        (["kind=means", "function=ratio"], "cost: is required"),
        (["kind=function", f"function={__file__}:twice_wrost"], "did you mean 'twice_worst'"),
        (["kind=function", f"function={__file__}:twice_worst"], "twice_worst failed on the score and {}: TypeError"),
        (["kind=function", "function=builtins.type"], "builtins.type to return an Objective, got ABCMeta"),
        (["kind=function", "function=align_cbrl.KLPriced", "arguments={price: -1}"], "price: expected a finite"),
    ],
)
def test_objectives_refused(values: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(ObjectiveSettings, None, values)


def test_objectives_refuse_the_wrong_judge_and_unknown_costs() -> None:
    pairs = PairwiseJudge(lambda completions_a, completions_b: [0.5])
    with pytest.raises(InputError, match="'expected' needs a judge that scores completions"):
        ExpectedSettings().build(pairs)
    assert PreferenceSettings(partners=2).build(pairs).preference is pairs  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="scale: a judge of pairs says probabilities"):
        PreferenceSettings(scale=1.0).build(pairs)
    sets = SetJudge(lambda completions: [0.5])
    with pytest.raises(InputError, match=r"'expected' needs a judge .* got one that scores sets; use kind 'set'"):
        ExpectedSettings().build(sets)
    assert SetSettings(size=3).build(sets).score is sets  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="score: a judge of sets says what they are worth, got 'best'"):
        SetSettings(size=3, score="best").build(sets)
    with pytest.raises(InputError, match="score: expected pass, best or distinct"):
        SetSettings(size=3).build(Judge(words))
    with pytest.raises(InputError, match="'set' needs a judge that scores completions, got one that compares pairs"):
        SetSettings(size=3, score="best").build(pairs)
    settings = ConstrainedSettings(cost="lenght", bound=1.0, rate=0.1)
    with pytest.raises(InputError, match="did you mean 'length'"):
        settings.build(Judge(words), {"length": Judge(words)})
