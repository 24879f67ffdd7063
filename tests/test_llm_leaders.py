"""Leaders, judges, reward models and data: what they compute, and what they refuse."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import tiny_reward_models
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    HPGDConfig,
    InputError,
    PolicyResponse,
    Problem,
    Rollouts,
    RunStopped,
)
from align_cbrl.llm import (
    Correction,
    Judge,
    LanguageLeader,
    LearnedBeta,
    LengthShaping,
    LoRA,
    RewardMixture,
    RewardModel,
    RewardModelLeader,
    RLOOFollower,
    Shaped,
    TiltedFollower,
    load_leader,
    load_prompts,
    load_reward,
    sample_completions,
)
from align_cbrl.llm.followers.trl.rloo import boltzmann_config


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


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reward models in double precision, by architecture."""
    root = tmp_path_factory.mktemp("classifiers")
    return {name: tiny_reward_models.build(root / name, name) for name in tiny_reward_models.ARCHITECTURES}


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


class Counted:
    """A reward function that counts how often it has scored each completion."""

    def __init__(self, letters: str) -> None:
        self.letters, self.calls = letters, 0
        self.asked: Counter[str] = Counter()

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        self.asked.update(completions)
        return [float(sum(text.count(letter) for letter in self.letters)) for text in completions]


def test_what_is_known_of_a_batch_is_not_asked_again_and_the_weights_still_move() -> None:
    counted = Counted("x")
    mixture = RewardMixture({"counted": counted}, budget=5.0)
    batch = mixture.prepare(rollouts(["x", "xxx"], 1))
    assert mixture.reward(batch).tolist() == [[5.0], [15.0]]
    with torch.no_grad():
        mixture.weight.mul_(0.5)
    assert mixture.reward(mixture.prepare(batch)).tolist() == [[2.5], [7.5]]
    assert mixture.reward(batch.select([1])).tolist() == [[7.5]]
    assert counted.calls == 1
    # What is known belongs to this leader and to these rollouts.
    assert RewardMixture({"counted": counted}, budget=2.0).reward(batch).tolist() == [[2.0], [6.0]]
    assert mixture.reward(rollouts(["x", "xxx"], 1)).tolist() == [[2.5], [7.5]]
    assert counted.calls == 3


def test_functions_that_change_their_arguments_change_nothing_else() -> None:
    seen: list[Any] = []

    def careless(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append(copy.deepcopy([prompts, completions, columns]))
        scores = [float(len(c[-1]["content"])) for c in completions]
        for completion in completions:
            completion[-1]["content"] = "x" * 9
        columns["completion_ids"][0].clear()
        columns["scale"][0].zero_()
        prompts.clear()
        return scores

    def failing(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        scores = careless(prompts, completions, **columns)
        if len(seen) % 2:
            raise OSError("try again")
        return scores

    steps = {
        "prompt": [[{"role": "user", "content": "q"}]] * 2,
        "completion": [[{"role": "assistant", "content": text}] for text in ("yes", "no")],
        "completion_ids": [[1, 2], [3]],
        "scale": torch.ones(2),
    }
    batch = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps=steps)
    before = copy.deepcopy(steps)
    mixture = RewardMixture({"one": careless, "two": careless}, {"one": 0.5, "two": 0.5})
    assert mixture.reward(mixture.prepare(batch)).tolist() == [[3.0], [2.0]]
    assert Judge(failing, wait=0.0)(None, batch).tolist() == [[3.0], [2.0]]
    assert len(seen) == 4
    assert all(str(arguments) == str(seen[0]) for arguments in seen[:2])
    assert all(arguments[:2] == seen[0][:2] for arguments in seen)
    assert str(steps) == str(before)


def leader_of_counted(name: str, one: Counted, other: Counted) -> LanguageLeader:
    mixture = RewardMixture({"one": one, "other": other}, {"one": 0.5, "other": -0.2})
    if name == "mixture":
        return mixture
    if name == "beta":
        return LearnedBeta(mixture, 2.0, low=1.0, high=5.0)
    if name == "shaped":
        return Shaped(one, RewardMixture({"other": other}, {"other": 0.1}))
    return LearnedBeta(LengthShaping(one, target=2.0, weight=0.1), 2.0, low=1.0, high=5.0)


@pytest.mark.parametrize("settings", [{}, {"correction": "on"}, {"replays": 3}])
@pytest.mark.parametrize("name", ["mixture", "beta", "shaped", "length"])
@pytest.mark.parametrize("chunks", [1, 5])
def test_a_leader_step_asks_every_term_once_about_every_completion(
    name: str, settings: dict[str, Any], chunks: int, folder: Path
) -> None:
    one, other = Counted("ab"), Counted("cd")
    leader = leader_of_counted(name, one, other)
    follower = TiltedFollower(folder, lm.prompt_dataset(), 1.0, max_completion_length=2)
    seen: Counter[str] = Counter()
    run = HPGD(
        Problem(leader, ExpectedUtility(letters_of), follower),
        torch.optim.Adam(leader.parameters(), lr=0.05, maximize=True),
        PolicyResponse(chunks=chunks),
        HPGDConfig(steps=3, contexts_per_step=4, group_size=4, progress=False, **settings),
        observers=[lambda row, batch: seen.update(batch.steps["completion"])],
    )
    run.run()
    assert sum(seen.values()) == 48
    for term in (one, other) if name != "length" else (one,):
        assert term.asked == seen and term.calls == 3


@pytest.mark.parametrize("name", ["mixture", "beta", "shaped", "length"])
def test_what_is_known_changes_no_number(name: str, folder: Path) -> None:
    leader = leader_of_counted(name, Counted("ab"), Counted("cd"))
    batch = rollouts(TEXTS, 2)
    leader.calibrate(batch)
    problem = Problem(leader, ExpectedUtility(letters_of), TiltedFollower(folder, lm.prompt_dataset(), 0.5))
    gradients = []
    for rows in (batch, leader.prepare(batch)):
        leader.zero_grad()
        PolicyResponse(chunks=3).backward(problem, rows)
        gradients.append([p.grad.tolist() for p in problem.parameters if p.grad is not None])
    assert gradients[0] == gradients[1] and torch.tensor(gradients[0][0]).norm() > 1e-3


def letters_of(leader: Any, batch: Rollouts) -> Tensor:
    """A utility: characters of each completion, [B, 1]."""
    return torch.tensor([[float(len(text))] for text in batch.steps["completion"]], dtype=torch.float64)


def test_follower_and_leader_ask_the_terms_once_about_a_batch(folder: Path) -> None:
    """The certificate and the gradient use what the follower's trainer has asked for already."""
    asked = []

    def counted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        asked.append(completions)
        return [float(sum(word in "abc" for word in text.split())) for text in completions]

    mixture = RewardMixture({"counted": counted}, budget=1.0)
    prompts = lm.prompt_dataset().add_column("topic", list("wxyz"))
    follower = RLOOFollower(folder, prompts, 1.0, max_completion_length=2, prompts_per_step=4, interval=1)
    wanted = ExpectedUtility(
        Judge(lambda prompts, completions: [float(sum(w in "cde" for w in c.split())) for c in completions])
    )
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1, maximize=True)
    config = HPGDConfig(steps=3, contexts_per_step=4, group_size=8, progress=False)
    HPGD(Problem(mixture, wanted, follower), optimizer, config=config).run()
    assert len(asked) == follower.steps == 3


def test_mixture_round_trip_with_functions_reward_models_and_files(tmp_path: Path, reward_model_folder: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def shout(prompts, completions, **columns):\n    return [float(c.isupper()) for c in completions]\n"
    )
    from align_cbrl.runs.imports import load_object

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
    assert load_reward(tmp_path / "reward", trust_code=True)(prompts=prompts, completions=completions) == pytest.approx(
        want, rel=1e-12
    )
    again = load_leader(tmp_path / "reward", trust_code=True)
    assert isinstance(again, RewardMixture)
    assert again.weights() == pytest.approx(mixture.weights())
    torch.testing.assert_close(again.correlation, mixture.correlation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "expected at least one reward function, got none"),
        (({"words": words}, {"wrods": 1.0}), r"no terms named \['wrods'\]; the terms are \['words'\]"),
        (({"words": words}, {"words": 2.0}, 1.0), "their norm 2 exceeds the budget 1"),
        (({"words": words}, None, 0.0), "budget: expected a finite number > 0, got 0.0"),
    ],
)
def test_mixtures_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RewardMixture(*arguments)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "bad: expected 2 scores, got None"),
        ([1.0], "bad: expected 2 scores, one per completion, got 1"),
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
    with pytest.raises(InputError, match="trainable: expected 'head' or 'lora' or 'all', got 'body'"):
        RewardModelLeader(RewardModel(reward_model_folder), "body")
    with pytest.raises(InputError, match=r"strength: expected a finite number > 0, got 0\.0"):
        RewardModelLeader(RewardModel(reward_model_folder), strength=0.0)


# ---- every leader ----

TEXTS = ["a", "b a", "c d", "e", "f f a", "a c b d", "b", "d e f", "e e", "c"]


def make_leader(name: str, classifiers: dict[str, Path]) -> LanguageLeader:
    """A leader in double precision, away from its start, calibrated on TEXTS."""
    terms = {"words": words, "letters": letters}
    if name in ("free", "positive", "softmax"):
        leader: LanguageLeader = RewardMixture(terms, {"words": 0.5, "letters": 0.2}, constraint=name)  # type: ignore[arg-type]
    elif name == "shaped mixture":
        leader = Shaped(words, RewardMixture({"letters": letters}, {"letters": 0.1}), strength=0.7)
    elif name == "length":
        leader = LengthShaping(letters, target=3.0, weight=0.4, learn_target=True)
    else:
        architecture, trainable = name.split()[-2:]
        model = RewardModel(classifiers[architecture], batch_size=4)
        leader = RewardModelLeader(model, trainable, strength=1.5, lora=LoRA(2, 3.0) if trainable == "lora" else None)  # type: ignore[arg-type]
        if name.startswith("shaped"):
            leader = Shaped(words, leader)
    leader.calibrate(rollouts(TEXTS, 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in leader.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return leader


def normalise_in_double_precision(leader: LanguageLeader) -> None:
    """Llama and Qwen normalise in single precision whatever the model's own is, which differences would show."""
    for module in leader.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(x: Tensor, module: Any = module) -> Tensor:
                return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

            module.forward = forward


LEADERS = (
    "free", "positive", "softmax", "length", "shaped mixture", "llama head", "llama lora", "llama all", "gpt2 head",
    "gpt2 lora", "gpt2 all", "qwen2 lora", "qwen3 lora", "qwen3 all", "shaped llama lora", "shaped gpt2 head",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADERS)
def test_the_gradient_of_a_score_is_its_finite_difference(name: str, classifiers: dict[str, Path]) -> None:
    leader = make_leader(name, classifiers)
    leader.train()  # dropout stays off
    normalise_in_double_precision(leader)
    batch, weight = rollouts(TEXTS, 2), torch.linspace(-1, 2, len(TEXTS), dtype=torch.float64)
    moving = [p for p in leader.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moving]
    (weight * leader.reward(batch)[:, 0]).sum().backward()
    slope = sum((p.grad * d).sum().item() for p, d in zip(moving, direction, strict=True) if p.grad is not None)

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(moving, direction, strict=True):
                p.add_(step * d)
            value = (weight * leader.reward(batch)[:, 0]).sum().item()
            for p, d in zip(moving, direction, strict=True):
                p.sub_(step * d)
        return value

    h = 1e-4
    central = [(moved(k * h) - moved(-k * h)) / (2 * k * h) for k in (1, 2)]
    assert slope == pytest.approx((4 * central[0] - central[1]) / 3, rel=1e-7)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("name", ["softmax", "length", "llama lora", "gpt2 all", "shaped llama lora"])
def test_one_chunk_is_eight_chunks(name: str, classifiers: dict[str, Path], folder: Path) -> None:
    leader = make_leader(name, classifiers)
    follower = TiltedFollower(folder, lm.prompt_dataset(), 0.5)
    judged = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(c))] for c in r.steps["completion"]]).double())
    problem = Problem(leader, judged, follower)
    batch = rollouts(TEXTS, 2)
    gradients = []
    for chunks in (1, 8):
        leader.zero_grad()
        PolicyResponse(chunks=chunks).backward(problem, batch)
        gradients.append(torch.cat([p.grad.flatten() for p in problem.parameters if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert gradients[0].norm() > 1e-3


def test_gradient_checkpointing_changes_memory_only(classifiers: dict[str, Path]) -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        leader = RewardModelLeader(
            RewardModel(classifiers["gpt2"]), "all", gradient_checkpointing=checkpointing
        ).train()
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = leader.reward(rollouts(TEXTS, 2)).sum()
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in leader.parameters() if p.grad is not None]))
        saved.append(sum(kept))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    assert saved[1] < saved[0] / 4


# ---- weights of a mixture ----


def test_softmax_weights_start_where_told_and_share_a_fixed_sum() -> None:
    terms = {"words": words, "letters": letters, "basename": lm.length_reward}
    mixture = RewardMixture(terms, {"words": 0.4, "letters": 0.1, "basename": 0.2}, constraint="softmax")
    assert mixture.weights() == pytest.approx({"words": 0.4, "letters": 0.1, "basename": 0.2})
    alone = RewardMixture(terms, {"words": 0.7}, constraint="softmax")
    assert alone.weights() == pytest.approx({"words": 0.7 / 1.02, "letters": 0.007 / 1.02, "basename": 0.007 / 1.02})
    with torch.no_grad():
        alone.logits.copy_(torch.tensor([3.0, -40.0, 5.0]))
    before = alone.effective_weight().detach()
    alone.project()
    assert alone.logits.max() == 0 and alone.logits.min().item() == pytest.approx(torch.log(torch.tensor(0.01)).item())
    assert sum(alone.weights().values()) == pytest.approx(0.7)
    assert before[0] / before[2] == pytest.approx((alone.effective_weight()[0] / alone.effective_weight()[2]).item())


@pytest.mark.parametrize("constraint", ["free", "positive", "softmax"])
def test_weights_stay_within_budget_and_constraint(constraint: str) -> None:
    generator = torch.Generator().manual_seed(0)
    terms = {"words": words, "letters": letters, "basename": lm.length_reward}  # the last is a copy of the first
    mixture = RewardMixture(terms, {"words": 0.8}, budget=0.8, constraint=constraint)  # type: ignore[arg-type]
    batch = rollouts(TEXTS, 2)
    mixture.calibrate(batch)
    features = mixture.features(batch.steps["prompt"], TEXTS)
    within = features - torch.stack([features[batch.contexts == g].mean(0) for g in range(2)])[batch.contexts]
    for _ in range(50):
        with torch.no_grad():
            for p in mixture.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        mixture.project()
        weight = mixture.effective_weight().detach()
        assert ((within @ weight).pow(2).sum() / 8).sqrt() <= 0.8 * (1 + 1e-9)
        assert constraint == "free" or (weight >= 0).all()
        assert constraint != "softmax" or weight.sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("weights", "constraint", "message"),
    [
        ({"words": -0.1}, "positive", "expected no negative weight under the constraint 'positive'"),
        ({"words": 0.5, "letters": -0.1}, "softmax", "expected no negative weight under the constraint 'softmax'"),
        ({}, "softmax", "a softmax shares a positive sum among the terms, got all zero"),
        ({"words": 0.8, "letters": 0.8}, "softmax", "their sum 1.6 exceeds the budget 1"),
        ({"words": 0.5}, "sofmax", "constraint: expected 'free' or 'positive' or 'softmax', got 'sofmax'"),
        ({"words": float("nan")}, "free", r"weights\['words'\]: expected a finite number, got nan"),
    ],
)
def test_starts_refused(weights: dict[str, float], constraint: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RewardMixture({"words": words, "letters": letters}, weights, constraint=constraint)


def test_calibration_needs_two_completions_of_a_prompt_that_differ(classifiers: dict[str, Path]) -> None:
    alone, same = rollouts(["a", "b"], 2), rollouts(["a", "a"], 1)
    with pytest.raises(InputError, match="expected at least two completions of some prompt, got 2 completions of 2"):
        RewardMixture({"words": words}).calibrate(alone)
    with pytest.raises(InputError, match="cannot be standardised, since it gives all completions of a prompt the same"):
        RewardModelLeader(RewardModel(classifiers["llama"])).calibrate(same)
    with pytest.raises(InputError, match="frozen: cannot be standardised"):
        LengthShaping(words, target=3.0).calibrate(same)


# ---- adapters ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapters_budget_is_on_the_weights_that_it_changes(architecture: str, classifiers: dict[str, Path]) -> None:
    reference = RewardModel(classifiers[architecture]).model.state_dict()
    leader = RewardModelLeader(RewardModel(classifiers[architecture]), "lora", budget=0.05, lora=LoRA(3, 5.0))
    assert leader.change() == 0
    adapter = leader.adapter
    assert adapter is not None
    names = {name.split(".")[0] for name in adapter.layers} | {n for n, p in leader.network.named_parameters()
                                                              if p.requires_grad and "lora" not in n}  # fmt: skip
    assert "score" not in names and len(names) == 1
    with torch.no_grad():
        for up in adapter.ups().values():
            up.normal_(std=0.3, generator=torch.Generator().manual_seed(up.numel()))
    for _ in range(2):  # before and after the projection, measured on the merged matrices themselves
        changed = start = 0.0
        for name, layer in adapter.layers.items():
            start += reference[f"{name}.weight"].pow(2).sum().item()
            changed += layer.get_delta_weight("default").pow(2).sum().item()  # type: ignore[operator]
        assert leader.change() == pytest.approx((changed / start) ** 0.5, rel=1e-9)
        leader.project()
    assert leader.change() == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lm_head",), "a reward model has no lm_head"),
        (("q_proj", "score"), "'score' is the score head, a single row.*use trainable='head'"),
        (("q_prj",), "has no layer 'q_prj'; did you mean .*'q_proj'"),
        (("norm",), "'model.norm' is no linear layer"),
        ((), "expected at least one name"),
    ],
)
def test_adapters_refused(targets: tuple[str, ...], message: str, classifiers: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=message):
        RewardModelLeader(RewardModel(classifiers["llama"]), "lora", lora=LoRA(target_modules=targets))


def test_leaders_of_reward_models_refused(classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers["llama"])
    with pytest.raises(InputError, match="lora: belongs to trainable='lora', got trainable='head'"):
        RewardModelLeader(model, "head", lora=LoRA())
    with pytest.raises(InputError, match="gradient_checkpointing: saves nothing with trainable='head'"):
        RewardModelLeader(model, "head", gradient_checkpointing=True)
    for settings, message in (
        ({"rank": 0}, "rank: expected a whole number >= 1"),
        ({"alpha": 0.0}, "alpha: expected a finite number > 0"),
    ):
        with pytest.raises(InputError, match=message):
            LoRA(**settings)
    RewardModelLeader(model, "lora")
    with pytest.raises(InputError, match="holds an adapter already"):
        RewardModelLeader(model, "lora")


# ---- shaping ----


@pytest.mark.parametrize("trainable", ["head", "lora"])
def test_a_correction_starts_at_zero_and_keeps_its_spread(trainable: Any, classifiers: dict[str, Path]) -> None:
    batch = rollouts(TEXTS, 2)
    inner = RewardModelLeader(RewardModel(classifiers["llama"]), trainable, budget=100.0)
    shaped = Shaped(words, inner, strength=0.6, budget=0.3)
    shaped.calibrate(batch)
    frozen = shaped.frozen_score(batch.steps["prompt"], TEXTS)
    torch.testing.assert_close(shaped.reward(batch)[:, 0].detach(), frozen, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in inner.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    assert shaped.spread() > 0.3
    shaped.project()
    correction = (shaped.reward(batch)[:, 0] - frozen).detach()
    within = correction - torch.stack([correction[batch.contexts == g].mean() for g in range(2)])[batch.contexts]
    spread = (within.pow(2).sum() / 8).sqrt().item()
    assert 0.2 < spread <= 0.3 * (1 + 1e-5)
    frozen_within = frozen - torch.stack([frozen[batch.contexts == g].mean() for g in range(2)])[batch.contexts]
    assert (frozen_within.pow(2).sum() / 8).sqrt().item() == pytest.approx(0.6)


def test_a_mixture_as_a_correction_keeps_the_smaller_budget() -> None:
    shaped = Shaped(words, RewardMixture({"letters": letters}, {"letters": 0.1}), budget=0.3)
    shaped.calibrate(rollouts(TEXTS, 2))
    with torch.no_grad():
        for p in shaped.parameters():
            p.fill_(5.0)
    shaped.project()
    assert shaped.spread() == pytest.approx(0.3)


def test_corrections_refused(classifiers: dict[str, Path]) -> None:
    model = RewardModel(classifiers["llama"])
    with pytest.raises(InputError, match="the weights of a softmax have a fixed sum"):
        Shaped(words, RewardMixture({"letters": letters}, constraint="softmax"))
    with pytest.raises(InputError, match="the correction trains this very model"):
        Shaped(model, RewardModelLeader(model, "head"))
    with pytest.raises(InputError, match="all of whose parameters move is no small correction"):
        Shaped(words, RewardModelLeader(model, "all"))
    with pytest.raises(InputError, match=r"Shaped\.correction: expected a Correction, got"):
        Shaped(words, letters)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"call calibrate\(rollouts\) first"):
        Shaped(words, RewardModelLeader(RewardModel(classifiers["llama"]), "head")).project()


class Offset(Correction):
    """A user's own correction: the number of letters a, times a learned weight."""

    def __init__(self, weight: float, shrinks: bool = True) -> None:
        super().__init__()
        self.weight, self.shrinks = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64)), shrinks

    def score(self, prompts: Any, completions: Any, **columns: Any) -> Tensor:
        return self.weight * torch.tensor([float(text.count("a")) for text in completions], dtype=torch.float64)

    deviation = score

    def shrink(self, factor: float) -> None:
        if self.shrinks:
            self.weight.mul_(factor)

    def check_correction_of(self, frozen: Any) -> None:
        pass

    def record(self, path: Path) -> dict[str, float]:
        return {"weight": self.weight.item()}

    @classmethod
    def from_record(cls, path: Path, record: Any) -> Offset:
        return cls(record["weight"])


def test_a_users_own_correction_keeps_the_budget_and_is_saved(tmp_path: Path) -> None:
    batch = rollouts(TEXTS, 2)
    shaped = Shaped(words, Offset(0.25), budget=0.3)
    shaped.calibrate(batch)
    assert not torch.equal(shaped.reward(batch)[:, 0], shaped.frozen_score(batch.steps["prompt"], TEXTS))
    with torch.no_grad():
        next(shaped.correction.parameters()).fill_(50.0)
    shaped.project()
    assert shaped.spread() == pytest.approx(0.3)
    shaped.save_pretrained(tmp_path)
    again = Shaped.from_pretrained(tmp_path, trust_code=True)
    assert isinstance(again.correction, Offset)
    assert again.reward(batch).tolist() == shaped.reward(batch).tolist()
    assert again.spread() == pytest.approx(0.3)
    stubborn = Shaped(words, Offset(50.0, shrinks=False), budget=0.3)
    stubborn.calibrate(batch)
    with pytest.raises(InputError, match=r"calls of Offset.shrink its spread is still .* above the budget 0.3; shrink"):
        stubborn.project()


def token_rollouts() -> Rollouts:
    ids = [[2] * (1 + (3 * i) % 7) for i in range(len(TEXTS))]
    return Rollouts.bandit(
        contexts=torch.arange(len(TEXTS)) % 2,
        steps={"prompt": ["a b"] * len(TEXTS), "completion": TEXTS, "completion_ids": ids},
    )


def test_length_is_charged_in_deviations_beyond_the_target() -> None:
    batch = token_rollouts()
    leader = LengthShaping(letters, target=4.0, weight=0.5, width=1e-3, strength=0.0, budget=2.0)
    leader.calibrate(batch)
    assert (leader.unit, leader.target) == ("tokens", pytest.approx(4.0))
    lengths = torch.tensor([float(len(ids)) for ids in batch.steps["completion_ids"]], dtype=torch.float64)
    within = lengths - torch.stack([lengths[batch.contexts == g].mean() for g in range(2)])[batch.contexts]
    deviation = (within.pow(2).sum() / 8).sqrt()
    want = -0.5 * (lengths - 4).clamp(min=0) / deviation
    torch.testing.assert_close(leader.reward(batch)[:, 0].detach(), want, rtol=0, atol=1e-3)
    with torch.no_grad():
        leader.weight.fill_(-9.0)
    leader.project()
    assert leader.weight.item() == -2.0
    charge = leader.reward(batch)[:, 0].detach()
    within = charge - torch.stack([charge[batch.contexts == g].mean() for g in range(2)])[batch.contexts]
    assert (within.pow(2).sum() / 8).sqrt() <= 2.0
    with pytest.raises(InputError, match="calibrated on lengths in tokens and got completions without completion_ids"):
        leader.score(["a"], ["b"])


def test_a_learned_target_stays_among_the_lengths_seen() -> None:
    leader = LengthShaping(letters, target=4.0, weight=0.5, learn_target=True)
    leader.calibrate(token_rollouts())
    for value, want in ((99.0, 7.0), (-99.0, 1.0)):
        with torch.no_grad():
            leader.scaled_target.fill_(value)
        leader.project()
        assert leader.target == pytest.approx(want)
    texts = LengthShaping(letters, target=4.0, weight=0.5)
    texts.calibrate(rollouts(TEXTS, 2))
    assert texts.unit == "characters"
    assert not texts.scaled_target.requires_grad
    messages = [[{"role": "assistant", "content": "abcdefgh"}]]
    torch.testing.assert_close(texts.correction_score(["a"], messages), texts.correction_score(["a"], ["abcdefgh"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, "target: expected a (finite|positive) number.*, got 0"),
        ({"target": 3.0, "width": 0.0}, "width: expected a finite number > 0"),
        ({"target": 3.0, "weight": 2.0}, "weight: expected at most the budget 1.0 in size, got 2.0"),
        ({"target": 3.0, "strength": -1.0}, "strength: expected a finite number >= 0, got -1"),
    ],
)
def test_length_limits_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LengthShaping(words, **settings)  # type: ignore[arg-type]


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
    with pytest.raises(InputError, match="group_size: expected a whole number >= 2, got 1"):
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
    with pytest.raises(InputError, match="broken: expected 4 scores, one per completion, got 1"):
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
