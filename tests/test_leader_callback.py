"""A leader in trl's own trainers: it learns, resumes bit for bit, works with adapters; mistakes in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import tiny_models
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from align_cbrl import (
    ExpectedUtility,
    HPGDConfig,
    InputError,
    KLPriced,
    Natural,
    PolicyResponse,
    Problem,
    StepResponse,
)
from align_cbrl.errors import CheckpointError
from align_cbrl.llm import Judge, LeaderCallback, LearnedBeta, LengthShaping, RewardMixture
from align_cbrl.llm.conversations import answer_text
from align_cbrl.llm.followers.trainer_batch import trainer_rollouts
from align_cbrl.llm.followers.trainer_response import TrainerPolicy, response_of
from align_cbrl.recipes import trl_script


def good(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Words of the first half of the alphabet: what the judge likes."""
    return [float(sum(word in "abc" for word in answer_text(text).split())) for text in completions]


def hacked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Words of the second half."""
    return [10.0 * sum(word in "def" for word in answer_text(text).split()) for text in completions]


def judge(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    return [one - other / 10 for one, other in
            zip(good(prompts, completions), hacked(prompts, completions), strict=True)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


def mixture() -> RewardMixture:
    return RewardMixture({"good": good, "hacked": hacked}, {"hacked": 0.6})


def config(out: Path, kind: type[Any] = GRPOConfig, **settings: Any) -> Any:
    """trl's defaults but for the sizes, and what a CPU needs."""
    sizes: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 16, "num_generations": 4,
        "max_completion_length": lm.LENGTH, "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    return kind(**{**sizes, **settings})


Train = Callable[..., tuple[RewardMixture, LeaderCallback, Any]]


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Train:
    """Train a script; the leader, its callback and the trainer afterwards."""

    def run(
        kind: type[Any] = GRPOConfig,
        *,
        resume: bool = False,
        every: int = 2,
        price: float | None = None,
        callback: dict[str, Any] | None = None,
        script: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[RewardMixture, LeaderCallback, Any]:
        leader = mixture()
        objective: Any = ExpectedUtility(Judge(judge))
        objective = objective if price is None else KLPriced(objective, price)
        watching = LeaderCallback(leader, objective, every=every, **(callback or {}))
        trainer = {GRPOConfig: GRPOTrainer, RLOOConfig: RLOOTrainer}[kind](
            **{
                "model": str(folder),
                "reward_funcs": leader.reward_function(),
                "args": config(tmp_path / "out", kind, **settings),
                "train_dataset": lm.prompt_dataset(),
                "callbacks": [watching],
                **(script or {}),
            }
        )
        trainer.train(resume_from_checkpoint=True if resume else None)
        return leader, watching, trainer

    return run


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_grpo_as_it_comes_has_its_weights_moved_through_its_next_step(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """beta 0, scale_rewards "group", loss "dapo", clipping."""
    leader, callback, trainer = train()
    assert (
        "LeaderCallback: every 2 optimizer steps, through the trainer's next step (scale_rewards='group'), since beta "
        "is 0; the certificate is not applicable\n"
    ) in capsys.readouterr().out
    first, last = mixture().weights(), leader.weights()
    assert last["good"] > first["good"] + 0.05 and last["hacked"] < first["hacked"] - 0.05
    assert [row["step"] for row in callback.history] == [1, 2, 3]
    assert not any("gap" in row or "kl" in row for row in callback.history)
    assert logged(trainer, "leader/objective")[-1] == callback.history[-2]["objective"]  # one optimizer step later
    assert logged(trainer, "leader/weight of good")[0] > 0.05
    assert 0 < logged(trainer, "leader/judge_calls")[-1] <= 16 * 3
    assert not logged(trainer, "leader/gap")


def test_rloo_as_it_comes_is_at_its_best_response_and_certified(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    leader, callback, trainer = train(RLOOConfig, num_generations=4, price=0.01)
    assert "through the best response at temperature 0.05 (beta); its distance is the metric leader/gap" in (
        capsys.readouterr().out
    )
    assert leader.weights()["good"] > 0.05
    assert all(row["gap"] >= 0 and row["kl"] > -1 for row in callback.history)
    assert len(logged(trainer, "leader/gap")) == 4  # of the optimizer steps after the first leader step


def test_around_a_best_response_steps_may_be_natural(train: Train) -> None:
    natural = {"config": HPGDConfig(natural=Natural(nats=0.5), progress=False)}
    leader, callback, _ = train(RLOOConfig, num_generations=4, price=0.01, callback=natural)
    assert leader.weights()["good"] > 0.005
    assert all(0 < row["step_nats"] <= 0.501 for row in callback.history)
    refused(train, "HPGDConfig.natural=.*best response only", callback=natural)


def test_what_the_policy_is_trained_on_stays_as_it_was_until_the_leader_moves(train: Train) -> None:
    """Watching, and looking at log-probabilities, changes no bit of the script's own training."""
    leader, _, trainer = train(every=100)
    _, _, priced = train(every=100, price=0.1)
    _, _, alone = train(script={"callbacks": [], "reward_funcs": mixture().reward_function()})
    assert leader.weights() == mixture().weights()
    assert torch.equal(weights(trainer.model), weights(alone.model))
    assert torch.equal(weights(priced.model), weights(alone.model))
    _, _, moved = train(every=2)
    assert not torch.equal(weights(moved.model), weights(alone.model))


def test_log_probabilities_are_those_of_the_policy_that_sampled_and_of_the_start(train: Train, folder: Path) -> None:
    seen: list[Any] = []

    class Looking(KLPriced):
        def observe(self, leader: Any, rollouts: Any) -> Any:
            seen.append(rollouts)
            return super().observe(leader, rollouts)

    def before(model: Any) -> Any:
        copies.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    copies: list[Any] = []

    class Copy(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            before(model)

    leader = mixture()
    watching = LeaderCallback(leader, Looking(ExpectedUtility(Judge(judge)), 0.1), every=3)
    train(
        script={"callbacks": [watching, Copy()], "reward_funcs": leader.reward_function()},
        max_steps=3,
        learning_rate=5e-4,
    )
    rollouts, near = seen[0], {"rtol": 1e-5, "atol": 1e-5}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    enumeration = lm.Enumeration.random(1)
    rows = enumeration.index(rollouts.steps["prompt"], rollouts.steps["completion_ids"])
    torch.testing.assert_close(rollouts.log_prior[:, 0], enumeration.log_probs(model, tokenizer)[rows], **near)
    model.load_state_dict(copies[-1])
    torch.testing.assert_close(rollouts.log_policy[:, 0], enumeration.log_probs(model, tokenizer)[rows], **near)
    assert (rollouts.log_policy - rollouts.log_prior).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "price", "natural"), [(GRPOConfig, 0.1, None), (RLOOConfig, None, None), (RLOOConfig, 0.01, Natural())]
)
def test_a_resumed_script_repeats_the_uninterrupted_one_to_the_last_bit(
    train: Train, kind: type[Any], price: float | None, natural: Natural | None
) -> None:
    rows = Dataset.from_dict({"prompt": lm.PROMPTS * 8})  # trl's own order of prompts resumes within an epoch only
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "script": {"train_dataset": rows}}
    saved |= {} if natural is None else {"callback": {"config": HPGDConfig(natural=natural)}}
    one, whole, trainer = train(kind, price=price, **saved)
    policy = weights(trainer.model)
    for step in Path(trainer.args.output_dir).glob("checkpoint-6"):
        step.rename(step.with_name("aside"))
    two, again, resumed = train(kind, price=price, resume=True, **saved)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.scale, two.scale)
    assert torch.equal(policy, weights(resumed.model))
    # The judge of the resumed script, which has no cache on the disk, is asked again about what it knew before.
    same = [name for name in whole.history[-1] if not name.endswith(("seconds", "share", "judge_calls"))]
    assert [[row[name] for name in same] for row in whole.history] == [
        [row[name] for name in same] for row in again.history
    ]
    other = {**saved, "callback": {"config": HPGDConfig(natural=natural, max_gradient_norm=0.5)}}
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        train(kind, price=price, resume=True, **other)
    for state in Path(resumed.args.output_dir).glob("checkpoint-*/leader"):
        state.rename(state.with_name("lost"))
    with pytest.raises(
        InputError, match=r"resume: expected the leader's state in .*leader, since the trainer resumes at"
    ):
        train(kind, price=price, resume=True, **saved)


def test_with_an_adapter_the_reference_is_the_policy_without_it(train: Train) -> None:
    leader, callback, trainer = train(
        price=0.1, script={"peft_config": LoraConfig(r=4, target_modules="all-linear")}, learning_rate=1e-2
    )
    assert leader.weights()["good"] > 0.05
    assert callback._reference._frozen.model_with_adapter is trainer.model


@pytest.mark.parametrize("price", [None, 0.1])
def test_conversations(tmp_path: Path, train: Train, price: float | None) -> None:
    model = tiny_models.build(tmp_path / "chat", "llama", chat=True, attention_dropout=0.0)
    rows = Dataset.from_dict({"prompt": tiny_models.prompts(chat=True)})
    leader, callback, _ = train(price=price, script={"model": str(model), "train_dataset": rows})
    assert leader.weights()["good"] > 0.05 and len(callback.history) == 3


def test_the_advantage_is_the_trainers_own(train: Train) -> None:
    """What trl logs as the advantage of each completion is what the leader differentiates."""
    pytest.importorskip("pandas")
    from align_cbrl.estimators.step_response import scaled_advantage

    for scale in ("group", "batch", "none"):
        _, _, trainer = train(every=100, scale_rewards=scale, log_completions=True, max_steps=1, beta=0.04)
        (file,) = sorted(Path(trainer.args.output_dir).glob("completions/completions_00001.parquet"))
        table = load_dataset("parquet", data_files=str(file), split="train", cache_dir=trainer.args.output_dir)
        reward = torch.tensor(table["RewardMixture"][:], dtype=torch.float64)
        group = torch.arange(len(reward)) // 4
        expected = torch.tensor(table["advantage"][:], dtype=torch.float64)
        torch.testing.assert_close(scaled_advantage(reward, group, scale), expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 0.1
        file.unlink()


@pytest.mark.parametrize(
    ("kind", "settings", "estimator", "words"),
    [
        (GRPOConfig, {}, StepResponse(scale="group"), "since beta is 0"),
        (GRPOConfig, {"beta": 0.04}, StepResponse(scale="group"), "since scale_rewards is 'group'"),
        (GRPOConfig, {"beta": 0.04, "scale_rewards": "none"}, PolicyResponse(), "temperature 0.04"),
        (GRPOConfig, {"beta": 0.04, "scale_rewards": False}, PolicyResponse(), "temperature 0.04"),
        (GRPOConfig, {"scale_rewards": "batch"}, StepResponse(scale="batch"), "since beta is 0"),
        (GRPOConfig, {"beta": 1, "scale_rewards": "none", "top_p": 0.9}, StepResponse(scale="none"), "top_p is 0.9"),
        (
            GRPOConfig,
            {"beta": 1, "scale_rewards": "none", "entropy_coef": 0.1},
            StepResponse(scale="none"),
            "entropy_coef is 0.1",
        ),
        (RLOOConfig, {}, PolicyResponse(), "temperature 0.05"),
        (RLOOConfig, {"beta": 0.0}, StepResponse(scale="none"), "next step, since beta is 0"),
        (RLOOConfig, {"temperature": 0.7}, StepResponse(scale="none"), "since temperature is 0.7"),
        (RLOOConfig, {"sync_ref_model": True}, StepResponse(scale="none"), "since sync_ref_model is True"),
    ],
)
def test_the_response_is_read_off_the_settings(
    tmp_path: Path, kind: type[Any], settings: dict[str, Any], estimator: PolicyResponse, words: str
) -> None:
    found = response_of(config(tmp_path, kind, **settings))
    assert type(found.estimator) is type(estimator) and words in found.words
    assert getattr(found.estimator, "scale", None) == getattr(estimator, "scale", None)
    assert found.temperature == (settings.get("beta", 0.05) if found.is_best else 1.0)


def refused(train: Train, words: str, *arguments: Any, **settings: Any) -> None:
    with pytest.raises(InputError, match=words):
        train(*arguments, **settings)


def test_mistakes_are_told_in_words(train: Train, folder: Path) -> None:
    leader = mixture()
    objective = ExpectedUtility(Judge(judge))
    another = {"reward_funcs": mixture().reward_function()}
    refused(train, "reward_funcs: the RewardMixture was asked about no completion", script=another)
    both = {"reward_funcs": [leader.reward_function(), good]}
    watching = LeaderCallback(leader, objective, every=2)
    refused(train, r"leader's reward function alone, got \['good'\]", script={**both, "callbacks": [watching]})
    refused(train, "reward_weights=.*expected None, since the leader weighs", reward_weights=[0.5])
    refused(
        train, r"every=2: expected at least 3, .* 3 optimizer steps on a batch \(num_iterations=3", num_iterations=3
    )
    refused(train, "every=1: expected at least 2, .*steps_per_generation=2", every=1, steps_per_generation=2)
    refused(train, "num_generations=2: expected at least 3 with scale_rewards='group'", num_generations=2)
    refused(train, "multi_objective_aggregation='normalize_then_sum': expected", multi_objective_aggregation=
            "normalize_then_sum")  # fmt: skip
    refused(train, "normalize_advantages=True: expected False", RLOOConfig, normalize_advantages=True)
    refused(train, "reward_clip_range=.*expected None", RLOOConfig, reward_clip_range=(-1.0, 1.0))
    refused(
        train,
        "KLPriced: expected completions that are samples of the policy itself, but top_k is 3",
        price=0.1,
        top_k=3,
    )
    refused(train, "HPGDConfig.replays=2: expected none", callback={"config": HPGDConfig(replays=2)})
    refused(train, "reference 'no such model'", price=0.1, callback={"reference": "no such model"})
    with pytest.raises(InputError, match=r"LeaderCallback.every: expected a whole number >= 1, got 0"):
        LeaderCallback(leader, objective, every=0)
    still = mixture()
    still.weight.requires_grad_(False)
    with pytest.raises(InputError, match="RewardMixture has no trainable parameters"):
        LeaderCallback(still, objective)
    with pytest.raises(InputError, match="optimizer: expected one for a LengthShaping"):
        LeaderCallback(LengthShaping(good, 2.0), objective)
    with pytest.raises(
        InputError, match="LearnedBeta sets the follower's temperature, and a trl trainer keeps its beta"
    ):
        LeaderCallback(LearnedBeta(mixture(), 0.5, low=0.1, high=1.0), objective)
    with pytest.raises(InputError, match=r"expected a trl.GRPOConfig or a trl.RLOOConfig, got object"):
        response_of(object())
    for call in ("sample_contexts", "respond", "rollout"):
        with pytest.raises(InputError, match="the trainer owns the loop"):
            getattr(TrainerPolicy(1.0), call)(*[None] * (3 if call == "rollout" else 2))


def test_a_batch_that_several_generations_are_made_for_shows_the_newest(train: Train) -> None:
    """Two generations an optimizer step; and a batch that lasts for two optimizer steps."""
    sizes: list[int] = []

    def counting(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        sizes.append(len(completions))
        return judge(prompts, completions)

    for settings, expected in (
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 16),
        ({"steps_per_generation": 2}, 32),
    ):
        leader, sizes[:] = mixture(), []
        objective = ExpectedUtility(lambda leader, rollouts: torch.tensor(counting(**{
            "prompts": rollouts.steps["prompt"], "completions": rollouts.steps["completion"]}))[:, None])  # fmt: skip
        watching = LeaderCallback(leader, objective, every=2)
        rows = Dataset.from_dict({"prompt": lm.PROMPTS * 4})
        script = {"callbacks": [watching], "reward_funcs": leader.reward_function(), "train_dataset": rows}
        train(script=script, max_steps=4, **settings)
        assert sizes == [expected] * 2 and len(watching.history) == 2


def test_evaluation_is_not_what_the_leader_steps_on(train: Train) -> None:
    seen: set[str] = set()

    def looking(leader: Any, rollouts: Any) -> torch.Tensor:
        seen.update(rollouts.steps["prompt"])
        return torch.tensor(judge(rollouts.steps["prompt"], rollouts.steps["completion"]))[:, None]

    leader = mixture()
    watching = LeaderCallback(leader, ExpectedUtility(looking))
    others = Dataset.from_dict({"prompt": ["a c", "d f", "b d e", "c f"]})
    script = {"callbacks": [watching], "reward_funcs": leader.reward_function(), "eval_dataset": others}
    _, _, trainer = train(script=script, eval_strategy="steps", eval_steps=1, max_steps=3)
    assert seen == set(lm.PROMPTS)
    assert any("eval_reward" in row for row in trainer.state.log_history)


def test_a_script_of_several_rewards_becomes_a_mixture(tmp_path: Path) -> None:
    made = RewardMixture.of([good, hacked, lambda completions: [0.0] * len(completions), good], [1.0, 0.5, 0.2, 0.1])
    assert made.weights() == {"good": 1.0, "hacked": 0.5, "reward": 0.2, "good_": 0.1}
    rows = {"prompts": ["p"] * 2, "completions": ["a b", "d"]}
    expected = [1.1 * a + 0.5 * b for a, b in zip(good(**rows), hacked(**rows), strict=True)]
    assert made.reward_function()(**rows) == pytest.approx(expected)
    assert RewardMixture.of([good]).weights() == {"good": 1.0}
    with pytest.raises(InputError, match="reward_weights: expected one for each of 1 reward functions, not all zero"):
        RewardMixture.of([good], [0.0])
    with pytest.raises(
        InputError, match="reward_funcs: expected functions, folders or hub ids, got a Linear in memory"
    ):
        RewardMixture.of([torch.nn.Linear(1, 1)])  # type: ignore[list-item]


def test_rescaling_leaves_the_reward_as_it_is() -> None:
    leader = RewardMixture({"good": good, "hacked": hacked, "none": lambda completions: [0.0] * len(completions)},
                           {"good": 0.3, "hacked": 0.4}, budget=2.0)  # fmt: skip
    texts = ["a b", "d", "a d", "b", "c c", "e f"]
    rollouts = trainer_rollouts(["p"] * 3 + ["q"] * 3, texts, {}, 3)
    before = leader.reward(rollouts)[:, 0]
    assert not leader.is_rescaled
    leader.rescale(rollouts)
    after = leader.reward(rollouts)[:, 0]
    torch.testing.assert_close(before - before.mean(), (after - after.mean()))
    assert leader.is_rescaled and leader.spread() == pytest.approx(0.5)  # the norm that the weights had
    assert leader.raw_weights() == pytest.approx({"good": 0.3, "hacked": 0.4, "none": 0.0})
    within = leader.features(**{"prompts": rollouts.steps["prompt"], "completions": texts})
    spread = (within - within.view(2, 3, 3).mean(1).repeat_interleave(3, 0)).square().sum(0) / 4
    assert spread[0] == pytest.approx(float(spread[1]))
    Problem(leader, ExpectedUtility(Judge(judge)), TrainerPolicy(1.0))


@pytest.mark.filterwarnings("ignore:the leader's gradient is zero")  # this policy has none of the desk's words
def test_the_recipe_trains_a_script_without_and_with_a_leader(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "2", "--every", "1", "--batch", "8", "--learning-rate", "1e-4"]
    trl_script.main(["--scripts", "grpo", "--seeds", "0", "--model", str(folder), *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert [row["led"] for row in map(json.loads, (line for line in lines if line.startswith("{")))] == [False, True]
    assert lines[-1].startswith("grpo: with a leader less without, ")
