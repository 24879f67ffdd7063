"""`ValuePenalty`: penalise the follower's regret instead of differentiating its response."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from align_cbrl.checks import Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.problem import Problem, require_fixed_temperature
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.solve import by_context, continuation, soft_policy_iteration
from toy_cmdp.referee.exact import exact_world
from toy_cmdp.tables.cmdp import Tables
from toy_cmdp.tables.transition import expected_next, policy_system


@checked
@dataclasses.dataclass(frozen=True)
class ValuePenalty(Hypergradient):
    """First-order value penalty on exact tables (PBRL: Shen, Yang, Chen 2024, arXiv 2402.06886).

    The bilevel problem is relaxed to

        max over x, pi of J(x, pi) - penalty * [ V*_x(rho) - V^pi_x(rho) ],

    V the follower's regularised value and V* that of its best response. The inner maximum over pi is attained by the
    best response pi_p to the mixed reward u + penalty * r at temperature penalty * lambda, and by the envelope theorem

        d = d_x [ J + penalty * V ](x, pi_p) - penalty * d_x V*_x,

    in which every derivative is at fixed policy: no derivative of a policy is ever taken. It differs from dJ by
    O(1 / penalty); too large a penalty loses digits in the difference of two large terms. It needs the whole model, and
    a second best response for each leader step.

    Attributes:
        penalty: sigma > 0. On Four Rooms 10 to 100 times the ratio of the utility to lambda is of use
            (docs/estimators.md).

    Raises:
        InputError: a penalty that is not positive; leader and follower with different discounts (their mixed reward has
            no stationary best response); an objective other than an expectation; a problem without tables.

    Example:
        >>> from toy_cmdp import ImplicitHypergradient, random_cmdp
        >>> problem = random_cmdp(discount=0.8, leader_discount=0.8)
        >>> near = ValuePenalty(penalty=1e5).backward(problem)["gradient_norm"]
        >>> abs(near - ImplicitHypergradient().backward(problem)["gradient_norm"]) < 1e-3
        True
    """

    penalty: Positive = 1e4

    def __post_init__(self) -> None:
        if not (0 < self.penalty < math.inf):
            raise InputError(f"ValuePenalty.penalty: expected a positive number, got {self.penalty}")

    def backward(self, problem: Problem, rollouts: Rollouts | None = None) -> dict[str, float]:
        """Add the gradient to `.grad`; `objective` is the penalised J, and the rollouts are not looked at."""
        discount, penalty = problem.follower.discount, self.penalty
        if not bool((torch.as_tensor(discount) == problem.objective.discount).all()):
            raise InputError(
                f"ValuePenalty: expected one discount for leader and follower, got {problem.objective.discount} and "
                f"{discount}; otherwise no stationary policy maximises the mixture of their values"
            )
        world = exact_world(problem)
        if not problem.objective.is_mean:
            raise InputError(
                f"objective: ValuePenalty takes expectations over contexts, got {type(problem.objective).__name__}"
            )
        tables, utility = world.tables, world.utility
        mixed = Tables(utility + penalty * tables.reward, tables.transition, tables.initial, tables.log_prior)
        temperature = penalty * require_fixed_temperature(problem, "ValuePenalty")
        response = soft_policy_iteration(
            require_exact(problem.follower).cmdp,
            mixed.detach(),
            temperature=temperature,
            discount=discount,
            start=penalty * world.solution.value,
        )
        mixture = _value_at_fixed_policy(problem, mixed, response.log_policy, response.value, temperature)
        best = _value_at_fixed_policy(
            problem, tables, world.solution.log_policy, world.solution.value, problem.follower.temperature
        )
        surrogate = mixture - penalty * best
        gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
        norm = accumulate(problem, gradients)
        with torch.no_grad():
            start = require_exact(problem.follower).cmdp.context_probabilities[:, None] * tables.initial
            objective = (start * (response.value - penalty * world.solution.value)).sum()
        return {"objective": objective.item(), "gradient_norm": norm}


def _value_at_fixed_policy(
    problem: Problem, tables: Tables, log_policy: Tensor, value: Tensor, temperature: float | Tensor
) -> Tensor:
    """A scalar with the gradient of the regularised value at the start: policy fixed, occupancies by one solve."""
    cmdp = require_exact(problem.follower).cmdp
    with torch.no_grad():
        policy = log_policy.exp()
        go_on = continuation(cmdp, problem.follower.discount, policy)
        system = policy_system(tables.detach().transition, go_on * policy)
        mu = system.solve(tables.initial, transpose=True)[..., None] * policy  # [C, S, A]
    inside = mu * (tables.reward + go_on * expected_next(tables.transition, value))
    if tables.log_prior is not None:
        inside = inside + mu * by_context(temperature, mu) * tables.log_prior
    per_context = (tables.initial * value).sum(-1) + inside.sum((-1, -2))
    return (cmdp.context_probabilities.to(per_context) * per_context).sum()
