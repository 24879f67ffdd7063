"""Leader steps from somebody else's logs: files, the follower that cannot be trained, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    HPGDConfig,
    InputError,
    KLPriced,
    Natural,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.cli import main
from align_cbrl.llm import LoggedFollower, RewardMixture, load_leader, load_rollouts

SCORES = {"a b": 1.0, "b": 0.5, "d": -1.0, "d e": -2.0}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(word in "ae" for word in text.split())) for text in completions]


def hacked(completions: list[str]) -> list[float]:
    return [float(sum(word in "de" for word in text.split())) for text in completions]


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "completion": text, "score": score, **{n: value(text) for n, value in columns.items()}}
        for prompt in ("p", "q", "r")
        for text, score in SCORES.items()
    ]


def written(file: Path, found: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        Dataset.from_list(found).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "leader"
    RewardMixture({"vowels": vowels, "hacked": hacked}, {"hacked": 0.5}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_of_logs_becomes_rollouts(tmp_path: Path, kind: str) -> None:
    logs = load_rollouts(written(tmp_path / f"logs.{kind}", rows(log_policy=lambda _: -1.5, log_prior=lambda _: -2)))
    assert logs.size == 12 and logs.group[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert logs.steps["score"] == list(SCORES.values()) * 3 and "log_policy" not in logs.steps
    assert logs.log_policy is not None and logs.log_prior is not None
    assert logs.log_policy[0, 0] == -1.5 and logs.log_prior[11, 0] == -2.0
    apart = load_rollouts(written(tmp_path / f"apart.{kind}", rows(group=lambda text: len(text))))
    assert len(apart.group.unique()) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "row 1: expected a text or a list of messages, got None"),
        ({"completion": None}, "completion 1: expected a text or a list of messages, got None"),
        ({"log_policy": 0.3}, "log_policy 1: expected a finite number of nats, at most 0, got 0.3"),
        ({"log_policy": None}, "log_policy 1: expected a finite number"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_in_words(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    found = rows(log_policy=lambda _: -1.0, log_prior=lambda _: -1.0)
    found[1] |= change
    with pytest.raises(InputError) as refused:
        load_rollouts(written(tmp_path / "logs.jsonl", found))
    assert words in str(refused.value)


def test_columns_that_are_missing_or_taken_are_refused_in_words(tmp_path: Path) -> None:
    for name, words in (("prompts", "a column 'prompts'"), ("log_policy", "got no log_prior")):
        with pytest.raises(InputError, match=words):
            load_rollouts(written(tmp_path / f"{name}.jsonl", rows(**{name: lambda _: -1.0})))
    with pytest.raises(InputError, match="expected a column 'completion'"):
        load_rollouts(written(tmp_path / "none.jsonl", [{"prompt": "p"}]))
    with pytest.raises(InputError, match="there is no such file"):
        load_rollouts(tmp_path / "nothing.jsonl")


def logged(temperature: float, exact: bool = True) -> tuple[LoggedFollower, RewardMixture]:
    """Logs of the best response to a mixture, or of the reference: 4000 samples of six completions."""
    leader = RewardMixture({"vowels": vowels, "hacked": hacked}, {"hacked": 0.5})
    texts = ["a", "b", "d", "a e", "d e", "b b"]
    reward = leader.score(["p"] * 6, texts).detach()
    policy = torch.softmax(reward / temperature if exact else 0 * reward, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(policy, 4000, replacement=True, generator=generator)
    logs = Rollouts.bandit(
        contexts=torch.zeros(4000, dtype=torch.long),
        steps={"prompt": ["p"] * 4000, "completion": [texts[i] for i in drawn]},
        log_policy=policy.log()[drawn],
        log_prior=torch.full((4000,), 1 / 6, dtype=torch.float64).log(),
    )
    return LoggedFollower(logs, temperature), leader


def test_the_gradient_from_logs_is_that_of_the_best_response() -> None:
    """Against enumeration: J = E u under softmax(r_x / lambda) over six completions."""
    follower, leader = logged(0.7)
    wanted = {"a": 1.0, "b": 0.3, "d": -1.0, "a e": 0.5, "d e": -2.0, "b b": 0.0}

    def utility(leader: Any, rollouts: Rollouts) -> torch.Tensor:
        return torch.tensor([wanted[text] for text in rollouts.steps["completion"]], dtype=torch.float64)[:, None]

    policy = torch.softmax(leader.score(["p"] * 6, list(wanted)) / 0.7, 0)
    value = (policy * torch.tensor(list(wanted.values()), dtype=torch.float64)).sum()
    (exact,) = torch.autograd.grad(value, leader.weight)
    problem = Problem(leader, ExpectedUtility(utility), follower)
    rollouts, _ = follower.turn(leader, 0, contexts_per_step=1, group_size=4000, seed=0)
    PolicyResponse().backward(problem, rollouts)
    assert leader.weight.grad is not None and (leader.weight.grad - exact).norm() < 0.05 * exact.norm()


def test_logs_of_another_policy_are_weighted_as_far_as_log_probabilities_reach() -> None:
    """Logs of the reference, several natural steps: the certificate is of weighted samples."""
    follower, leader = logged(0.7, exact=False)

    def utility(leader: Any, rollouts: Rollouts) -> torch.Tensor:
        return torch.tensor(vowels(rollouts.steps["completion"]), dtype=torch.float64)[:, None]

    config = HPGDConfig(steps=5, contexts_per_step=1, group_size=64, natural=Natural(), correction="on", progress=False)
    run = HPGD(Problem(leader, KLPriced(ExpectedUtility(utility), 0.1), follower), config=config)
    run.run()
    assert run.history[-1]["corrected"] == 1.0 and leader.weights()["vowels"] > 0.3 > leader.weights()["hacked"]


def test_it_says_that_it_cannot_be_trained(tmp_path: Path) -> None:
    logs = load_rollouts(written(tmp_path / "logs.jsonl", rows()))
    follower = LoggedFollower(logs, 0.5)
    leader = RewardMixture({"vowels": vowels, "hacked": hacked}, {"hacked": 0.5})
    assert follower.respond(leader, follower.contexts) == {}
    with pytest.warns(UserWarning, match="logs only cannot be trained"):
        follower.respond(leader, follower.contexts)
    generator = torch.Generator().manual_seed(0)
    assert follower.sample_contexts(2, generator).unique().numel() == 2
    few = follower.rollout(follower.contexts[:1], 3, generator)
    assert few.size == 3 and len(few.contexts.unique()) == 1 and len(few.group.unique()) == 1
    alone = [row for row in rows() if row["completion"] == "b"]
    with pytest.raises(InputError, match="expected several completions of a prompt"):
        LoggedFollower(load_rollouts(written(tmp_path / "alone.jsonl", alone)), 0.5)
    with pytest.raises(InputError, match=r"LoggedFollower.temperature: expected a finite number > 0"):
        LoggedFollower(logs, 0.0)


def test_the_command_takes_a_step_and_writes_the_new_leader(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = written(tmp_path / "logs.jsonl", rows()), tmp_path / "next"
    given = ["step", "--leader", str(saved), "--rollouts", str(file), "--out", str(out)]
    assert main(given) == 2 and "trust_code=True" in capsys.readouterr().err
    assert not out.exists() or not any(file.suffix == ".json" for file in out.iterdir())
    assert main([*given, "--trust-code"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert row["step"] == 1 and row["objective"] == pytest.approx(sum(SCORES.values()) / 4)
    found = load_leader(out, trust_code=True)
    assert isinstance(found, RewardMixture)
    assert found.raw_weights()["hacked"] < 0.5 and found.raw_weights()["vowels"] > 0.0
    assert main([*given, "--trust-code"]) == 2 and "expected a folder that is new or empty" in capsys.readouterr().err


def test_a_judge_in_place_of_scores_is_paid_once(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "logs.jsonl", [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows()])
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from pathlib import Path\ndef judge(completions):\n"
        f"    with Path({str(tmp_path / 'calls')!r}).open('a') as file:\n"
        "        file.write(f'{len(completions)}\\n')\n    return [-float(len(text)) for text in completions]\n"
    )
    given = ["step", "--leader", str(saved), "--rollouts", str(file), "--trust-code"]
    assert main([*given, "--out", str(tmp_path / "x")]) == 2
    assert "expected one, or a column 'score' in the logs" in capsys.readouterr().err
    config = tmp_path / "step.yaml"
    config.write_text(f"judge: {{function: {judge}:judge}}\nhpgd: {{steps: 3}}\n")
    with pytest.warns(UserWarning, match="logs only cannot be trained"):
        assert main([*given, "--out", str(tmp_path / "y"), "--config", str(config)]) == 0
    assert (tmp_path / "calls").read_text().split() == ["4"]  # it looks at completions only, of which four differ
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]) == 3
    best = ["--set", "response.kind=best_response", "response.temperature=0.5"]
    assert main([*given, "--out", str(tmp_path / "z"), "--config", str(config), *best]) == 2
    assert "hpgd.steps: expected 1 around a best response without log-probabilities" in capsys.readouterr().err
