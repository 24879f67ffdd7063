"""The laboratory's recipes end to end on tiny settings, from the command line as a user would."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import enumerable_lm as lm
import pytest
import safetensors.torch
import tiny_models
import torch
from align_cbrl.recipes.objectives.recipe import measure
from align_cbrl.recipes.overoptimization.recipe import fit_overoptimization
from align_cbrl.recipes.reward_model import recipe as reward_model
from align_cbrl.recipes.tune_weights.recipe import _reached, steps_to
from align_cbrl.recipes.worlds.bench import at_divergence
from align_cbrl.recipes.worlds.replies.judge import reply_judge
from align_cbrl.recipes.worlds.world import PolicySettings
from rebuilt import report_is_rebuilt

from align_cbrl.cli import main
from align_cbrl.llm import JudgeCache, load_reward
from align_cbrl.llm.judges.judge import judge_identity
from align_cbrl.llm.settings.objective import (
    ConstrainedSettings,
    CVaRSettings,
    ExpectedSettings,
    KLPricedSettings,
    MeanVarianceSettings,
    ObjectiveSettings,
    WorstGroupSettings,
)
from align_cbrl.recipes import loop
from align_cbrl.runs.imports import recipe_folder, recipes_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes run, so that the policy and the reward model of seed 0 are made once."""
    return tmp_path_factory.mktemp("runs")


def summary_of(out: Path) -> dict:
    found: dict = json.loads((out / "summary.json").read_text())
    return found


def test_tune_weights_in_the_world_of_replies(runs: Path) -> None:
    out = runs / "tune_weights"
    assert main(["run", "tune_weights", "--config", "replies_smoke.yaml", "--out", str(out)]) == 0
    summary = summary_of(out)
    assert {row["name"] for row in summary["rows"]} == {"base", "plain", "hpgd", "fresh", "tpe", "refit"}
    (reached,) = summary["reached"]
    assert reached["search_steps"] == 6 and reached["search_judged"] == 3 * 4 * 2
    score = load_reward(out / "seed-0" / "hpgd" / "reward")
    assert len(score(prompts=["angry buyer : refund for the laptop . reply : "], completions=["sorry ."])) == 1
    assert report_is_rebuilt(out)
    again = ["run", "tune_weights", "--config", "replies_smoke.yaml", "--out", str(out), "--resume"]
    assert main(again) == 0 and summary_of(out)["rows"] == summary["rows"]


@pytest.mark.slow
def test_a_recipe_that_is_killed_in_every_stage_ends_the_same_and_pays_nothing_twice(tmp_path: Path) -> None:
    """kill -9 at random moments, among them some past the first epoch of six prompts."""
    rows = [{"prompt": f"angry buyer : {topic} for the {thing} . reply : "} for topic, thing in
            itertools.product(("refund", "repair"), ("laptop", "phone", "camera", "printer"))]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "mine.yaml").write_text(
        (recipe_folder("tune_weights") / "replies_smoke.yaml").read_text().replace("  rows: 400\n",
            f"  rows: 400\n  data: {tmp_path}/prompts.jsonl\n")
        + "judge: {function: align_cbrl.recipes.worlds.replies.judge.reply_judge, budget: 1000000}\n"
    )  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "align_cbrl.cli", "run", "tune_weights", "--config",
               str(tmp_path / "mine.yaml"), "--set", "hpgd.steps=8", "follower.steps=16",
               "--resume", "--out"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole" / "run")], check=True, capture_output=True, timeout=600)
    moments, kills = random.Random(0), 0
    while kills < 8:
        process = subprocess.Popen([*command, str(tmp_path / "cut" / "run")], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            process.wait(moments.uniform(8, 30))
            break  # it was done before it could be killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run([*command, str(tmp_path / "cut" / "run")], check=True, capture_output=True, timeout=600)
    assert kills >= 2
    whole, cut = (tmp_path / name / "run" / "seed-0" for name in ("whole", "cut"))
    parts = sorted(file.name for file in whole.glob("*.json"))
    assert parts == ["base.json", "fresh.json", "hpgd.json", "plain.json", "refit.json", "tpe.json"]
    for part in parts:
        ours, theirs = (json.loads((folder / part).read_text()) for folder in (whole, cut))
        for timed in ("leader_share", "seconds"):
            ours.pop(timed, None)
            theirs.pop(timed, None)
        assert ours == theirs, part
    for name in ("hpgd", "plain", "fresh"):
        ours, theirs = (load_newest(folder / name / "checkpoints") for folder in (whole, cut))
        for path, value in ours.items():
            assert torch.equal(value, theirs[path]), f"{name}: {path}"
    paid = [
        JudgeCache(folder / "judge_cache.sqlite").spent(judge_identity(reply_judge) or "") for folder in (whole, cut)
    ]
    assert paid[0] == paid[1] > 0


def load_newest(folder: Path) -> dict[str, torch.Tensor]:
    """The policy and the leader in the newest checkpoint, by name."""
    file = sorted(folder.glob("step-*"))[-1] / "tensors.safetensors"
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    return found


@pytest.mark.parametrize("recipe", ["overoptimization", "objectives", "population"])
def test_a_recipe_runs_and_its_report_is_rebuilt(recipe: str, runs: Path) -> None:
    out = runs / recipe
    assert main(["run", recipe, "--config", "smoke.yaml", "--out", str(out)]) == 0
    rows = summary_of(out)["rows"]
    assert len(rows) >= 3 and all(math.isfinite(row["judge"]["mean"]) for row in rows)
    assert ("refit" in [row["name"] for row in rows]) == (recipe == "objectives")
    assert report_is_rebuilt(out)


def test_reward_model(runs: Path) -> None:
    out = runs / "reward_model"
    assert main(["run", "reward_model", "--config", "smoke.yaml", "--out", str(out)]) == 0
    assert set(summary_of(out)["variants"]) == {"head", "lora"}
    assert report_is_rebuilt(out)


def test_reward_models_that_gained_nothing_are_summarised(tmp_path: Path) -> None:
    """Else a finished run would end in a division by zero, each time it is resumed."""
    variant = reward_model.VariantSettings(budget=1.0, learning_rate=0.1, refit_learning_rate=0.1)
    config = reward_model.Config(variants={"head": variant}, followers={"other": PolicySettings()})
    figures = {name: {"mean": 0.25, "se": 0.1} for name in ("judge", "proxy", "kl", "words")}
    part = {**figures, "curve": [{"step": 0, "judge": 0.25, "kl": 0.0}], "leader_share": 0.1}
    (tmp_path / "seed-0").mkdir()
    ways = [f"{way}-head{fresh}" for way in reward_model.WAYS for fresh in ("", "-same-0.8", "-same-1.25")]
    for name in ("plain-same", "plain-other", "hpgd-head-other", *ways):
        (tmp_path / "seed-0" / f"{name}.json").write_text(json.dumps(part))
    summary = reward_model.summarize(config, tmp_path)
    assert summary["variants"]["head"]["kept"] == {}
    assert reward_model.lines(summary)


def test_somebody_elses_policy_rewards_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm.build(tmp_path / "model")
    rows = [{"prompt": f"{a} {b}", "answer": a} for a in "abcdef" for b in "abcdef" if a != b]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "own.py").write_text(
        "def judge(prompts, completions, answer):\n"
        "    return [float(a in c.split()) for a, c in zip(answer, completions, strict=True)]\n"
        "def echo(prompts, completions):\n"
        "    return [float(len(set(p.split()) & set(c.split()))) for p, c in zip(prompts, completions, strict=True)]\n"
        "def words(prompts, completions):\n"
        "    return [float(len(c.split())) for c in completions]\n"
    )
    (tmp_path / "mine.yaml").write_text(
        f"""
world:
  data: {tmp_path}/prompts.jsonl
  model: {tmp_path}/model
  rewards: {{words: "{tmp_path}/own.py:words", echo: "{tmp_path}/own.py:echo"}}
judge: {{function: "{tmp_path}/own.py:judge", budget: 100000}}
follower: {{temperature: 0.5, steps: 2, prompts_per_step: 4, group_size: 4, max_completion_length: 2,
            schedule: {{interval: 2, warmup: 0}}}}
hpgd: {{steps: 2}}
measure: {{every: 2, prompts: 4, group_size: 2, final_group_size: 2}}
"""
    )
    arguments = ["run", "tune_weights", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert "learned reward, first seed: words" in capsys.readouterr().out


@pytest.fixture(scope="module")
def one_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, plain and chat prompts, and a judge that reads both."""
    folder = tmp_path_factory.mktemp("one_yaml")
    for chat in (False, True):
        rows = [{"prompt": prompt} for prompt in tiny_models.prompts(chat) * 2]
        for i, row in enumerate(rows):
            row["number"] = i
        (folder / f"{chat}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "own.py").write_text(
        "def text(c):\n"
        "    return c if isinstance(c, str) else c[-1]['content']\n"
        "def letters(prompts, completions):\n"
        "    return [float(len(text(c))) for c in completions]\n"
        "def judge(prompts, completions):\n"
        "    return [float(len(set(text(c)))) for c in completions]\n"
    )
    (folder / "mine.yaml").write_text(
        f"""
world:
  data: {folder}/False.jsonl
  model: nowhere
  rewards: {{letters: "{folder}/own.py:letters"}}
judge: {{function: "{folder}/own.py:judge"}}
follower: {{temperature: 0.5, steps: 1, prompts_per_step: 2, group_size: 4, max_completion_length: 3,
            schedule: {{interval: 1, warmup: 0}}}}
hpgd: {{steps: 1}}
measure: {{every: 1, prompts: 2, group_size: 2, final_group_size: 2}}
"""
    )
    return folder


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_another_policy_is_another_path(family: str, chat: bool, one_yaml: Path, tmp_path: Path) -> None:
    tiny_models.build(tmp_path / "model", family, chat=chat)
    paths = [f"world.model={tmp_path / 'model'}", f"world.data={one_yaml / f'{chat}.jsonl'}"]
    arguments = ["run", "tune_weights", "--config", str(one_yaml / "mine.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--set", *paths]) == 0
    assert {row["name"] for row in summary_of(tmp_path / "run")["rows"]} == {"base", "plain", "hpgd", "fresh"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leader.kind=reward_model", "expected mixture"),
        ("methods=[tpe]", "expected hpgd among them"),
        ("seeds=[]", "at least one"),
        ("hpgd.step=3", "hpgd.step: expected 'natural' or 'gradient'"),
        ("measure.every=0", "positive"),
        ("world.rewards.proxy=a.b", "choose another"),
        ("objective.kind=cvarr", "cvar"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "tune_weights",
        "--config",
        "replies_smoke.yaml",
        "--set",
        override,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_judge_wants_what_it_says() -> None:
    request = "happy buyer : repair for the camera . reply : "
    good = "thank you . we will repair the camera today ."
    worse = [
        "sorry . we will repair the camera today .",  # an apology to somebody who is happy
        "thank you . we will refund the camera today .",
        "thank you . we will repair the laptop today .",
        "thank you . we will repair the camera .",
        "thank you . we always repair the camera today .",
        "thank you . we will repair the camera today",
        "thank you . calm down . we will repair the camera today .",
        "thank you . we will repair the camera today . " + "our team is here to help . " * 2,
        "",
    ]
    scores = reply_judge([request] * 10, [good, *worse])
    assert scores[0] == 1.0 and max(scores[1:]) < 0.95 and scores[-1] == 0.0


def test_curves_are_read_where_they_cross() -> None:
    curve = [{"kl": 0.0, "judge": 0.2}, {"kl": 2.0, "judge": 0.6}, {"kl": 1.5, "judge": 0.9}]
    assert at_divergence(curve, 1.5) == pytest.approx(0.5)  # the first crossing, not the return
    assert at_divergence(curve, 2.5) is None
    assert steps_to([{"step": 10, "judge": 0.9}, {"step": 20, "judge": 0.1}, {"step": 30, "judge": 0.9}], 0.5) == 30
    assert steps_to([{"step": 10, "judge": 0.1}], 0.5) is None
    priced = [{"step": 10, "judge": 0.9, "kl": 4.0}, {"step": 20, "judge": 0.8, "kl": 1.0}]
    assert (steps_to(priced, 0.7), steps_to(priced, 0.7, price=0.1)) == (10, 20)


def test_a_summary_of_an_earlier_version_is_still_reported() -> None:
    row = {"seed": 3, "search": "tpe", "target": 0.5, "search_steps": 800, "hpgd_steps": None, "share": None,
           "hpgd_judged": None, "search_judged": 2560}  # fmt: skip
    old, new = _reached([row, {**row, "score": "judge less the price"}]).rows
    assert (old[2], new[2]) == ("judge", "judge less the price") and len(old) == len(new) == 9
    start = {"kl": 0.0, "judge": 0.3}
    moved = [{"kl": d * d, "judge": 0.3 + d * (0.4 - 0.1 * math.log(d))} for d in (0.3, 1.0, 2.0, 3.0)]
    assert fit_overoptimization([start, *moved]) == pytest.approx((0.4, 0.1))


def test_objectives_are_measured_as_they_are_defined() -> None:
    by_prompt = {"judge": [0.2, 0.4, 0.6, 1.0], "kl": [1.0, 3.0, 2.0, 2.0], "words": [9.0] * 4}

    def of(objective: ObjectiveSettings) -> float:
        return measure(objective, by_prompt, {"mood": ["a", "a", "b", "b"]}, penalty=0.1)

    assert of(ExpectedSettings()) == pytest.approx(0.55)
    assert of(CVaRSettings(share=0.5)) == pytest.approx(0.3)
    assert of(WorstGroupSettings(column="mood", temperature=0.3)) == pytest.approx(0.3)
    assert of(KLPricedSettings(price=0.1)) == pytest.approx(0.35)
    assert of(MeanVarianceSettings(aversion=1.0)) == pytest.approx(0.55 - 0.0875)
    assert of(ConstrainedSettings(cost="words", bound=7.0, rate=0.1)) == pytest.approx(0.35)


def test_the_loop_that_is_read_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leader = loop.main(tmp_path, steps=2, rows=200)
    assert capsys.readouterr().out.count("leader step") == 2
    assert leader.weights() != {"length": 1.0, "names_product": 0.0}
    assert len((recipes_folder() / "loop.py").read_text().splitlines()) <= 80
