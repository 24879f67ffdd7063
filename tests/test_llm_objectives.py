"""Objectives of few prompts and few completions: biases by enumeration, memory, groups, labelled pairs, settings."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import (
    HPGD,
    CrossFitted,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    FunctionOfMeans,
    HPGDConfig,
    InputError,
    Leader,
    MeanVariance,
    PolicyResponse,
    PreferenceData,
    PreferenceLikelihood,
    Problem,
    Regularised,
    Rollouts,
    WorstContext,
    WorstGroup,
)
from align_cbrl.objectives import OverContexts, harmonic_mean

UTILITY = torch.tensor([[0.0, 1.0], [0.3, 2.0]], dtype=torch.float64)  # [C, A]
TOPICS = ["law", "art"]


class Rewards(Leader):
    """A reward for each answer of each prompt."""

    def __init__(self, rewards: Tensor) -> None:
        super().__init__()
        self.rewards = torch.nn.Parameter(rewards.clone())

    def reward(self, rollouts: Rollouts) -> Tensor:
        return self.rewards[rollouts.contexts, rollouts.steps["answer"]][:, None]


def utility(leader: Any, rollouts: Rollouts) -> Tensor:
    return UTILITY[rollouts.contexts, rollouts.steps["answer"]][:, None]


SCORE = ExpectedUtility(utility)


def batch(answers: list[list[int]], contexts: list[int] | None = None) -> Rollouts:
    """The answers drawn in each context."""
    contexts = list(range(len(answers))) if contexts is None else contexts
    rows = [c for c, drawn in zip(contexts, answers, strict=True) for _ in drawn]
    drawn = [a for of_context in answers for a in of_context]
    steps = {
        "answer": torch.tensor(drawn),
        "prompt": [f"prompt {c}" for c in rows],
        "completion": [f"answer {a}" for a in drawn],
        "topic": [TOPICS[c] for c in rows],
    }
    return Rollouts.bandit(contexts=torch.tensor(rows), steps=steps)


def expectation(objective: Any, group: int, rewards: Tensor) -> Tensor:
    """The exact expectation of the estimated hypergradient, over everything that two groups may consist of."""
    leader = Rewards(rewards)
    follower = type("Fixed", (), {"temperature": 1.0, "discount": 0.0})()
    problem = Problem(leader, objective, follower)
    policy = torch.softmax(rewards, -1)
    total = torch.zeros_like(rewards)
    for ones in itertools.product(range(group + 1), repeat=2):  # how many of each group's answers are answer 1
        chance = 1.0
        for c, k in enumerate(ones):
            p = policy[c, 1].item()
            chance *= math.comb(group, k) * p**k * (1 - p) ** (group - k)
        leader.rewards.grad = None
        PolicyResponse().backward(problem, batch([[1] * k + [0] * (group - k) for k in ones]))
        total += chance * leader.rewards.grad
    return total


def exact(risk: OverContexts, rewards: Tensor) -> Tensor:
    leaf = rewards.clone().requires_grad_(True)
    values = (torch.softmax(leaf, -1) * UTILITY).sum(-1)
    worth = risk.aggregate_groups(values, torch.tensor([0.5, 0.5], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(worth, leaf)
    return gradient


RISKS = {
    "mean_variance": MeanVariance(SCORE, 0.6),
    "entropic": EntropicRisk(SCORE, 2.0),
    "soft_worst": WorstContext(SCORE, 0.4),
    "worst_group": WorstGroup(SCORE, "topic", 0.4),
    "cvar": CVaR(SCORE, 0.75),
}


def bias(objective: Any, risk: OverContexts, group: int, rewards: Tensor) -> float:
    """The relative error of the estimator's expectation."""
    wanted = exact(risk, rewards)
    return float((expectation(objective, group, rewards) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("group", [3, 6])
def test_cross_fitted_mean_variance_is_unbiased_by_enumeration(group: int) -> None:
    rewards = torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64)
    risk = MeanVariance(SCORE, 0.6)
    assert bias(CrossFitted(risk), risk, group, rewards) < 1e-12
    assert bias(risk, risk, group, rewards) > 0.05  # what the covariance of weight and weighed costs


@pytest.mark.parametrize("name", ["entropic", "soft_worst", "worst_group"])
def test_cross_fitting_lowers_the_bias_where_contexts_are_close(name: str) -> None:
    risk = RISKS[name]
    rewards = torch.tensor([[0.0, 0.5], [0.2, -1.2]], dtype=torch.float64)  # values 0.62 and 0.64
    plain, fitted = bias(risk, risk, 4, rewards), bias(CrossFitted(risk), risk, 4, rewards)
    assert fitted < 0.2 * plain, (plain, fitted)


def test_the_bias_of_a_function_of_means_falls_with_the_batch() -> None:
    """The slopes come from the completions that they multiply: a bias of one over the batch, by enumeration."""
    rewards = torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64)
    first = torch.tensor([[0.2, 1.0], [0.3, 0.9]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0.4], [0.8, 0.5]], dtype=torch.float64)

    def of(table: Tensor) -> ExpectedUtility:
        return ExpectedUtility(lambda leader, r: table[r.contexts, r.steps["answer"]][:, None])

    leaf = rewards.clone().requires_grad_(True)
    policy = torch.softmax(leaf, -1)
    a, b = ((policy * table).sum(-1).mean() for table in (first, second))
    (wanted,) = torch.autograd.grad(2 / (1 / a + 1 / b), leaf)
    errors = []
    for group in (4, 8, 16):
        found = expectation(FunctionOfMeans(harmonic_mean, [of(first), of(second)]), group, rewards)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.25 and errors[1] < 0.55 * errors[0] and errors[2] < 0.55 * errors[1], errors


def gradient(objective: Any, rollouts: Rollouts, chunks: int = 1) -> Tensor:
    leader = Rewards(torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64))
    follower = type("Fixed", (), {"temperature": 1.0, "discount": 0.0})()
    PolicyResponse(chunks=chunks).backward(Problem(leader, objective, follower), rollouts)
    assert leader.rewards.grad is not None
    return leader.rewards.grad


def test_a_group_that_the_batch_lacks_is_remembered() -> None:
    law, art = batch([[0, 0, 1, 0]], contexts=[0]), batch([[1, 1, 0, 1]], contexts=[1])
    objective = CrossFitted(WorstGroup(SCORE, "topic"), memory=2)
    assert gradient(objective, art).norm() > 0  # all that is known is art, so it is the worst
    objective.update(lambda: objective.observe(Rewards(torch.zeros(2, 2)), art))
    assert objective.evaluate(None, law).value.item() == 0.25  # type: ignore[arg-type]
    objective.update(lambda: objective.observe(Rewards(torch.zeros(2, 2)), law))
    assert gradient(objective, art).norm() == 0  # law is known to be worse, and is not here
    there = gradient(objective, law)
    assert there.norm() > 0
    again = CrossFitted(WorstGroup(SCORE, "topic"), memory=2)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(gradient(again, law), there)
    objective.update(lambda: objective.observe(Rewards(torch.zeros(2, 2)), law))  # memory has forgotten art
    assert objective.state_dict()["values"] == [0.25, 0.25]


def test_a_group_counts_by_one_over_its_share() -> None:
    """Over batches that hold one prompt each, by their shares, the worst group's gradient is that of its value."""
    objective = CrossFitted(WorstGroup(SCORE, "topic"), memory=4)
    for contexts in ([0], [1], [1], [1]):  # law is a quarter of nature's draws
        seen = batch([[0, 1, 1, 0]], contexts=contexts)
        objective.evaluate(None, seen)  # type: ignore[arg-type]
        objective.update(lambda seen=seen: objective.observe(Rewards(torch.zeros(2, 2)), seen))  # type: ignore[misc]
    objective.memory = 0  # what is known stays as it is
    law = batch([[0, 1, 1, 0]], contexts=[0])
    plain = gradient(SCORE, law)
    share = 2 / 5  # of law, in memory and batch
    torch.testing.assert_close(gradient(objective, law), plain / share)


@pytest.mark.parametrize("name", RISKS)
def test_chunks_change_nothing(name: str) -> None:
    whole = batch([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]])
    chosen, rejected = batch([[1, 1], [0]]), batch([[0, 0], [1]])
    pairs = PreferenceData(chosen, rejected)
    for objective in (CrossFitted(RISKS[name]), Regularised(CrossFitted(RISKS[name]), pairs, 0.3)):
        torch.testing.assert_close(gradient(objective, whole, chunks=3), gradient(objective, whole))


def test_labelled_pairs_add_their_own_gradient() -> None:
    whole = batch([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]])
    chosen, rejected = batch([[1, 1], [0]]), batch([[0, 0], [1]])
    pairs = PreferenceData(chosen, rejected)
    leader = Rewards(torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64))
    pairs.likelihood(leader).backward()
    r = leader.rewards.detach()
    differences = torch.stack([r[0, 1] - r[0, 0], r[0, 1] - r[0, 0], r[1, 0] - r[1, 1]])
    by_hand = torch.nn.functional.logsigmoid(differences).mean()
    assert pairs.likelihood(leader).item() == pytest.approx(by_hand.item())
    own = leader.rewards.grad
    torch.testing.assert_close(gradient(pairs, whole), own)
    for objective in (SCORE, PreferenceLikelihood(utility)):
        together = gradient(Regularised(objective, pairs, 0.3), whole)
        torch.testing.assert_close(together, gradient(objective, whole) + 0.3 * own)


def test_pairs_are_drawn_anew_and_again_after_a_restart() -> None:
    chosen, rejected = batch([[1] * 30, []]), batch([[0] * 20 + [1] * 10, []])
    leader = Rewards(torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64))
    pairs = PreferenceData(chosen, rejected, pairs_per_step=3, seed=1)
    seen = [pairs.update(lambda: pairs.observe(leader, chosen))["pair_likelihood"] for _ in range(12)]
    assert len(set(seen)) > 1
    again = PreferenceData(chosen, rejected, pairs_per_step=3, seed=1)
    again.load_state_dict({"step": 5})
    assert [again.update(lambda: again.observe(leader, chosen))["pair_likelihood"] for _ in range(7)] == seen[5:]


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    class Follower:
        temperature, discount = 1.0, 0.0

        def follow(self, leader: Any, on_rollouts: Any, *, start: int, steps: int, **rest: Any) -> None:
            for step in range(start, steps):
                generator = torch.Generator().manual_seed(step)
                policy = torch.softmax(leader.rewards.detach(), -1)
                answers = torch.multinomial(policy, 12, replacement=True, generator=generator).tolist()
                if not on_rollouts(batch(answers[: 1 + step % 2]), {}):
                    return

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    def run(steps: int, out: Path) -> Tensor:
        leader = Rewards(torch.tensor([[0.0, 0.5], [0.2, -0.5]], dtype=torch.float64))
        objective = CrossFitted(WorstGroup(SCORE, "topic", 0.3), memory=3)
        optimizer = torch.optim.SGD(leader.parameters(), lr=0.5, maximize=True)
        config = HPGDConfig(steps=steps, progress=False)
        HPGD(Problem(leader, objective, Follower()), optimizer, config=config, out=out).run(resume=True)  # type: ignore[arg-type]
        return leader.rewards.detach()

    whole = run(9, tmp_path / "whole")
    run(4, tmp_path / "parts")
    assert torch.equal(run(9, tmp_path / "parts"), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossFitted(SCORE), "expected a risk over contexts .* got ExpectedUtility"),  # type: ignore[arg-type]
        (lambda: CrossFitted(CVaR(SCORE, 0.5), memory=-1), "memory: expected a whole number >= 0, got -1"),
        (lambda: CrossFitted(CVaR(SCORE, 0.5)).evaluate(None, batch([[0, 1], [1, 1, 0]])), "at least 3 completions"),
        (lambda: WorstGroup(SCORE, "subject").evaluate(None, batch([[0], [1]])), "a column 'subject'.*'topic'"),
        (lambda: WorstGroup(SCORE, "topic").aggregate(torch.ones(2), torch.ones(2)), "no exact value on a table"),
        (lambda: PreferenceData(batch([[0], [1]]), batch([[0], []])), "as many rejected as chosen"),
        (lambda: PreferenceData(batch([[0], [1]]), batch([[0], [1]]), 3), "between 1 and the 2 pairs"),
        (lambda: Regularised(SCORE, PreferenceData(batch([[0], [1]]), batch([[0], [1]])), 0.0), "Regularised.weight"),
        (lambda: PreferenceLikelihood(), "either score or preference"),
        (lambda: PreferenceLikelihood(utility, partners=3), "an even number >= 2, got 3"),
        (
            lambda: PreferenceLikelihood(preference=lambda r, i, j: 2.0 * torch.ones(len(i)))
            .evaluate(Rewards(torch.zeros(2, 2)), batch([[0, 1, 1], [0, 1, 1]])),
            r"probabilities in \[0, 1\]",
        ),
        (
            lambda: PreferenceLikelihood(utility, partners=4)
            .evaluate(Rewards(torch.zeros(2, 2)), batch([[0, 1, 1], [0, 1, 1]])),
            "at most 2, the others of a group of 3, got 4",
        ),
    ],
)  # fmt: skip
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
