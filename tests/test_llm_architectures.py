"""Llama, GPT-2, Qwen2 and Qwen3, plain and chat: the same code, another path."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, InputError, Problem, Rollouts
from align_cbrl.llm import (
    GRPOFollower,
    Judge,
    RewardMixture,
    RLOOFollower,
    TiltedFollower,
    TrainedFollower,
    sample_completions,
)
from align_cbrl.llm.sampling import completion_log_probs, pad_left, prompt_ids

LENGTH = 4


def words(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Reward and judge; they see the same formats as trl's reward functions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    assert all(isinstance(p, str) == isinstance(c, str) for p, c in zip(prompts, completions, strict=True))
    assert all(isinstance(c, str) or (len(c) == 1 and c[0]["role"] == "assistant") for c in completions)
    return [sum(ord(letter) for letter in text) / 100 for text in texts]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in tiny_models.FAMILIES:
        for chat in (False, True):
            tiny_models.build(folder / f"{family}-{chat}", family, chat=chat)
    return folder


def dataset(chat: bool) -> Dataset:
    return Dataset.from_dict({"prompt": tiny_models.prompts(chat), "answer": [1, 2, 3, 4]})


def make(path: Path, chat: bool, kind: type[TrainedFollower] = RLOOFollower, **options: Any) -> TrainedFollower:
    defaults = {
        "max_completion_length": LENGTH, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-2, "interval": 2,
    }  # fmt: skip
    return kind(path, dataset(chat), 0.5, **{**defaults, **options})


def direct_log_probs(model: Any, follower: TrainedFollower, rollouts: Rollouts) -> torch.Tensor:
    """One completion at a time, so that nothing is padded: [B, 1]."""
    rows = []
    for prompt, ids in zip(rollouts.steps["prompt"], rollouts.steps["completion_ids"], strict=True):
        asked = prompt_ids(follower.tokenizer, [prompt])
        rows.append(completion_log_probs(model, pad_left(asked, 0), [ids]))
    return torch.stack(rows)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_hpgd_runs_around_every_family(models: Path, family: str, chat: bool) -> None:
    follower = make(models / f"{family}-{chat}", chat)
    leader = RewardMixture({"words": words}, {"words": 1.0})
    run = HPGD(
        Problem(leader, ExpectedUtility(Judge(words)), follower),
        torch.optim.Adam(leader.parameters(), lr=0.1, maximize=True),
        config=HPGDConfig(steps=2, contexts_per_step=4, group_size=4, progress=False),
    )
    run.run()
    assert follower.steps == 4 and all(math.isfinite(row["objective"]) for row in run.history)

    # What the leader is told are the log-probabilities of the policy that was sampled, and of the reference.
    reference = AutoModelForCausalLM.from_pretrained(models / f"{family}-{chat}").eval()
    before = follower._load().eval()
    before.load_state_dict({n: p.detach().clone() for n, p in follower.policy.named_parameters()}, strict=False)
    follower.train(leader, 1)
    seen = follower.newest
    torch.testing.assert_close(seen.log_policy, direct_log_probs(before, follower, seen), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.log_prior, direct_log_probs(reference, follower, seen), rtol=0, atol=1e-4)
    fresh = follower.rollout(torch.arange(4), 4, torch.Generator().manual_seed(0))
    policy = direct_log_probs(follower.policy.eval(), follower, fresh)
    torch.testing.assert_close(fresh.log_policy, policy, rtol=0, atol=1e-4)
    assert type(fresh.steps["completion"][0]) is type(seen.steps["completion"][0])
    for rollouts in (seen, fresh):
        ends = {tiny_models.EOS, tiny_models.END_OF_TURN}
        assert all(not ends & set(ids[:-1]) for ids in rollouts.steps["completion_ids"])
        assert all(len(ids) == LENGTH or ids[-1] in ends for ids in rollouts.steps["completion_ids"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_ways_of_sampling_draw_from_the_policy_itself(models: Path, family: str) -> None:
    """The models declare top_k = 2 and a repetition penalty: one token of either way against its probability."""
    follower = make(models / f"{family}-False", False, max_completion_length=1, group_size=400, learning_rate=1e-9)
    follower.train(RewardMixture({"words": words}), 1)
    fresh = follower.rollout(torch.arange(4), 400, torch.Generator().manual_seed(1))
    ids = prompt_ids(follower.tokenizer, tiny_models.prompts(False))
    tokens = [[t] for t in range(len(tiny_models.WORDS))]
    for rollouts in (follower.newest, fresh):
        for prompt in range(4):
            asked = pad_left([ids[prompt]] * len(tokens), 0)
            probability = completion_log_probs(follower.policy, asked, tokens).exp()
            drawn = [rollouts.steps["completion_ids"][i][0] for i in (rollouts.contexts == prompt).nonzero()[:, 0]]
            counts = torch.bincount(torch.tensor(drawn), minlength=len(tokens)).double()
            z = (counts / 400 - probability) / (probability * (1 - probability) / 400).sqrt()
            assert z.abs().max() < 4.5, (family, prompt)


# What a model's folder may declare about how it likes to be sampled, each far from leaving the policy alone.
DECLARED = {
    "do_sample": False, "num_beams": 2, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 3.0,
    "temperature": 0.3, "top_k": 1, "top_p": 0.2, "min_p": 0.5, "typical_p": 0.2, "top_h": 0.2, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "repetition_penalty": 3.0, "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[5], [6, 7]], "suppress_tokens": [7, 8],
    "begin_suppress_tokens": [9], "forced_bos_token_id": 5, "forced_eos_token_id": 1, "min_length": 50,
    "min_new_tokens": 4, "max_length": 3, "max_new_tokens": 1, "max_time": 1e-9, "stop_strings": ["a"],
    "exponential_decay_length_penalty": [1, 5.0], "sequence_bias": [[[5], 9.0]], "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0}, "penalty_alpha": 0.6, "dola_layers": "high", "num_beam_groups": 2,
    "diversity_penalty": 1.0, "force_words_ids": [[5]], "token_healing": True, "remove_invalid_values": True,
    "renormalize_logits": True, "prompt_lookup_num_tokens": 2, "cache_implementation": "static", "use_cache": False,
    "low_memory": True, "return_dict_in_generate": True, "output_scores": True, "prefill_chunk_size": 1,
    "pad_token_id": 9, "bos_token_id": 9,
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
def test_nothing_that_a_folder_declares_acts_on_what_is_sampled(
    tmp_path: Path, kind: type[TrainedFollower], adapted: bool
) -> None:
    """The same completions, to the token, whatever generation_config.json says; and saved, it says it still."""
    from peft import LoraConfig

    seen: list[list[Any]] = []
    for name, declared in {"bare": {}, "wilful": DECLARED}.items():
        path = tiny_models.build(tmp_path / name, "llama")
        file = path / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": [tiny_models.END_OF_TURN, tiny_models.EOS], **declared}))
        lora = LoraConfig(r=2, target_modules="all-linear") if adapted else None
        follower = make(path, False, kind, peft_config=lora)
        follower.train(RewardMixture({"words": words}), 2)
        fresh = follower.rollout(torch.arange(4), 4, torch.Generator().manual_seed(0))
        reference = sample_completions(follower.prior, None, follower.tokenizer, dataset(False), [0, 1], 4, 4, seed=0)
        tilted = TiltedFollower(path, dataset(False), 0.5, max_completion_length=LENGTH)
        tilted.respond(RewardMixture({"words": words}), torch.arange(4))
        of_the_reference = tilted.rollout(torch.arange(4), 4, torch.Generator().manual_seed(0))
        rollouts = (follower.newest, fresh, of_the_reference)
        seen.append([r.steps["completion_ids"] for r in rollouts] + [reference.token_ids])
        model = follower.policy.get_base_model() if adapted else follower.policy
        assert model.generation_config.min_p == declared.get("min_p")
    assert seen[0] == seen[1]


def test_an_end_of_turn_that_the_model_declares_ends_a_completion(models: Path) -> None:
    """In both ways of sampling; the tokenizer knows of <eos> only."""
    follower = make(models / "llama-True", True, group_size=64, learning_rate=1e-9)
    follower.train(RewardMixture({"words": words}), 1)
    for rollouts in (follower.newest, follower.rollout(torch.arange(4), 64, torch.Generator().manual_seed(0))):
        completions = rollouts.steps["completion_ids"]
        assert sum(ids[-1] == tiny_models.END_OF_TURN and len(ids) < LENGTH for ids in completions) > 5
        assert not any(tiny_models.END_OF_TURN in ids[:-1] for ids in completions)


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
def test_a_policy_in_training_has_no_dropout(models: Path, kind: type[TrainedFollower]) -> None:
    """Llama's and Qwen's is an argument of a function, which trl does not reach."""
    follower = make(models / "qwen3-False", False, kind)
    assert AutoModelForCausalLM.from_pretrained(models / "qwen3-False").config.attention_dropout == 0.1
    for model in (follower.policy, follower.prior):
        assert model.config.attention_dropout == 0
        assert {getattr(m, "attention_dropout", 0.0) for m in model.modules()} == {0.0}
    inputs = pad_left(prompt_ids(follower.tokenizer, tiny_models.prompts(False)), 0)
    follower.policy.train()
    first, second = (follower.policy(**inputs).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_conversations_need_a_template(models: Path) -> None:
    with pytest.raises(InputError, match="has no chat template, got a conversation"):
        make(models / "llama-False", True)


def test_columns_and_conversations_reach_the_judge_in_one_format(models: Path) -> None:
    follower = TiltedFollower(models / "qwen2-True", dataset(True), 0.5, max_completion_length=LENGTH)
    follower.respond(RewardMixture({"words": words}), torch.tensor([1]))
    rollouts = follower.rollout(torch.tensor([1]), 4, torch.Generator().manual_seed(0))
    assert rollouts.steps["answer"] == [2] * 4
    assert rollouts.steps["prompt"][0] == [{"role": "user", "content": "c d e f g"}]
    assert Judge(words)(None, rollouts).shape == (4, 1)


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_trained_and_the_reference_is_the_policy_without_it(
    models: Path, tmp_path: Path, family: str, kind: type[TrainedFollower]
) -> None:
    from peft import LoraConfig, PeftModel

    path = models / f"{family}-False"
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    leader = RewardMixture({"words": words})
    follower, other = make(path, False, kind, peft_config=lora), make(path, False, kind, peft_config=lora)
    follower.train(leader, 3)
    seen = follower.newest
    reference = AutoModelForCausalLM.from_pretrained(path).eval()
    torch.testing.assert_close(seen.log_prior, direct_log_probs(reference, follower, seen), rtol=0, atol=1e-4)
    assert (seen.log_policy - seen.log_prior).abs().max() > 1e-3

    state = follower.state_dict()
    assert state["policy"] and all("lora_" in name for name in state["policy"])
    other.load_state_dict(state)
    follower.train(leader, 2)
    other.train(leader, 2)
    for name, value in other.state_dict()["policy"].items():
        torch.testing.assert_close(value, follower.state_dict()["policy"][name], rtol=0, atol=0)
    fresh = follower.rollout(torch.arange(4), 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh.log_prior, direct_log_probs(reference, follower, fresh), rtol=0, atol=1e-4)
    # The reference can be sampled as any model can.
    sampled = sample_completions(
        follower.prior, None, follower.tokenizer, follower.prompts, [0, 1], 2, LENGTH, seed=0
    ).rollouts()
    direct = direct_log_probs(reference, follower, sampled)
    torch.testing.assert_close(sampled.log_policy, direct, rtol=0, atol=1e-4)

    follower.save_pretrained(tmp_path / "adapter")
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter").eval()
    torch.testing.assert_close(fresh.log_policy, direct_log_probs(saved, follower, fresh), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="is an adapter"):
        make(tmp_path / "adapter", False)
    follower.reset()
    untrained = follower.rollout(torch.arange(4), 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(untrained.log_policy, untrained.log_prior, rtol=0, atol=1e-5)


def test_adapters_refused(models: Path) -> None:
    from peft import LoraConfig

    for lora in (
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(target_modules=".*_head"),
    ):
        with pytest.raises(InputError, match="expected no adapter on lm_head"):
            make(models / "llama-False", False, peft_config=lora)
    with pytest.raises(InputError, match="expected a peft configuration such as"):
        make(models / "llama-False", False, peft_config=8)
