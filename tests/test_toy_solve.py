"""Best responses: value iteration against policy iteration, small temperatures, threads."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_close, implicit_gradient

from align_cbrl.errors import InputError
from toy_cmdp import (
    ContextualMDP,
    Tables,
    expected_policy_response,
    four_rooms,
    random_cmdp,
    soft_policy_iteration,
    soft_value_iteration,
)
from toy_cmdp.tables.transition import Factorization


def setting(problem):
    return problem.follower.cmdp, problem.leader.tables()


@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_policy_iteration_agree(temperature, seed):
    cmdp, tables = setting(random_cmdp(seed=seed))
    a = soft_value_iteration(cmdp, tables, temperature=temperature, discount=0.9, tolerance=1e-13)
    b = soft_policy_iteration(cmdp, tables, temperature=temperature, discount=0.9)
    torch.testing.assert_close(a.value, b.value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.q, b.q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.log_policy, b.log_policy, rtol=1e-7, atol=1e-7)
    assert b.iterations < 15 < a.iterations
    assert not b.value.requires_grad


def test_four_rooms_at_the_smallest_temperature():
    cmdp, tables = setting(four_rooms(temperature=0.001))
    solution = soft_policy_iteration(cmdp, tables, temperature=0.001, discount=0.99)
    assert solution.residual < 1e-13
    assert torch.isfinite(solution.log_policy).all()
    torch.testing.assert_close(solution.log_policy.logsumexp(-1), torch.zeros_like(solution.value), atol=1e-12, rtol=0)
    # Boltzmann: the log-policy is the scaled advantage, with a measure of 1 as the prior.
    torch.testing.assert_close(
        solution.log_policy, (solution.q - solution.value[..., None]) / 0.001, atol=1e-9, rtol=1e-9
    )
    warm = soft_policy_iteration(cmdp, tables, temperature=0.001, discount=0.99, start=solution.value)
    assert warm.iterations <= 2


def test_single_precision_converges_to_what_it_can_resolve():
    cmdp, tables = setting(random_cmdp(seed=0))
    single = Tables(tables.reward.float(), tables.transition.float(), tables.initial.float(), tables.log_prior.float())
    a = soft_policy_iteration(cmdp, single, temperature=0.5, discount=0.9)
    b = soft_policy_iteration(cmdp, tables, temperature=0.5, discount=0.9)
    torch.testing.assert_close(a.value.double(), b.value, rtol=1e-4, atol=1e-4)


def test_a_uniform_prior_is_not_entropy_regularisation_where_episodes_end():
    cmdp = ContextualMDP(torch.ones(1), torch.tensor([[False, True]]))
    transition = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    transition[0, 0, 0, 0] = transition[0, 0, 1, 1] = transition[0, 1, :, 1] = 1  # stay or leave
    reward, initial = torch.zeros(1, 2, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    uniform = torch.full((1, 2, 2), 0.5, dtype=torch.float64).log()
    entropy = soft_policy_iteration(cmdp, Tables(reward, transition, initial), temperature=1.0, discount=0.9)
    kl = soft_policy_iteration(cmdp, Tables(reward, transition, initial, uniform), temperature=1.0, discount=0.9)
    assert kl.log_policy[0, 0].exp().tolist() == pytest.approx([0.5, 0.5])
    assert entropy.log_policy[0, 0, 0].exp() > 0.6  # staying earns more entropy


def test_two_threads_and_151_states():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        problem = random_cmdp(contexts=2, states=151, actions=2, parameters=2, seed=4)
        assert_close(expected_policy_response(problem)[0], implicit_gradient(problem), 1e-9)
        matrix = 0.9 * torch.softmax(torch.randn(3, 160, 160, dtype=torch.float64), -1)
        right = torch.randn(3, 160, dtype=torch.float64)
        factors = Factorization(matrix)
        for transpose in (False, True):
            solved = factors.solve(right, transpose=transpose)
            system = torch.eye(160, dtype=torch.float64) - (matrix.mT if transpose else matrix)
            torch.testing.assert_close((system @ solved[..., None])[..., 0], right, rtol=1e-10, atol=1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("solver", [soft_value_iteration, soft_policy_iteration])
def test_bad_arguments(solver):
    cmdp, tables = setting(random_cmdp())
    with pytest.raises(InputError, match="temperature: expected a positive temperature lambda, got 0"):
        solver(cmdp, tables, temperature=0.0, discount=0.9)
    with pytest.raises(InputError, match=r"discount: expected a discount in \[0, 1\), got 1"):
        solver(cmdp, tables, temperature=0.5, discount=1.0)
    with pytest.raises(InputError, match=r"no fixed point after max_iterations = 2 .*raise max_iterations"):
        solver(cmdp, tables, temperature=0.5, discount=0.9, max_iterations=2)
    with pytest.raises(InputError, match=r"start: expected shape \(2, 4\), got \(4,\)"):
        solver(cmdp, tables, temperature=0.5, discount=0.9, start=torch.zeros(4))
