"""Iterative followers reach the exact best response, at the rates that theory gives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import HPGD, HPGDConfig, InputError, PolicyResponse, Problem
from toy_cmdp.followers.iterative import (
    NaturalPolicyGradient,
    SoftQLearning,
    SoftValueIteration,
    TabularIterativeFollower,
    policy_q,
)
from toy_cmdp.followers.solve import SoftSolution, soft_policy_iteration
from toy_cmdp.problems.four_rooms import four_rooms
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.referee.exact import ExactCritic, expected_policy_response
from toy_cmdp.referee.frozen_policy import PresentCritic, PresentPolicyResponse, present
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import expected_next

TEMPERATURE, DISCOUNT = 0.3, 0.8


def known(
    temperature: float | Tensor = TEMPERATURE, discount: float | Tensor = DISCOUNT
) -> tuple[Problem, SoftSolution]:
    problem = random_cmdp(temperature=0.3, discount=0.8, seed=3)
    tables = problem.leader.tables()
    best = soft_policy_iteration(cmdp_of(problem), tables, temperature=temperature, discount=discount)
    return problem, best


def cmdp_of(problem: Problem) -> ContextualMDP:
    cmdp: ContextualMDP = problem.follower.cmdp  # type: ignore[attr-defined]
    return cmdp


def step(follower: TabularIterativeFollower, problem: Problem, iterations: int, seed: int = 0) -> Tensor:
    follower.iterate(problem.leader, torch.arange(1), iterations, torch.Generator().manual_seed(seed))
    return follower.log_policy


def kl(log_policy: Tensor, best: Tensor) -> float:
    """The largest KL(pi || pi*) over states."""
    return float((log_policy.exp() * (log_policy - best)).sum(-1).max())


@pytest.mark.parametrize("discount", [0.5, 0.8, 0.95])
def test_soft_value_iteration_contracts_at_gamma(discount: float) -> None:
    problem, best = known(discount=discount)
    follower = SoftValueIteration(cmdp_of(problem), TEMPERATURE, discount, iterations=0)
    start = last = float(best.q.abs().max())  # Q_0 = 0
    for done in range(1, 31):
        log_policy = step(follower, problem, 1)
        assert follower._table is not None
        error = float((follower._table - best.q).abs().max())
        assert error <= discount * last + 1e-12
        assert float((log_policy - best.log_policy).abs().max()) <= 2 * discount**done * start / TEMPERATURE + 1e-12
        if done == 20:  # the rate is gamma itself, for the constant part of the error
            assert error / last == pytest.approx(discount, abs=1e-3)
        last = error


@pytest.mark.parametrize("size", [0.2, 0.5, 1.0])
def test_natural_policy_gradient_converges_at_its_theorems_rate(size: float) -> None:
    problem, best = known()
    cmdp, tables = cmdp_of(problem), problem.leader.tables().detach()
    follower = NaturalPolicyGradient(cmdp, TEMPERATURE, DISCOUNT, step=size, iterations=0)
    log_policy = step(follower, problem, 0)
    q, _ = policy_q(cmdp, tables, log_policy, TEMPERATURE, DISCOUNT)
    constant = float((q - best.q).abs().max())
    constant += 2 * (1 - size) * TEMPERATURE * float((log_policy - best.log_policy).abs().max())
    for done in range(30):
        log_policy = step(follower, problem, 1)
        q, _ = policy_q(cmdp, tables, log_policy, TEMPERATURE, DISCOUNT)
        bound = DISCOUNT * constant * (1 - size * (1 - DISCOUNT)) ** done
        assert float((q - best.q).abs().max()) <= bound + 1e-12
        assert float((log_policy - best.log_policy).abs().max()) <= 2 * bound / DISCOUNT / TEMPERATURE + 1e-11


def test_a_full_natural_gradient_step_is_soft_policy_iteration() -> None:
    """Its iterates are Newton's: quadratic convergence, machine precision within a handful of steps."""
    problem, best = known()
    follower = NaturalPolicyGradient(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=0)
    errors = [float((step(follower, problem, 1) - best.log_policy).abs().max()) for _ in range(6)]
    assert errors[-1] < 1e-12
    assert errors[2] < 10 * errors[1] ** 2


def test_the_natural_gradient_is_the_natural_gradient() -> None:
    """Against its definition: Fisher information to the power -1 times the gradient of the soft return, by autograd."""
    problem, _ = known()
    cmdp, tables = cmdp_of(problem), problem.leader.tables().detach()
    c, s, a = tables.reward.shape
    start = torch.ones(c, s, dtype=torch.float64) / s
    logits = 0.3 * torch.randn(c, s, a, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_(True)
    log_policy = tables.log_prior + torch.log_softmax(logits, -1)
    log_policy = torch.log_softmax(log_policy, -1)
    policy = log_policy.exp()
    moves = torch.einsum("csa,csat->cst", policy, tables.transition)
    earned = (policy * (tables.reward - TEMPERATURE * (log_policy - tables.log_prior))).sum(-1)
    value = torch.linalg.solve(torch.eye(s, dtype=torch.float64) - DISCOUNT * moves[0], earned[0])
    (slope,) = torch.autograd.grad((start[0] * value).sum(), logits)
    occupancy = torch.linalg.solve(torch.eye(s, dtype=torch.float64) - DISCOUNT * moves[0].T, start[0])
    pi = policy[0].detach()
    fisher = [(1 - DISCOUNT) * occupancy[i] * (torch.diag(pi[i]) - torch.outer(pi[i], pi[i])) for i in range(s)]
    direction = torch.stack([torch.linalg.pinv(f) @ g for f, g in zip(fisher, slope[0], strict=True)])

    share = 0.4
    follower = NaturalPolicyGradient(cmdp, TEMPERATURE, DISCOUNT, step=share, iterations=0)
    step(follower, problem, 0)
    follower._table = TEMPERATURE * logits.detach()
    after = step(follower, problem, 1)[0]
    eta = share * (1 - DISCOUNT) / TEMPERATURE
    expected = torch.log_softmax(log_policy[0].detach() + eta * direction, -1)
    assert torch.allclose(after, expected, atol=1e-10)


def test_soft_q_learning_converges_at_the_root_of_its_samples() -> None:
    problem, best = known()
    counts = [64, 256, 1024, 4096]
    squares = torch.zeros(10, len(counts), dtype=torch.float64)
    for seed in range(10):
        follower = SoftQLearning(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=0)
        generator = torch.Generator().manual_seed(seed)
        for i, (before, count) in enumerate(zip([0, *counts], counts, strict=False)):
            follower.iterate(problem.leader, torch.arange(1), count - before, generator)
            assert follower._table is not None
            squares[seed, i] = (follower._table - best.q).pow(2).mean()
    logs = squares.log().mean(0) / math.log(4)
    spread = (squares.log() / math.log(4)).std(0) / 10**0.5
    rate = (logs[-1] - logs[0]) / (len(counts) - 1)  # the exponent of n
    error = float((spread[0] ** 2 + spread[-1] ** 2) ** 0.5) / (len(counts) - 1)
    assert abs(rate + 1) <= 4 * error + 0.1
    assert kl(follower.log_policy, best.log_policy) < 1e-2


ALL: list[tuple[type[TabularIterativeFollower], dict[str, Any], float]] = [
    (SoftValueIteration, {"iterations": 150}, 1e-12),
    (NaturalPolicyGradient, {"iterations": 8}, 1e-12),
    (NaturalPolicyGradient, {"iterations": 300, "step": 0.3}, 1e-12),
    (SoftQLearning, {"iterations": 4000}, 2e-2),
]


@pytest.mark.parametrize(("kind", "options", "allowed"), ALL, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("population", [False, True], ids=["one", "population"])
def test_every_follower_reaches_the_best_response(
    kind: type[TabularIterativeFollower], options: dict[str, Any], allowed: float, population: bool
) -> None:
    """Also where each context has a temperature and a discount of its own."""
    temperature = torch.tensor([0.3, 0.6], dtype=torch.float64) if population else TEMPERATURE
    discount = torch.tensor([0.8, 0.6], dtype=torch.float64) if population else DISCOUNT
    problem, best = known(temperature, discount)
    follower = kind(cmdp_of(problem), temperature, discount, **options)
    follower.respond(problem.leader, torch.arange(1))
    assert kl(follower.log_policy, best.log_policy) <= allowed


@pytest.mark.parametrize("kind", [SoftValueIteration, NaturalPolicyGradient])
def test_episodes_end(kind: type[TabularIterativeFollower]) -> None:
    """Four Rooms, entropy regularised: terminal goals and a law that both contexts may share."""
    problem = four_rooms(temperature=0.005)
    _, best = problem.follower.solve(problem.leader)  # type: ignore[attr-defined]
    iterations = {SoftValueIteration: 4000, NaturalPolicyGradient: 12}[kind]
    follower = kind(cmdp_of(problem), 0.005, 0.99, iterations=iterations)
    follower.respond(problem.leader, torch.arange(2))
    assert kl(follower.log_policy, best.log_policy) < 1e-6


class Other(TabularLeader):
    """The tables of another leader, with another form of the transition law."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self._tables = tables
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def tables(self) -> Tables:
        return self._tables


def laws() -> dict[str, Tables]:
    """One world, whose contexts share their law, in three forms."""
    tables = random_cmdp(seed=3).leader.tables().detach()
    law = tables.transition[:1]
    s, a = law.shape[1:3]
    successor = torch.arange(s).expand(s, a, s)
    forms = {"dense": law.expand(2, -1, -1, -1).contiguous(), "shared": law, "sparse": SparseTransition(successor, law)}
    return {name: dataclasses.replace(tables, transition=form) for name, form in forms.items()}


@pytest.mark.parametrize("kind", [SoftValueIteration, NaturalPolicyGradient, SoftQLearning])
def test_the_form_of_the_transition_law_does_not_matter(kind: type[TabularIterativeFollower]) -> None:
    cmdp = cmdp_of(random_cmdp(seed=3))
    found = {}
    for name, tables in laws().items():
        follower = kind(cmdp, 0.5, 0.9, iterations=20)
        follower.respond(Other(tables), torch.arange(2))
        found[name] = follower.log_policy
    assert torch.allclose(found["dense"], found["shared"], atol=1e-12)
    assert torch.allclose(found["dense"], found["sparse"], atol=1e-12)


@pytest.mark.parametrize("kind", [SoftQLearning])
def test_next_states_are_drawn_by_their_law(kind: type[SoftQLearning]) -> None:
    for tables in laws().values():
        follower = kind(cmdp_of(random_cmdp(seed=3)), 0.5, 0.9, iterations=0)
        follower._prepare(tables)
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack([follower._next_states(tables.reward, generator) for _ in range(4000)])
        value = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64).expand(2, -1)
        seen = value[0][draws]
        expected = expected_next(tables.transition, value)
        z = (seen.mean(0) - expected) / (seen.std(0) / 4000**0.5)
        assert float(z.abs().max()) < 4.5  # 24 entries


@pytest.mark.parametrize("kind", [SoftValueIteration, NaturalPolicyGradient, SoftQLearning])
def test_stopping_in_between_changes_nothing(kind: type[TabularIterativeFollower]) -> None:
    problem, _ = known()
    whole = kind(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=0)
    parts = kind(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=0)
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    whole.iterate(problem.leader, torch.arange(1), 7, one)
    parts.iterate(problem.leader, torch.arange(1), 3, other)
    state = parts.state_dict()
    resumed = kind(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=0)
    resumed.load_state_dict(state)
    resumed.iterate(problem.leader, torch.arange(1), 4, other)
    assert torch.equal(whole.log_policy, resumed.log_policy)


def test_warm_starts_continue_and_cold_ones_do_not() -> None:
    problem, best = known()
    errors = {}
    for warm in (False, True):
        follower = SoftValueIteration(cmdp_of(problem), TEMPERATURE, DISCOUNT, iterations=5, warm=warm)
        for _ in range(6):
            follower.respond(problem.leader, torch.arange(1))
        errors[warm] = kl(follower.log_policy, best.log_policy)
    assert errors[True] < 1e-4 * errors[False]


def test_rollouts_are_of_the_present_policy_and_hpgd_runs_on_them() -> None:
    exact = random_cmdp(seed=3)
    follower = SoftValueIteration(cmdp_of(exact), 0.5, 0.9, iterations=3, horizon=4)
    problem = dataclasses.replace(exact, follower=follower)
    follower.respond(problem.leader, torch.arange(1))
    rollouts = follower.rollout(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
    state = rollouts.steps["state"][:, :-1]
    expected = follower.log_policy[rollouts.contexts[:, None], state]
    assert torch.equal(rollouts.steps["log_policy_all"], expected)
    optimizer = torch.optim.SGD(problem.parameters, lr=0.1, maximize=True)
    run = HPGD(problem, optimizer, PolicyResponse(PresentCritic()), HPGDConfig(steps=2, progress=False))
    run.run()
    assert len(run.history) == 2


def test_the_formulas_at_the_present_policy_are_the_referees_at_the_best_response() -> None:
    exact = random_cmdp(seed=3)
    follower = NaturalPolicyGradient(cmdp_of(exact), 0.5, 0.9, iterations=20)
    problem = dataclasses.replace(exact, follower=follower)
    follower.respond(problem.leader, torch.arange(2))
    (gradient,) = expected_policy_response(present(problem))
    assert torch.allclose(gradient, expected_policy_response(exact)[0], atol=1e-10)
    rollouts = follower.rollout(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
    credit = torch.zeros(rollouts.mask.shape, dtype=torch.float64)
    ours, referees = (
        critic.evaluate(one, rollouts, credit) for critic, one in ((PresentCritic(), problem), (ExactCritic(), exact))
    )
    assert torch.allclose(ours.advantage, referees.advantage, atol=1e-10)
    assert ours.soft_value is not None and referees.soft_value is not None
    assert torch.allclose(ours.soft_value, referees.soft_value, atol=1e-10)


def test_sampled_estimates_average_to_the_formula_at_a_policy_that_is_no_best_response() -> None:
    exact = random_cmdp(seed=3)
    follower = SoftValueIteration(cmdp_of(exact), 0.5, 0.9, iterations=1, leader_discount=0.8)
    problem = dataclasses.replace(exact, follower=follower)
    follower.respond(problem.leader, torch.arange(2))
    estimates = []
    contexts = torch.tensor([0, 1]).repeat(500)
    for seed in range(40):
        rollouts = follower.rollout(contexts, 1, torch.Generator().manual_seed(seed))
        problem.parameters[0].grad = None
        PolicyResponse(PresentCritic()).backward(problem, rollouts)
        estimates.append(problem.parameters[0].grad)
    problem.parameters[0].grad = None
    metrics = PresentPolicyResponse().backward(problem, rollouts)
    mean, spread = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 40**0.5
    assert float(((mean - problem.parameters[0].grad) / spread).abs().max()) < 4
    assert metrics["gradient_norm"] == pytest.approx(float(problem.parameters[0].grad.norm()))


def test_what_is_wrong_is_named() -> None:
    problem, _ = known()
    cmdp = cmdp_of(problem)
    for options, name in (
        ({"iterations": -1}, "iterations"),
        ({"iterations": 1, "horizon": 0}, "horizon"),
        ({"iterations": 1, "step": 0.0}, "step"),
        ({"iterations": 1, "step": 1.5}, "step"),
        ({"iterations": 1, "leader_discount": 1.0}, "leader_discount"),
    ):
        with pytest.raises(InputError, match=rf"^NaturalPolicyGradient\.{name}: expected"):
            NaturalPolicyGradient(cmdp, 0.5, 0.9, **options)  # type: ignore[arg-type]
    for arguments, name in (
        ((0.0, 0.9), "temperature"),
        ((0.5, 1.0), "discount"),
        ((torch.ones(3), 0.9), "temperature"),
    ):
        with pytest.raises(InputError, match=rf"^{name}"):
            SoftValueIteration(cmdp, *arguments, iterations=1)
    follower = SoftValueIteration(cmdp, 0.5, 0.9, iterations=1)
    with pytest.raises(InputError, match="no policy yet"):
        follower.rollout(torch.tensor([0]), 1, torch.Generator())
    with pytest.raises(InputError, match=r"^iterations"):
        follower.iterate(problem.leader, torch.tensor([0]), -1, torch.Generator())
    follower.respond(problem.leader, torch.tensor([0]))
    with pytest.raises(InputError, match=r"^contexts"):
        follower.rollout(torch.tensor([2]), 1, torch.Generator())
    with pytest.raises(InputError, match=r"^group_size"):
        follower.rollout(torch.tensor([0]), 0, torch.Generator())
    with pytest.raises(InputError, match="belongs to another problem"):
        follower.load_state_dict({"table": torch.zeros(1, 1, 1), "done": 0, "responses": 0})
    with pytest.raises(InputError, match="TabularIterativeFollower"):
        present(problem)
