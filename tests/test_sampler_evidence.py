"""The test of the sampler: what it finds, how soon, and how seldom it is wrong."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, Problem
from align_cbrl.estimators.sampler_evidence import ALARM, SamplerEvidence, mean_evidence, sampler_alarm, total_evidence
from align_cbrl.llm import GRPOFollower, Judge, RewardMixture, RLOOFollower, Schedule, TiltedFollower
from align_cbrl.llm import sampling as llm_sampling
from align_cbrl.llm.followers.training import train_follower
from align_cbrl.llm.followers.trl import observed

SIZE, LENGTH, ROWS, PROMPT, END = 12, 6, 16, 3, 0


def draw(table: torch.Tensor, batch: SamplerEvidence, claimed: float = 1.0) -> None:
    """A batch of a Markov chain's texts, all of its tokens drawn from the table as claimed, or not."""
    text = [torch.randint(SIZE, (ROWS,)) for _ in range(PROMPT)]
    for _ in range(LENGTH):
        text.append(torch.multinomial((table[text[-1]] * claimed).softmax(-1), 1)[:, 0])
    texts = torch.stack(text, 1)
    tokens = texts[:, PROMPT:]
    ended = (tokens == END).cumsum(1) - (tokens == END).long()
    batch.add(table[texts[:, PROMPT - 1 : -1]], tokens, ended == 0, texts[:, :PROMPT], torch.ones(ROWS, PROMPT), [END])


def test_every_alternative_is_a_distribution() -> None:
    """Under p a bet has mean one, exactly: enumerated over the vocabulary, with a memory of biased batches."""
    torch.manual_seed(0)
    table = torch.randn(SIZE, SIZE)
    evidence = SamplerEvidence()
    for _ in range(6):
        draw(table, evidence, claimed=0.3)  # so that tokens, ends and repeats are believed to be favoured or avoided
    for prompt in ([3, 4, 3], [3, 4, 3, 4, 3], [5, 5, 5], [1, 2, 6]):
        logits = torch.randn(1, 1, SIZE)
        entering = torch.tensor(-math.log((evidence.batches + 1) * (evidence.batches + 2)), dtype=torch.float64)
        total = torch.zeros(len(evidence._stake), dtype=torch.float64)
        for token in range(SIZE):
            after = copy.deepcopy(evidence)
            asked = torch.tensor([[7, *prompt]])  # the first is padding, which is no text that could repeat
            padding = torch.ones_like(asked)
            padding[0, 0] = 0
            after.add(logits, torch.tensor([[token]]), torch.ones(1, 1), asked, padding, [END])
            gain = after._stake - torch.logaddexp(evidence._stake, entering)
            total += logits[0, 0].double().softmax(-1)[token] * gain.exp()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    assert (evidence._sets_seen[[0, 1, 3, 4, 5]] > 0).all()  # something was learned of repeats and of ends


def largest(seed: int, batches: int, claimed: float = 1.0) -> float:
    """The most evidence that a run ever shows."""
    torch.manual_seed(seed)
    table, evidence, most = torch.randn(SIZE, SIZE), SamplerEvidence(), -math.inf
    for _ in range(batches):
        draw(table, evidence, claimed)
        most = max(most, total_evidence(evidence.by_alternative()))
    return most


def test_a_right_sampler_is_seldom_suspected() -> None:
    """40 whole runs, looked at after every batch: beyond log(1 / a) in at most a share a of them."""
    most = torch.tensor([largest(seed, 20) for seed in range(40)])
    assert most.max() < ALARM
    assert (most > math.log(10)).double().mean() < 0.1
    assert most.median() < 1


def test_evidence_accumulates_and_what_begins_late_is_found() -> None:
    torch.manual_seed(1)
    table, evidence = torch.randn(SIZE, SIZE), SamplerEvidence()
    for _ in range(40):
        draw(table, evidence)
    assert sampler_alarm(evidence.by_alternative()) is None
    taken = 0
    while sampler_alarm(evidence.by_alternative()) is None and taken < 25:
        draw(table, evidence, claimed=1.5)
        taken += 1
    assert 1 <= taken < 20


def test_evidence_survives_a_checkpoint() -> None:
    """And what was seen since is kept when a follower is put back."""
    torch.manual_seed(2)
    table, first = torch.randn(SIZE, SIZE), SamplerEvidence()
    for _ in range(3):
        draw(table, first, claimed=1.3)
    second, before = SamplerEvidence(), first.state_dict()
    second.load_state_dict(before)
    for evidence in (first, second):
        torch.manual_seed(3)
        draw(table, evidence, claimed=1.3)
    assert first.by_alternative() == second.by_alternative()
    second.load_state_dict(before)
    assert first.by_alternative() == second.by_alternative()
    assert SamplerEvidence().by_alternative() == {}


def test_the_mean_of_several_is_evidence() -> None:
    torch.manual_seed(4)
    table, several = torch.randn(SIZE, SIZE), [SamplerEvidence() for _ in range(2)]
    draw(table, several[0], claimed=4.0)
    draw(table, several[1])
    found = [evidence.by_alternative() for evidence in several]
    mean = total_evidence(mean_evidence(found))
    expected = torch.logsumexp(torch.tensor([total_evidence(f) for f in found]), 0) - math.log(2)
    assert mean == pytest.approx(float(expected), abs=1e-4)


# ---- what transformers can do to samples ----

# name: (what is declared, batches of at most 512 tokens after which it is found)
LEAKS: dict[str, tuple[dict[str, Any], int]] = {
    "temperature 0.7": ({"temperature": 0.7}, 3),
    "temperature 1.2": ({"temperature": 1.2}, 15),
    "top_k": ({"top_k": 6}, 15),
    "top_p": ({"top_p": 0.8}, 3),
    "min_p": ({"min_p": 0.3}, 3),
    "typical_p": ({"typical_p": 0.5}, 3),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.05}, 4),
    "suppress_tokens": ({"suppress_tokens": [9, 10]}, 5),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [9, 10]}, 25),
    "bad_words_ids": ({"bad_words_ids": [[9], [10, 11]]}, 12),
    "sequence_bias": ({"sequence_bias": [[[9], 1.0]]}, 12),
    "repetition_penalty": ({"repetition_penalty": 1.5}, 6),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, 6),
    "min_new_tokens": ({"min_new_tokens": 6}, 6),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (2, 1.5)}, 6),
    "beams": ({"num_beams": 2}, 2),
    "greedy": ({"do_sample": False}, 2),
    "guidance_scale": ({"guidance_scale": 2.0}, 8),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(tmp_path_factory.mktemp("sampled"), "llama", initializer_range=0.5)


def batches_until_found(path: Path, declared: dict[str, Any], most: int, seed: int) -> float:
    """Batches of 40 completions of 12 tokens; infinity where `most` are not enough."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ends = [tiny_models.END_OF_TURN, tiny_models.EOS]
    config = GenerationConfig(**{
        "max_new_tokens": 12, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": ends, **declared,
    })  # fmt: skip
    torch.manual_seed(seed)
    prompt = llm_sampling.pad_left([torch.randint(5, 13, (2 + i % 4,)).tolist() for i in range(40)], 0)
    evidence = SamplerEvidence()
    for batch in range(1, most + 1):
        with llm_sampling.sampled_by(model, config), torch.no_grad():
            output = model.generate(**prompt, generation_config=config)
        ids = [llm_sampling._cut(row, ends) for row in output[:, prompt["input_ids"].shape[1] :].tolist()]
        padded, mask = llm_sampling._pad_right(ids, torch.device("cpu"))
        logits = llm_sampling.completion_logits(model, prompt, padded, mask)
        llm_sampling.show_evidence(evidence, logits, prompt, padded, mask, ends)
        if sampler_alarm(evidence.by_alternative()) is not None:
            return batch
    return math.inf


@pytest.mark.parametrize("name", LEAKS)
def test_whatever_changes_the_samples_is_found(path: Path, name: str) -> None:
    declared, enough = LEAKS[name]
    assert batches_until_found(path, declared, enough, seed=0) <= enough


def test_the_policys_own_samples_are_not_suspected(path: Path) -> None:
    assert batches_until_found(path, {}, 15, seed=0) == math.inf


@pytest.mark.slow
def test_power_and_false_alarms(path: Path) -> None:
    """The figures of docs/certificate.md: `python -m pytest tests/test_sampler_evidence.py -m slow -s`."""
    for name, (declared, _) in LEAKS.items():
        taken = [batches_until_found(path, declared, 60, seed) for seed in range(10)]
        print(f"{name:34} batches of 512 tokens until the alarm: {sorted(taken)}")
        assert max(taken) < math.inf
    most = torch.tensor([largest(seed, 60) for seed in range(400)])
    for share in (0.1, 0.01, 0.001):
        print(f"beyond log {1 / share:.0f} nats: {(most > -math.log(share)).double().mean():.4f} of 400 right runs")
    assert (most > ALARM).double().mean() <= 0.005  # at most 0.4 expected; 3 with probability 0.008


# ---- in a run ----


def words(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(ord(letter) for letter in text) / 100 for text in completions]


def follower_of(path: Path, kind: str) -> Any:
    prompts = Dataset.from_dict({"prompt": tiny_models.prompts(False)})
    options: dict[str, Any] = {"max_completion_length": 6}
    if kind == "tilted":
        return TiltedFollower(path, prompts, 5.0, **options)
    options |= {"prompts_per_step": 4, "group_size": 8, "learning_rate": 1e-3}
    trainer = GRPOFollower if kind == "grpo" else RLOOFollower
    return trainer(path, prompts, 5.0, schedule=Schedule(interval=2, inside=kind != "fresh"), **options)


def history(path: Path, kind: str, steps: int = 2) -> list[dict[str, float]]:
    leader = RewardMixture({"words": words}, {"words": 1.0})
    run = HPGD(
        Problem(leader, ExpectedUtility(Judge(words)), follower_of(path, kind)),
        torch.optim.Adam(leader.parameters(), lr=0.01, maximize=True),
        config=HPGDConfig(steps=steps, contexts_per_step=4, group_size=8, progress=False),
    )
    run.run()
    return run.history


def leak(monkeypatch: pytest.MonkeyPatch, **declared: Any) -> None:
    """Something comes between the policy and its samples."""
    own = llm_sampling.generation_config

    def biased(*args: Any) -> GenerationConfig:
        config = own(*args)
        config.update(**declared)
        return config

    monkeypatch.setattr(llm_sampling, "generation_config", biased)
    monkeypatch.setattr(observed, "generation_config", biased)


@pytest.mark.parametrize("kind", ["rloo", "grpo", "fresh", "tilted"])
def test_the_certificate_says_when_completions_are_not_the_policys(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = history(path, kind)
    assert all(row["sampler_evidence"] < ALARM for row in rows)
    leak(monkeypatch, min_p=0.5)
    with pytest.warns(UserWarning, match=r"leader step \d: the completions are not samples of the policy .*likely tok"):
        rows = history(path, kind, 4 if kind == "tilted" else 2)
    assert rows[-1]["sampler_evidence"] > ALARM and rows[-1]["alarm"] == 1


def test_plain_training_says_so_too(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch, suppress_tokens=[7, 8, 9])
    with pytest.warns(UserWarning, match=r"follower, step \d+: the completions are not samples of the policy") as told:
        train_follower(
            follower_of(path, "rloo"),
            RewardMixture({"words": words}),
            12,
            out=tmp_path,
            fingerprint="f",
            progress=False,
        )
    assert sum("not samples" in str(warning.message) for warning in told) == 1


def test_a_run_that_is_continued_keeps_its_evidence(path: Path) -> None:
    whole, first, second = (follower_of(path, "rloo") for _ in range(3))
    leader = RewardMixture({"words": words})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.train(leader, 4)
        first.train(leader, 2)
        second.load_state_dict(first.state_dict())
        second.train(leader, 2)
    assert second.sampler_evidence() == whole.sampler_evidence() != first.sampler_evidence()
