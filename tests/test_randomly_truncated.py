"""RT-Q: the bias of plain truncation at level K + 1, at a cost linear in K."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rebuilt import report_is_rebuilt
from torch import Tensor

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    HPGDConfig,
    InputError,
    Leader,
    PolicyResponse,
    Problem,
    Rollouts,
    ZerothOrder,
)
from align_cbrl.cli import main
from align_cbrl.estimators.random_numbers import generator_for
from align_cbrl.estimators.truncated import IterativeFollower, RandomlyTruncated, Truncated, gradients_after
from toy_cmdp.followers.iterative import (
    NaturalPolicyGradient,
    SoftQLearning,
    SoftValueIteration,
    TabularIterativeFollower,
)
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.referee.frozen_policy import PresentCritic, PresentPolicyResponse


def stopped(
    kind: type[TabularIterativeFollower] = SoftValueIteration, discount: float = 0.9, horizon: int = 30
) -> Problem:
    known = random_cmdp(seed=1, discount=discount, temperature=0.3)
    cmdp = known.follower.cmdp  # type: ignore[attr-defined]
    return dataclasses.replace(known, follower=kind(cmdp, 0.3, discount, iterations=0, horizon=horizon))


def observed(problem: Problem, contexts: Tensor, seed: int = 0) -> Rollouts:
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(seed))


def taken(problem: Problem) -> Tensor:
    (parameter,) = problem.parameters
    assert parameter.grad is not None
    gradient = parameter.grad.clone()
    parameter.grad = None
    return gradient


@pytest.mark.parametrize("kind", [SoftValueIteration, NaturalPolicyGradient, SoftQLearning])
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("sampled", [False, True], ids=["expected", "sampled"])
def test_the_expectation_over_levels_is_plain_truncation(
    kind: type[TabularIterativeFollower], levels: int, sampled: bool
) -> None:
    """By enumeration of k, for one and the same random numbers: the sum telescopes to the last digit."""
    problem = stopped(kind)
    estimator = PolicyResponse(PresentCritic()) if sampled else PresentPolicyResponse()
    rollouts = observed(problem, torch.tensor([0, 1, 1]))
    rtq = RandomlyTruncated(estimator, levels)
    total, objective = torch.zeros_like(problem.parameters[0]), 0.0
    for level, probability in enumerate(rtq.probabilities.tolist(), start=1):
        metrics = rtq.backward_at(level, problem, rollouts, torch.Generator().manual_seed(7))
        total += probability * taken(problem)
        objective += probability * metrics["objective"]
        assert metrics["lower_iterations"] == 2 ** (level + 1)
    ((last,), last_metrics) = gradients_after(
        [2 ** (levels + 1)], estimator, problem, rollouts.contexts, torch.Generator().manual_seed(7)
    )[0]
    assert torch.allclose(total, last, rtol=1e-10, atol=1e-12)
    assert objective == pytest.approx(last_metrics["objective"], rel=1e-10)


@pytest.mark.parametrize("kind", [SoftValueIteration, SoftQLearning])
def test_drawn_estimates_average_to_plain_truncation(kind: type[TabularIterativeFollower]) -> None:
    problem = stopped(kind)
    rollouts = observed(problem, torch.tensor([0]))
    random, plain, costs = [], [], []
    for seed in range(120):
        metrics = RandomlyTruncated(PresentPolicyResponse(), 3, seed).backward(problem, rollouts)
        random.append(taken(problem))
        costs.append(metrics["lower_iterations"])
        Truncated(PresentPolicyResponse(), 16, seed).backward(problem, rollouts)
        plain.append(taken(problem))
    difference = torch.stack(random) - torch.stack(plain)
    z = difference.mean(0) / (difference.std(0) / 120**0.5)
    assert float(z.abs().max()) < 4
    cost = torch.tensor(costs)
    expected = RandomlyTruncated(PresentPolicyResponse(), 3).expected_iterations
    assert abs(float(cost.mean()) - expected) < 4 * float(cost.std()) / 120**0.5


def test_the_cost_is_linear_in_the_levels() -> None:
    costs = [RandomlyTruncated(PresentPolicyResponse(), k) for k in range(1, 20)]
    for k, rtq in enumerate(costs, start=1):
        by_sum = sum(p * 2 ** (level + 1) for level, p in enumerate(rtq.probabilities.tolist(), start=1))
        assert rtq.expected_iterations == pytest.approx(by_sum)
        assert 2 * k < rtq.expected_iterations <= 2 * k + 2


def test_the_change_between_levels_of_q_learning_halves() -> None:
    """E |g_{k+1} - g_k|^2 = O(2^-k), the premise of a variance that is linear in K."""
    problem = stopped(SoftQLearning, discount=0.6)
    rollouts = observed(problem, torch.tensor([0, 1]))
    stops = [2**level for level in range(4, 10)]
    squares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        levels = gradients_after(stops, PresentPolicyResponse(), problem, rollouts.contexts, generator)
        found = torch.stack([gradients[0] for gradients, _ in levels])
        squares.append(found.diff(dim=0).pow(2).sum(-1))
    change = torch.stack(squares)  # [40, 5]
    ratio = float(change.mean(0)[-1] / change.mean(0)[0])
    error = float((change.std(0) / change.mean(0) / 40**0.5).pow(2)[[0, -1]].sum().sqrt())
    assert abs(ratio / 0.5**4 - 1) < 4 * error + 0.5
    assert ratio < 0.5**3


def test_everything_is_left_as_it_was_found() -> None:
    problem = stopped(SoftQLearning)
    follower = problem.follower
    assert isinstance(follower, SoftQLearning)
    follower.iterations = 3
    rollouts = observed(problem, torch.tensor([0, 1]))
    state = follower.state_dict()
    problem.parameters[0].grad = torch.ones_like(problem.parameters[0])
    x = problem.parameters[0].detach().clone()
    metrics = RandomlyTruncated(PresentPolicyResponse(), 3).backward(problem, rollouts)
    added = taken(problem) - 1
    assert float(added.norm()) == pytest.approx(metrics["gradient_norm"])
    assert torch.equal(x, problem.parameters[0])
    after = follower.state_dict()
    assert torch.equal(state["table"], after["table"])
    assert (state["done"], state["responses"]) == (after["done"], after["responses"])
    RandomlyTruncated(PresentPolicyResponse(), 3).backward(problem, rollouts)
    assert torch.allclose(taken(problem), added)  # and it repeats itself


def test_hpgd_takes_it_and_a_resumed_run_repeats_itself(tmp_path: Path) -> None:
    def weights(out: Path, steps: list[int]) -> Tensor:
        for number in steps:
            problem = stopped(SoftQLearning)
            optimizer = torch.optim.SGD(problem.parameters, lr=0.1, maximize=True)
            config = HPGDConfig(steps=number, contexts_per_step=2, group_size=1, checkpoint_every=1, progress=False)
            estimator = RandomlyTruncated(PolicyResponse(PresentCritic()), 2)
            HPGD(problem, optimizer, estimator, config, out).run(resume=True)
        return problem.parameters[0].detach()

    assert torch.equal(weights(tmp_path / "whole", [5]), weights(tmp_path / "parts", [2, 5]))


def test_its_random_numbers_change_with_the_leader_and_the_seed() -> None:
    problem = stopped()
    rollouts = observed(problem, torch.tensor([0, 1]))
    seeds = {generator_for(problem, rollouts, seed).initial_seed() for seed in range(3)}
    again = generator_for(problem, rollouts, 0).initial_seed()
    with torch.no_grad():
        problem.parameters[0][0] += 1e-15
    moved = generator_for(problem, rollouts, 0).initial_seed()
    other = generator_for(problem, observed(problem, torch.tensor([1, 1])), 0).initial_seed()
    assert len({*seeds, moved, other}) == 5
    assert again in seeds


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match=r"^RandomlyTruncated\.max_level"):
        RandomlyTruncated(PresentPolicyResponse(), 0)
    with pytest.raises(InputError, match=r"^Truncated\.iterations"):
        Truncated(PresentPolicyResponse(), 0)
    exact = random_cmdp()
    assert not isinstance(exact.follower, IterativeFollower)
    rollouts = observed(exact, torch.tensor([0]))
    with pytest.raises(InputError, match="IterativeFollower"):
        RandomlyTruncated(PresentPolicyResponse(), 2).backward(exact, rollouts)


def test_the_recipe_runs_and_is_found_again(tmp_path: Path) -> None:
    out = ["--config", "smoke.yaml", "--out", str(tmp_path / "run")]
    assert main(["run", "rtq", *out]) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["levels"] for row in first["rows"]] == [1, 2, 3]
    assert all(abs(row["bias_against_level"]["z"]) < 4 for row in first["rows"] if row["bias_against_level"]["se"] > 0)
    assert main(["run", "rtq", *out, "--resume"]) == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["rows"] == again["rows"]
    assert report_is_rebuilt(tmp_path / "run")


def test_the_convergence_recipe_runs(tmp_path: Path) -> None:
    out = ["--config", "smoke.yaml", "--out", str(tmp_path / "run")]
    assert main(["run", "convergence", *out]) == 0
    assert report_is_rebuilt(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["estimate"] for row in summary["rows"]] == ["4 paths", "exact"]
    assert summary["slopes"]["kl"]["mean"] == pytest.approx(2, abs=0.1)
    for options in (["batches=[4,2]"], ["sweeps=[1]"], ["every=0"], ["learning_rate=0"], ["problems=1"]):
        assert main(["run", "convergence", "--out", str(tmp_path / "bad"), "--set", *options]) == 2
    for options in (["budgets=[0]"], ["max_level=0"], ["draws=1"]):
        assert main(["run", "rtq", "--out", str(tmp_path / "bad"), "--set", *options]) == 2


class Logits(IterativeFollower):
    """A one-step follower that is a network, if a small one: its state is its live weights, as a trainer's is."""

    temperature, discount = 0.5, 0.0

    def __init__(self) -> None:
        self.weights = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))  # [contexts, actions]

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(3, (count,), generator=generator)

    def reset(self) -> None:
        self.weights.data.zero_()

    def iterate(
        self, leader: Leader, contexts: Tensor, iterations: int, generator: torch.Generator
    ) -> dict[str, float]:
        for _ in range(iterations):
            noise = 0.01 * torch.randn(self.weights.shape, generator=generator, dtype=torch.float64)
            assert isinstance(leader, Rewards)
            self.weights.data += 0.2 * (leader.x.detach() / self.temperature - self.weights.data) + noise
        return {}

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        return self.iterate(leader, contexts, 0, torch.Generator())

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        log_policy = torch.log_softmax(self.weights.detach(), -1)
        action = torch.multinomial(log_policy.exp()[contexts], group_size, replacement=True, generator=generator)
        repeated, chosen = contexts.repeat_interleave(group_size), action.reshape(-1)
        steps = {"place": repeated * 4 + chosen}
        return Rollouts.bandit(contexts=repeated, steps=steps, log_policy=log_policy[repeated, chosen])

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.data.copy_(state["weights"])


class Rewards(Leader):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> Tensor:
        return self.x.reshape(-1)[rollouts.steps["place"]][:, None]


def of_one_step() -> Problem:
    utility = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = ExpectedUtility(lambda leader, rollouts: utility[rollouts.steps["place"]][:, None])
    return Problem(Rewards(), objective, Logits())


def test_groups_of_completions_around_a_follower_that_is_a_network() -> None:
    """Nothing is table-only: groups for `GroupCritic`, and weights that training moves in place come back."""
    problem, contexts = of_one_step(), torch.arange(3)
    rollouts = problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="group size"):
        RandomlyTruncated(PolicyResponse(), 2).backward(problem, rollouts)
    rtq = RandomlyTruncated(PolicyResponse(), 2, group_size=4)
    total = torch.zeros_like(problem.parameters[0])
    for level, probability in enumerate(rtq.probabilities.tolist(), start=1):
        rtq.backward_at(level, problem, rollouts, torch.Generator().manual_seed(7))
        total += probability * taken(problem)
        assert problem.follower.weights.abs().max() == 0  # type: ignore[attr-defined]
    [((last,), _)] = gradients_after(
        [8], PolicyResponse(), problem, contexts, torch.Generator().manual_seed(7), group_size=4
    )
    torch.testing.assert_close(total, last, rtol=1e-9, atol=1e-12)
    Truncated(PolicyResponse(), 8, group_size=4).backward(problem, rollouts)
    assert taken(problem).abs().max() > 0


def test_differences_put_a_network_back() -> None:
    problem, contexts = of_one_step(), torch.arange(3)
    problem.follower.respond = lambda leader, contexts: problem.follower.iterate(  # type: ignore[method-assign,attr-defined]
        leader, contexts, 3, torch.Generator().manual_seed(0)
    )
    rollouts = problem.follower.rollout(contexts, 2, torch.Generator().manual_seed(0))
    ZerothOrder(0.1, directions=2).backward(problem, rollouts)
    assert problem.follower.weights.abs().max() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [RandomlyTruncated, Truncated])
def test_a_group_has_a_member(make: type[RandomlyTruncated] | type[Truncated]) -> None:
    with pytest.raises(InputError, match="group_size: expected a whole number >= 1, got 0"):
        make(PolicyResponse(), 2, group_size=0)
