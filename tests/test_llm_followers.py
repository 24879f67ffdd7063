"""Followers and the estimator on a language model small enough to enumerate."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from datasets import Dataset

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    GroupCritic,
    HPGDConfig,
    InputError,
    PolicyResponse,
    Problem,
    RandomlyTruncated,
    Rollouts,
)
from align_cbrl.estimators.truncated import gradients_after
from align_cbrl.functional import best_response_gap
from align_cbrl.llm import (
    GRPOFollower,
    RLOOFollower,
    Schedule,
    TiltedFollower,
    TrainedFollower,
    sample_completions,
)
from align_cbrl.llm.followers.trl import grpo, observed
from align_cbrl.llm.settings.follower import FollowerSettings, TiltedSettings, TrainedSettings
from align_cbrl.problem import Critic, Critique
from align_cbrl.runs.config import load_config

TEMPERATURE = 2.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture(scope="session")
def enumeration() -> lm.Enumeration:
    return lm.Enumeration.random(1)


@pytest.fixture
def leader(enumeration: lm.Enumeration) -> lm.LinearLeader:
    torch.manual_seed(0)
    return lm.LinearLeader(enumeration, 0.65 * torch.randn(5, dtype=torch.float64))


@pytest.fixture(scope="session")
def trained(folder: Path, enumeration: lm.Enumeration) -> tuple[RLOOFollower, lm.LinearLeader, list[float]]:
    """A follower trained for 300 steps, and its exact KL to the best response before and after."""
    torch.manual_seed(0)
    leader = lm.LinearLeader(enumeration, 0.65 * torch.randn(5, dtype=torch.float64))
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=4, group_size=96, learning_rate=1e-3,
    )  # fmt: skip
    target = exact_best_response(follower, leader)
    distances = [lm.kl(enumeration.log_probs(follower.policy, follower.tokenizer), target)]
    follower.train(leader, 300)
    distances.append(lm.kl(enumeration.log_probs(follower.policy, follower.tokenizer), target))
    return follower, leader, distances


def exact_best_response(follower: RLOOFollower, leader: lm.LinearLeader) -> torch.Tensor:
    prior = leader.enumeration.log_probs(follower.prior, follower.tokenizer)
    return leader.enumeration.best_response(prior, leader.x.detach(), TEMPERATURE)


def exact_hypergradient(log_prior: torch.Tensor, leader: lm.LinearLeader) -> torch.Tensor:
    """d/dx of the mean over prompts of E_{pi*} u, by autograd through the enumerated best response."""
    x = leader.x.detach().clone().requires_grad_(True)
    policy = leader.enumeration.best_response(log_prior, x, TEMPERATURE).exp()
    (policy * leader.enumeration.utility).sum(-1).mean().backward()
    assert x.grad is not None
    return x.grad


def estimates(problem: Problem, batches: list[Rollouts], hypergradient: PolicyResponse) -> torch.Tensor:
    rows = []
    for rollouts in batches:
        problem.leader.zero_grad()
        hypergradient.backward(problem, rollouts)
        rows.append(problem.parameters[0].grad.clone())
    return torch.stack(rows)


def check_within_four_standard_errors(rows: torch.Tensor, exact: torch.Tensor) -> None:
    error = rows.std(0) / math.sqrt(len(rows))
    assert (error < 0.25 * exact.norm()).all(), "too noisy to say anything"
    z = (rows.mean(0) - exact) / error
    assert z.abs().max() < 4, f"deviations in standard errors: {z.tolist()}"


def test_rloo_converges_to_the_enumerated_best_response(trained: tuple) -> None:
    """From 0.4 nats to at most 0.005: guards against upstream changes of the trainer."""
    _, _, (before, after) = trained
    assert before > 0.4
    assert after <= 0.005


def test_enumerated_probabilities_sum_to_one(folder: Path, enumeration: lm.Enumeration) -> None:
    follower = TiltedFollower(folder, lm.prompt_dataset(), TEMPERATURE)
    total = enumeration.log_probs(follower._load(), follower.tokenizer).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_observed_log_probabilities_match_enumeration(trained: tuple) -> None:
    follower, leader, _ = trained
    before = leader.enumeration.log_probs(follower.policy, follower.tokenizer)
    prior = leader.enumeration.log_probs(follower.prior, follower.tokenizer)
    follower.train(leader, 1)
    seen = follower._trainer.observed
    index = leader.enumeration.index(seen.columns["prompt"], seen.token_ids)
    torch.testing.assert_close(seen.log_policy, before[index], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.log_prior, prior[index], rtol=0, atol=1e-4)


@pytest.fixture(scope="session")
def rloo_batches(trained: tuple) -> list[Rollouts]:
    follower, _, _ = trained
    generator = torch.Generator().manual_seed(7)
    return [follower.rollout(torch.arange(4), 64, generator) for _ in range(60)]


def test_policy_response_on_rloo_samples_is_the_exact_covariance(trained: tuple, rloo_batches: list[Rollouts]) -> None:
    """Against the covariance under the follower's own enumerated policy: what the samples can know."""
    follower, leader, _ = trained
    problem = Problem(leader, ExpectedUtility(leader.enumeration.judge), follower)
    policy = leader.enumeration.log_probs(follower.policy, follower.tokenizer).exp()
    u, features = leader.enumeration.utility, leader.enumeration.features
    centred = u - (policy * u).sum(-1, keepdim=True)
    exact = ((policy * centred)[..., None] * features).sum(1).mean(0) / TEMPERATURE
    rows = estimates(problem, rloo_batches, PolicyResponse())
    check_within_four_standard_errors(rows, exact)
    # and the follower is so close to its best response that this is the hypergradient, to a few per cent
    prior = leader.enumeration.log_probs(follower.prior, follower.tokenizer)
    true = exact_hypergradient(prior, leader)
    assert (exact - true).norm() / true.norm() < 0.15


def test_policy_response_on_tilted_samples_is_the_exact_hypergradient(
    folder: Path, leader: lm.LinearLeader, enumeration: lm.Enumeration
) -> None:
    follower = TiltedFollower(folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH)
    follower.respond(leader, torch.arange(4))
    generator = torch.Generator().manual_seed(11)
    batches = [follower.rollout(torch.arange(4), 1024, generator) for _ in range(30)]
    problem = Problem(leader, ExpectedUtility(enumeration.judge), follower)
    exact = exact_hypergradient(enumeration.log_probs(follower._load(), follower.tokenizer), leader)
    check_within_four_standard_errors(estimates(problem, batches, PolicyResponse()), exact)


class PlainGroupMean(Critic):
    """Broken on purpose: centres on the group mean without the factor G / (G - 1)."""

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: torch.Tensor) -> Critique:
        size = int((rollouts.group[:, 0] == rollouts.group[0, 0]).sum())
        advantage = GroupCritic().evaluate(problem, rollouts, credit).advantage
        return Critique(advantage * (size - 1) / size)


def test_a_group_mean_without_its_factor_is_caught(trained: tuple) -> None:
    """With G = 2 the estimate shrinks by half: the check above must see it."""
    follower, leader, _ = trained
    generator = torch.Generator().manual_seed(13)
    contexts = torch.arange(4)
    pairs = [follower.rollout(contexts.repeat(128), 2, generator) for _ in range(40)]
    pairs = [regroup(rollouts, 2) for rollouts in pairs]
    problem = Problem(leader, ExpectedUtility(leader.enumeration.judge), follower)
    policy = leader.enumeration.log_probs(follower.policy, follower.tokenizer).exp()
    u, features = leader.enumeration.utility, leader.enumeration.features
    centred = u - (policy * u).sum(-1, keepdim=True)
    exact = ((policy * centred)[..., None] * features).sum(1).mean(0) / TEMPERATURE
    check_within_four_standard_errors(estimates(problem, pairs, PolicyResponse()), exact)
    with pytest.raises(AssertionError, match="standard errors"):
        check_within_four_standard_errors(estimates(problem, pairs, PolicyResponse(PlainGroupMean())), exact)


def regroup(rollouts: Rollouts, size: int) -> Rollouts:
    """The same paths, in groups of `size` consecutive ones."""
    group = (torch.arange(rollouts.size) // size)[:, None]
    return Rollouts(rollouts.contexts, rollouts.mask, group, rollouts.steps, rollouts.log_policy, rollouts.log_prior)


def test_the_estimated_gap_never_exceeds_the_true_divergence(folder: Path, leader: lm.LinearLeader) -> None:
    """Averaged over 20 policies between the reference and far beyond the best response."""
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=4, group_size=16, learning_rate=2e-3,
    )  # fmt: skip
    target = exact_best_response(follower, leader)
    excess, errors, divergences = [], [], []
    for k in range(20):
        policy = follower._load()  # a copy of the trainer's model would answer for the original: trl patches forward
        torch.manual_seed(k)
        with torch.no_grad():  # perturbed references: from near to far
            for parameter in policy.parameters():
                parameter.add_(0.01 * k * torch.randn_like(parameter))
        seen = sample_completions(
            policy, follower.prior, follower.tokenizer, follower.prompts, [0, 1, 2, 3] * 16, 16, lm.LENGTH, seed=k
        )
        rollouts = regroup(seen.rollouts(), 16)
        reward = leader.reward(rollouts)[:, 0].detach()
        gaps = best_response_gap(reward / TEMPERATURE - (seen.log_policy - seen.log_prior), rollouts.group[:, 0])
        true = lm.kl(leader.enumeration.log_probs(policy, follower.tokenizer), target)
        excess.append(gaps.mean().item() - true)
        divergences.append(true)
        errors.append(gaps.std().item() / math.sqrt(len(gaps)))
    mean = sum(excess) / len(excess)
    error = math.sqrt(sum(e * e for e in errors)) / len(errors)
    assert mean <= error
    assert max(divergences) > 1.0 > min(divergences)  # they are twenty different policies
    assert min(excess) < -0.01  # far from the best response a lower bound from 16 samples is not tight


def test_leader_steps_inside_the_training_loop_see_a_fifth(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4, interval=5, warmup=3,
    )  # fmt: skip
    seen: list[Rollouts] = []

    def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        seen.append(rollouts)
        return len(seen) < 3

    follower.follow(leader, on_rollouts, start=0, steps=10, contexts_per_step=2, group_size=4, seed=3)
    assert [r.size for r in seen] == [8, 8, 8]
    assert follower.completions_seen == (3 + 3 * 5) * 8  # it stopped when it was told to
    assert len(set(seen[0].group[:, 0].tolist())) == 2


def test_leader_steps_between_best_responses(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4, interval=2, inside=False,
    )  # fmt: skip
    seen: list[Rollouts] = []
    follower.follow(
        leader, lambda rollouts, metrics: not seen.append(rollouts),
        start=0, steps=2, contexts_per_step=3, group_size=5, seed=3,
    )  # fmt: skip
    assert [r.size for r in seen] == [15, 15]
    assert follower.completions_seen == 4 * 8


@pytest.mark.parametrize("decay_after", [None, 2])
def test_state_survives_a_new_process(folder: Path, leader: lm.LinearLeader, decay_after: int | None) -> None:
    def fresh() -> RLOOFollower:
        return RLOOFollower(
            folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
            prompts_per_step=2, group_size=4, learning_rate=1e-3, decay_after=decay_after,
        )  # fmt: skip

    whole, first, second = fresh(), fresh(), fresh()
    whole.train(leader, 3)
    whole.train(leader, 3)
    first.train(leader, 3)
    second.load_state_dict(first.state_dict())
    second.train(leader, 3)
    for a, b in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_learning_rate_that_decays_does_so_over_all_calls(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
        prompts_per_step=2, group_size=4, learning_rate=1e-3, decay_after=2,
    )  # fmt: skip
    rates = []

    def on_step(step: int) -> bool:
        assert follower._trainer is not None
        rates.append(follower._trainer.lr_scheduler.get_last_lr()[0])  # of the next step
        return True

    follower.train(leader, 3, on_step)
    follower.train(leader, 2, on_step)
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 * 2 / 4, 1e-3 * 2 / 5, 1e-3 * 2 / 6])
    follower.reset()
    follower.train(leader, 1, on_step)
    assert rates[-1] == pytest.approx(1e-3)


def test_sampling_leaves_the_global_generator_alone(folder: Path) -> None:
    follower = TiltedFollower(folder, lm.prompt_dataset(), TEMPERATURE)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample_completions(follower._load(), None, follower.tokenizer, lm.prompt_dataset(), [0, 1], 3, 2, seed=1)
    torch.testing.assert_close(torch.rand(1), expected)


def test_extra_columns_reach_the_rollouts(folder: Path, leader: lm.LinearLeader) -> None:
    prompts = Dataset.from_dict({"prompt": lm.PROMPTS, "answer": [1, 2, 3, 4]})
    follower = TiltedFollower(folder, prompts, TEMPERATURE, max_completion_length=2)
    follower.respond(leader, torch.tensor([2]))
    rollouts = follower.rollout(torch.tensor([2]), 4, torch.Generator().manual_seed(0))
    assert rollouts.steps["answer"] == [3, 3, 3, 3]


# ---- GRPO ----


def distance_after(
    kind: type[TrainedFollower], folder: Path, leader: lm.LinearLeader, steps: int, **options: Any
) -> float:
    """Exact KL to the best response after training."""
    follower = kind(folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH, **options)
    target = exact_best_response(follower, leader)
    follower.train(leader, steps)
    return lm.kl(leader.enumeration.log_probs(follower.policy, follower.tokenizer), target)


def test_grpo_with_the_kl_in_the_reward_moves_as_rloo_does(folder: Path, leader: lm.LinearLeader) -> None:
    """Same seeds, hence the same prompts and random numbers: only the baseline differs. The start is at 0.44 nats."""
    options = {"prompts_per_step": 4, "group_size": 32, "learning_rate": 2e-3}
    rloo, grpo = (distance_after(kind, folder, leader, 25, **options) for kind in (RLOOFollower, GRPOFollower))
    assert rloo < 0.25
    assert grpo == pytest.approx(rloo, rel=0.1)


@pytest.mark.slow
def test_grpo_with_the_kl_in_the_reward_converges_to_the_enumerated_best_response(
    folder: Path, leader: lm.LinearLeader
) -> None:
    """As the test of RLOO above. GRPO's own KL would end at 0.02 nats."""
    options = {"prompts_per_step": 4, "group_size": 96, "learning_rate": 1e-3}
    assert distance_after(GRPOFollower, folder, leader, 300, **options) <= 0.005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "group"}, r"scale_rewards='group': acts as lambda times the spread.*0\.11 nats"),
        ({"loss_type": "dapo"}, "loss_type='dapo': only 'dr_grpo'"),
        ({"num_iterations": 2}, r"num_iterations=2: GRPO's ratios are a token's.*0\.002 nats"),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, "divides by the completion's length"),
        ({"top_entropy_quantile": 0.2}, "leaves tokens untrained"),
        ({"entropy_coef": 0.1}, "an entropy bonus is another objective"),
        ({"mask_truncated_completions": True}, r"worse than no training \(0\.97 nats\)"),
        ({"temperature": 0.7}, "samples are not the policy's"),
        ({"generation_kwargs": {"suppress_tokens": [3]}}, r"suppress_tokens left 1\.94 nats"),
        ({"lr_scheduler_type": "linear"}, "only 'constant' is the same after a resume"),
        ({"disable_dropout": False}, "disable_dropout=False"),
        ({"beta": 0.1}, "settings: beta follows from the follower's own arguments; set its temperature"),
        ({"no_such": 1}, "GRPO settings: .*no_such"),
    ],
)
def test_grpo_settings_with_another_fixed_point_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        GRPOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, group_size=2, settings=settings)


def test_grpos_own_kl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"beta=0\.1: GRPO's own KL.* \(0\.019 to 0\.025 nats"):
        grpo.boltzmann_config(0.1, output_dir=str(tmp_path), beta=0.1, num_generations=2)


# ---- the temperature may be the leader's ----


class LearnedTemperature(lm.LinearLeader):
    """x, and a temperature beside it."""

    def __init__(self, enumeration: lm.Enumeration, x: torch.Tensor, temperature: float) -> None:
        super().__init__(enumeration, x)
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(temperature)))

    def follower_temperature(self) -> torch.Tensor:
        return self.log_temperature.exp()


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
def test_the_leaders_temperature_is_the_price_of_a_nat(
    folder: Path, enumeration: lm.Enumeration, kind: type[TrainedFollower]
) -> None:
    """A follower made for 2 and told 0.7 by the leader is one made for 0.7; read anew at every step."""
    x = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.6], dtype=torch.float64)
    plain, told = lm.LinearLeader(enumeration, x), LearnedTemperature(enumeration, x, 0.7)
    options = {"max_completion_length": lm.LENGTH, "prompts_per_step": 2, "group_size": 4, "learning_rate": 1e-3}
    made, follower = (kind(folder, lm.prompt_dataset(), t, **options) for t in (0.7, 2.0))
    made.train(plain, 3)
    follower.train(told, 3)
    for a, b in zip(made.policy.parameters(), follower.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert follower.newest_gap() == pytest.approx(made.newest_gap(), rel=1e-5)
    with torch.no_grad():
        told.log_temperature.fill_(math.log(5.0))
    made.train(plain, 2)
    follower.train(told, 2)
    apart = max(
        (a - b).abs().max().item() for a, b in zip(made.policy.parameters(), follower.policy.parameters(), strict=True)
    )
    assert apart > 1e-4


def test_a_tilted_follower_takes_the_leaders_temperature(folder: Path, enumeration: lm.Enumeration) -> None:
    x = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.6], dtype=torch.float64)
    weights = []
    for temperature, leader in ((0.7, lm.LinearLeader(enumeration, x)), (2.0, LearnedTemperature(enumeration, x, 0.7))):
        follower = TiltedFollower(folder, lm.prompt_dataset(), temperature, max_completion_length=lm.LENGTH)
        follower.respond(leader, torch.arange(4))
        weights.append(follower.rollout(torch.arange(4), 8, torch.Generator().manual_seed(0)).weight)
    torch.testing.assert_close(*weights)


# ---- schedules ----


def test_a_full_best_response_ends_at_the_tolerance(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=4, group_size=64, learning_rate=2e-3,
        schedule=Schedule(interval=5, tolerance=0.1, limit=200),
    )  # fmt: skip
    enumeration, target = leader.enumeration, exact_best_response(follower, leader)
    rows: list[dict[str, float]] = []

    def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        close = lm.kl(enumeration.log_probs(follower.policy, follower.tokenizer), target)
        rows.append({**metrics, "kl": close})
        return True

    follower.follow(leader, on_rollouts, start=0, steps=2, contexts_per_step=4, group_size=64, seed=0)
    first, second = rows
    assert first["response_steps"] > 5 and first["response_steps"] % 5 == 0
    assert first["kl"] < 0.15
    assert second["response_steps"] == 5  # nothing moved: one look is enough


def test_randomly_truncated_training_telescopes(folder: Path, leader: lm.LinearLeader) -> None:
    """RT-Q: the expectation over the level is the gradient after 2^(K+1) optimizer steps, exactly."""
    schedule = Schedule(interval=0, inside=False, levels=2)
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4, learning_rate=2e-3, schedule=schedule,
    )  # fmt: skip
    problem = Problem(leader, ExpectedUtility(leader.enumeration.judge), follower)
    estimator = schedule.around(PolicyResponse(), group_size=8)
    assert isinstance(estimator, RandomlyTruncated)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.tensor([0, 2, 3])
    follower.respond(leader, contexts)
    rollouts = follower.rollout(contexts, 1, generator)

    def gradient(call: Callable[[], Any]) -> torch.Tensor:
        leader.zero_grad()
        call()
        assert leader.x.grad is not None
        return leader.x.grad.clone()

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    levels = [
        gradient(lambda k=k: estimator.backward_at(k, problem, rollouts, fresh())) for k in (1, 2)
    ]  # fmt: skip
    expectation = sum(p * g for p, g in zip(estimator.probabilities.tolist(), levels, strict=True))
    (_, (longest, _)) = gradients_after([2, 8], PolicyResponse(), problem, contexts, fresh(), group_size=8)
    torch.testing.assert_close(expectation, longest[0], rtol=1e-9, atol=1e-12)
    (once,) = gradients_after([8], PolicyResponse(), problem, contexts, fresh(), group_size=8)
    torch.testing.assert_close(once[0][0], longest[0], rtol=1e-5, atol=1e-8)  # 2 steps and 6 more are 8
    assert (levels[0] - levels[1]).norm() > 1e-4

    # The follower is left untrained, and what the training cost is counted.
    assert follower.steps == 0 and follower.completions_seen == (4 + 8 + 8 + 8) * 8
    start = follower.rollout(contexts, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(start.log_policy, start.log_prior, rtol=0, atol=1e-6)


def test_an_estimator_that_trains_cannot_do_so_inside_the_training_loop(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(
        folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4,
    )  # fmt: skip
    problem = Problem(leader, ExpectedUtility(leader.enumeration.judge), follower)
    optimizer = torch.optim.SGD(leader.parameters(), lr=0.1, maximize=True)
    config = HPGDConfig(steps=1, contexts_per_step=2, group_size=4, progress=False)
    with pytest.raises(InputError, match=r"asked to train from inside its own training loop.*inside=False"):
        HPGD(problem, optimizer, RandomlyTruncated(PolicyResponse(), 1, group_size=4), config).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval: expected at least 1, got 0"),
        ({"warmup": -1}, "warmup: expected a whole number >= 0, got -1"),
        ({"tolerance": 0.1}, "tolerance=0.1 and limit=None go together"),
        ({"tolerance": -1.0, "limit": 10}, "tolerance: expected a finite number > 0, got -1.0"),
        ({"tolerance": 0.1, "limit": 3}, "expected at least interval=5 steps, got 3"),
        ({"levels": 2}, "expected K >= 1 with inside=False"),
    ],
)
def test_schedules_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**options)
    with pytest.raises(InputError, match="expected either a Schedule or interval, got both"):
        RLOOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, schedule=Schedule(), interval=3)


# ---- vLLM, through trl's own option ----


class FakeEngine:
    """Stands where trl's vLLM engine would: always answers `a b`, and counts the weights it was given."""

    def __init__(self) -> None:
        self.syncs = 0

    def sync_weights(self) -> None:
        self.syncs += 1

    def generate(self, prompts: list[Any], **options: Any) -> tuple[Any, ...]:
        completions = [[2 + i % 3, 3] for i in range(len(prompts))]
        return prompts, completions, [[[-9.0]] * 2 for _ in prompts], None


@pytest.mark.parametrize("kind", [RLOOFollower, GRPOFollower])
def test_with_another_engine_the_log_probabilities_are_the_trainers_own(
    folder: Path, leader: lm.LinearLeader, kind: type[TrainedFollower]
) -> None:
    follower = kind(
        folder, lm.prompt_dataset(), TEMPERATURE,
        max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4, learning_rate=1e-3,
    )  # fmt: skip
    trainer, engine = follower._built(), FakeEngine()
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine, -1
    trainer.vllm_importance_sampling_correction = False
    follower.train(leader, 1)
    before = leader.enumeration.log_probs(follower.policy, follower.tokenizer)
    follower.train(leader, 1)  # trl counts from 0 again, and would take the engine's weights for up to date
    assert engine.syncs == 2
    seen = follower.newest
    index = leader.enumeration.index(seen.steps["prompt"], seen.steps["completion_ids"])
    torch.testing.assert_close(seen.log_policy[:, 0], before[index], rtol=0, atol=1e-4)


def test_vllm_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (RLOOFollower, GRPOFollower):
        with pytest.raises(InputError, match=r"use_vllm=True: vllm is not installed; pip install 'trl\[vllm\]'"):
            kind(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, settings={"use_vllm": True})
    monkeypatch.setattr(observed.importlib.util, "find_spec", lambda name: object())
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
    config = GRPOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, settings=settings)._config
    assert config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_importance_sampling_correction
    with pytest.raises(InputError, match="vllm_importance_sampling_correction=True"):
        settings["vllm_importance_sampling_correction"] = True
        GRPOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, settings=settings)


# ---- bad input ----


def test_models_that_are_not_a_base_model_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "checkpoint-50")
    (checkpoint / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a checkpoint of a run in training.*become the reference policy; pass"):
        RLOOFollower(checkpoint, lm.prompt_dataset(), 1.0, prompts_per_step=2)
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "vocab_size": 6}))
    with pytest.raises(InputError, match="token ids up to 7, and the model has 6 tokens; they do not belong together"):
        TiltedFollower(wrong, lm.prompt_dataset(), 1.0)


def test_another_trl_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed.importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(InputError, match=r"trl 1\.17\.0 is installed; expected at least 1\.16 and below 1\.17"):
        RLOOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2)


def test_an_untrained_policy_that_says_nothing_is_refused(folder: Path, leader: lm.LinearLeader) -> None:
    follower = RLOOFollower(folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, group_size=2, max_completion_length=2)
    head = follower.policy.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(lm.VOCABULARY)))
    with torch.no_grad():
        head.bias[lm.EOS] = 100.0
    with pytest.raises(InputError, match="all 4 completions of the untrained policy are empty"):
        follower.train(leader, 1)


def test_batches_that_cannot_be_cut_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="got 6 completions in 4 pieces"):
        RLOOFollower(
            folder, lm.prompt_dataset(), 1.0, prompts_per_step=2, group_size=3,
            settings={"gradient_accumulation_steps": 4},
        )  # fmt: skip


def test_one_forward_pass_less_changes_nothing(folder: Path, leader: lm.LinearLeader) -> None:
    """The graph of the scoring pass is kept for the loss; with it and without, the same steps."""
    options = {"max_completion_length": lm.LENGTH, "prompts_per_step": 2, "group_size": 4, "learning_rate": 1e-3}
    for kind in (RLOOFollower, GRPOFollower):
        short, long = (kind(folder, lm.prompt_dataset(), TEMPERATURE, **options) for _ in range(2))
        long._built()._one_forward_is_enough = lambda: False
        short.train(leader, 4)
        long.train(leader, 4)
        for a, b in zip(short.policy.parameters(), long.policy.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_settings_build_followers(folder: Path) -> None:
    prompts = lm.prompt_dataset()
    schedule = Schedule(interval=2, warmup=3)
    follower = TrainedSettings(
        trainer="grpo", temperature=0.5, prompts_per_step=2, group_size=4, lora=2, schedule=schedule,
        decay_after=9, settings={"adam_beta2": 0.99},
    ).build(folder, prompts, seed=7)  # fmt: skip
    assert isinstance(follower, GRPOFollower)
    assert (follower.schedule.warmup, follower.seed, follower.peft_config.r) == (3, 7, 2)
    assert follower.decay_after == 9
    assert follower._config.adam_beta2 == 0.99
    assert isinstance(TrainedSettings(prompts_per_step=2).build(folder, prompts, 0), RLOOFollower)
    assert isinstance(TiltedSettings().build(folder, prompts, 0), TiltedFollower)
    for wrong, message in (
        (["trainer=ppo"], "trainer: got the string 'ppo'; did you mean 'grpo'"),
        (["group_size=1"], "group_size: expected a whole number >= 2, got 1"),
        (["temperature=0"], "temperature: expected a finite number > 0, got 0.0"),
        (["trainer=tilted", "vllm=true"], "vllm: unknown key"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(FollowerSettings, None, wrong)
    with pytest.raises(InputError, match="vllm is not installed"):
        TrainedSettings(prompts_per_step=2, vllm=True).build(folder, prompts, 0)
