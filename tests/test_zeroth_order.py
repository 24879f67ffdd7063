"""ZerothOrder: unbiased for the smoothed objective, and a guest that leaves no trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import HPGD, HPGDConfig, InputError, Problem, Rollouts
from align_cbrl.estimators.zeroth_order import ZerothOrder
from toy_cmdp import leader_value
from toy_cmdp.followers.iterative import SoftQLearning
from toy_cmdp.followers.neural import NeuralSoftQFollower
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.validate import implicit_gradient


def observed(problem: Problem, contexts: Tensor, seed: int = 0) -> Rollouts:
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(seed))


def taken(problem: Problem) -> Tensor:
    (parameter,) = problem.parameters
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    parameter.grad = None
    return gradient


def worst(estimates: list[Tensor], truth: Tensor) -> float:
    sample = torch.stack(estimates)
    return float(((sample.mean(0) - truth) / (sample.std(0) / len(sample) ** 0.5)).abs().max())


@pytest.mark.parametrize("two_sided", [True, False])
def test_it_is_unbiased_for_the_gradient_with_an_exact_value(two_sided: bool) -> None:
    problem = random_cmdp(seed=2)
    rollouts = observed(problem, torch.tensor([0]))
    truth = implicit_gradient(problem)
    estimates = []
    for seed in range(100):
        estimator = ZerothOrder(1e-4, 4, two_sided=two_sided, value=leader_value, seed=seed)
        estimator.backward(problem, rollouts)
        estimates.append(taken(problem))
    assert worst(estimates, truth) < 4
    # and of the variance that the docstring promises, n + 1 for one direction
    variance = torch.stack(estimates).var(0).sum()
    assert float(variance) == pytest.approx(float((len(truth) + 1) / 4 * truth.pow(2).sum()), rel=0.4)


def test_a_wide_radius_estimates_the_smoothed_objective() -> None:
    """Against the gradient averaged over the same Gaussian, which is not that at the centre."""
    problem = random_cmdp(seed=2)
    rollouts = observed(problem, torch.tensor([0]))
    (x,) = problem.parameters
    centre, radius = x.detach().clone(), 0.7
    estimates, smoothed = [], []
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        ZerothOrder(radius, value=leader_value, seed=seed).backward(problem, rollouts)
        estimates.append(taken(problem))
    for _ in range(200):
        with torch.no_grad():
            x.copy_(centre + radius * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        smoothed.append(implicit_gradient(problem))
    ours, other = torch.stack(estimates), torch.stack(smoothed)
    error = ((ours.var(0) + other.var(0)) / 200).sqrt()
    assert float(((ours.mean(0) - other.mean(0)) / error).abs().max()) < 4


@pytest.mark.parametrize("two_sided", [True, False])
def test_it_is_unbiased_from_paths(two_sided: bool) -> None:
    """Common random numbers make the difference of two sampled returns a derivative of the expected one."""
    problem = random_cmdp(seed=2, leader_discount=0.6, discount=0.6)
    estimates = []
    for seed in range(40):
        rollouts = observed(problem, problem.follower.sample_contexts(300, torch.Generator().manual_seed(seed)), seed)
        ZerothOrder(0.1, 2, two_sided=two_sided, seed=seed).backward(problem, rollouts)
        estimates.append(taken(problem))
    exact = []
    for seed in range(120):
        ZerothOrder(0.1, 2, two_sided=two_sided, value=leader_value, seed=seed).backward(problem, rollouts)
        exact.append(taken(problem))
    truth = torch.stack(exact).mean(0)
    error = ((torch.stack(estimates).var(0) / 40) + torch.stack(exact).var(0) / 120).sqrt()
    assert float(((torch.stack(estimates).mean(0) - truth) / error).abs().max()) < 4


def test_common_random_numbers_matter() -> None:
    """The paths of both sides share their uniform numbers: independent ones would be noisier by far."""
    problem = random_cmdp(seed=2, leader_discount=0.6, discount=0.6)
    rollouts = observed(problem, torch.arange(2).repeat(100))
    spread = {}
    for radius in (0.01, 0.1):
        estimates = []
        for seed in range(30):
            ZerothOrder(radius, seed=seed).backward(problem, rollouts)
            estimates.append(taken(problem))
        spread[radius] = float(torch.stack(estimates).var(0).sum())
    # Shared: most paths coincide, so that the variance grows like 1 / radius; independent: like 1 / radius^2.
    assert spread[0.01] / spread[0.1] < 30


@pytest.mark.parametrize("kind", ["exact", "q_learning", "neural"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_it_leaves_no_trace(kind: str, two_sided: bool) -> None:
    problem = random_cmdp(seed=2)
    cmdp = problem.follower.cmdp  # type: ignore[attr-defined]
    if kind == "q_learning":
        problem = dataclasses.replace(problem, follower=SoftQLearning(cmdp, 0.5, 0.9, iterations=5, horizon=5))
    if kind == "neural":
        neural = NeuralSoftQFollower(cmdp, 0.5, 0.9, updates=2, environments=4, horizon=5)
        problem = dataclasses.replace(problem, follower=neural)
    rollouts = observed(problem, torch.tensor([0, 1]))
    (x,) = problem.parameters
    before, state = x.detach().clone(), problem.follower.state_dict()
    x.grad = torch.ones_like(x)
    estimator = ZerothOrder(0.3, 3, two_sided=two_sided)
    metrics = estimator.backward(problem, rollouts)
    assert torch.equal(before, x)
    assert same(state, problem.follower.state_dict())
    assert metrics["responses"] == (6 if two_sided else 4)
    added = taken(problem) - 1
    assert float(added.norm()) == pytest.approx(metrics["gradient_norm"])
    estimator.backward(problem, rollouts)
    assert torch.allclose(taken(problem), added, atol=1e-12)  # it repeats itself


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_the_leader_comes_back_when_an_evaluation_fails() -> None:
    problem = random_cmdp(seed=2)
    rollouts = observed(problem, torch.tensor([0, 1]))
    before = problem.parameters[0].detach().clone()
    calls = []

    def fails(one: Problem) -> Tensor:
        calls.append(one)
        return torch.tensor(float("nan"))

    with pytest.raises(InputError, match="reduce the radius"):
        ZerothOrder(0.3, value=fails).backward(problem, rollouts)
    assert torch.equal(before, problem.parameters[0])


def test_hpgd_climbs_with_it() -> None:
    problem = random_cmdp(seed=2)
    start = leader_value(problem).item()
    optimizer = torch.optim.SGD(problem.parameters, lr=0.3, maximize=True)
    estimator = ZerothOrder(0.01, 4, value=leader_value)
    HPGD(problem, optimizer, estimator, HPGDConfig(steps=20, contexts_per_step=1, progress=False)).run()
    assert leader_value(problem).item() > start


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"radius": 0.0}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"radius": 0.1, "directions": 0}, "directions"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"^ZerothOrder\.{name}: expected"):
        ZerothOrder(**options)
