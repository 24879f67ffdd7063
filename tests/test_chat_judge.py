"""A language model as judge: templates, replies, failures, spending, keys; and judges that are asked in threads."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from chat_server import KEY, ChatServer, chat_server, length

from align_cbrl import InputError, PreferenceLikelihood, Rollouts, RunStopped, SetUtility
from align_cbrl.llm import ChatJudge, Judge, JudgeCache, PairwiseJudge, Prices, RemoteJudge, SetJudge, Usage
from align_cbrl.llm.judges import endpoint
from align_cbrl.llm.judges.reply import ReplyReader
from align_cbrl.llm.judges.template import Template
from align_cbrl.llm.settings.judge import ChatSettings, JudgeSettings
from align_cbrl.runs.config import load_config, to_dict
from align_cbrl.runs.facts import facts_of

RUBRIC = "To {prompt} somebody said <<{completion}>>. From 0 to 9?"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_CHAT_ACCESS", KEY)  # a name that does not give it away


def rollouts(completions: list[Any], **columns: list[Any]) -> Rollouts:
    steps = {"prompt": ["q"] * len(completions), "completion": completions, **columns}
    return Rollouts.bandit(contexts=torch.zeros(len(completions), dtype=torch.long), steps=steps)


def texts(count: int, start: int = 0) -> list[str]:
    """Different completions, of 1, 2, ..., 9 words and so on."""
    return [" ".join([f"w{i}"] * (1 + i % 9)) for i in range(start, start + count)]


def ninths(completions: list[str]) -> list[float]:
    return [len(text.split()) / 9 for text in completions]


def chat(api: ChatServer | str, template: str | Path = RUBRIC, **options: Any) -> ChatJudge:
    url = api if isinstance(api, str) else api.url
    return ChatJudge(url, "m", template, **{"scale": (0, 9), "token_variable": "MY_CHAT_ACCESS", **options})


# ---- questions and replies ----


def test_a_question_holds_what_is_judged_as_it_is() -> None:
    odd = 'x {prompt} {completion} {{y}} {0} }{ \\1 \\g<0> {"a": 1} %s'
    with chat_server() as api:
        template = 'Q {prompt}|{topic}|<<{completion}>> {"score": 0} {{name}} {} {1}'
        Judge(chat(api, template))(None, rollouts([odd], topic=["{completion} & co"]))
        said = api.seen[0]["body"]["messages"]
        assert said == [
            {"role": "user", "content": f'Q q|{{completion}} & co|<<{odd}>> {{"score": 0}} {{name}} {{}} {{1}}'}
        ]
        assert api.seen[0]["path"] == "/v1/chat/completions" and api.seen[0]["token"] == f"Bearer {KEY}"
        turns = [{"role": "assistant", "content": "so it is"}]
        asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
        steps = {"prompt": [asked], "completion": [turns], "topic": [3]}
        Judge(chat(api, template))(None, Rollouts.bandit(contexts=torch.tensor([0]), steps=steps))
        assert api.seen[1]["body"]["messages"][0]["content"].startswith(
            "Q system: Be kind.\nuser: Hello|3|<<so it is>>"
        )


def test_the_request_is_what_was_configured() -> None:
    with chat_server() as api:
        Judge(chat(api, extra_body={"max_completion_tokens": 5, "seed": 1}, temperature=0.5))(None, rollouts(["a"]))
        Judge(chat(f"{api.url}/chat/completions?version=2", temperature=None))(None, rollouts(["a"]))
        first, second = (row["body"] for row in api.seen)
        assert {k: v for k, v in first.items() if k != "messages"} == {
            "model": "m", "temperature": 0.5, "max_completion_tokens": 5, "seed": 1,
        }  # fmt: skip
        assert set(second) == {"model", "messages"}
        assert api.seen[1]["path"] == "/v1/chat/completions?version=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} {completion}", None),
        ("{prompt} {completion_a} {completion_b} {topic}", None),
        ("{prompt} {completions}", None),
        ("{completion}", r"expected the places \{prompt\} and \{completion\}; .*got \{completion\}"),
        ("{prompt}", r"got \{prompt\}"),
        ("Score this.", "got none"),
        ("{prompt} {{completion}}", r"got \{prompt\}"),
        ("{prompt} {completion_a}", r"got \{completion_a\}, \{prompt\}"),
        ("{prompt} {completion} {completions}", r"got \{completion\}, \{completions\}, \{prompt\}"),
        ("{prompt} {completion} {prompts}", r"\{prompts\} is no column of the data; did you mean \{prompt\}"),
        ("{prompt} {completion} {class}", r"\{class\} is no column"),
    ],
)
def test_a_template_is_looked_at_when_it_is_built(tmp_path: Path, text: str, message: str | None) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text(text)
    if message is None:
        assert Template(file).text == text
        return
    with pytest.raises(InputError, match=message):
        chat("http://localhost:1/v1", text)
    with pytest.raises(InputError, match=rf"template .*rubric\.txt: .*{message}"):
        chat("http://localhost:1/v1", file)


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff{prompt}{completion}")
    with pytest.raises(InputError, match=r"template .*none\.txt: cannot be read \(No such file"):
        chat("http://localhost:1/v1", tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"template .*bytes\.txt: cannot be read \(it is not UTF-8"):
        chat("http://localhost:1/v1", tmp_path / "bytes.txt")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 7), (" 7.5\n", 7.5), ("Score: 7", 7), ("**Score:** 7/10", 7), ("It is fine.\nFinal score = 3.", 3),
        ('{"score": 4}', 4), ("[[8]]", 8), ("Score: 2\nOn second thoughts,\nScore: 3", 3), ("Score:\n6", 6),
        ("score: **9**", 9), ("`5`", 5), ("> 5", 5), ("Score: 10 / 10", 10),
        ("", None), ("I would say 7", None), ("7 out of 10", None), ("11", None), ("-3", None), ("Score: -3", None),
        ("7/9", None), ("1e1", None), ("NaN", None), ("Score: seven", None), ("9" * 5000, None), ("3 4", None),
        ("- 3 words", None), ("2024-05-17", None), ("A: B: 7", None), (":" * 50_000, None), ("a " * 50_000, None),
    ],
)  # fmt: skip
def test_a_number_is_read_where_it_stands_alone(reply: str, score: float | None) -> None:
    began = time.monotonic()
    read = ReplyReader((0, 10)).read(reply)
    assert read == (None if score is None else pytest.approx(score / 10))
    assert time.monotonic() - began < 1


def test_scales_verdicts_and_patterns() -> None:
    assert ReplyReader((-1, 1)).read("-0.5") == 0.25
    assert ReplyReader((1, 5)).read("1") == 0.0
    words = ReplyReader(verdicts={"A": 1, "B": 0, "A lot (tie)": 0.5})
    assert [words.read(text) for text in ("[[A]]", "Winner: b", "a lot (TIE)", "A or B", "C")] == [
        1,
        0,
        0.5,
        None,
        None,
    ]
    json_score = ReplyReader((0, 10), pattern=r'"score": *([0-9.]+)')
    assert json_score.read('{"score": 2, "why": "3"} {"score": 4}') == 0.4
    assert json_score.read('{"score": ...}') is None
    assert ReplyReader(verdicts={"yes": 1, "no": 0}, pattern="<(.*?)>").read("<Yes>") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (1, 1)}, "scale: expected the lowest number and a higher one, got 1 and 1"),
        ({"scale": (0, math.inf)}, "scale"),
        ({"scale": (0, 1), "verdicts": {}}, "verdicts: expected words and their scores"),
        ({"scale": (0, 1), "verdicts": {"a": 1.0, "A": 0.0}}, "differ not only in case"),
        ({"verdicts": {"a": 1.0}}, "scale: is of numbers, and verdicts were given"),
        ({"pattern": "(("}, "pattern: .* is no regular expression"),
        ({"pattern": "[0-9]"}, "pattern: expected a group around the score"),
        ({"max_cost": 1.0}, "max_cost: needs prices"),
        ({"max_calls": 0}, "max_calls: expected a whole number >= 1, got 0"),
        ({"extra_body": {"model": "b"}}, "extra_body: expected parameters other than .*got 'model'"),
        ({"extra_body": {"a": object()}}, "extra_body: expected plain data"),
        ({"extra_body": {"a": math.nan}}, "extra_body: expected plain data"),
        ({"extra_body": {"api_key": KEY}}, "extra_body: holds a key or password"),
        ({"token_variable": "sk-abc"}, "token_variable: expected the name of an environment variable"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        chat("http://localhost:1/v1", **options)
    assert KEY not in str(refused.value) and "sk-abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://api.example/v1", "would carry the token unencrypted"),
        ("api.example/v1", "ChatJudge.url: expected http"),
        ("https://[x/v1", "ChatJudge.url: .* is no URL"),
        (f"https://me:{KEY}@api.example/v1", "expected no password"),
    ],
)
def test_urls_are_refused_as_those_of_a_remote_judge(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        chat(url)
    assert KEY not in str(refused.value)
    with pytest.raises(InputError, match=message.replace("ChatJudge", "RemoteJudge")):
        RemoteJudge(url, token_variable="MY_CHAT_ACCESS")


# ---- a server that fails ----


def test_every_completion_is_scored_once_and_what_was_spent_is_known_exactly(tmp_path: Path) -> None:
    """3 in 10 requests fail, 1 in 12 replies cannot be read, and answers are slow."""
    with chat_server(faults=(10, 10, 10, 6), slow=0.02) as api:
        judge = Judge(
            chat(api, prices=Prices(1.0, 2.0), concurrency=8, attempts=5),
            cache=JudgeCache(tmp_path / "c.sqlite"), retries=12, wait=0.001,
        )  # fmt: skip
        completions = texts(120)
        scores = judge(None, rollouts([*completions, *completions[:30]]))[:, 0].tolist()
        assert scores == pytest.approx(ninths([*completions, *completions[:30]]))
        used = judge.function.usage
        readable = {question: count for question, count in api.paid.items() if count > 1}
        assert judge.calls == judge.spent == 120 and len(api.paid) == 120
        assert used.calls == api.calls == 120 + used.unread and sum(readable.values()) - len(readable) == used.unread
        assert [used.prompt_tokens, used.completion_tokens] == api.tokens
        assert used.unread == api.statuses["malformed"] > 0 and used.fallbacks == 0
        assert used.failed == sum(api.statuses[name] for name in ("429", "500", "dropped"))
        assert used.calls + used.failed == len(api.seen)
        assert 0.2 < used.failed / len(api.seen) < 0.4
        assert judge.function.cost == pytest.approx((api.tokens[0] + 2 * api.tokens[1]) / 1e6)
        assert 2 <= api.most_together <= 8
        before = len(api.seen)
        judge(None, rollouts(completions))
        assert len(api.seen) == before


def test_a_limit_stops_the_run_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    def judge(api: ChatServer, **limits: Any) -> Judge:
        return Judge(chat(api, concurrency=4, **limits), cache=JudgeCache(tmp_path / "c.sqlite"))

    batch = rollouts(texts(20))
    with chat_server() as api:
        Judge(chat(api))(None, batch)
        one = max(len(question) for question in api.paid) + len("Score: 0")  # tokens of the longest request, of all 20
    with chat_server(slow=0.01) as api:
        with pytest.raises(
            RunStopped, match=r"max_calls is reached: 7 of 7 are spent; .*resume with a larger max_calls"
        ):
            judge(api, max_calls=7)(None, batch)
        assert api.calls == judge(api).spent == judge(api).function.usage.calls == 7  # each is kept
        with pytest.raises(RunStopped, match="max_tokens is reached"):
            judge(api, max_tokens=sum(api.tokens) + 1)(None, batch)
        assert 8 <= api.calls <= 7 + 4  # those under way are finished
        price = Prices(1.0, 1.0)
        with pytest.raises(RunStopped, match=r"max_cost is reached: .* of 1e-05 are spent"):
            judge(api, max_cost=0.00001, prices=price)(None, batch)
        spent = judge(api).function.usage.tokens
        with pytest.raises(RunStopped, match="max_cost is reached"):
            judge(api, max_cost=(spent + 2 * one) / 1e6, prices=price)(None, batch)
        assert judge(api).function.usage.tokens <= spent + (2 + 4) * one
        assert judge(api, max_calls=20)(None, batch)[:, 0].tolist() == pytest.approx(ninths(texts(20)))
        assert set(api.paid.values()) == {1} and api.calls == 20


def test_threads_that_ask_first_together_share_their_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client each, of which all but one are lost with their sockets open, is what a cache alone would give."""
    made: list[Any] = []

    def slowly(**options: Any) -> Any:
        time.sleep(0.05)
        made.append(httpx2.Client(**options))
        return made[-1]

    monkeypatch.setattr(endpoint, "os", types.SimpleNamespace(**{**vars(os), "getpid": lambda: -1}))  # another process
    monkeypatch.setattr(endpoint, "httpx2", types.SimpleNamespace(**{**vars(httpx2), "Client": slowly}))
    try:
        with chat_server(slow=0.01) as api:
            Judge(chat(api, concurrency=4), cache=JudgeCache())(None, rollouts(texts(8)))
            assert api.calls == 8 and len(made) == 1
    finally:
        for client in made:
            client.close()


def test_a_reply_without_a_score_stops_the_run_with_words_or_gets_the_fallback(tmp_path: Path) -> None:
    def says(question: str) -> str:
        return f"it depends, {KEY}" if "w2" in question else f"{length(question)}"

    (tmp_path / "rubric.txt").write_text(RUBRIC)
    with chat_server(says) as api:
        judge = Judge(chat(api, tmp_path / "rubric.txt", attempts=2, concurrency=1), cache=JudgeCache())
        with pytest.raises(RunStopped) as stopped:
            judge(None, rollouts(texts(5)))
        said = str(stopped.value)
        for part in ("no score in 2 replies", "'w2 w2 w2'", "'it depends, ***'", "rubric.txt", "0 to 9", "fallback"):
            assert part in said
        assert (
            judge.calls == 2
            and api.calls == 4
            and judge.function.usage
            == Usage(calls=4, prompt_tokens=api.tokens[0], completion_tokens=api.tokens[1], unread=2)
        )
        lenient = Judge(chat(api, attempts=2, fallback=0.25))
        with pytest.warns(UserWarning, match=r"no score in 2 replies .*its score is the fallback, 0.25") as warned:
            scores = lenient(None, rollouts([*texts(5), "w2 again"]))[:, 0].tolist()
        assert scores[2] == scores[5] == 0.25 and scores[:2] == pytest.approx(ninths(texts(2)))
        assert len(warned) == 1 and lenient.function.usage.fallbacks == 2  # told once, counted always
        assert KEY not in str(warned[0].message)
        assert lenient.identity != Judge(chat(api, attempts=2)).identity


def test_half_a_key_is_not_shown_either() -> None:
    with chat_server(lambda question: "x" * 190 + KEY) as api:
        with pytest.raises(RunStopped) as stopped:
            Judge(chat(api, attempts=1))(None, rollouts(["a"]))
        assert KEY[:6] not in str(stopped.value) and "***" in str(stopped.value)


def test_a_reply_that_ended_at_its_limit_is_told() -> None:
    cut = {"choices": [{"message": {"content": ""}, "finish_reason": "length"}], "usage": {}}
    with chat_server() as api, answering(api, 200, cut), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Judge(chat(api, fallback=0.5, attempts=2))(None, rollouts(["a", "b"]))
    assert sum("ended at its limit of tokens" in str(warning.message) for warning in told) == 1


def test_failures_between_unreadable_replies_do_not_begin_the_count_anew() -> None:
    with chat_server(lambda question: "hm") as api:
        api.fate = lambda: "500" if len(api.seen) % 2 == 0 else "good"  # type: ignore[method-assign]
        with pytest.raises(RunStopped, match="no score in 3 replies"):
            Judge(chat(api, attempts=3), retries=9, wait=0.0)(None, rollouts(["a"]))
        assert api.calls == 3


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (401, {"error": KEY}, InputError, r"status 401 .*\*\*\*.*; repair the request"),
        (400, {"error": "no such model"}, InputError, "status 400 .*no such model"),
        (
            200,
            {"error": f"overloaded {KEY}"},
            RunStopped,
            "on all 2 attempts .*expected a chat completion with a message",
        ),
        (200, [1], RunStopped, "expected a chat completion"),
        (200, {"choices": []}, RunStopped, "expected a chat completion"),
        (200, {"choices": [{"message": {"content": 3}}]}, RunStopped, "expected a chat completion"),
        (200, {"choices": [{"message": {"content": None}}]}, RunStopped, "no score in 3 replies .*got ''"),
        (503, {"error": KEY}, RunStopped, "on all 2 attempts .*status 503"),
    ],
)
def test_a_server_that_does_not_recover(status: int, body: Any, error: type, message: str) -> None:
    with chat_server() as api, answering(api, status, body), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tokens that are not reported
        with pytest.raises(error, match=message) as stopped:
            Judge(chat(api), retries=1, wait=0.0)(None, rollouts(["a"]))
        assert KEY not in str(stopped.value)


@contextlib.contextmanager
def answering(api: ChatServer, status: int, body: Any) -> Any:
    """Let the server answer everything alike."""
    api.always = (status, body)
    yield
    api.always = None


def test_without_reported_tokens_there_is_a_warning_and_no_limit_on_them() -> None:
    good = {"choices": [{"message": {"content": "3"}}], "usage": None}
    with chat_server() as api, answering(api, 200, good):
        with pytest.warns(UserWarning, match="reports no tokens: they and their cost count as 0"):
            assert Judge(chat(api))(None, rollouts(["a", "b"]))[:, 0].tolist() == pytest.approx([1 / 3] * 2)
        judge = Judge(chat(api, max_tokens=100, concurrency=1))
        with (
            pytest.warns(UserWarning, match="reports no tokens"),
            pytest.raises(InputError, match="max_tokens and max_cost cannot be kept; use max_calls"),
        ):
            judge(None, rollouts(["a", "b"]))
        assert judge.calls == 1


def test_a_slow_server_times_out_and_is_counted_as_failed() -> None:
    with chat_server() as api:
        api.before = lambda number: time.sleep(0.6 if number == 0 else 0.0)
        judge = Judge(chat(api, timeout=0.3), wait=0.0)
        assert judge(None, rollouts(["a"])).item() == pytest.approx(1 / 9)
        used = judge.function.usage
        assert (used.calls, used.failed) == (1, 1)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    judge = Judge(chat(f"http://127.0.0.1:{port}/v1"), retries=1, wait=0.0)
    with pytest.raises(RunStopped, match=r"JudgeUnavailable on all 2 attempts .*no answer"):
        judge(None, rollouts(["a"]))
    assert judge.function.usage == Usage(failed=2)


def test_nothing_is_paid_twice_after_a_kill(tmp_path: Path) -> None:
    """The judge's process is killed while requests are under way; another one goes on and asks the rest."""
    completions, concurrency = texts(40), 4
    with chat_server(slow=0.02) as api:

        def judge() -> Judge:
            return Judge(chat(api, concurrency=concurrency), cache=JudgeCache(tmp_path / "c.sqlite"))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the child ends by a kill
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                judge()(None, rollouts(completions))
            os._exit(1)  # never reached, unless the kill did not come
        api.after = lambda paid: os.kill(child, signal.SIGKILL) if paid == 15 else None
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(0.1)  # whatever was under way
        kept, answered = judge().spent, api.calls
        assert 15 - concurrency <= kept <= answered <= 15 + concurrency
        api.after = lambda paid: None
        assert judge()(None, rollouts(completions))[:, 0].tolist() == pytest.approx(ninths(completions))
        twice = [question for question, count in api.paid.items() if count > 1]
        assert len(twice) == answered - kept <= concurrency and max(api.paid.values()) <= 2
        assert judge().spent == 40 and api.calls == 40 + len(twice)
        # An answer that arrived was written down, also where its score was not.
        assert api.calls - len(twice) <= judge().function.usage.calls <= api.calls


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_that_is_killed_and_resumed_pays_nothing_twice(tmp_path: Path, concurrency: int) -> None:
    """HPGD around a tiny model; 3 in 10 requests fail. Counts are the server's own."""
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    with chat_server(faults=(10, 10, 10, 6), slow=0.02) as api:
        command = [sys.executable, str(ROOT / "tests/chat_worker.py"), api.url, str(tmp_path), str(concurrency)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE)
        api.after = lambda paid: child.send_signal(signal.SIGKILL) if paid == 30 else None
        assert child.wait(timeout=500) == -signal.SIGKILL, child.communicate()[1].decode()
        child.communicate()
        time.sleep(0.1)  # whatever was under way
        api.after = lambda paid: None
        before = spending(tmp_path / "run/judge_cache.sqlite")
        lost = api.calls - before["calls"]  # answered, and not written down
        assert 0 <= lost <= concurrency
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        after = spending(tmp_path / "run/judge_cache.sqlite")
        again = api.calls - len(api.paid) - api.statuses["malformed"]  # readable replies beyond the first
        print(f"killed with {before}, ended with {after}; the server: {api.calls} replies paid, {api.tokens} tokens, "
              f"{len(api.paid)} questions, {dict(api.statuses)}; {lost} in flight, {again} paid again")  # fmt: skip
        assert again <= concurrency and after["scores"] == len(api.paid)
        assert after["calls"] == api.calls - lost and after["unread"] <= api.statuses["malformed"]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("checkpoint" in str(file) for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def spending(cache: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(cache)) as database:
        names = ["calls", "failed", "prompt_tokens", "completion_tokens", "unread", "fallbacks"]
        (row,) = database.execute(f"SELECT {', '.join(names)} FROM usage").fetchall()
        return {
            **dict(zip(names, row, strict=True)),
            "scores": database.execute("SELECT count(*) FROM scores").fetchone()[0],
        }


# ---- keys ----


def test_no_key_is_written_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with chat_server(faults=(20, 20, 10, 10)) as api, caplog.at_level(logging.DEBUG):
        judge = Judge(
            chat(f"{api.url}?api_key=4lso-{KEY}", attempts=9),
            cache=JudgeCache(tmp_path / "c.sqlite"),
            retries=20,
            wait=0.0,
        )
        judge(None, rollouts(texts(20)))
        assert f"?api_key=4lso-{KEY}" in api.seen[0]["path"]
    assert caplog.records and "HTTP Request" in caplog.text
    assert "4lso" not in caplog.text and KEY not in caplog.text
    assert "4lso" not in judge.identity
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes() and b"4lso" not in file.read_bytes()


def test_a_key_that_is_not_set_is_asked_for_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server() as api:
        judge = Judge(chat(api))
        monkeypatch.delenv("MY_CHAT_ACCESS")
        with pytest.raises(InputError, match="a token in the environment variable MY_CHAT_ACCESS"):
            judge(None, rollouts(["a"]))
        monkeypatch.setenv("MY_CHAT_ACCESS", "ä\nb")
        with pytest.raises(InputError, match="MY_CHAT_ACCESS holds characters that no header can"):
            judge(None, rollouts(["a"]))
        assert not api.seen and judge.function.usage == Usage()


# ---- pairs and sets ----


def test_pairs_are_asked_in_both_orders() -> None:
    def longer(question: str) -> str:
        a, b = question.split("|")[1:]
        return "[[A]]" if len(a) > len(b) else "Verdict: B" if len(a) < len(b) else "tie"

    verdicts = {"A": 1.0, "B": 0.0, "tie": 0.5}
    template = "{prompt}|{completion_a}|{completion_b}"
    with chat_server(longer) as api:
        judge = PairwiseJudge(chat(api, template, scale=(0, 1), verdicts=verdicts))
        batch = rollouts(["a", "bb", "c"])
        said = judge(batch, torch.tensor([0, 1, 0]), torch.tensor([1, 2, 2])).tolist()
        assert said == [0.0, 1.0, 0.5] and judge.calls == api.calls == 6
        PreferenceLikelihood(preference=judge).evaluate(Constant(), batch)
        assert api.calls == 6
        first = PairwiseJudge(chat(api, template, scale=(0, 1), verdicts={"A": 1.0, "B": 0.0, "tie": 1.0}))
        api.say = lambda question: "A"  # whatever it is asked
        assert first(batch, torch.tensor([0]), torch.tensor([1])).tolist() == [0.5]


class Constant(torch.nn.Module):
    def reward(self, rollouts: Rollouts) -> torch.Tensor:
        return torch.zeros(rollouts.size, 1, dtype=torch.float64)


def test_a_set_is_shown_in_one_order_and_asked_about_once() -> None:
    with chat_server(lambda question: "6") as api:
        judge = SetJudge(chat(api, "{prompt}: {completions}"))
        value = SetUtility(judge, size=2).evaluate(Constant(), rollouts(["b", "a", "c"])).value.item()
        assert value == pytest.approx(6 / 9) and api.calls == 3
        asked = {row["body"]["messages"][0]["content"] for row in api.seen}
        assert asked == {"q: [1]\na\n\n[2]\nb", "q: [1]\nb\n\n[2]\nc", "q: [1]\na\n\n[2]\nc"}


def test_a_template_of_another_kind_is_missed_at_the_first_call() -> None:
    with chat_server() as api:
        with pytest.raises(InputError, match="takes 'completions_a', 'completions_b', which the data do not have"):
            Judge(chat(api, "{prompt}{completion_a}{completion_b}"))(None, rollouts(["a"]))
        with pytest.raises(InputError, match="takes 'topic', which the data do not have"):
            Judge(chat(api, RUBRIC + "{topic}"))(None, rollouts(["a"]))
        with pytest.raises(InputError, match=r"needs \['completions'\], got \['prompts'\]"):
            chat(api)(prompts=["a"])
        assert not api.seen


# ---- functions in threads ----


def test_a_function_is_called_in_threads_and_scores_keep_their_order() -> None:
    together, most, sizes, lock = [0], [0], [], threading.Lock()

    def slow(completions: list[str]) -> list[float]:
        assert not torch.is_grad_enabled()
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
            sizes.append(len(completions))
        time.sleep(0.05 * (9 - len(completions[0].split())) / 9)  # the first ones take longest
        with lock:
            together[0] -= 1
        return [float(len(text.split())) for text in completions]

    completions = texts(18)
    expected = [float(len(text.split())) for text in completions]
    assert Judge(slow, concurrency=4)(None, rollouts(completions))[:, 0].tolist() == expected
    assert 2 <= most[0] <= 4 and sorted(sizes) == [3, 5, 5, 5]
    sizes.clear()
    assert Judge(slow, concurrency=3, batch_size=2)(None, rollouts(completions))[:, 0].tolist() == expected
    assert sizes == [2] * 9
    sizes.clear()
    assert Judge(slow)(None, rollouts(completions))[:, 0].tolist() == expected and sizes == [18]


def test_what_is_under_way_when_a_call_fails_is_kept_and_nothing_more_is_asked() -> None:
    started, asked = threading.Barrier(3, timeout=10), []

    def fails(completions: list[str]) -> list[float]:
        asked.append(completions[0])
        if len(asked) <= 3:
            started.wait()
        if completions[0] == "w1 w1":
            raise InputError("no")
        time.sleep(0.1)
        return [1.0]

    judge = Judge(fails, concurrency=3, batch_size=1, identity="fails")
    with pytest.raises(InputError, match="no"):
        judge(None, rollouts(texts(30)))
    assert judge.calls == judge.spent == 2 and len(asked) == 3
    with pytest.raises(InputError, match="concurrency: expected a whole number >= 1"):
        Judge(fails, concurrency=0)


def test_a_chat_judge_is_asked_about_one_at_a_time() -> None:
    judge = Judge(chat("http://localhost:1/v1", concurrency=3))
    assert (judge.batch_size, judge.concurrency) == (1, 3)
    assert Judge(chat("http://localhost:1/v1"), concurrency=2).concurrency == 2
    with pytest.raises(
        InputError, match="batch_size: expected 1 or none of a judge that is paid by the request, got 4"
    ):
        Judge(chat("http://localhost:1/v1"), batch_size=4)


# ---- settings ----


def settings(folder: Path, **values: Any) -> Any:
    (folder / "rubric.txt").write_text(values.pop("text", RUBRIC))
    tree = {"chat": "http://localhost:1/v1", "model": "m", "template": str(folder / "rubric.txt"), **values}
    (folder / "judge.yaml").write_text(yaml.safe_dump(tree))
    return load_config(JudgeSettings, folder / "judge.yaml")


def test_settings_build_the_judge(tmp_path: Path) -> None:
    with chat_server() as api:
        made = settings(
            tmp_path, chat=api.url, scale=[0, 9], token_variable="MY_CHAT_ACCESS",
            prices={"prompt": 1, "completion": 2}, max_cost=1.0, extra_body={"seed": 3}, concurrency=2,
        )  # fmt: skip
        assert isinstance(made, ChatSettings)
        judge = made.build(tmp_path / "run")
        assert isinstance(judge, Judge) and judge(None, rollouts(["a b"])).item() == pytest.approx(2 / 9)
        assert (judge.batch_size, judge.concurrency, judge.retries) == (1, 2, 8)
        assert api.seen[0]["body"]["seed"] == 3 and (tmp_path / "run/judge_cache.sqlite").is_file()
    pairs = settings(tmp_path, text="{prompt}{completion_a}{completion_b}", pairwise=True, both_orders=False)
    assert isinstance(built := pairs.build(tmp_path), PairwiseJudge) and not built.both_orders
    assert isinstance(settings(tmp_path, text="{prompt}{completions}", sets=True).build(tmp_path), SetJudge)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "{prompt}"}, r"template .*rubric\.txt: expected the places"),
        (
            {"text": "{prompt}{completion_a}{completion_b}"},
            r"template .*rubric\.txt: expected \{prompt\} and \{completion\}",
        ),
        (
            {"pairwise": True},
            r"rubric\.txt: expected \{prompt\} and \{completion_a\} and \{completion_b\} with pairwise true",
        ),
        ({"sets": True, "pairwise": True, "text": "{prompt}{completion_a}{completion_b}"}, "either pairwise or sets"),
        ({"template": "none.txt"}, r"template none\.txt: cannot be read"),
        ({"model": None}, "model: expected a string, got null"),
        ({"api_key": KEY}, "api_key: unknown key"),
        ({"token_variable": KEY}, "token_variable: expected the name of an environment variable"),
        ({"scale": [1]}, "scale: expected a list of 2 items"),
        ({"prices": {"prompt": 1}}, "prices.completion: is required"),
        ({"batch_size": 4}, "batch_size: expected 1 or none"),
    ],
)
def test_settings_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        settings(tmp_path, **values).build(tmp_path)
    assert KEY not in str(refused.value)


def test_another_template_is_another_judge_and_another_run(tmp_path: Path) -> None:
    one = settings(tmp_path)
    first, facts = one.build(tmp_path).identity, facts_of(one)
    assert settings(tmp_path, text=RUBRIC + "!").build(tmp_path).identity != first
    assert facts_of(one)["content of template"] != facts["content of template"]
    assert settings(tmp_path, attempts=7, max_calls=9, concurrency=1).build(tmp_path).identity == first
    for change in (
        {"scale": [0, 2]},
        {"temperature": 1.0},
        {"pattern": "(.)"},
        {"fallback": 0.0},
        {"extra_body": {"a": 1}},
    ):
        assert settings(tmp_path, **change).build(tmp_path).identity != first
    assert to_dict(one)["template"].endswith("rubric.txt")


# ---- the page ----


def of_the_page(folder: Path, port: int) -> None:
    """The files of the page, as a reader saves them."""
    page = (ROOT / "docs/llm_judge.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "rubric.txt").write_text(next(text for kind, text in blocks if kind == "text"))
    configured = next(text for kind, text in blocks if kind == "yaml")
    assert configured.startswith("# chat.yaml") and ":8765/" in configured
    (folder / "chat.yaml").write_text(configured.replace(":8765/", f":{port}/"))
    (folder / "stand_in.py").write_text(next(text for kind, text in blocks if text.startswith("# stand_in.py")))


@contextlib.contextmanager
def stand_in(folder: Path) -> Any:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_the_page(folder, port)
    server = subprocess.Popen([sys.executable, "stand_in.py", str(port)], cwd=folder)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=10)


def test_the_pages_judge_scores_what_the_stand_in_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_TOKEN", "anything")
    with stand_in(tmp_path):
        section = yaml.safe_load((tmp_path / "chat.yaml").read_text())["judge"]
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(section))
        judge = load_config(JudgeSettings, tmp_path / "judge.yaml").build(tmp_path)
        eight, two = " ".join("abcdefgh"), "too short"
        assert judge(None, rollouts([eight, two]))[:, 0].tolist() == pytest.approx([1.0, (4 - 1) / 9])


@pytest.mark.slow
def test_the_pages_run_runs(tmp_path: Path) -> None:
    with stand_in(tmp_path):
        command = [
            sys.executable,
            "-m",
            "align_cbrl.cli",
            "run",
            "tune_weights",
            "--config",
            "chat.yaml",
            "--out",
            "runs/chat",
        ]
        environment = {**os.environ, "JUDGE_TOKEN": "a-key-of-many-letters"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^judge: \d+ calls answered, 0 failed; [\d,]+ \+ [\d,]+ tokens; cost 0\.\d+; 0 replies", done.stdout, re.M
    )
    assert "What the judge was asked" in (tmp_path / "runs/chat/report.html").read_text()
