"""The Fisher metric of the best response on a table, which natural steps divide by: exact, or in a fitted model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.solve import by_context, continuation, per_state, soft_logits
from toy_cmdp.tables.cmdp import require_tabular
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import PolicySystem, Transition, expected_next, policy_system

_AT_ONCE = 32  # parameters whose derivatives are taken together, each as large as the leader's tables


@checked
def exact_metric(problem: Problem) -> Tensor:
    """F = sum_c Xi(c) sum_s d_c(s) sum_a pi*(a|s) (d log pi*)(d log pi*)^T, in nats, [n, n] over all parameters.

    d_c is the leader's discounted occupancy of states: d'F d / 2 is, to second order in d, the divergence between the
    best responses before and after a step d, summed along a path as the leader discounts it. For problems of one step
    it is `align_cbrl`'s metric of samples, exactly.

    Args:
        problem: as for `leader_value`.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> exact_metric(random_cmdp()).shape
        torch.Size([5, 5])
    """
    leader, follower = require_tabular(problem.leader), require_exact(problem.follower)
    cmdp, discount = follower.cmdp, follower.discount
    tables, solution = follower.solve(leader)
    go_on = continuation(cmdp, discount, tables.reward)  # [C, S, 1]
    with torch.enable_grad():
        temperature = problem.temperature
        q = tables.reward + go_on * expected_next(tables.transition, solution.value)
        logits = soft_logits(q, tables.log_prior, temperature)  # [C, S, A]
    with torch.no_grad():
        law, policy = tables.detach().transition, solution.log_policy.exp()
        leader_go_on = continuation(cmdp, problem.objective.discount, tables.reward)
        occupancy = policy_system(law, leader_go_on * policy).solve(tables.initial.detach(), transpose=True)  # [C, S]
        mass = cmdp.context_probabilities.to(policy)[:, None, None] * occupancy[..., None] * policy  # [C, S, A]
        system = policy_system(law, go_on * policy)
    return metric_of_policy(problem, logits, solution.value, policy, mass, law, system, go_on)


def metric_of_policy(
    problem: Problem,
    logits: Tensor,
    value: Tensor,
    policy: Tensor,
    mass: Tensor,
    law: Transition,
    system: PolicySystem,
    go_on: Tensor,
) -> Tensor:
    """sum mass (d log pi)(d log pi)^T [n, n], for a policy pi that answers to the leader as a best response does.

    With the derivative of the logits at fixed values, D = d[(r + gamma E V) / lambda + log prior], the theorem of
    implicit functions gives

        dV = (I - gamma P_pi)^{-1} (lambda E_pi D + V dlambda / lambda),
        d log pi = (1 - E_pi)(D + gamma E dV / lambda) :

    one linear solve for each parameter, of one matrix that is factored once.

    Args:
        problem: its leader's parameters are differentiated by.
        logits: [C, S, A], (r + gamma E V) / lambda + log prior, with graph but for V.
        value: V [C, S].
        policy: pi [C, S, A].
        mass: [C, S, A], how much each state and action counts.
        law: of the states, without graph.
        system: I - gamma P_pi.
        go_on: the follower's discount, zero where the episode ends, [C, S, 1].
    """
    with torch.enable_grad():
        warmth = torch.as_tensor(problem.temperature, dtype=logits.dtype)
    one_by_one = type(law) is SparseTransition  # whose solver iterates, in compiled code that takes one at a time
    slope = _columns(logits, problem, one_by_one)  # [n, C, S, A]
    heat = _columns(warmth, problem, one_by_one)  # [n] or [n, C]: of a leader that sets lambda
    with torch.no_grad():
        warmth = warmth.detach()
        scale = per_state(warmth, value)

        def score(column: Tensor, hotter: Tensor) -> Tensor:
            right = scale * (policy * column).sum(-1) + value / scale * hotter.reshape(-1, 1)
            moved = column + go_on * expected_next(law, system.solve(right)) / by_context(warmth, policy)
            return moved - (policy * moved).sum(-1, keepdim=True)

        rows = _of_each(score, slope, heat, one_by_one).flatten(1)  # [n, C S A]
        metric = (rows * mass.flatten()) @ rows.T
    return (metric + metric.T) / 2


def _of_each(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, one_by_one: bool) -> Tensor:
    """The function of every pair of rows, [n, ...]."""
    if one_by_one:
        return torch.stack([function(*pair) for pair in zip(first, second, strict=True)])
    found: Tensor = torch.func.vmap(function)(first, second)
    return found


def _columns(value: Tensor, problem: Problem, one_by_one: bool) -> Tensor:
    """The derivative of a table with respect to every parameter, [n, ...]: the gradient of its gradient's entries."""
    parameters = problem.parameters
    count = sum(p.numel() for p in parameters)
    if not value.requires_grad:
        return value.new_zeros(count, *value.shape)
    weight = torch.zeros_like(value, requires_grad=True)
    found = torch.autograd.grad(value, parameters, weight, create_graph=True, allow_unused=True)
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )
    if not gradient.requires_grad:
        return value.new_zeros(count, *value.shape)

    def along(which: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, weight, which, retain_graph=True, is_grads_batched=which.ndim > 1)[0]

    every = torch.eye(count, dtype=gradient.dtype)
    if one_by_one:
        return torch.stack([along(one) for one in every])
    return torch.cat([along(some) for some in every.split(_AT_ONCE)])
