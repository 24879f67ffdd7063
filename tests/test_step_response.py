"""The gradient through a trainer's next step, against finite differences of J after it, on an enumerable policy."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import ExpectedUtility, InputError, KLPriced, PolicyResponse, Problem, Rollouts, StepResponse
from align_cbrl.estimators.step_response import Scale, scaled_advantage
from align_cbrl.llm.followers.trainer_response import TrainerPolicy
from align_cbrl.objectives.observations import LogRatio

X = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.6], dtype=torch.float64)
PAIR = 2  # prompts in a batch of the whole
ETA, NUDGE = 1e-6, 1e-4


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[lm.Enumeration, Tensor]:
    """A language model's first token, if it is one of four, and log pi(y | prompt) [P, 4] of two prompts."""
    folder = lm.build(tmp_path_factory.mktemp("model"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    enumeration = lm.Enumeration.random(1)
    enumeration.completions = [[lm.EOS], [2], [3], [4]]
    enumeration.features, enumeration.utility = enumeration.features[:, :4], enumeration.utility[:, :4]
    return enumeration, torch.log_softmax(enumeration.log_probs(model, tokenizer)[:PAIR], 1)


def advantages(rewards: Tensor, scale: Scale) -> Tensor:
    """As trl computes them, written once more: rewards [P, G] of a batch."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    spread = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (spread + 1e-4)


def batches(count: int, prompts: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every batch there can be, but for the order in its groups."""
    groups = list(itertools.combinations_with_replacement(range(count), size))
    return list(itertools.product(groups, repeat=prompts))


def probability(batch: tuple[tuple[int, ...], ...], log_policy: Tensor) -> float:
    """Of drawing it, in any order."""
    total = 1.0
    for prompt, group in enumerate(batch):
        ways = math.factorial(len(group)) / math.prod(math.factorial(n) for n in Counter(group).values())
        total *= ways * math.exp(sum(float(log_policy[prompt, y]) for y in group))
    return total


def expected_advantage(rewards: Tensor, log_policy: Tensor, size: int, scale: Scale) -> Tensor:
    """A(y) [P, N]: what the advantage of y is on average over the rest of its batch; rewards [P, N]."""
    prompts, count = rewards.shape
    found = torch.zeros_like(rewards)
    alone = scale != "batch"  # then a group's advantages are its own business
    for batch in batches(count, 1 if alone else prompts, size):
        for first in range(prompts if alone else 1):
            rows = range(first, first + len(batch))
            drawn = torch.stack([rewards[p, list(group)] for p, group in zip(rows, batch, strict=True)])
            share = probability(batch, log_policy[list(rows)]) / size
            for p, group, advantage in zip(rows, batch, advantages(drawn, scale), strict=True):
                found[p].index_add_(0, torch.tensor(group), share * advantage)
    return found / log_policy.exp()


def value_after_a_step(enumeration: lm.Enumeration, log_policy: Tensor, x: Tensor, size: int, scale: Scale) -> Tensor:
    """J of pi' ~ pi exp(eta A_x)."""
    rewards = (enumeration.features @ x)[:PAIR]
    step = expected_advantage(rewards, log_policy, size, scale)
    after = torch.softmax(log_policy + ETA * step, 1)
    return (after * enumeration.utility[:PAIR]).sum(1).mean()


def rollouts_of(enumeration: lm.Enumeration, batch: Any, **fields: Any) -> Rollouts:
    rows = [(prompt, y) for prompt, group in enumerate(batch) for y in group]
    return Rollouts.bandit(
        contexts=torch.tensor([prompt for prompt, _ in rows]),
        steps={
            "prompt": [lm.PROMPTS[prompt] for prompt, _ in rows],
            "completion": ["" for _ in rows],
            "completion_ids": [enumeration.completions[y] for _, y in rows],
        },
        **fields,
    )


@pytest.mark.parametrize(("scale", "size"), [("group", 3), ("none", 3), ("batch", 2)])
def test_it_is_the_gradient_of_the_objective_after_one_exact_step(
    policy: tuple[lm.Enumeration, Tensor], scale: Scale, size: int
) -> None:
    """Unbiased over every batch that the policy can draw, to 1e-5 of finite differences, for small groups too."""
    enumeration, log_policy = policy
    differences = torch.zeros(5, dtype=torch.float64)
    for k, unit in enumerate(torch.eye(5, dtype=torch.float64)):
        up, down = (value_after_a_step(enumeration, log_policy, X + s * unit, size, scale) for s in (NUDGE, -NUDGE))
        differences[k] = (up - down) / (2 * NUDGE * ETA)

    leader = lm.LinearLeader(enumeration, X)
    problem = Problem(leader, ExpectedUtility(enumeration.judge), TrainerPolicy(1.0))
    estimator, mean = StepResponse(scale=scale), torch.zeros(5, dtype=torch.float64)
    for batch in batches(len(enumeration.completions), PAIR if scale == "batch" else 1, size):
        for first in range(1 if scale == "batch" else PAIR):
            drawn = [()] * first + list(batch)
            share = probability(batch, log_policy[first : first + len(batch)]) * len(batch) / PAIR
            leader.zero_grad()
            estimator.backward(problem, rollouts_of(enumeration, drawn))
            assert leader.x.grad is not None
            mean += share * leader.x.grad
    unbiased = mean * (size - 1) / size  # the sample covariance's factor belongs to eta
    assert differences.norm() > 0.01
    torch.testing.assert_close(unbiased, differences, rtol=1e-5, atol=1e-5 * float(differences.norm()))


def test_the_best_response_would_be_another_gradient(policy: tuple[lm.Enumeration, Tensor]) -> None:
    """The comparison above can fail: group scaling turns the gradient."""
    enumeration, _ = policy
    leader = lm.LinearLeader(enumeration, X)
    problem = Problem(leader, ExpectedUtility(enumeration.judge), TrainerPolicy(1.0))
    gradients = []
    for estimator in (StepResponse(scale="group"), PolicyResponse()):
        leader.zero_grad()
        estimator.backward(problem, rollouts_of(enumeration, [(0, 3, 1, 2), (1, 2, 1, 3)]))
        assert leader.x.grad is not None
        gradients.append(leader.x.grad.clone())
    step, best = (gradient / gradient.norm() for gradient in gradients)
    assert (step - best).norm() > 0.1


def test_without_scaling_it_is_the_best_response_at_temperature_one(policy: tuple[lm.Enumeration, Tensor]) -> None:
    enumeration, _ = policy
    leader = lm.LinearLeader(enumeration, X)
    problem = Problem(leader, ExpectedUtility(enumeration.judge), TrainerPolicy(1.0))
    rollouts = rollouts_of(enumeration, [(0, 3, 1, 2), (1, 2, 1, 3)])
    gradients = []
    for estimator in (StepResponse(scale="none"), PolicyResponse(), StepResponse(scale="group", chunks=1)):
        leader.zero_grad()
        estimator.backward(problem, rollouts)
        assert leader.x.grad is not None
        gradients.append(leader.x.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)
    for chunks in (3, 8):  # pieces that cut groups
        leader.zero_grad()
        StepResponse(scale="group", chunks=chunks).backward(problem, rollouts)
        torch.testing.assert_close(leader.x.grad, gradients[2], rtol=1e-12, atol=1e-15)


def test_a_price_on_divergence_is_part_of_the_credit(policy: tuple[lm.Enumeration, Tensor]) -> None:
    enumeration, log_policy = policy
    leader = lm.LinearLeader(enumeration, X)
    batch = [(0, 3, 1, 2), (1, 2, 1, 3)]
    chosen = torch.stack([log_policy[p, list(group)] for p, group in enumerate(batch)]).flatten()
    prior = torch.full((8,), -2.0, dtype=torch.float64)
    rollouts = rollouts_of(enumeration, batch, log_policy=chosen, log_prior=prior)
    gradients = {}
    for price in (0.0, 0.5):
        leader.zero_grad()
        priced = KLPriced(ExpectedUtility(enumeration.judge), price)
        StepResponse().backward(Problem(leader, priced, TrainerPolicy(1.0)), rollouts)
        assert leader.x.grad is not None
        gradients[price] = leader.x.grad.clone()
    leader.zero_grad()
    ratio = LogRatio()
    own = ExpectedUtility(lambda leader, rollouts: ratio.of(leader, rollouts))
    StepResponse().backward(Problem(leader, own, TrainerPolicy(1.0)), rollouts)
    assert leader.x.grad is not None
    torch.testing.assert_close(gradients[0.0] - 0.5 * leader.x.grad, gradients[0.5], rtol=1e-10, atol=1e-13)


def test_a_group_that_is_rewarded_alike_neither_explodes_nor_is_lost() -> None:
    """trl adds 1e-4 to a deviation of zero: the literal derivative would be 10000 times that of the other groups."""
    reward = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage = scaled_advantage(reward, group, "group")
    assert advantage[:3].tolist() == [0.0, 0.0, 0.0]
    (alike,) = torch.autograd.grad(advantage[0], reward, retain_graph=True)
    (other,) = torch.autograd.grad(advantage[4], reward)
    assert 0.1 < alike[:3].norm() < 10 * other.norm()
    same = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for scale in ("group", "batch", "none"):
        (moved,) = torch.autograd.grad(scaled_advantage(same, torch.zeros(4).long(), scale)[0], same)
        assert torch.isfinite(moved).all()


def test_what_has_no_next_step_is_refused(policy: tuple[lm.Enumeration, Tensor]) -> None:
    enumeration, _ = policy
    problem = Problem(lm.LinearLeader(enumeration, X), ExpectedUtility(enumeration.judge), TrainerPolicy(1.0))
    weighted = rollouts_of(enumeration, [(0, 3, 1)], weight=torch.tensor([0.5, 1.5, 1.0]))
    with pytest.raises(
        InputError, match="StepResponse: expected the trainer's own batch of completions, got importance"
    ):
        StepResponse().backward(problem, weighted)
    two = Rollouts(torch.zeros(2).long(), torch.ones(2, 2, dtype=torch.bool), torch.arange(4).view(2, 2), {})
    with pytest.raises(InputError, match="got paths of 2 steps"):
        StepResponse().backward(problem, two)
    with pytest.raises(InputError, match=r"StepResponse.scale: expected 'group' or 'batch' or 'none', got 'groups'"):
        StepResponse(scale="groups")  # type: ignore[arg-type]
