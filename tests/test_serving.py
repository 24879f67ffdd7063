"""The reward server: what engines ask and are answered, what the leader learns, and what a kill leaves."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving_worker

from align_cbrl import InputError
from align_cbrl.errors import CheckpointError, RunStopped
from align_cbrl.llm import load_reward
from align_cbrl.llm.engines import client
from align_cbrl.llm.engines.requests import read_request
from align_cbrl.llm.engines.service import RewardService
from align_cbrl.llm.engines.settings import ServeSettings
from align_cbrl.llm.settings.hpgd import HPGDSettings
from align_cbrl.llm.settings.judge import FunctionSettings
from align_cbrl.llm.settings.leader import MixtureSettings
from align_cbrl.llm.settings.objective import KLPricedSettings
from align_cbrl.llm.settings.response import BestResponseSettings, NextStepSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.metrics import MetricsLog

pytest.importorskip("starlette")
uvicorn: Any = pytest.importorskip("uvicorn")
http: Any = importlib.import_module("align_cbrl.llm.engines.http")

TERMS = '''
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent


def good(completions):
    """Words of the first half of the alphabet: what the judge likes."""
    return [float(sum(word in "abc" for word in text.split())) for text in completions]


def hacked(completions):
    return [float("nan") if "nan" in text else 10.0 * sum(word in "def" for word in text.split())
            for text in completions]


def broken(completions):
    if any("broken" in text for text in completions):
        raise ConnectionError("no route to the scorer")
    return [0.0] * len(completions)


def exact(completions, answer):
    return [float(text == one) for text, one in zip(completions, answer)]


def judge(completions):
    """Slow enough to be killed at it; writes down what it was asked, and what it had said."""
    with (HERE / "judged.jsonl").open("a") as file:
        file.write(json.dumps({"asked": completions}) + "\\n")
    time.sleep(float(os.environ.get("JUDGE_SECONDS", "0")))
    scores = [one - other / 10 for one, other in zip(good(completions), hacked(completions))]
    with (HERE / "judged.jsonl").open("a") as file:
        file.write(json.dumps({"said": completions}) + "\\n")
    return scores
'''
PROMPTS = ["p one", "p two", "p three", "p four"]


@pytest.fixture
def terms(tmp_path: Path) -> Path:
    file = tmp_path / "terms.py"
    file.write_text(TERMS)
    return file


def settings(terms: Path, **changed: Any) -> ServeSettings:
    known: dict[str, Any] = {
        "judge": FunctionSettings(function=f"{terms}:judge"),
        "rewards": {"hacked": f"{terms}:hacked", "good": f"{terms}:good"},
        "leader": MixtureSettings(strength=0.6, weights={"hacked": 0.6}),
        "hpgd": HPGDSettings(step="gradient", steps=50),
        "batch_size": 16,
    }
    return ServeSettings(**{**known, **changed})


def sampled(seed: int, prompts: int = 4, each: int = 4) -> dict[str, Any]:
    """A batch as an engine's policy might have sampled it; all completions of all batches differ."""
    draw = random.Random(seed)
    asked = [prompt for prompt in PROMPTS[:prompts] for _ in range(each)]
    texts = [" ".join([*draw.choices("abcdefgh", k=3), f"n{seed}x{i}"]) for i in range(len(asked))]
    return {"prompts": asked, "completions": texts}


def asked_of(service: RewardService, **fields: Any) -> Any:
    known = service.settings
    body = json.dumps(fields).encode()
    return service.reward(read_request(body, columns=known.columns, labels=known.labels, ends=known.ends))


def said(terms: Path) -> list[str]:
    file = terms.with_name("judged.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [text for row in rows for text in row.get("said", [])]


# ------------------------------------------------------------------------------------------------- what is asked


def test_a_request_of_ours_and_one_of_openrlhf_say_the_same() -> None:
    ours = {"prompts": ["1 + 1 =", "why?"], "completions": [" 2", "so"], "columns": {"answer": ["2", "so"]}}
    theirs = {
        "query": ["1  + 1 = 2<|end|>", "why?so<|end|>rest"],
        "prompts": ["1 + 1 =", "why?"],
        "labels": ["2", "so"],
    }
    one = read_request(json.dumps(ours).encode(), columns=["answer"], labels="answer")
    other = read_request(json.dumps(theirs).encode(), columns=["answer"], labels="answer", ends=["<|end|>", "</s>"])
    assert (one.prompts, one.completions, one.columns) == (other.prompts, other.completions, other.columns)
    assert one.digest == other.digest and one.learn
    assert read_request(json.dumps(theirs).encode()).columns == {}  # nobody asked for labels


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"completions": ["a", "b"]}, "completions: expected 1 values, one for each prompt, got 2"),
        ({"completions": [3]}, "completion 0: expected a text or a list of messages, got 3, a int"),
        ({"completions": "a"}, "completions: expected a list, got 'a', a str"),
        ({"completions": ["a"], "prompts": [None]}, "row 0: expected a text or a list of messages, got None"),
        ({"completions": ["a"], "prompts": []}, "prompts: expected a list that is not empty"),
        ({"completions": ["a"], "columns": {"answer": ["a"], "anser": ["a"]}}, "unknown column 'anser'; did you mean"),
        ({"completions": ["a"], "columns": {}}, "expected the column 'answer'"),
        ({"completions": ["a"], "columns": {"answer": []}}, "columns.answer: expected 1 values"),
        ({"completions": ["a"], "columns": []}, "columns: expected lists by name, got"),
        ({"completions": ["a"], "lables": ["a"]}, "unknown field 'lables'; did you mean 'labels'"),
        ({"completions": ["a"], "query": ["pa"]}, "either completions, or OpenRLHF's query"),
        ({"query": ["qa"], "labels": ["a"]}, "query 0: expected a text that begins with its prompt, 'p', got 'qa'"),
        ({"query": [1], "labels": ["a"]}, "query 0: expected texts"),
        ({"completions": ["a"], "log_policy": [-1.0]}, "log_policy and log_prior together, got no log_prior"),
        ({"completions": ["a"], "log_policy": [-1.0], "log_prior": [0.5]}, "log_prior 0: expected a finite number"),
        ({"completions": ["a"], "log_policy": [-1.0], "log_prior": [True]}, "log_prior 0: expected a finite number"),
        ({"completions": ["a"], "learn": 1}, "learn: expected true or false, got 1"),
        ({"completions": ["a"], "id": 1}, "id: expected a text, got 1"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    full = {"prompts": ["p"], **({} if "labels" in fields else {"columns": {"answer": ["a"]}}), **fields}
    with pytest.raises(InputError) as refused:
        read_request(json.dumps(full).encode(), columns=["answer"], labels="answer")
    assert words in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompts": NaN}', b"9" * 5000])
def test_a_body_that_is_no_object_of_json_is_refused_in_words(body: bytes) -> None:
    with pytest.raises(InputError, match="request: expected"):
        read_request(body)


# --------------------------------------------------------------------------------------------- what is learned


def test_the_leader_learns_from_what_is_asked(terms: Path, tmp_path: Path) -> None:
    with RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service:
        first = asked_of(service, **sampled(0))
        assert first.version == 0 and first.rewards == pytest.approx(
            [0.6 * 10 * sum(word in "def" for word in text.split()) for text in sampled(0)["completions"]]
        )
        assert service.step_if_due() and not service.step_if_due()
        for seed in range(1, 8):
            asked_of(service, **sampled(seed))
            service.step_if_due()
        answer = asked_of(service, **sampled(100), learn=False)
        assert answer.version == service.version == 8
        weights = service.leader.weights()
        assert weights["good"] > 0.05 and weights["hacked"] < 0.5
        state = service.status()
    assert (state["requests"], state["completions"], state["judged"]) == (8, 128, 128)
    assert load_reward(tmp_path / "out" / "reward", trust_code=True)(**sampled(100)) == pytest.approx(answer.rewards)
    assert [row["step"] for row in MetricsLog.read(tmp_path / "out" / "metrics.jsonl")] == list(range(1, 9))


def test_the_newest_share_of_a_period_is_judged(terms: Path, tmp_path: Path) -> None:
    """Of three batches the last; with a share of two thirds, the last two."""
    for share, judged in ((None, [2]), (0.6, [1, 2]), (1.0, [0, 1, 2])):
        terms.with_name("judged.jsonl").unlink(missing_ok=True)
        with RewardService.opened(
            settings(terms, every=3, share=share), tmp_path / f"out-{share}", learning=False
        ) as service:
            for seed in range(3):
                assert not service.step_if_due()
                asked_of(service, **sampled(seed))
            assert service.step_if_due() and service.version == 1
        assert sorted(said(terms)) == sorted(text for seed in judged for text in sampled(seed)["completions"])


def test_a_request_that_comes_again_is_answered_alike_counted_once_and_paid_for_once(
    terms: Path, tmp_path: Path
) -> None:
    with RewardService.opened(settings(terms, batch_size=32), tmp_path / "out", learning=False) as service:
        first = asked_of(service, **sampled(0))
        assert asked_of(service, **sampled(0)) == first
        assert not service.step_if_due() and service.status()["repeated"] == 1
        asked_of(service, **sampled(1))
        assert service.step_if_due() and service.version == 1
        assert asked_of(service, **sampled(0)) == first  # although the reward is another by now
        assert asked_of(service, **sampled(0), id="meant")[0] != first.rewards
        assert Counter(said(terms)).most_common(1)[0][1] == 1 and len(said(terms)) == 32
        assert service.status()["completions"] == 48


def test_completions_that_come_one_at_a_time_form_groups(terms: Path, tmp_path: Path) -> None:
    """As OpenRLHF and verl's reward loop send them, in any order."""
    with RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service:
        whole = sampled(0)
        order = list(range(16))
        random.Random(0).shuffle(order)
        for i in order:
            asked_of(service, prompts=[whole["prompts"][i]], completions=[whole["completions"][i]])
        assert service.step_if_due() and service.version == 1 and service.failure is None
        moved = service.leader.weights()
    with RewardService.opened(settings(terms), tmp_path / "other", learning=False) as service:
        asked_of(service, **whole)
        service.step_if_due()
        assert service.leader.weights() == pytest.approx(moved)


def test_a_period_without_groups_is_left_out_and_said(terms: Path, tmp_path: Path) -> None:
    with RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service:
        texts = sampled(0)["completions"]
        asked_of(service, prompts=[f"p {i}" for i in range(16)], completions=texts)
        assert service.step_if_due() and service.version == 0 and not said(terms)
        assert "no two completions of one prompt" in service.status()["failure"]
        asked_of(service, **sampled(1))
        assert service.step_if_due() and service.version == 1 and service.failure is None


def test_after_the_last_step_the_reward_stays(terms: Path, tmp_path: Path) -> None:
    with RewardService.opened(
        settings(terms, hpgd=HPGDSettings(step="gradient", steps=1)), tmp_path / "out", learning=False
    ) as service:
        for seed in range(3):
            asked_of(service, **sampled(seed))
            service.step_if_due()
        assert service.version == 1 and len(said(terms)) == 16
        assert (tmp_path / "out" / "reward" / "reward.json").is_file()


def test_around_a_best_response_log_probabilities_are_used(terms: Path, tmp_path: Path) -> None:
    priced = settings(
        terms,
        objective=KLPricedSettings(price=0.1),
        response=BestResponseSettings(temperature=0.5),
        hpgd=HPGDSettings(step="natural", steps=5),
    )
    with RewardService.opened(priced, tmp_path / "out", learning=False) as service:
        with pytest.raises(InputError, match="expected log_policy and log_prior, since the objective has a price"):
            asked_of(service, **sampled(0))
        for seed in range(2):
            logs = {name: [-3.0 - 0.1 * i for i in range(16)] for name in ("log_policy", "log_prior")}
            asked_of(service, **sampled(seed), **logs)
            assert service.step_if_due()
        row = service.status()["last"]
    assert {"gap", "kl", "step_nats", "gradient_norm"} <= set(row) and row["kl"] == pytest.approx(0.0)


def test_the_file_of_the_page_is_a_configuration(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    if not page.is_file():
        pytest.skip("the documentation is not part of an installed package")
    blocks = page.read_text(encoding="utf-8").split("```yaml\n")[1:]
    (tmp_path / "leader.yaml").write_text(blocks[0].split("```")[0])
    loaded = load_config(ServeSettings, tmp_path / "leader.yaml")
    assert (loaded.period, loaded.window) == (2560, 2048) and loaded.hpgd.step == "gradient"


# ------------------------------------------------------------------------------------------------- what breaks


def test_what_a_reward_function_gets_wrong_is_said(terms: Path, tmp_path: Path) -> None:
    with_broken = settings(terms, rewards={"hacked": f"{terms}:hacked", "broken": f"{terms}:broken"})
    with RewardService.opened(with_broken, tmp_path / "out", learning=False) as service:
        asked = {"prompts": ["p", "p"], "completions": ["a", "nan"]}
        with pytest.raises(InputError, match="hacked: expected a finite number for each completion, got nan"):
            asked_of(service, **asked)
        assert service.status()["requests"] == 0


def test_a_judge_that_fails_stops_no_request_and_is_asked_again(
    terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = settings(terms, judge=FunctionSettings(function=f"{terms}:judge", retries=0, budget=15))
    with RewardService.opened(failing, tmp_path / "out", learning=False) as service:
        first = asked_of(service, **sampled(0))
        with pytest.raises(RunStopped, match="0 of the budget of 15 completions are spent, and 16 more are needed"):
            service.step_if_due()
        assert asked_of(service, **sampled(1)).version == first.version == 0
    larger = settings(terms, judge=FunctionSettings(function=f"{terms}:judge", retries=0, budget=1000))
    with RewardService.opened(larger, tmp_path / "out", learning=False) as service:
        assert service.step_if_due() and not service.step_if_due()
        assert sorted(said(terms)) == sorted(sampled(1)["completions"])  # the newest, of the present policy


def test_a_kill_between_checkpoint_and_journal_takes_no_step_twice(
    terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), RewardService.opened(settings(terms), out, learning=False) as service:
        asked_of(service, **sampled(0))

        def killed(period: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(service._journal, "drop", killed)
        service.step_if_due()
    with RewardService.opened(settings(terms), out, learning=False) as service:
        assert service.version == 1 and not service.step_if_due()


def test_a_checkpoint_that_cannot_be_written_takes_no_step_twice(
    terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise CheckpointError("the disk is full")

    with RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service:
        asked_of(service, **sampled(0))
        with monkeypatch.context() as patched:
            patched.setattr(service._loop, "save", full)
            with pytest.raises(CheckpointError, match="disk is full"):
                service.step_if_due()
        moved = service.leader.weights()
        assert service.step_if_due() and not service.step_if_due()
        assert service.version == 1 and service.leader.weights() == moved


def test_a_folder_belongs_to_one_process_and_one_configuration(terms: Path, tmp_path: Path) -> None:
    with (
        RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service,
        pytest.raises(CheckpointError, match="works in it"),
        RewardService.opened(settings(terms), tmp_path / "out"),
    ):
        pass
    asked_before = service.settings
    with (
        pytest.raises(CheckpointError, match=r"another configuration .different: batch_size was 16, is 8"),
        RewardService.opened(settings(terms, batch_size=8), tmp_path / "out"),
    ):
        pass
    with RewardService.opened(asked_before, tmp_path / "out", learning=False):
        pass


def test_settings_that_do_not_fit_are_told_in_words(terms: Path, tmp_path: Path) -> None:
    def refused(words: str, **changed: Any) -> None:
        with pytest.raises(InputError, match=words):
            RewardService(settings(terms, **changed), tmp_path)

    refused("rewards: expected at least one reward function, or a proxy", rewards={})
    refused("hpgd.step: expected gradient with response.kind: next_step", hpgd=HPGDSettings())
    refused("hpgd.replays: expected 0 with", hpgd=HPGDSettings(step="gradient", replays=2))
    refused("reward exact: takes 'answer', which the data do not have", rewards={"exact": f"{terms}:exact"})
    refused("labels: expected one of columns", labels="answer")
    refused("columns: 'completion' is a name", columns=["completion"])
    refused("ends: expected texts", ends=[""])
    refused("token_variable: expected the name", token_variable="my secret")
    refused("share: expected a finite number > 0 and <= 1", share=0.0)
    config = tmp_path / "leader.yaml"
    config.write_text(f"judge: {{function: {terms}:judge}}\nrewards: {{good: {terms}:good}}\nevry: 2\n")
    with pytest.raises(InputError, match="evry: unknown key; did you mean 'every'"):
        load_config(ServeSettings, config)
    shaped = config.with_name("shaped.yaml")
    shaped.write_text(
        f"judge: {{function: {terms}:judge}}\nrewards: {{good: {terms}:good, hacked: {terms}:hacked}}\n"
        "leader: {kind: shaped}\nhpgd: {steps: 3}\n"
    )
    loaded = load_config(ServeSettings, shaped)
    assert loaded.hpgd.step == "gradient" and isinstance(loaded.response, NextStepSettings)
    with pytest.raises(InputError, match=r"leader.kind: shaped is calibrated on completions of the reference"):
        RewardService(loaded, tmp_path / "shaped")


# ----------------------------------------------------------------------------------------------------- over HTTP


class Client:
    """What asks a server at an address."""

    port = 0

    def send(self, path: str, body: bytes | None, **headers: str) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ask(self, **fields: Any) -> tuple[int, Any]:
        return self.send("/score", json.dumps(fields).encode())


class Process(Client):
    """`align-cbrl serve` in a process of its own, at an address that stays when it is started again."""

    def __init__(self, folder: Path, config: str, **environment: str) -> None:
        self.folder = folder
        (folder / "leader.yaml").write_text(config)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}

    def start(self) -> None:
        arguments = ("serve", "leader.yaml", "--out", "out", "--port", str(self.port))
        log = self.folder / "server.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "align_cbrl.cli", *arguments], cwd=self.folder, env=self.environment,
                stdout=file, stderr=file,
            )  # fmt: skip
        while "serving http" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.05)
        self.port = int(log.read_text().split("/score")[0].rpartition(":")[2])

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


CONFIG = """
judge: {function: terms.py:judge}
rewards: {hacked: terms.py:hacked, good: terms.py:good, broken: terms.py:broken}
leader: {weights: {hacked: 0.6, good: 0.3}}
hpgd: {steps: 100000}
batch_size: 64
largest_body: 1
ends: [</s>]
"""


@contextlib.contextmanager
def answering(service: RewardService, token: str | None = None) -> Iterator[Client]:
    """The service at an address of this machine, in threads of this process."""
    made = uvicorn.Config(http.application(service, token, 2**20), log_level="warning", lifespan="off")
    running, found = uvicorn.Server(made), Client()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        found.port = listening.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield found
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "terms.py").write_text(TERMS)
    (folder / "leader.yaml").write_text(CONFIG.replace("terms.py", str(folder / "terms.py")))
    with (
        RewardService.opened(load_config(ServeSettings, folder / "leader.yaml"), folder / "out") as service,
        answering(service) as at_it,
    ):
        yield at_it


def test_sixty_four_requests_at_a_time_are_answered_correctly(server: Client) -> None:
    """Each completion has a reward that nothing else could have, at the version that the answer names."""
    batches = [sampled(1000 + seed) for seed in range(256)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda batch: server.ask(**batch), batches))
    assert {status for status, _ in replies} == {200}
    _, after = server.send("/status", None)
    assert after["completions"] == 256 * 16 and after["requests"] == 256 and after["failure"] is None

    def parts(batch: dict[str, Any]) -> list[tuple[int, int]]:
        words = [text.split() for text in batch["completions"]]
        return [(sum(w in "def" for w in row), sum(w in "abc" for w in row)) for row in words]

    # The reward is linear in the two counts: 3 numbers for each version, of which any completions give the same.
    seen: dict[int, dict[tuple[int, int], float]] = {}
    for batch, (_, reply) in zip(batches, replies, strict=True):
        assert len(reply["rewards"]) == 16 and reply["extra_logs"]["leader_version"] == [reply["version"]] * 16
        for counts, reward in zip(parts(batch), reply["rewards"], strict=True):
            assert seen.setdefault(reply["version"], {}).setdefault(counts, reward) == pytest.approx(reward)
    assert max(seen) >= 1
    for rewards in seen.values():
        assert len(set(rewards)) == len(rewards) > 1  # different counts, different rewards


def test_openrlhf_is_answered(server: Client) -> None:
    status, reply = server.send(
        "/get_reward", json.dumps({"query": ["why?a b</s>"], "prompts": ["why?"], "labels": [None]}).encode()
    )
    assert status == 200 and set(reply) == {"rewards", "scores", "extra_logs", "version"}
    assert reply["rewards"] == reply["scores"] == server.ask(prompts=["why?"], completions=["a b"])[1]["rewards"]
    assert all(isinstance(values, list) and len(values) == 1 for values in reply["extra_logs"].values())


def test_what_is_wrong_is_answered_in_words(server: Client) -> None:
    for status, body, words in (
        (400, b"{", "expected a JSON object"),
        (400, b'{"prompts": ["p"], "completions": [1]}', "completion 0: expected a text"),
        (400, b'{"prompts": ["p"], "completions": ["a"], "columns": {"x": ["a"]}}', "unknown column 'x'"),
        (500, b'{"prompts": ["p"], "completions": ["nan"]}', "hacked: expected a finite number"),
        (503, b'{"prompts": ["p"], "completions": ["broken"]}', "no route to the scorer"),
        (413, b'{"prompts": ["' + b"p" * 2**20 + b'"], "completions": ["a"]}', "at most 1 MiB"),
    ):
        found, reply = server.send("/score", body)
        assert found == status and words in reply["error"] and "Traceback" not in reply["error"], reply
    assert server.send("/nowhere", None)[0] == 404
    assert server.send("/score", None)[0] == 405
    assert server.ask(prompts=["p"], completions=["a"])[0] == 200


def test_the_client_that_is_shipped_serves_verl_and_trl(server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.port}/score")
    extra = [{"question": prompt, "split": "test"} for prompt in ("p", "p", "q")]
    before = server.send("/status", None)[1]["completions"]
    # As verl's managers call it: by name, for a batch and for one.
    given = {"solution_strs": ["a", "d", "b c"], "ground_truths": ["", "", ""], "extra_infos": extra}
    scores = client.compute_scores(data_sources=["x"] * 3, **given)
    one = client.compute_score(data_source="x", solution_str="d", ground_truth="", extra_info=extra[1])
    assert [row["score"] for row in scores][1] == one["score"] and set(one) == {"score", "leader_version"}
    logged: dict[str, float] = {}
    rewards = client.reward(["p", "p", "q"], ["a", "d", "b c"], completion_ids=[[1]] * 3, log_metric=logged.__setitem__)
    assert rewards == [row["score"] for row in scores] and logged == {"leader/version": one["leader_version"]}
    assert server.send("/status", None)[1]["completions"] == before + 3  # verl's were an evaluation
    with pytest.raises(RuntimeError, match=r"reward server: 400 .*expected 1 values"):
        client.ask(["p"], ["a", "b"])
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:1/score")
    with pytest.raises(RuntimeError, match="no answer from"):
        client.ask(["p"], ["a"], patience=0.0)


def test_the_client_needs_nothing_but_python(tmp_path: Path) -> None:
    copy = tmp_path / "client.py"
    copy.write_text(Path(client.__file__).read_text())
    code = "import sys, client; print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"client", "__main__", "sitecustomize"}


def test_a_token_is_asked_for_and_written_down_nowhere(terms: Path, tmp_path: Path) -> None:
    token = "a token of some length"
    with (
        RewardService.opened(settings(terms), tmp_path / "out", learning=False) as service,
        answering(service, token) as client,
    ):
        body = json.dumps({"prompts": ["p"], "completions": ["a"]}).encode()
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": token}):
            status, reply = client.send("/score", body, **headers)
            assert status == 401 and "token" in reply["error"] and token not in json.dumps(reply)
        assert client.send("/status", None)[0] == 401
        assert client.send("/score", body, Authorization=f"Bearer {token}")[0] == 200


def test_the_command_serves_stops_and_goes_on(terms: Path) -> None:
    config = f"{CONFIG}\nevery: 1\ntoken_variable: REWARD_TOKEN\n"
    process = Process(terms.parent, config, REWARD_TOKEN="a token of some length")
    process.start()
    body, bearer = json.dumps(sampled(0)).encode(), {"Authorization": "Bearer a token of some length"}
    status, first = process.send("/score", body, **bearer)
    assert status == 200 and process.send("/score", body)[0] == 401
    assert process.stop(signal.SIGTERM) == 143
    assert (terms.parent / "out" / "reward" / "reward.json").is_file()
    kept = [file for file in terms.parent.rglob("*") if file.is_file()]
    assert not any(b"some length" in file.read_bytes() for file in kept)
    with RewardService.opened(load_config(ServeSettings, terms.with_name("leader.yaml"), [
        f"judge.function={terms}:judge", *(f"rewards.{n}={terms}:{n}" for n in ("hacked", "good", "broken"))
    ]), terms.parent / "other", learning=False) as service:  # fmt: skip
        assert asked_of(service, **sampled(0)).rewards == first["rewards"]


@pytest.mark.parametrize(
    ("options", "extra", "words"),
    [
        (["--host", "0.0.0.0"], "", "expected token_variable in the configuration, since other machines could ask"),
        ([], "token_variable: NOT_SET_ANYWHERE", "expected a token in the environment variable NOT_SET_ANYWHERE"),
        (["--host", "192.0.2.1"], "token_variable: PATH", "cannot be bound to"),
    ],
)
def test_an_address_that_is_not_to_be_served_is_refused(
    terms: Path, options: list[str], extra: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from align_cbrl.cli import main

    config = terms.with_name("leader.yaml")
    config.write_text(CONFIG.replace("terms.py", str(terms)) + extra)
    assert main(["serve", str(config), "--out", str(terms.with_name("out")), *options]) == 2
    assert words in capsys.readouterr().err


KILLED = textwrap.dedent("""
    judge: {function: terms.py:judge, batch_size: 8}
    rewards: {hacked: terms.py:hacked, good: terms.py:good}
    leader: {weights: {hacked: 0.6}}
    hpgd: {steps: 100000}
    batch_size: 16
""")


class Killed(Client):
    """A server in a process that is killed and started again, at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["align_cbrl.llm.engines.http"])

    def start(self) -> None:
        note = self.folder / "address"
        note.unlink(missing_ok=True)
        self.process = self.context.Process(target=serving_worker.run, args=(str(self.folder), self.port))
        self.process.start()
        while not note.exists():
            assert self.process.is_alive()
            time.sleep(0.01)
        self.port = int(note.read_text().rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.mark.slow
def test_ten_kills_during_use_lose_no_score_and_pay_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said and stored is never asked again; only the call that a kill interrupts may be."""
    monkeypatch.setenv("JUDGE_SECONDS", "0.02")
    (tmp_path / "terms.py").write_text(TERMS)
    (tmp_path / "leader.yaml").write_text(KILLED)
    server = Killed(tmp_path)
    server.start()
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.port}/score")
    replies: dict[int, Any] = {}
    over = threading.Event()

    def engine(first: int) -> None:
        seed = first
        while not over.is_set():
            replies[seed] = client.ask(**sampled(seed), patience=120.0)
            seed += 2
            time.sleep(0.02)

    threads = [threading.Thread(target=engine, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    draw, log, interrupted = random.Random(0), tmp_path / "judged.jsonl", []

    def events() -> list[dict[str, list[str]]]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    for _ in range(10):
        before = len(events())
        while len(events()) < before + 6:  # it is in use again
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.2))
        server.kill()
        interrupted += next(iter(events()[-1].values()))  # its call was under way, or perhaps not stored yet
        server.start()
    over.set()
    for thread in threads:
        thread.join()
    while True:  # until the steps that are due are taken
        _, state = server.send("/status", None)
        time.sleep(0.5)
        if state == server.send("/status", None)[1]:
            break
    server.kill()
    texts = [text for seed in replies for text in sampled(seed)["completions"]]
    assert state["requests"] == len(replies) and state["completions"] == len(texts) == len(set(texts))
    counts = Counter(said(tmp_path / "terms.py"))
    twice = {text for text, count in counts.items() if count > 1}
    assert twice <= set(interrupted)
    # Every score that was said is stored and counted once, but for those of a call that a kill had interrupted.
    lost = len(counts) - state["judged"]
    assert 0 <= lost <= len(set(interrupted) & set(counts))
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / "judge_cache.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (state["judged"],)
    steps = [row["step"] for row in MetricsLog.read(tmp_path / "out" / "metrics.jsonl")]
    assert steps == list(range(1, state["version"] + 1)) and len(steps) >= 5 and state["failure"] is None
    found = {name: state[name] for name in ("requests", "judged", "version", "repeated")}
    print(json.dumps({**found, "asked again after a kill": len(twice), "lost with their call": lost}))
