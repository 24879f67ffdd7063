"""Keys and passwords reach nothing that a run writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from align_cbrl import cli
from align_cbrl.errors import InputError
from align_cbrl.llm.judges import RemoteJudge
from align_cbrl.llm.settings.judge import RemoteSettings, judge_facts
from align_cbrl.runs.checkpoints import load_checkpoint, save_checkpoint
from align_cbrl.runs.run_folder import claim
from align_cbrl.runs.secrets import redact, redacted

SECRET = "v3ry-s3cret-value"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@judge.example/score",
        f"https://{SECRET}@judge.example/score",
        f"https://judge.example/score?api_key={SECRET}&size=3",
        f"https://judge.example/score?size=3&access_token={SECRET}#top",
        f"https://judge.example/score?X-Api-Key={SECRET};x=1",
        f"'/score?key={SECRET} x' can't contain control characters".replace("?key", "?apikey"),
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f'{{"authorization": "Basic {SECRET}"}}',
        f"Authorization: {SECRET}",
        f"bearer {SECRET} is not valid",
        f"password={SECRET}",
        f"--set judge.token={SECRET} seed=0",
        f"db_password: '{SECRET}'",
        f"you sent {SECRET}, which has expired",
    ],
)
def test_no_secret_stays_in_a_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    if text.startswith("you sent"):
        monkeypatch.setenv("MY_JUDGE_TOKEN", SECRET)
    found = redact(text)
    assert SECRET not in found and "***" in found
    assert redact(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "expected key=value or key.sub=value, such as hpgd.steps=100",
        "seed was 0, is 1",
        "pad_token='<pad>' and eos_token: </s>",
        "max_tokens=16",
        "https://judge.example/score?size=3 says: token 17 is not known",
        "token_variable: JUDGE_TOKEN",
        "the keys are: a, b",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_a_path_in_the_environment_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shell exports its working directory as PWD: hidden, it would leave a configuration without its files."""
    file = tmp_path / "prompts.jsonl"
    file.touch()
    for name in ("PWD", "OLDPWD", "SERVICE_CREDENTIALS"):
        monkeypatch.setenv(name, str(file if name.startswith("SERVICE") else tmp_path))
    assert redacted({"data": str(file)}) == {"data": str(file)}


def test_names_hide_what_stands_under_them() -> None:
    tree = {"api_key": 17, "headers": [{"Authorization": "x"}], "secret": None, "pad_token": "<pad>", "retries": 3}
    assert redacted(tree) == {
        "api_key": "***", "headers": [{"Authorization": "***"}], "secret": None, "pad_token": "<pad>", "retries": 3,
    }  # fmt: skip


@dataclasses.dataclass
class Config:
    judge: RemoteSettings
    hub_token: str = SECRET


def everything(folder: Path) -> str:
    return "\n".join(str(f) + f.read_bytes().decode("utf-8", "replace") for f in folder.rglob("*") if f.is_file())


def test_a_runs_folder_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://judge.example/score?api_key={SECRET}"
    monkeypatch.setattr(sys, "argv", ["align-cbrl", "run", "mine", "--set", f"judge.url={url}"])
    config = Config(RemoteSettings(url=url))
    claim(tmp_path, config, recipe="mine")
    judge = config.judge.build(tmp_path)
    judge.cache.add(judge._cached_as, {"key": 0.5})
    save_checkpoint(tmp_path / "checkpoints", 1, {}, fingerprint={"judge": judge_facts(config.judge), "url": url})
    assert load_checkpoint(tmp_path / "checkpoints", fingerprint={"judge": judge_facts(config.judge), "url": url})
    written = everything(tmp_path)
    assert SECRET not in written and "api_key=***" in written
    assert judge.identity == "https://judge.example/score?api_key=*** version 1"
    assert judge.function.url == url  # it is used all the same
    claim(tmp_path, config, recipe="mine")
    rotated = Config(RemoteSettings(url=url.replace(SECRET, "another")), hub_token="another")
    claim(tmp_path, rotated, recipe="mine")  # a new key is no new configuration
    with pytest.raises(InputError, match="its key was left out when it was written down; put it in again"):
        RemoteJudge(json.loads((tmp_path / "run.json").read_text())["config"]["judge"]["url"])


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (f"ftp://judge.example/?token={SECRET}", {}),
        (f"https://me:{SECRET}@judge.example/", {}),
        (f"http://judge.example/?token={SECRET}", {"token_variable": "T"}),
        ("https://judge.example/", {"token_variable": SECRET}),
    ],
)
def test_refusals_do_not_repeat_a_secret(url: str, options: dict[str, str]) -> None:
    with pytest.raises(InputError, match="RemoteJudge") as refused:
        RemoteJudge(url, **options)
    assert SECRET not in str(refused.value)


def test_what_is_printed_holds_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://judge.example/?api_key={SECRET}"
    assert cli.main(["run", "four_rooms", "--out", str(tmp_path), "--set", f"judge.url={url}"]) == 2
    said = capsys.readouterr()
    assert "unknown key" in said.err and SECRET not in said.err + said.out
