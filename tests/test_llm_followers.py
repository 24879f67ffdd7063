"""Followers and the estimator on a language model small enough to enumerate."""

from __future__ import annotations

import math
from pathlib import Path

import enumerable_lm as lm
import pytest
import torch
from datasets import Dataset

from align_cbrl import ExpectedUtility, GroupCritic, PolicyResponse, Problem, Rollouts
from align_cbrl.functional import best_response_gap
from align_cbrl.llm import RLOOFollower, TiltedFollower, sample_completions
from align_cbrl.problem import Critic, Critique

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


def test_state_survives_a_new_process(folder: Path, leader: lm.LinearLeader) -> None:
    def fresh() -> RLOOFollower:
        return RLOOFollower(
            folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
            prompts_per_step=2, group_size=4, learning_rate=1e-3,
        )  # fmt: skip

    whole, first, second = fresh(), fresh(), fresh()
    whole.train(leader, 3)
    whole.train(leader, 3)
    first.train(leader, 3)
    second.load_state_dict(first.state_dict())
    second.train(leader, 3)
    for a, b in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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
