"""The follower's best response: soft value iteration and soft policy iteration (Newton's method).

Both solve V = T(V), T(V)(s) = lambda log sum_a prior(a|s) exp(Q(s, a) / lambda), Q = r + gamma P V, and work with
logarithms throughout: at a temperature of 0.001 most probabilities are below the smallest float.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import Count, NonNegative, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import check_discount, check_temperature
from toy_cmdp.tables.cmdp import ContextualMDP, Tables
from toy_cmdp.tables.transition import expected_next, policy_system

_FIRST_DIGITS = 0.1  # relative residual of a linear solve far from the fixed point


@checked
@dataclasses.dataclass(frozen=True)
class SoftSolution:
    """The best response in every context.

    Attributes:
        log_policy: [C, S, A], log pi*(a|s) = log prior(a|s) + (Q(s, a) - V(s)) / lambda.
        q: [C, S, A], Q_lambda.
        value: [C, S], V_lambda.
        iterations: sweeps or linear solves that were needed.
        residual: largest |T(V) - V| at the end.
    """

    log_policy: Tensor
    q: Tensor
    value: Tensor
    iterations: Count
    residual: float


def by_context(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or one for each context [C] as [C, 1, 1]: what a table [C, S, A] can be multiplied with."""
    return value.to(like).reshape(-1, 1, 1) if isinstance(value, Tensor) else value


def per_state(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or one for each context [C] as [C, 1]: what a table [C, S] can be multiplied with."""
    return value.to(like).reshape(-1, 1) if isinstance(value, Tensor) else value


def continuation(cmdp: ContextualMDP, discount: float | Tensor, like: Tensor) -> Tensor:
    """The discount where the episode goes on and zero in terminal states, [C, S, 1]."""
    return (~cmdp.terminal)[..., None].to(dtype=like.dtype) * by_context(discount, like)


def soft_logits(q: Tensor, log_prior: Tensor | None, temperature: float | Tensor) -> Tensor:
    """The sum log prior + Q / lambda, [C, S, A]; its logsumexp is V / lambda, its log_softmax the policy."""
    scaled = q / by_context(temperature, q)
    return scaled if log_prior is None else log_prior + scaled


@checked
def soft_value_iteration(
    cmdp: ContextualMDP,
    tables: Tables,
    *,
    temperature: float | Tensor,
    discount: float | Tensor,
    start: Tensor | None = None,
    tolerance: NonNegative = 1e-10,
    max_iterations: Count = 100_000,
) -> SoftSolution:
    """V <- T(V), a contraction with modulus gamma, until gamma / (1 - gamma) |T(V) - V| <= tolerance * scale.

    Args:
        cmdp: nature and the ends of episodes.
        tables: the MDPs; gradients are not tracked.
        temperature: the follower's lambda; a tensor [C] where it depends on the context.
        discount: the follower's gamma; likewise.
        start: [C, S], an initial V.
        max_iterations: sweeps before giving up.
        tolerance: of the error in V, relative to the largest |Q| + lambda.

    Raises:
        InputError: invalid tables, temperature or discount; no convergence in `max_iterations`.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp(temperature=0.5, discount=0.9)
        >>> tables = problem.leader.tables()
        >>> soft = soft_value_iteration(problem.follower.cmdp, tables, temperature=0.5, discount=0.9)
        >>> bool((soft.log_policy.exp().sum(-1) - 1).abs().max() < 1e-9)
        True
    """
    tables = _prepare(cmdp, tables, temperature, discount, start)
    go_on = continuation(cmdp, discount, tables.reward)
    value = tables.reward.new_zeros(cmdp.contexts, cmdp.states) if start is None else start.detach()
    residual = float("inf")
    warmth = per_state(temperature, value)
    farsight, hottest = float(torch.as_tensor(discount).max()), float(torch.as_tensor(temperature).max())
    with torch.no_grad():
        for iteration in range(1, max_iterations + 1):
            q = tables.reward + go_on * expected_next(tables.transition, value)
            logits = soft_logits(q, tables.log_prior, temperature)
            image = warmth * torch.logsumexp(logits, -1)
            residual, scale = float((image - value).abs().max()), float(q.abs().max()) + hottest
            value = image
            if farsight / (1 - farsight) * residual <= tolerance * scale:
                return SoftSolution(torch.log_softmax(logits, -1), q, value, iteration, residual)
    raise _not_converged("soft_value_iteration", max_iterations, residual, tolerance)


@checked
def soft_policy_iteration(
    cmdp: ContextualMDP,
    tables: Tables,
    *,
    temperature: float | Tensor,
    discount: float | Tensor,
    start: Tensor | None = None,
    tolerance: NonNegative = 1e-15,
    max_iterations: Count = 1_000,
) -> SoftSolution:
    """V <- V + (I - gamma P_pi)^{-1} (T(V) - V) with pi the Boltzmann policy of V: Newton's method on T(V) = V.

    T is convex and increasing, so that every step is the exact value of pi, the iterates increase after the first and
    converge from any start, quadratically at the end.

    Args:
        cmdp: nature and the ends of episodes.
        tables: the MDPs; gradients are not tracked.
        temperature: the follower's lambda; a tensor [C] where it depends on the context.
        discount: the follower's gamma; likewise.
        start: [C, S], an initial V.
        max_iterations: solves before giving up.
        tolerance: of |T(V) - V|, relative to the largest |Q| + lambda. Less than the dtype can resolve is replaced by
            what it can: a residual below sqrt(eps) that no longer decreases. The default is that, since an error in
            V is divided by lambda in the policy: 1e-13 costs finite differences of J a digit and a half.

    Raises:
        InputError: invalid tables, temperature or discount; no convergence in `max_iterations`.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp(temperature=0.001, discount=0.99)
        >>> tables = problem.leader.tables()
        >>> soft_policy_iteration(problem.follower.cmdp, tables, temperature=0.001, discount=0.99).iterations < 15
        True
    """
    tables = _prepare(cmdp, tables, temperature, discount, start)
    go_on = continuation(cmdp, discount, tables.reward)
    value = tables.reward.new_zeros(cmdp.contexts, cmdp.states) if start is None else start.detach()
    resolvable = torch.finfo(value.dtype).eps ** 0.5
    previous = residual = float("inf")
    warmth, hottest = per_state(temperature, value), float(torch.as_tensor(temperature).max())
    with torch.no_grad():
        for iteration in range(1, max_iterations + 1):
            q = tables.reward + go_on * expected_next(tables.transition, value)
            logits = soft_logits(q, tables.log_prior, temperature)
            log_policy = torch.log_softmax(logits, -1)
            # V = lambda (logits - log_policy) for every action; logsumexp again would cost more than a gather.
            image = warmth * (logits - log_policy)[..., 0]
            step = image - value
            residual, scale = float(step.abs().max()), float(q.abs().max()) + hottest
            settled = residual <= resolvable * scale and residual >= previous
            if residual <= tolerance * scale or settled:
                return SoftSolution(log_policy, q, image, iteration, residual)
            # Inexact Newton: no more digits of a step than it is worth, which keeps the quadratic order. Only solvers
            # that iterate make use of it.
            digits = max((residual / previous) ** 2, 0.1 * tolerance * scale / residual)
            digits = _FIRST_DIGITS if iteration == 1 else min(digits, _FIRST_DIGITS)
            previous = residual
            value = value + policy_system(tables.transition, go_on * log_policy.exp()).solve(step, tolerance=digits)
    raise _not_converged("soft_policy_iteration", max_iterations, residual, tolerance)


def _prepare(
    cmdp: ContextualMDP,
    tables: Tables,
    temperature: float | Tensor,
    discount: float | Tensor,
    start: Tensor | None,
) -> Tables:
    check_temperature("temperature", temperature, cmdp.contexts)
    check_discount("discount", discount, cmdp.contexts)
    cmdp.check(tables)
    if start is not None and tuple(start.shape) != (cmdp.contexts, cmdp.states):
        raise InputError(f"start: expected shape {(cmdp.contexts, cmdp.states)}, got {tuple(start.shape)}")
    return tables.detach()


def _not_converged(name: str, iterations: int, residual: float, tolerance: float) -> InputError:
    return InputError(
        f"{name}: no fixed point after max_iterations = {iterations} (residual {residual:.3g}, tolerance "
        f"{tolerance:.3g}); raise max_iterations or tolerance"
    )
