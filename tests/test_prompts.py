"""The door for prompts: what is no prompt is named with its row, wherever prompts enter."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from align_cbrl.recipes.worlds.bench import Bench, BenchSettings
from align_cbrl.recipes.worlds.replies.policy import make_tokenizer
from align_cbrl.recipes.worlds.world import Replies
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import (
    GRPOFollower,
    RewardMixture,
    RLOOFollower,
    TiltedFollower,
    TrainedFollower,
    load_preferences,
    load_prompts,
    sample_completions,
)
from align_cbrl.llm.prompts import RESERVED, positions_of, prompt_ids
from align_cbrl.llm.scoring import score_arguments
from align_cbrl.llm.settings.follower import TrainedSettings
from align_cbrl.llm.settings.judge import FunctionSettings

USER = {"role": "user", "content": "a b"}
ANSWER = {"role": "assistant", "content": "c"}
SYSTEM = {"role": "system", "content": "d"}
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
PART = {"type": "text", "text": "a"}
FINE: dict[str, Any] = {"text": "a b", "talk": [USER]}
NO_PROMPTS: dict[str, tuple[Any, Any, str]] = {
    "none": (FINE["text"], None, "got None; leave"),
    "empty": (FINE["text"], "", "expected a text that is not empty"),
    "blank": (FINE["text"], "  ", "makes no token"),
    "too long": (FINE["text"], "a " * 62, "has 62 tokens, .* 66 positions, and the model has 64"),
    "no messages": (FINE["talk"], [], r"got the list \[\]"),
    "no conversation": (FINE["talk"], None, "got None; leave"),
    "no content": (FINE["talk"], [USER, {"role": "assistant", "content": None}, USER], "of the assistant's turn, got"),
    "no role": (FINE["talk"], [{"role": None, "content": "a"}], "expected messages"),
    "its answer": (FINE["talk"], [USER, ANSWER], "ends in a turn of the assistant, 'c'"),
    "its answer, by another name": (FINE["talk"], [USER, {**ANSWER, "role": "Assistant"}], "ends in a turn of the Ass"),
    "nothing asked": (FINE["talk"], [SYSTEM, {"role": "user", "content": " "}], "says nothing"),
    "system": (FINE["talk"], [SYSTEM, USER], "the chat template refuses it, TemplateError: no system role"),
    "too long a talk": (FINE["talk"], [{"role": "user", "content": "a " * 59}], "has 6[0-9] tokens"),
    "texts": (["a"], ["a", "b"], "expected messages"),
    "another form": ([{"from": "a", "value": "b"}], [{"from": "human", "value": "a"}], "expected messages"),
    "an image": ([{"role": "user", "content": [{"type": "image", "text": None}]}], None, r"parts of type \['image'\]"),
    "parts": ([{"role": "user", "content": [PART]}], None, "refuses it, TypeError|got None"),
}
"""What stands in every row but one, what stands in row 2, and what is said of the first that is refused."""


def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, positions in (("llama", {"max_position_embeddings": 64}), ("gpt2", {})):  # GPT-2's are 64 anyway
        tiny_models.build(folder / family, family, chat=True, **positions)
        tokenizer = AutoTokenizer.from_pretrained(folder / family)
        tokenizer.chat_template = STRICT + tokenizer.chat_template
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NO_PROMPTS)
def test_a_row_that_is_no_prompt_is_refused_when_the_follower_is_made(models: Path, family: str, name: str) -> None:
    others, prompt, reason = NO_PROMPTS[name]
    rows = Dataset.from_dict({"prompt": [others, others, prompt, others]})
    first = 2 if others in FINE.values() else "[02]"
    with pytest.raises(InputError, match=f"prompts: row {first}: .*(?:{reason})"):
        TiltedFollower(models / family, rows, 0.5, max_completion_length=4)


@pytest.mark.parametrize("values", [[1, 2, 3], [1.5, float("nan"), 2.0], [None, None], [True, False], [{"a": 1}] * 2])
def test_what_is_neither_text_nor_conversation_is_refused(models: Path, values: list[Any]) -> None:
    with pytest.raises(InputError, match=f"prompts: row 0: expected a text .*{len(values) - 1} further rows"):
        RLOOFollower(models / "llama", Dataset.from_dict({"prompt": values}), 0.5, prompts_per_step=2)


def test_the_first_row_is_named_and_the_others_are_counted(models: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["a", "a b", "", "b", "", ""]})
    with pytest.raises(InputError, match=r"row 2: .* \(2 further rows are refused as well\)"):
        TiltedFollower(models / "llama", rows, 0.5)


def test_prompts_that_are_only_measured_on_are_looked_at_too(models: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(models / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    fine = Dataset.from_dict({"prompt": ["a b", "c"]})
    sample_completions(policy, None, tokenizer, fine, [0, 1], 2, 4, seed=0)
    for prompt, reason in (("", "not empty"), ("a " * 62, "the model has 64")):
        rows = Dataset.from_dict({"prompt": ["a b", prompt]})
        with pytest.raises(InputError, match=f"prompts: row 1: .*{reason}"):
            sample_completions(policy, None, tokenizer, rows, [0, 1], 2, 4, seed=0)
        with pytest.raises(InputError, match=f"prompts: row 1: .*{reason}"):
            TiltedFollower(models / "gpt2", fine, 0.5, max_completion_length=4).check(rows)


def test_the_bench_looks_before_a_reward_model_is_made(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"prompt": "a " * (62 if i == 7 else 1 + i)} for i in range(10)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    world = Replies(model=str(models / "gpt2"), data=str(tmp_path / "p.jsonl"), rewards={"a": "test_prompts.length"})
    monkeypatch.setattr(Replies, "make_proxy", lambda *arguments: pytest.fail("made a reward model"))
    with pytest.raises(InputError, match="has 62 tokens"):
        judge, follower = FunctionSettings(function="test_prompts.length"), TrainedSettings(max_completion_length=4)
        settings = BenchSettings(world=world, judge=judge, follower=follower)
        Bench(settings, 0, tmp_path / "seed-0", tmp_path / "cache")


def test_conversations_that_end_in_a_question_are_answered(models: Path) -> None:
    rows = Dataset.from_dict({"prompt": [[USER, ANSWER, USER], [USER], [USER, {"role": "tool", "content": "e"}]]})
    TiltedFollower(models / "llama", rows, 0.5, max_completion_length=4)


def test_a_template_that_prints_a_list_is_refused(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"row 0: .* prints a content of parts as Python does"):
        prompt_ids(tokenizer, [[{"role": "user", "content": [{"type": "text", "text": "a"}]}]])


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_column_with_a_name_of_ours_is_refused_by_name(models: Path, tmp_path: Path, name: str) -> None:
    rows = Dataset.from_dict({"prompt": ["a b", "c"], name: ["the reference answer"] * 2})
    advice = rf"got a column '{name}', .*dataset\.rename_column\('{name}', 'data_{name}'\)"
    with pytest.raises(InputError, match=advice):
        TiltedFollower(models / "llama", rows, 0.5)
    policy = AutoModelForCausalLM.from_pretrained(models / "llama")
    with pytest.raises(InputError, match=advice):
        sample_completions(policy, None, AutoTokenizer.from_pretrained(models / "llama"), rows, [0], 2, 2, seed=0)
    if name != "completion":  # of which a world's policy is made, before
        rows.to_json(tmp_path / "rows.jsonl")
        with pytest.raises(InputError, match=advice):
            load_prompts(str(tmp_path / "rows.jsonl"))
    if name not in ("completion", "completion_ids"):
        steps = {"prompt": ["a"], "completion": ["b"], name: ["c"]}
        with pytest.raises(InputError, match=advice):
            score_arguments(Rollouts.bandit(contexts=torch.tensor([0]), steps=steps))


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
def test_columns_that_trl_has_a_use_for_reach_rewards_as_they_are(models: Path, kind: type[TrainedFollower]) -> None:
    day = datetime.datetime(2024, 5, 17)
    columns = {
        "image": b"not an image", "images": ["a", "b"], "context": "of the question", "tools": None, "score": 0.5,
        "step": 3, "when": day, "nested": {"a": [{"b": 2}]}, "place": "Bern", "completions_ids": [1], "row": 9,
        "action": "x", "mask": True, "environment": "e", "class": "law", "with space": 1,
    }  # fmt: skip
    seen: list[dict[str, Any]] = []

    def reward(prompts: list[Any], completions: list[Any], **given: Any) -> list[float]:
        seen.append(given)
        return [float(len(set(completion))) for completion in completions]

    rows = Dataset.from_list([{"prompt": prompt, **columns} for prompt in ("a b", "c d e")])
    follower = kind(models / "llama", rows, 0.5, max_completion_length=4, prompts_per_step=2, group_size=2)
    follower.train(RewardMixture({"reward": reward}, {"reward": 1.0}), 1)
    for given in (seen[0], score_arguments(follower.newest)):
        assert {name: given[name][0] for name in columns} == columns and len(given["completion_ids"]) == 4
    assert follower.newest.steps["prompt"] == ["a b", "a b", "c d e", "c d e"] or len(seen) == 1


def test_how_far_a_model_reads() -> None:
    def config(**values: Any) -> Any:
        made = SimpleNamespace(**values)
        made.get_text_config = lambda: made
        return made

    assert positions_of(config(max_position_embeddings=64)) == 64
    assert positions_of(config()) is None
    assert positions_of(config(max_position_embeddings=None)) is None
    assert positions_of(config(max_position_embeddings=64, sliding_window=8)) is None
    assert positions_of(config(max_position_embeddings=64, sliding_window=8, layer_types=["full_attention"])) == 64
    assert positions_of(config(max_position_embeddings=64, alibi=True)) is None
    assert positions_of(config(max_position_embeddings=64, rope_parameters={"factor": 4.0})) == 256
    stretched = {"factor": 4.0, "original_max_position_embeddings": 64}
    assert positions_of(config(max_position_embeddings=256, rope_parameters=stretched)) == 256
    by_layer = {"full_attention": {"factor": 2.0}, "sliding_attention": {"rope_type": "default"}}
    assert positions_of(config(max_position_embeddings=64, rope_parameters=by_layer)) == 128


def test_what_is_no_dataset_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match=r"prompts: expected a Dataset, got \['a b'\], a list"):
        TiltedFollower(models / "llama", ["a b"], 0.5)  # type: ignore[arg-type]  # on purpose
    splits = DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})})
    with pytest.raises(InputError, match=r"prompts: expected a Dataset, got DatasetDict"):
        TiltedFollower(models / "llama", splits, 0.5)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, float("nan"), "half", None, True])
@pytest.mark.parametrize("load", [load_prompts, load_preferences])
def test_a_share_is_between_none_and_all(load: Any, share: Any) -> None:
    with pytest.raises(InputError, match="test_share: expected a finite number > 0 and < 1"):
        load("never.jsonl", test_share=share)


def test_a_split_leaves_something_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match=r"leaves a prompt to train on, got 0\.9 of 3 prompts"):
        load_prompts(str(tmp_path / "p.txt"), test_share=0.9)
    assert len(load_prompts(str(tmp_path / "p.txt"), test_share=0.01)["test"]) == 1
    with pytest.raises(InputError, match="row 1: expected a text that is not empty"):
        (tmp_path / "p.txt").write_text("one\n\nthree\n")
        load_prompts(str(tmp_path / "p.txt"))


def test_prompts_of_preferences_are_looked_at(tmp_path: Path) -> None:
    rows = [{"prompt": [USER, ANSWER], "chosen": [{**ANSWER, "content": "e"}], "rejected": [ANSWER]}] * 3
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="prompts: row 0: ends in a turn of the assistant"):
        load_preferences(str(tmp_path / "pairs.jsonl"))


def test_a_blank_text_makes_no_token_of_its_own_where_the_tokenizer_adds_one() -> None:
    with pytest.raises(InputError, match="row 1: makes no token"):
        prompt_ids(make_tokenizer(), ["angry buyer", " \n"])
    assert len(prompt_ids(make_tokenizer(), ["<bos>"])[0]) == 2  # written by the user
