"""Nothing is learned too late: what a configuration gets wrong is said before anything is trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import enumerable_lm as lm
import pytest
import tiny_models
import torch
from chat_server import chat_server
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align_cbrl import cli
from align_cbrl.runs import preflight
from align_cbrl.runs.imports import load_recipe
from align_cbrl.runs.run_folder import claim

OWN = """
def judge(prompts, completions, answer, **columns):
    return [float(a in c.split()) for a, c in zip(answer, completions, strict=True)]
def raising(prompts, completions):
    raise ConnectionError("the judge is out to lunch")
def needing(prompts, completions, difficulty):
    return [0.0 for _ in completions]
def counting(prompts, completions):
    return [1.0]
def echo(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's policy, reward model, data, judge and configuration."""
    folder = tmp_path_factory.mktemp("material")
    lm.build(folder / "policy")
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(folder / "policy", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / "reward")
    rows = [{"prompt": f"{a} {b}", "answer": a} for a in "abcdef" for b in "abcdef" if a != b]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "torn.jsonl").write_text('{"prompt": "a b", "answer": "a"}\n{"prompt": ')
    tiny_models.build(folder / "chatty", "llama", chat=True)
    template = folder / "chatty" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if %}")
    talks = [{"prompt": [{"role": "user", "content": "a " * count}], "answer": "a"} for count in range(1, 31)]
    (folder / "talks.jsonl").write_text("\n".join(json.dumps(row) for row in talks))
    (folder / "own.py").write_text(OWN)
    (folder / "my.yaml").write_text(
        f"""
world:
  name: docstrings
  data: {folder}/prompts.jsonl
  model: {folder}/policy
  proxy: {folder}/reward
  rewards: {{echo: "{folder}/own.py:echo"}}
judge: {{function: "{folder}/own.py:judge"}}
follower:
  max_completion_length: 2
  prompts_per_step: 4
  group_size: 4
  steps: 4
  learning_rate: 1.0e-3
  schedule: {{interval: 2, warmup: 0}}
hpgd: {{steps: 2}}
measure: {{every: null, prompts: 4, final_group_size: 2}}
"""
    )
    return folder


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "a misspelt key": (["hpgd.nat=0.3"], ["--set hpgd.nat=0.3: hpgd.nat: unknown key; did you mean 'nats'"]),
    "a misspelt kind": (["leader.kind=mixtur"], ["--set leader.kind=mixtur: leader.kind: ", "did you mean 'mixture'?"]),
    "a judge that is not there": (
        ["judge.function={}/own.py:jugde"],
        ["own.py:jugde: judge.function: ", "has no 'jugde'; did you mean 'judge'"],
    ),
    "a judge's file that is not there": (
        ["judge.function={}/onw.py:judge"],
        ["onw.py:judge: judge.function: ", "there is no file", "did you mean 'own.py'?"],
    ),
    "a judge that raises": (
        ["judge.function={}/own.py:raising"],
        ["own.py:raising: judge.function: judge: raised ConnectionError (the judge is out to lunch)"],
    ),
    "a judge that needs a column": (
        ["judge.function={}/own.py:needing"],
        ["own.py:needing: judge.function: judge: takes 'difficulty', which the data do not have; there are ['answer'"],
    ),
    "a reward that returns another number of scores": (
        ["world.rewards.echo={}/own.py:counting"],
        ["own.py:counting: world.rewards.echo: reward echo: expected 2 scores, one per completion, got 1"],
    ),
    "a policy that is not there": (
        ["world.model={}/polici"],
        ["polici: world.model: model ", "there is no such folder; did you mean '{}/policy'?"],
    ),
    "a language model as a reward model": (
        ["world.proxy={}/policy"],
        ["policy: world.proxy: reward model ", "holds no weights for the score head"],
    ),
    "data that are not there": (
        ["world.data={}/promts.jsonl"],
        ["promts.jsonl: world.data: data ", "there is no such file; did you mean '{}/prompts.jsonl'"],
    ),
    "data that are torn": (
        ["world.data={}/torn.jsonl"],
        ["torn.jsonl: world.data: data ", "loading it raised DatasetGenerationError: JSON parse error"],
    ),
    "a broken chat template": (
        ["world.data={}/talks.jsonl", "world.model={}/chatty", "judge.function={}/own.py:echo", "world.proxy=null"],
        ["talks.jsonl: world.data: prompts: row 0: the chat template refuses it, TemplateSyntaxError"],
    ),
    "a column that is not there": (
        ["objective={kind: worst_group, column: anser}"],
        ["anser}: objective.column: the data have no column 'anser'; did you mean 'answer'?"],
    ),
    "more prompts than there are": (
        ["follower.prompts_per_step=1000"],
        ["--set follower.prompts_per_step=1000: follower.prompts_per_step: ", "expected at least 1000 rows"],
    ),
    "a number out of range": (
        ["follower.temperature=0"],
        ["--set follower.temperature=0: follower.temperature: expected a finite number > 0, got 0.0"],
    ),
    "a value of another type": (
        ["hpgd.steps=many"],
        ["--set hpgd.steps=many: hpgd.steps: expected an integer, got the string 'many'"],
    ),
    "settings that exclude each other": (
        ["hpgd.learning_rate=0.1"],
        ["--set hpgd.learning_rate=0.1: hpgd.learning_rate: belongs to step: gradient, got 0.1 with natural steps"],
    ),
    "remembered batches of steps that have none": (
        ["hpgd={step: gradient, memory: 3}"],
        ["hpgd.memory: belongs to step: natural, got 3 with gradient steps"],
    ),
    "a weight of a term that there is not": (
        ["leader.weights={ehco: 1.0}"],
        ["leader.weights={{ehco: 1.0}}: leader: ", "no terms named ['ehco']; the terms are ['proxy', 'echo']"],
    ),
}
"""What is set, and what is said: fragments of the message, with the folder of the material for {}."""


def command(material: Path, out: Path, *overrides: str) -> list[str]:
    return ["run", "tune_weights", "--config", f"{material}/my.yaml", "--out", str(out), "--set", *overrides]


def refused(material: Path, out: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `run` says of a configuration that it refuses, leaving nothing behind; prints how soon."""
    began = time.perf_counter()
    assert cli.main(command(material, out, "seeds=[0]", *overrides)) == 2
    seconds = time.perf_counter() - began
    assert not out.exists() and not (out.parent / "cache").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    print(f"{seconds:.2f} s")
    return error


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that the recipe is started with, in place of the hours that it would take."""
    seen: list[Any] = []

    def run(config: Any, out: Path, resume: bool) -> None:
        claim(out, config, recipe="tune_weights")
        seen.append(config)

    monkeypatch.setattr(load_recipe("tune_weights"), "run", run)
    return seen


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_refused_and_the_folder_can_be_used(
    name: str, material: Path, tmp_path: Path, accepted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, fragments = WRONG[name]
    out = tmp_path / "run"
    error = refused(material, out, [override.replace("{}", str(material)) for override in overrides], capsys)
    for fragment in fragments:
        assert fragment.replace("{{", "{").replace("}}", "}").replace("{}", str(material)) in error
    assert cli.main(command(material, out, "seeds=[0]")) == 0 and len(accepted) == 1


def test_a_wrong_file_is_named(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes from the file is said to."""
    file = tmp_path / "mine.yaml"
    file.write_text((material / "my.yaml").read_text().replace("own.py:judge", "own.py:raising"))
    assert cli.main(["run", "tune_weights", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert f"error: {file}: judge.function: judge: raised ConnectionError" in capsys.readouterr().err


def test_all_that_is_wrong_is_said_at_once(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First what is seen without loading anything, which is soon; then what loading and asking show."""
    shown = [f"judge.function={material}/own.py:raising", f"world.proxy={material}/policy"]
    seen = [f"world.rewards.two={material}/own.py:two", f"world.data={material}/promts.jsonl"]
    for wrong, keys in (
        (shown + seen, ["world.rewards.two", "world.data"]),
        (shown, ["world.proxy", "judge.function"]),
    ):
        error = refused(material, tmp_path / "run", wrong, capsys)
        assert [line.split(": ")[2] for line in error.splitlines()] == keys
        assert all(line.startswith("error: --set ") for line in error.splitlines())


def test_a_folder_that_may_not_be_written_is_named(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    error = refused(material, tmp_path / "run", [], capsys)
    assert f"--out {tmp_path / 'run'}: expected a folder that may be written, got {tmp_path}, which may not" in error


@pytest.mark.parametrize(
    ("package", "overrides", "message"),
    [
        ("peft", ["follower.lora=8"], "--set follower.lora=8: follower.lora: rank 8 needs peft; pip install"),
        (
            "peft",
            ["leader={kind: reward_model, trainable: lora}"],
            "adapters need the package peft",
        ),
        ("vllm", ["follower.vllm=true"], "--set follower.vllm=true: follower.vllm: the package vllm is not installed"),
        ("optuna", ["methods=[hpgd, tpe]"], "--set methods=[hpgd, tpe]: methods: tpe and random: need optuna"),
        ("matplotlib", [], "curves: need matplotlib, which is not installed: pip install 'align-cbrl[plots]'"),
        ("wandb", ["tracking.report_to=wandb"], "--set tracking.report_to=wandb: tracking.report_to: wandb is not"),
    ],
)
def test_a_package_that_is_missing_is_named(
    package: str,
    overrides: list[str],
    message: str,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = preflight.require_package.__globals__["importlib"].util.find_spec
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else found(name, *more))
    monkeypatch.setattr("align_cbrl.llm.trackers.get_available_trackers", lambda: ["tensorboard"])
    assert message in refused(material, tmp_path / "run", overrides, capsys)


def test_a_disk_that_is_too_small_is_named(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accepted: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * 2**20))
        error = refused(material, tmp_path / "run", [], capsys)
    assert f"error: --out {tmp_path / 'run'}: expected room for 0.0" in error and "got 0.01 GB; make room" in error
    assert cli.main(command(material, tmp_path / "run", "seeds=[0]")) == 0 and accepted


def test_a_start_that_failed_later_leaves_the_folder_usable(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a mistake was not seen before, but in the run."""
    recipe = load_recipe("tune_weights")
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "check_bench", lambda *arguments, **more: None)
        refused(material, tmp_path / "run", [f"judge.function={material}/own.py:needing"], capsys)
    monkeypatch.setattr(recipe, "run", lambda config, out, resume: claim(out, config, recipe="tune_weights"))
    assert cli.main(command(material, tmp_path / "run", "seeds=[0]")) == 0


def test_a_copied_recipe_runs_by_its_path(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cp", "tune_weights", "mine"]) == 0
    assert capsys.readouterr().out == "mine: change it, and run it with: align-cbrl run mine/\n"
    assert cli.main(["check", "mine", "--config", f"{material}/my.yaml"]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert cli.main(["cp", "tune_weights", "mine"]) == 2
    assert "mine: expected a folder that is not there yet" in capsys.readouterr().err
    assert cli.main(["cp", "tune_wieghts", "other"]) == 2
    assert "did you mean 'tune_weights'?" in capsys.readouterr().err and not Path("other").exists()


def test_check_says_what_is_there_and_makes_nothing(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["check", "tune_weights", "--config", f"{material}/my.yaml", "--out", str(out)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tune_weights with my.yaml, into ") and lines[-1] == "nothing is missing"
    told = dict(line.split(maxsplit=1) for line in lines[1:-1])
    assert told["world.data"] == "26 training and 4 test prompts"
    assert told["world.model"] == f"{material}/policy: LlamaForCausalLM, 8 tokens"
    assert told["judge.function"] == "0, 0 for two completions"
    assert told["world.rewards.echo"] == "4, 22 for two completions"
    assert cli.main([*arguments, "--set", f"judge.function={material}/own.py:raising"]) == 2
    assert "judge: raised ConnectionError" in capsys.readouterr().err
    assert not out.exists()


def test_judges_of_every_kind_are_asked_by_their_own_key(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judge.txt").write_text("How good is {completion} for {prompt}?")
    check = ["check", "tune_weights", "--config", f"{material}/my.yaml", "--set"]
    assert cli.main([*check, "judge.url=http://127.0.0.1:9/score"]) == 2
    assert "--set judge.url=http://127.0.0.1:9/score: judge.url: judge: raised" in capsys.readouterr().err
    with chat_server() as api:
        assert cli.main([*check, f"judge.chat={api.url}", "judge.model=m", "judge.scale=[0, 9]",
                         f"judge.template={tmp_path}/judge.txt"]) == 0  # fmt: skip
        assert api.calls == 2
    assert "judge.chat " in capsys.readouterr().out
    assert cli.main([*check, f"judge.reward_model={material}/reward"]) == 0
    assert "judge.reward_model " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["four_rooms", "rtq", "variety"])
def test_recipes_of_tables_are_checked_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", name, "--config", "smoke", "--out", str(tmp_path / "run")]) == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["run", name, "--config", "smoke", "--out", str(tmp_path / "run")]) == 2
    assert "need matplotlib" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a misspelt key", "a judge that raises", "a policy that is not there"])
def test_the_real_command_line_refuses_too(name: str, material: Path, tmp_path: Path) -> None:
    overrides, fragments = WRONG[name]
    arguments = command(material, tmp_path / "run", *[override.replace("{}", str(material)) for override in overrides])
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "align_cbrl.cli", *arguments], capture_output=True, text=True)
    print(f"{name}: {time.perf_counter() - began:.1f} s")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert all(fragment.replace("{}", str(material)) in done.stderr for fragment in fragments)
    assert done.stdout.startswith("tune_weights with my.yaml, into ")


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which takes half a minute where there is no network."""

    def asked(*arguments: object, **more: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("align_cbrl.llm.followers.base.find_adapter_config_file", asked)
    monkeypatch.chdir(material.parent)
    error = refused(material, tmp_path / "run", [f"world.model={material.name}/polici"], capsys)
    assert f"there is no such folder; did you mean '{material.name}/policy'?" in error
