"""`AMD`: adaptive model design, the hypergradient by Bellman sweeps over the exact tables."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.exact import require_exact
from toy_cmdp.followers.solve import by_context, continuation
from toy_cmdp.referee.exact import exact_world
from toy_cmdp.tables.transition import Transition, expected_next, pushed


@checked
@dataclasses.dataclass(frozen=True)
class AMD(Hypergradient):
    """Deterministic Bellman propagation of dV (Chen et al. 2022, "Adaptive Model Design for Markov Decision Process").

    With the best response pi known, three linear Bellman equations are swept `sweeps` times from zero,

        dQ <- dr + gamma P E_pi dQ,   Q_F <- u + gammaF P E_pi Q_F,   W <- E_pi [du + A_F dA / lambda] + gammaF P_pi W,

    and the gradient is rho . W. It needs the whole model and no paths: a rival with full information, whose truncation
    error falls as max(gamma, gammaF)^sweeps; with enough sweeps it is the implicit hypergradient. The sweeps are run in
    adjoint form, on occupancies of size [C, S] instead of on derivatives of size [C, S, A, |x|]; the truncated sums are
    the same ones, so the cost does not grow with x.

    The authors' implementation (lasgroup/HPGD, train_amd.py) differs: it sweeps the follower's Q, dQ, Q_F and W
    together, 100 times a leader step, and carries all four to the next step, so that its gradient lags behind the
    leader; and it steps along the gradient of one sampled context, where this is the expectation over contexts.

    Attributes:
        sweeps: Bellman sweeps of each equation, at least 1.

    Raises:
        InputError: fewer than one sweep; a problem without tables (see `exact_world`).

    Example:
        >>> from toy_cmdp import ImplicitHypergradient, random_cmdp
        >>> problem = random_cmdp()
        >>> far = AMD(sweeps=400).backward(problem)["gradient_norm"]
        >>> abs(far - ImplicitHypergradient().backward(problem)["gradient_norm"]) < 1e-9
        True
    """

    sweeps: Count = 100

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise InputError(f"AMD.sweeps: expected at least 1, got {self.sweeps}")

    def backward(self, problem: Problem, rollouts: Rollouts | None = None) -> dict[str, float]:
        """Add the gradient to `.grad`; `objective` is the swept J, and the rollouts are not looked at."""
        world = exact_world(problem)
        follower, tables, temperature = problem.follower, world.tables, problem.temperature
        cmdp = require_exact(follower).cmdp
        with torch.no_grad():
            law = tables.detach().transition
            go_on = continuation(cmdp, follower.discount, world.policy)
            go_on_leader = continuation(cmdp, problem.objective.discount, world.policy)
            credit = world.q - go_on_leader * expected_next(law, world.value)
            value = torch.zeros_like(world.value)
            for _ in range(self.sweeps):
                value = (world.policy * (world.utility + go_on_leader * expected_next(law, value))).sum(-1)
            q = credit + go_on_leader * expected_next(law, value)
            advantage = q - (world.policy * q).sum(-1, keepdim=True)
            mu = self._visits(law, go_on_leader * world.policy, tables.initial)[..., None] * world.policy
            source = pushed(law, go_on * mu * advantage)
            marginal = self._visits(law, go_on * world.policy, source)
            eta = world.policy * marginal[..., None] + mu * advantage
            weight = eta / by_context(temperature, eta)
        next_leader = expected_next(tables.transition, value)
        next_soft = expected_next(tables.transition, world.solution.value)
        per_context = (tables.initial * value).sum(-1) + (
            mu * world.utility
            + eta * (tables.reward / by_context(temperature, eta))
            + go_on_leader * mu * next_leader
            + go_on * weight * next_soft
        ).sum((-1, -2))
        if tables.log_prior is not None:
            per_context = per_context + (eta * tables.log_prior).sum((-1, -2))
        probabilities = cmdp.context_probabilities.to(per_context)
        surrogate = (probabilities * per_context).sum()
        gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
        norm = accumulate(problem, gradients)
        # To first order in what the sweeps miss; exact for an expectation.
        missed = (tables.initial.detach() * (value - world.value)).sum(-1)
        objective = world.objective + (probabilities * missed).sum()
        return {"objective": objective.item(), "gradient_norm": norm}

    def _visits(self, law: Transition, policy: Tensor, start: Tensor) -> Tensor:
        """The first `sweeps` terms of sum_j (gamma P_pi^T)^j start, [C, S]; `policy` carries the discount."""
        total, term = start, start
        for _ in range(self.sweeps - 1):
            term = pushed(law, policy * term[..., None])
            total = total + term
        return total
