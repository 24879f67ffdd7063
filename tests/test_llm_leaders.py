"""Leaders, judges, reward models and data: what they compute, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align_cbrl import InputError, Rollouts, RunStopped
from align_cbrl.llm import (
    Judge,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    RLOOFollower,
    TiltedFollower,
    load_leader,
    load_prompts,
    load_reward,
    sample_completions,
)
from align_cbrl.llm.trl_rloo import boltzmann_config


def words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c.split())) for c in completions]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(c.count("a")) for c in completions]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture(scope="session")
def reward_model_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(folder, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


def rollouts(completions: list[str], groups: int) -> Rollouts:
    return Rollouts.bandit(
        contexts=torch.arange(len(completions)) % groups,
        steps={"prompt": ["a b"] * len(completions), "completion": completions},
    )


# ---- reward mixtures ----


def test_calibration_standardises_within_prompts_and_shapes_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join("a" if v < 0.4 else "b" for v in torch.rand(int(n), generator=generator)) or "c"
             for n in torch.randint(1, 9, (40,), generator=generator)]  # fmt: skip
    batch = rollouts(texts, 4)
    mixture = RewardMixture({"words": words, "letters": letters}, {"words": 0.9}, budget=0.9)
    mixture.calibrate(batch)
    features = mixture.features(["a b"] * 40, texts)
    within = features - torch.stack([features[batch.contexts == g].mean(0) for g in range(4)])[batch.contexts]
    variance = within.pow(2).sum(0) / (40 - 4)
    torch.testing.assert_close(variance, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(features.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    with torch.no_grad():
        mixture.weight.fill_(3.0)
    mixture.project()
    reward = within @ mixture.weight.detach()
    assert (reward.pow(2).sum() / (40 - 4)).sqrt().item() == pytest.approx(0.9)


def test_mixture_round_trip_with_functions_reward_models_and_files(tmp_path: Path, reward_model_folder: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def shout(prompts, completions, **columns):\n    return [float(c.isupper()) for c in completions]\n"
    )
    from align_cbrl.imports import load_object

    terms = {
        "proxy": RewardModel(reward_model_folder),
        "basename": load_object("enumerable_lm.length_reward"),
        "shout": load_object(f"{own}:shout"),
    }
    mixture = RewardMixture(terms, {"proxy": 0.5, "basename": -0.2, "shout": 0.1}, budget=2.0)
    batch = rollouts(["a b", "A", "c d e", "f", "b b b", "C C"], 2)
    mixture.calibrate(batch)
    mixture.save_pretrained(tmp_path / "reward")
    own.unlink()  # the saved reward stands alone
    prompts, completions = ["c d e", "b e"], ["a a", "B"]
    want = mixture.score(prompts, completions).tolist()
    assert load_reward(tmp_path / "reward")(prompts=prompts, completions=completions) == pytest.approx(want, rel=1e-12)
    again = load_leader(tmp_path / "reward")
    assert isinstance(again, RewardMixture)
    assert again.weights() == pytest.approx(mixture.weights())
    torch.testing.assert_close(again.correlation, mixture.correlation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "expected at least one reward function, got none"),
        (({"words": words}, {"wrods": 1.0}), r"no terms named \['wrods'\]; the terms are \['words'\]"),
        (({"words": words}, {"words": 2.0}, 1.0), "their norm 2 exceeds the budget 1"),
        (({"words": words}, None, 0.0), "budget: expected a positive number, got 0"),
    ],
)
def test_mixtures_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RewardMixture(*arguments)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "bad: expected 2 scores, got None"),
        ([1.0], "bad: expected 2 scores, one a completion, got 1"),
        ([1.0, None], "bad: expected a finite number for each completion, got None for completion 1"),
        ([1.0, "high"], "got 'high' for completion 1"),
        ([float("nan"), 1.0], "got nan for completion 0"),
        ([float("inf"), 1.0], "got inf for completion 0"),
    ],
)
def test_reward_functions_refused(returned: Any, message: str) -> None:
    mixture = RewardMixture({"bad": lambda prompts, completions, **columns: returned})
    with pytest.raises(InputError, match=message):
        mixture.score(["a", "b"], ["c", "d"])


def test_a_lambda_cannot_be_saved(tmp_path: Path) -> None:
    mixture = RewardMixture({"short": lambda prompts, completions, **columns: [0.0] * len(completions)})
    with pytest.raises(InputError, match=r"term 'short': expected a reward model or a function defined at the top"):
        mixture.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no reward\.json in"):
        load_reward(tmp_path / "nowhere")


# ---- reward models ----


def test_reward_model_scores_do_not_depend_on_the_batch(reward_model_folder: Path) -> None:
    model = RewardModel(reward_model_folder, batch_size=2)
    prompts, completions = ["a b", "c d e", "b e", "f a c"], ["a", "b c d e f", "", "e"]
    together = model(prompts, completions)
    alone = [model([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(("trainable", "tensors"), [("head", 1), ("all", None)])
def test_reward_model_leader_moves_what_it_should(
    reward_model_folder: Path, trainable: str, tensors: int | None
) -> None:
    leader = RewardModelLeader(RewardModel(reward_model_folder), trainable, strength=2.0, budget=0.1)
    moving = [p for p in leader.parameters() if p.requires_grad]
    assert tensors is None or len(moving) == tensors
    batch = rollouts(["a", "b", "c d", "e", "f f", "a c"], 2)
    leader.calibrate(batch)
    reward = leader.reward(batch)[:, 0]
    within = reward - torch.stack([reward[batch.contexts == g].mean() for g in range(2)])[batch.contexts]
    assert (within.pow(2).sum() / 4).sqrt().item() == pytest.approx(2.0, rel=1e-4)
    reward.sum().backward()
    assert all(p.grad is not None for p in moving)
    start = [p.detach().clone() for p in moving]
    with torch.no_grad():
        for p in moving:
            p.add_(1.0)
    leader.project()
    moved = torch.stack([(p - s).norm() for p, s in zip(moving, start, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * torch.stack([s.norm() for s in start]).norm().item(), rel=1e-4)


def test_reward_model_leader_round_trip(tmp_path: Path, reward_model_folder: Path) -> None:
    leader = RewardModelLeader(RewardModel(reward_model_folder), "head", strength=1.5)
    leader.calibrate(rollouts(["a", "b", "c d", "e"], 2))
    with torch.no_grad():
        leader.reward_model.head.weight.mul_(1.3)
    leader.save_pretrained(tmp_path)
    want = leader.score(["a b"], ["c"]).tolist()
    assert load_reward(tmp_path)(prompts=["a b"], completions=["c"]) == pytest.approx(want, rel=1e-5)


def test_reward_models_refused(tmp_path: Path, folder: Path, reward_model_folder: Path) -> None:
    with pytest.raises(InputError, match="neither a hub id nor a folder that loads"):
        RewardModel(tmp_path / "nowhere")
    many = tmp_path / "many"
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(folder, num_labels=3)).save_pretrained(many)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(many)
    with pytest.raises(InputError, match="expected one label, the score, got 3"):
        RewardModel(many)
    padless = tmp_path / "padless"
    LlamaForSequenceClassification.from_pretrained(reward_model_folder).save_pretrained(padless)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(padless)
    with pytest.raises(InputError, match="its tokenizer has no pad token"):
        RewardModel(padless)
    with pytest.raises(InputError, match="trainable: got 'body'; there are: all, head, lora"):
        RewardModelLeader(RewardModel(reward_model_folder), "body")
    with pytest.raises(InputError, match="strength: expected a positive number, got 0"):
        RewardModelLeader(RewardModel(reward_model_folder), strength=0.0)


# ---- judges ----


def test_a_judge_that_recovers_is_retried() -> None:
    attempts = []

    def flaky(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        attempts.append(len(completions))
        if len(attempts) < 3:
            raise TimeoutError("busy")
        return [1.0] * len(completions)

    judge = Judge(flaky, wait=0.0)
    assert judge(None, rollouts(["a", "b"], 1)).tolist() == [[1.0], [1.0]]
    assert (len(attempts), judge.calls) == (3, 2)


def test_a_judge_that_never_recovers_stops_the_run() -> None:
    def down(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise TimeoutError("busy")

    with pytest.raises(RunStopped, match=r"judge: raised TimeoutError on all 3 attempts \(busy\).*resume"):
        Judge(down, retries=2, wait=0.0)(None, rollouts(["a"], 1))


@pytest.mark.parametrize("returned", [None, [1.0], ["x", "y"], [float("nan"), 0.0]])
def test_judges_refused(returned: Any) -> None:
    with pytest.raises(InputError, match="judge: expected"):
        Judge(lambda **arguments: returned)(None, rollouts(["a", "b"], 1))


def test_scoring_functions_get_what_they_name() -> None:
    def strict(completions: list[str], answer: list[int]) -> list[float]:
        return [float(a) for a in answer]

    batch = rollouts(["a", "b"], 1)
    batch = Rollouts.bandit(contexts=batch.contexts, steps={**batch.steps, "answer": [3, 4], "other": [0, 0]})
    assert Judge(strict)(None, batch).tolist() == [[3.0], [4.0]]
    assert RewardMixture({"strict": strict}).reward(batch).tolist() == [[3.0], [4.0]]


# ---- followers ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "without a KL price the best response is undefined"),
        ({"normalize_advantages": True}, "normalize_advantages=True: divides by the batch's spread"),
        ({"temperature": 0.7}, r"temperature=0.7: samples are not the policy's"),
        ({"top_k": 4}, "top_k=4: cuts the policy's support"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"reward_clip_range": (-1, 1)}, "reward_clip_range="),
        ({"mask_truncated_completions": True}, "mask_truncated_completions=True: worse than no training"),
        ({"sync_ref_model": True}, "sync_ref_model=True: the prior moves"),
        ({"scale_rewards": "group"}, "scale_rewards"),
    ],
)
def test_settings_that_leave_lambda_undefined_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        boltzmann_config(0.5, output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=4, **settings)


def test_followers_refused(folder: Path, tmp_path: Path) -> None:
    prompts = lm.prompt_dataset()
    with pytest.raises(InputError, match="temperature: expected a positive temperature lambda, got 0"):
        TiltedFollower(folder, prompts, 0.0)
    with pytest.raises(InputError, match=r"expected a dataset with a 'prompt' column, got columns \['text'\]"):
        RLOOFollower(folder, Dataset.from_dict({"text": ["a"]}), 1.0)
    with pytest.raises(
        InputError, match="prompts: expected at least 8 rows, the prompts of one generation batch, got 4"
    ):
        RLOOFollower(folder, prompts, 1.0, prompts_per_step=8)
    with pytest.raises(InputError, match="group_size: expected at least 2 completions a prompt, got 1"):
        RLOOFollower(folder, prompts, 1.0, prompts_per_step=2, group_size=1)
    with pytest.raises(InputError, match="neither a hub id nor a folder that loads"):
        RLOOFollower(tmp_path / "nowhere", prompts, 1.0, prompts_per_step=2)
    follower = RLOOFollower(folder, prompts, 1.0, prompts_per_step=2, group_size=2)
    with pytest.raises(InputError, match="the leader sees the follower's own batch of 2 prompts x 2 completions"):
        follower.follow(
            RewardMixture({"words": words}), lambda r, m: True,
            start=0, steps=1, contexts_per_step=3, group_size=2, seed=0,
        )  # fmt: skip
    with pytest.raises(InputError, match="group_size: expected at least 2"):
        TiltedFollower(folder, prompts, 1.0).rollout(torch.tensor([0]), 1, torch.Generator())
    with pytest.raises(InputError, match=r"call respond\(leader, contexts\) first"):
        TiltedFollower(folder, prompts, 1.0).rollout(torch.tensor([0]), 2, torch.Generator())


def test_a_reward_that_fails_in_training_is_named(folder: Path) -> None:
    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0]

    follower = RLOOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, group_size=2, max_completion_length=2)
    with pytest.raises(InputError, match="broken: expected 4 scores, one a completion, got 1"):
        follower.train(RewardMixture({"broken": broken}), 1)


def test_truncated_and_ended_completions(folder: Path) -> None:
    follower = TiltedFollower(folder, lm.prompt_dataset(), 1.0)
    seen = sample_completions(follower._load(), None, follower.tokenizer, lm.prompt_dataset(), [0, 1, 2], 50, 2, seed=0)
    assert all(lm.EOS not in ids[:-1] for ids in seen.token_ids)
    assert all(ids[-1] == lm.EOS or len(ids) == 2 for ids in seen.token_ids)
    assert any(len(ids) == 1 for ids in seen.token_ids)


# ---- data ----


def test_prompts_load_from_everywhere(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 20}", "answer": i} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "data.txt").write_text("\n".join(row["prompt"] for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "mine.py").write_text(
        "from datasets import Dataset\ndef load():\n    return Dataset.from_list("
        "[{'prompt': f'p{i}', 'answer': i} for i in range(20)])\n"
    )
    for source in ("data.jsonl", "data.txt", "saved", "mine.py:load"):
        data = load_prompts(str(tmp_path / source))
        assert isinstance(data, DatasetDict)
        assert not set(data["train"]["prompt"]) & set(data["test"]["prompt"])
        assert len(set(data["test"]["prompt"])) == 3


def test_data_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match="expected a dataset with a 'prompt' column"):
        load_prompts(str(tmp_path / "text.jsonl"))
    with pytest.raises(InputError, match="has no 'nothing'"):
        load_prompts("os.path.nothing")
    (tmp_path / "wrong.py").write_text("def load():\n    return 5\n")
    with pytest.raises(InputError, match=r"expected a Dataset, or a DatasetDict with a 'train' split, got int"):
        load_prompts(f"{tmp_path / 'wrong.py'}:load")
