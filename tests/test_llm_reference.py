"""The reference is the model that the user named, whatever the policy is made, adapted or continued with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from align_cbrl import InputError
from align_cbrl.llm import GRPOFollower, RewardMixture, RLOOFollower, TiltedFollower, TrainedFollower
from align_cbrl.llm.followers import base
from align_cbrl.llm.sampling import completion_log_probs, pad_left, prompt_ids

KINDS = (RLOOFollower, GRPOFollower)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(tmp_path_factory.mktemp("named"), "llama")


def words(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(ord(letter) for letter in text) / 100 for text in completions]


def make(path: Path, kind: type[TrainedFollower] = RLOOFollower, **options: Any) -> TrainedFollower:
    prompts = Dataset.from_dict({"prompt": tiny_models.prompts(False)})
    return kind(
        path, prompts, 0.5, max_completion_length=4, prompts_per_step=4, group_size=4, learning_rate=1e-2, **options
    )


def check_reference(follower: TrainedFollower, path: Path) -> None:
    """The log-probabilities that the leader is told, in training and fresh, are those of the model named."""
    named = AutoModelForCausalLM.from_pretrained(path).eval()
    for seen in (follower.newest, follower.rollout(torch.arange(4), 2, torch.Generator().manual_seed(0))):
        asked = pad_left(prompt_ids(follower.tokenizer, seen.steps["prompt"]), 0)
        expected = completion_log_probs(named, asked, seen.steps["completion_ids"])
        assert seen.log_prior is not None and seen.log_policy is not None
        torch.testing.assert_close(seen.log_prior[:, 0], expected, rtol=0, atol=1e-4)
        assert (seen.log_policy - seen.log_prior).abs().max() > 1e-4


def adapters() -> dict[str, Any]:
    from peft import LoraConfig

    return {
        "whole": None,
        "lora": LoraConfig(r=2, target_modules="all-linear"),
        "starts elsewhere": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        "embeddings": LoraConfig(r=2, target_modules="all-linear", modules_to_save=["embed_tokens"]),
        "tokens": LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[5, 6]),
    }


@pytest.mark.parametrize("name", adapters())
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_named(path: Path, kind: type[TrainedFollower], name: str) -> None:
    follower = make(path, kind, peft_config=adapters()[name])
    follower.train(RewardMixture({"words": words}), 3)
    check_reference(follower, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': not known to leave the model below the adapter"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"bias": "all"}, "bias='all'.*biases are trained in it"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"layer_replication": [(0, 1), (0, 1)]}, "layer_replication"),
        ({"inference_mode": True}, "inference_mode=True"),
    ],
)
def test_adapters_that_change_the_model_below_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    from peft import LoraConfig

    with pytest.raises(InputError, match=message):
        make(path, peft_config=LoraConfig(r=2, target_modules="all-linear", **options))


def test_other_adapters_than_lora_are_refused(path: Path) -> None:
    from peft import AdaLoraConfig, PrefixTuningConfig

    for adapter in (PrefixTuningConfig(num_virtual_tokens=2), AdaLoraConfig(total_step=3)):
        with pytest.raises(InputError, match=r"expected a peft\.LoraConfig, got .*only of LoRA is it known"):
            make(path, peft_config=adapter)


def test_a_name_inside_the_folder_is_not_the_reference(path: Path, tmp_path: Path) -> None:
    """A copy remembers where it came from."""
    copy = tiny_models.build(tmp_path / "copy", "llama", seed=1)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": str(path)}))
    for kind in KINDS:
        follower = make(copy, kind)
        follower.train(RewardMixture({"words": words}), 2)
        check_reference(follower, copy)


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_policy_is_not_continued_against_another_reference(path: Path, tmp_path: Path, name: str) -> None:
    """Of the same shape, so that nothing else would notice; of an adapter, only the adapter is in the state."""
    first, second = (make(path, peft_config=adapters()[name]) for _ in range(2))
    first.train(RewardMixture({"words": words}), 2)
    second.load_state_dict(first.state_dict())
    second.train(RewardMixture({"words": words}), 1)
    check_reference(second, path)
    other = make(tiny_models.build(tmp_path / "other", "llama", seed=1), peft_config=adapters()[name])
    with pytest.raises(InputError, match="trained against another reference than model"):
        other.load_state_dict(first.state_dict())


def test_an_adapter_that_loads_as_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id of an adapter's repository loads its base with the adapter on top, in policy and reference alike."""
    monkeypatch.setattr(base, "find_adapter_config_file", lambda name: f"cache/{name}/adapter_config.json")
    for kind in (*KINDS, TiltedFollower):
        with pytest.raises(InputError, match="model 'someone/adapter': is an adapter"):
            kind("someone/adapter", Dataset.from_dict({"prompt": ["a"] * 8}), 0.5)
