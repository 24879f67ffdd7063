"""The main job, end to end on tiny settings, from the command line as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import enumerable_lm as lm
import pytest
import torch
from rebuilt import report_is_rebuilt
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align_cbrl.cli import main
from align_cbrl.llm import load_reward
from align_cbrl.runs.config import load_config
from align_cbrl.runs.imports import load_recipe, recipe_names, recipes_folder
from align_cbrl.runs.metrics import MetricsLog

# A model of a few words answers some prompts always alike.
pytestmark = pytest.mark.filterwarnings(  # a policy of eight tokens and batches of sixteen earn both
    "ignore:the leader's gradient is zero", "ignore:leader step .* from its best response"
)
RECIPES = recipes_folder()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Somebody else's model, reward model, data, judge and reward: everything the YAML can name."""
    folder = tmp_path_factory.mktemp("material")
    lm.build(folder / "model")
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(folder / "model", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "proxy")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "proxy")
    rows = [{"prompt": f"{a} {b}", "answer": a} for a in "abcdef" for b in "abcdef" if a != b]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "own.py").write_text(
        "import time\n"
        "def judge(prompts, completions, answer, **columns):\n"
        "    time.sleep(0.05)\n"
        "    return [float(a in c.split()) for a, c in zip(answer, completions, strict=True)]\n"
        "def echo(prompts, completions, **columns):\n"
        "    return [float(len(set(p.split()) & set(c.split()))) for p, c in zip(prompts, completions, strict=True)]\n"
    )
    return [
        f"world.data={folder / 'prompts.jsonl'}",
        f"world.model={folder / 'model'}",
        f"world.proxy={folder / 'proxy'}",
        f"judge.function={folder / 'own.py'}:judge",
        f"world.rewards={{echo: '{folder / 'own.py'}:echo'}}",
        "follower.max_completion_length=2",
        "follower.prompts_per_step=4",
        "follower.group_size=4",
        "follower.steps=10",
        "follower.learning_rate=1e-3",
        "hpgd.steps=8",
        "follower.schedule.interval=5",
        "follower.schedule.warmup=2",
        "measure.prompts=4",
        "measure.final_group_size=4",
    ]


def command(out: Path, material: list[str], *more: str) -> list[str]:
    return ["run", "tune_weights", "--out", str(out), "--set", *material, *more]


def test_the_whole_job_with_everything_replaced(
    tmp_path: Path, material: list[str], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert main(command(out, material, "tracking.report_to=tensorboard")) == 0
    assert list((out / "seed-0" / "hpgd" / "align-cbrl").glob("events.out.tfevents.*"))
    summary = json.loads((out / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "plain", "refit", "hpgd", "fresh"]
    for row in summary["rows"]:
        for figure in ("judge", "proxy", "kl", "gap"):
            assert set(row[figure]) == {"mean", "se", "n"}
        assert 0 <= row["judge"]["mean"] <= 1
    assert summary["rows"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert summary["judge_share"] <= 0.2
    assert summary["judge_calls"] == 8 * 16
    assert {"base", "plain", "refit", "hpgd", "fresh"} == set(summary["seconds"])
    log = MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert all({"gap", "effective_sample_size", "leader_share", "objective", "kl"} <= set(row) for row in log)
    page = (out / "report.html").read_text()
    assert '<svg viewBox="0 0' in page and "Learned weights, hpgd" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert (
        len(load_reward(out / "seed-0" / "hpgd" / "reward", trust_code=True)(prompts=["a b"], completions=["a"])) == 1
    )
    printed = capsys.readouterr().out
    assert "HPGD" in printed
    assert "report:" in printed
    assert report_is_rebuilt(out)
    # the same folder again: nothing is trained a second time, and without --resume nothing is touched; nor does it
    # matter where it is tracked
    began = time.perf_counter()
    assert main([*command(out, material), "--resume"]) == 0
    assert time.perf_counter() - began < 20
    assert main(command(out, material)) == 2
    assert main([*command(out, material, "seeds=[7]"), "--resume"]) == 3
    assert "another configuration (different: seeds was [0], is [7])" in capsys.readouterr().err


def test_the_reward_model_variant(tmp_path: Path, material: list[str]) -> None:
    assert main([*command(tmp_path / "run", material, "hpgd.steps=2"), "--config", "head.yaml"]) == 0
    assert (tmp_path / "run" / "seed-0" / "hpgd" / "reward" / "model" / "config.json").is_file()


def test_kill_9_loses_nothing_before_the_last_checkpoint(tmp_path: Path, material: list[str]) -> None:
    """One kill here, in the leader's stage; five, at random moments, in the slow test below."""
    out = tmp_path / "run"
    longer = [*material, "hpgd.steps=40"]
    kill_during_tuning(out, longer)
    before = MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")
    saved = max(int(p.name.split("-")[1]) for p in (out / "seed-0" / "hpgd" / "checkpoints").glob("step-*[0-9]"))
    assert 0 < saved < 40
    assert main([*command(out, longer), "--resume"]) == 0
    after = MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")
    assert [row["step"] for row in after] == list(range(1, 41))
    assert after[:saved] == before[:saved]


def kill_during_tuning(out: Path, material: list[str]) -> None:
    code = "import sys; from align_cbrl.cli import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", code, *command(out, material)], cwd=out.parent) as process:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if list((out / "seed-0" / "hpgd" / "checkpoints").glob("step-*[0-9]")):
                break
            time.sleep(0.02)
        process.kill()


@pytest.mark.slow
def test_five_kills_at_random_moments(tmp_path: Path, material: list[str]) -> None:
    out = tmp_path / "run"
    code = "import sys; from align_cbrl.cli import main; sys.exit(main())"
    for delay in torch.rand(5, generator=torch.Generator().manual_seed(0)).mul(12).add(8).tolist():
        arguments = [*command(out, [*material, "hpgd.steps=200"]), "--resume"]
        before = (
            MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")
            if (out / "seed-0" / "hpgd" / "metrics.jsonl").exists()
            else []
        )
        folders = [int(p.name.split("-")[1]) for p in (out / "seed-0" / "hpgd" / "checkpoints").glob("step-*[0-9]")]
        with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=out.parent) as process:
            try:
                process.wait(timeout=delay)
            except subprocess.TimeoutExpired:
                process.kill()
        if folders:
            assert MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")[: max(folders)] == before[: max(folders)]
    assert main([*command(out, [*material, "hpgd.steps=200"]), "--resume"]) == 0
    assert [row["step"] for row in MetricsLog.read(out / "seed-0" / "hpgd" / "metrics.jsonl")] == list(range(1, 201))


def test_a_judge_that_fails_in_the_middle_stops_the_run_resumably(
    tmp_path: Path, material: list[str], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "moody.py").write_text(
        "from pathlib import Path\n"
        "calls = []\n"
        "def judge(prompts, completions, **columns):\n"
        "    calls.append(len(completions))\n"
        f"    if len(calls) > 8 and not Path({str(tmp_path / 'repaired')!r}).exists():\n"
        "        raise ConnectionError('the judge is out to lunch')\n"
        "    return [0.5 + 0.1 * len(c) for c in completions]\n"
    )
    settings = [*material, f"judge.function={tmp_path / 'moody.py'}:judge"]
    assert main(command(tmp_path / "run", settings)) == 3
    assert "ConnectionError on all 4 attempts (the judge is out to lunch)" in capsys.readouterr().err
    saved = MetricsLog.read(tmp_path / "run" / "seed-0" / "hpgd" / "metrics.jsonl")
    assert 0 < len(saved) < 8  # it failed in the leader's stage, between two checkpoints
    (tmp_path / "repaired").touch()
    assert main([*command(tmp_path / "run", settings), "--resume"]) == 0
    assert MetricsLog.read(tmp_path / "run" / "seed-0" / "hpgd" / "metrics.jsonl")[: len(saved)] == saved


def test_every_yaml_of_every_recipe_loads() -> None:
    files = [(name, file) for name in recipe_names() for file in (RECIPES / name).glob("*.yaml")]
    assert {"config.yaml", "smoke.yaml"} <= {file.name for _, file in files} and len(files) > 20
    for name, file in files:
        load_config(load_recipe(name).Config, file, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leader.kind=mixtur", "did you mean 'mixture'?"),
        ("follower.group_size=1", "follower.group_size: expected a whole number >= 2, got 1"),
        ("follower.steps=0", "follower.steps: expected a whole number >= 1, got 0"),
        ("hpgd.stepz=3", "steps"),
        ("judge.function=align_cbrl.recipes.worlds.docstrings.judge.docstring_jugde", "docstring_judge"),
        ("judge.function=nowhere.py:judge", "there is no file"),
        ("world.data=nowhere.jsonl", "data 'nowhere.jsonl'"),
        ("world.model=nowhere/at-all", "nowhere/at-all"),
        ("follower.temperature=0", "follower.temperature: expected a finite number > 0, got 0.0"),
        ("follower.prompts_per_step=1000", "expected at least 1000 rows"),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path, material: list[str], override: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tmp_path / "run", material, override)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
