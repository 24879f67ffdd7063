"""The exact Fisher metric of the best response on a table, which natural steps divide by."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.problem import Problem
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.solve import by_context, continuation, per_state, soft_logits
from toy_cmdp.tables.cmdp import require_tabular
from toy_cmdp.tables.transition import expected_next, policy_system


@checked
def exact_metric(problem: Problem) -> Tensor:
    """F = sum_c Xi(c) sum_s d_c(s) sum_a pi*(a|s) (d log pi*)(d log pi*)^T, in nats, [n, n] over all parameters.

    d_c is the leader's discounted occupancy of states: d'F d / 2 is, to second order in d, the divergence between the
    best responses before and after a step d, summed along a path as the leader discounts it. With the derivative of
    logits at fixed values, D = d[(r + gamma E V) / lambda + log prior], the implicit function theorem gives

        dV = (I - gamma P_pi)^{-1} (lambda E_pi D + V dlambda / lambda),
        d log pi = (1 - E_pi)(D + gamma E dV / lambda) :

    one linear solve for each parameter. For problems of one step it is `align_cbrl`'s metric of samples, exactly.

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
        warmth = torch.as_tensor(temperature, dtype=q.dtype)
    slope = _columns(logits, problem)  # [n, C, S, A]
    heat = _columns(warmth, problem) if warmth.requires_grad else None
    with torch.no_grad():
        law, policy = tables.detach().transition, solution.log_policy.exp()
        scale = per_state(warmth.detach() if warmth.ndim == 0 else warmth, q)
        system = policy_system(law, go_on * policy)
        leader_go_on = continuation(cmdp, problem.objective.discount, tables.reward)
        occupancy = policy_system(law, leader_go_on * policy).solve(tables.initial.detach(), transpose=True)  # [C, S]
        mass = cmdp.context_probabilities.to(policy)[:, None, None] * occupancy[..., None] * policy  # [C, S, A]
        score = []
        for j, column in enumerate(slope):
            right = scale * (policy * column).sum(-1)
            if heat is not None:
                right = right + solution.value / scale * heat[j]
            moved = column + go_on * expected_next(law, system.solve(right)) / by_context(warmth.detach(), q)
            score.append(moved - (policy * moved).sum(-1, keepdim=True))
        rows = torch.stack(score).flatten(1)  # [n, C S A]
        metric = (rows * mass.flatten()) @ rows.T
    return (metric + metric.T) / 2


def _columns(value: Tensor, problem: Problem) -> Tensor:
    """The derivative of a table with respect to every parameter, [n, ...]: the gradient of its gradient's entries."""
    if not value.requires_grad:
        return value.new_zeros(sum(p.numel() for p in problem.parameters), *value.shape)
    weight = torch.zeros_like(value, requires_grad=True)
    found = torch.autograd.grad(value, problem.parameters, weight, create_graph=True, allow_unused=True)
    columns = []
    for parameter, gradient in zip(problem.parameters, found, strict=True):
        if gradient is None or not gradient.requires_grad:
            columns += [torch.zeros_like(value)] * parameter.numel()
            continue
        for entry in gradient.flatten():
            (column,) = torch.autograd.grad(entry, weight, retain_graph=True, allow_unused=True)
            columns.append(torch.zeros_like(value) if column is None else column)
    return torch.stack(columns)
