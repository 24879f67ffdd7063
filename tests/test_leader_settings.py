"""Leaders from YAML: every kind is built where plain RLHF stands, and what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_reward_models
import torch

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import (
    LearnedBeta,
    LengthShaping,
    LoRA,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    Shaped,
)
from align_cbrl.llm.settings.leader import LeaderSettings
from align_cbrl.runs.config import load_config
from align_cbrl.runs.imports import load_object

TEXTS = ["a", "b a", "c d", "e", "f f a", "a c b d"]
REFERENCE = Rollouts.bandit(
    contexts=torch.arange(6) % 2,
    steps={"prompt": ["a b"] * 6, "completion": TEXTS, "completion_ids": [[2]] * 5 + [[3] * 4]},
)
WORDS = load_object("enumerable_lm.length_reward")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return RewardModel(tiny_reward_models.build(tmp_path_factory.mktemp("proxy") / "llama"), batch_size=5)


def settings(*lines: str) -> LeaderSettings:
    return load_config(LeaderSettings, None, lines)


def test_every_kind_starts_at_the_proxy(proxy: RewardModel) -> None:
    want = torch.tensor(proxy(["a b"] * 6, TEXTS), dtype=torch.float64)
    within = want - torch.stack([want[REFERENCE.contexts == g].mean() for g in range(2)])[REFERENCE.contexts]
    want = 0.8 * (want - want.mean()) / (within.pow(2).sum() / 4).sqrt()
    both, alone = {"proxy": proxy, "words": WORDS}, {"proxy": proxy}
    cases: list[tuple[list[str], dict[str, Any], type]] = [
        (["kind=mixture"], both, RewardMixture),
        (["constraint=positive"], both, RewardMixture),
        (["kind=reward_model"], alone, RewardModelLeader),
        (["kind=reward_model", "trainable=all", "gradient_checkpointing=true"], alone,
         RewardModelLeader),
        (["kind=shaped"], both, Shaped),
        (["kind=shaped", "correction=lora", "lora.rank=2"], alone, Shaped),
        (["kind=length", "target=2", "learn_target=true"], alone, LengthShaping),
    ]  # fmt: skip
    for lines, terms, kind in cases:
        leader = settings("strength=0.8", *lines).build(terms, REFERENCE)
        assert type(leader) is kind
        torch.testing.assert_close(leader.reward(REFERENCE)[:, 0].detach(), want, rtol=1e-6, atol=1e-6)
        assert any(p.requires_grad for p in leader.parameters())
        assert all(p is not q for p in leader.parameters() for q in proxy.model.parameters())


def test_settings_reach_the_leader(proxy: RewardModel) -> None:
    built = settings("kind=reward_model", "trainable=lora", "lora={rank: 3, target_modules: [q_proj]}", "strength=0.1",
                     "budget=0.1", "beta={start: 0.5, low: 0.1, high: 1}").build({"p": proxy}, REFERENCE)  # fmt: skip
    assert isinstance(built, LearnedBeta) and isinstance(built.leader, RewardModelLeader)
    assert (built.leader.lora, built.leader.budget) == (LoRA(3, target_modules=("q_proj",)), 0.1)
    assert built.beta == pytest.approx(0.5) and built.leader.reward_model.batch_size == 5
    unbounded = settings("kind=reward_model", "budget=null").build({"proxy": proxy}, REFERENCE)
    assert isinstance(unbounded, RewardModelLeader) and unbounded.budget is None
    lines = ("constraint=softmax", "weights={words: 0.25, proxy: 0.25}", "budget=0.5", "strength=0.5")
    mixture = settings(*lines).build({"proxy": proxy, "words": WORDS}, REFERENCE)
    assert isinstance(mixture, RewardMixture)
    assert (mixture.constraint, mixture.weights()) == ("softmax", pytest.approx({"proxy": 0.25, "words": 0.25}))
    length = settings("kind=length", "target=3", "weight=0.2", "width=0.5").build({"proxy": proxy}, REFERENCE)
    assert isinstance(length, LengthShaping)
    assert (length.unit, length.target, length.weight.item(), length.width) == ("tokens", pytest.approx(3), 0.2, 0.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["kind=mixtur"], "did you mean 'mixture'"),
        (["target=3"], "target: unknown key"),
        (["kind=length", "target=3", "constraint=free"], "constraint: unknown key"),
        (["kind=length"], "target: is required"),
        (["kind=length", "weight=0.1"], "target: is required"),
        (["budget=0"], "budget: expected a (finite|positive) number"),
        (["budget=null"], "budget: expected a number, got null"),
        (["kind=reward_model", "budget=.inf"], "budget: expected a number or null, got the number inf"),
        (["strength=2.0"], "budget: expected at least strength=2.0, the start, got 1.0"),
        (["kind=reward_model", "lora.rank=2"], "lora: belongs to trainable: lora, got trainable: head"),
        (["kind=reward_model", "gradient_checkpointing=true"], "saves nothing with trainable: head"),
        (["kind=shaped", "model=x"], "model: belongs to correction: head or lora"),
        (["kind=shaped", "lora.rank=2"], "lora: belongs to correction: lora, got correction: terms"),
        (["kind=shaped", "correction=head", "constraint=positive"], "constraint: belongs to correction: terms"),
        (["beta={start: 2, low: 0.1, high: 1}"], "expected 0 < low <= start <= high"),
        (["constraint=softmx"], "did you mean 'softmax'"),
        (["kind=reward_model", "trainable=lora", "lora={target_modules: [lm_head]}"], "has no lm_head"),
    ],
)
def test_settings_refused(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(*lines)


@pytest.mark.parametrize(
    ("lines", "terms", "message"),
    [
        ([], [], "expected at least one term, the proxy"),
        (["kind=reward_model"], ["proxy", "words"], r"uses the proxy alone, got also the terms \['words'\]"),
        (["kind=length", "target=3"], ["proxy", "words"], "kind: length uses the proxy alone"),
        (
            ["kind=reward_model"],
            ["words"],
            "the term 'words' is to be trained, which needs a reward model, got function",
        ),
        (["kind=shaped"], ["proxy"], "a correction by terms needs terms besides the proxy"),
        (["kind=shaped", "correction=head"], ["proxy", "words"], "does not use the terms"),
    ],
)
def test_terms_refused(lines: list[str], terms: list[str], message: str, proxy: RewardModel) -> None:
    known: dict[str, Any] = {"proxy": proxy, "words": WORDS}
    with pytest.raises(InputError, match=message):
        settings(*lines).build({name: known[name] for name in terms}, REFERENCE)


def test_a_yaml_file_changes_the_path_only(tmp_path: Path) -> None:
    file = tmp_path / "leader.yaml"
    file.write_text("kind: reward_model\ntrainable: lora\nlora: {rank: 2}\nbudget: 0.2\n")
    for architecture in tiny_reward_models.ARCHITECTURES:
        model = RewardModel(tiny_reward_models.build(tmp_path / architecture, architecture))
        leader = load_config(LeaderSettings, file).build({"proxy": model}, REFERENCE)
        assert leader.score(["a b"], ["c"]).requires_grad
