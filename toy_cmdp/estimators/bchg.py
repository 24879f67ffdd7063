"""`BCHG`: the leader's learned critic times the follower's dQ, uncentred."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.problem import Critic, Critique, Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.estimators.visits import Visits, add_gradient, discounted, expected_utility, visits


@dataclasses.dataclass(frozen=True)
class TemporalDifferenceCritic(Critic):
    """Q_F that solves the SARSA equations of the batch: where tabular SARSA ends if it replays these transitions.

        Q(s, a) = mean over the visits of (s, a) of [ u + gammaF Q(s', a') ],   Q = 0 after the last step,

    a linear system over the visited pairs, solved exactly; A_F = Q - E_pi Q under the follower's known policy.

    Attributes:
        cell: maps rollouts to the cell of every visited state, long [B, T + 1], other ones in other contexts.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> critic = TemporalDifferenceCritic(problem.follower.cmdp.cell)
        >>> critic.evaluate(problem, rollouts, torch.zeros_like(rollouts.log_policy)).advantage.abs().max().item()
        0.0
    """

    cell: Callable[[Rollouts], Tensor]

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T] of the credit."""
        seen = visits(rollouts, self.cell)
        pairs, index = torch.unique(seen.pair.index, return_inverse=True)
        count = len(pairs)
        arcs = (index[:-1] * count + index[1:])[_goes_on(seen.pair.place, rollouts.horizon)]
        follows = torch.bincount(arcs, minlength=count * count).view(count, count).to(credit)
        visited = seen.pair.count[pairs].to(credit)
        system = torch.eye(count, dtype=credit.dtype) - problem.objective.discount * follows / visited[:, None]
        q = torch.zeros_like(seen.pair.count, dtype=credit.dtype)
        q[pairs] = torch.linalg.solve(system, seen.pair.mean(credit)[pairs])
        return Critique(_centred(q, seen, rollouts))


@checked
@dataclasses.dataclass(frozen=True)
class SarsaCritic(Critic):
    """Q_F by tabular SARSA from zero: one pass over the batch's transitions in random order, as BC-HG's code does it.

        Q(s, a) <- Q(s, a) + rate * ( u + gammaF Q(s', a') - Q(s, a) ),   Q = 0 after the last step;

    A_F = Q - E_pi Q under the follower's known policy. The published code carries Q from one leader step to the next:
    pass a `memory`. From zero, one pass leaves most of Q near zero, where it began: a strong shrinkage, and at few
    paths a smaller error than the fixed point of many passes (`TemporalDifferenceCritic`).

    Attributes:
        cell: maps rollouts to the cell of every visited state, long [B, T + 1], other ones in other contexts.
        rate: in (0, 1]; the published code searches 0.1, 0.3, ..., 1.
        passes: over the batch, at least 1.
        seed: of the orders.
        memory: Q that a batch begins with and leaves behind, pair by pair; an empty list to begin with carries Q from
            batch to batch. None: each batch stands alone.

    Raises:
        InputError: a rate or a number of passes out of range; rollouts without "action" and "log_policy_all".

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> critic = SarsaCritic(problem.follower.cmdp.cell)
        >>> critic.evaluate(problem, rollouts, torch.zeros_like(rollouts.log_policy)).advantage.abs().max().item()
        0.0
    """

    cell: Callable[[Rollouts], Tensor]
    rate: Positive = 0.1
    passes: Count = 1
    seed: Whole = 0
    memory: list[float] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.rate <= 1):
            raise InputError(f"SarsaCritic.rate: expected a number in (0, 1], got {self.rate}")
        if self.passes < 1:
            raise InputError(f"SarsaCritic.passes: expected at least 1, got {self.passes}")

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T] of the credit."""
        seen = visits(rollouts, self.cell)
        pair, count = seen.pair.index + 1, len(seen.pair.count)  # place 0 is of a Q that stays zero
        following = torch.zeros_like(pair)
        following[:-1] = torch.where(_goes_on(seen.pair.place, rollouts.horizon), pair[1:], 0)
        gain = credit.reshape(-1)[seen.pair.place]
        values = [] if self.memory is None else self.memory
        values.extend([0.0] * (count + 1 - len(values)))
        rate, discount = self.rate, problem.objective.discount
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.passes):
            order = torch.randperm(len(gain), generator=generator)
            steps = zip(pair[order].tolist(), following[order].tolist(), gain[order].tolist(), strict=True)
            for here, after, utility in steps:
                value = values[here]
                values[here] = value + rate * (utility + discount * values[after] - value)
        q = torch.tensor(values[1 : count + 1], dtype=credit.dtype)
        return Critique(_centred(q, seen, rollouts))


def _goes_on(place: Tensor, horizon: int) -> Tensor:
    """bool [N - 1]: whether the next step taken is the next one of the same path; paths begin at multiples of T."""
    return (place[1:] == place[:-1] + 1) & (place[1:] % horizon != 0)


def _centred(q: Tensor, seen: Visits, rollouts: Rollouts) -> Tensor:
    """Q - E_pi Q along the paths, [B, T], of q [pairs]."""
    policy = rollouts.steps["log_policy_all"].flatten(0, 1)[seen.pair.place].exp()  # [N, A]
    centre = (policy * q.view(-1, seen.actions)[seen.cell.index]).sum(-1)
    advantage = q.new_zeros(rollouts.mask.numel())
    advantage[seen.pair.place] = q[seen.pair.index] - centre
    return advantage.view(rollouts.mask.shape)


@checked
@dataclasses.dataclass(frozen=True)
class BCHG(Hypergradient):
    """Boltzmann-covariance hypergradient (Kudo et al. 2026, arXiv 2603.14867; code: akimotolab/BC-HG).

        dJ = dVbar_F(s_0) + (1 / (lambda B)) sum over steps of gammaF^t A_F(s_t, a_t) dQbar(s_t, a_t),

    with dQbar the average of sum_{k >= t} gamma^{k-t} dr_k over all visits of the pair, and A_F a learned critic,
    centred under the follower's known policy. Because E_pi A_F = 0, dQ may stand in place of dA: the identity of the
    paper. That is unbiased for an exact A_F but leaves the variance of dV in; and with a critic fitted on the same
    paths both factors share their noise.

    Attributes:
        critic: gives A_F [B, T].
        cell: maps rollouts to the cell of every visited state, long [B, T + 1] (`ContextualMDP.cell`).

    Raises:
        InputError: an objective other than an ExpectedUtility; a leader that moves the transitions or the initial
            state; rollouts without "action" and "log_policy_all".

    Example:
        >>> from toy_cmdp import four_rooms
        >>> problem = four_rooms(temperature=0.005)
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 2, torch.Generator().manual_seed(0))
        >>> cell = problem.follower.cmdp.cell
        >>> sorted(BCHG(TemporalDifferenceCritic(cell), cell).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    critic: Critic
    cell: Callable[[Rollouts], Tensor]

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`."""
        with torch.no_grad():
            seen = visits(rollouts, self.cell)
            utility = torch.where(rollouts.mask, expected_utility(problem, rollouts, "BCHG"), 0.0)
            advantage = self.critic.evaluate(problem, rollouts, utility).advantage
            credit = torch.where(rollouts.mask, discounted(advantage, problem), 0.0) / rollouts.size
            source = seen.pair.spread(credit)
        objective = float(discounted(utility, problem).sum(1).mean())
        return {"objective": objective, "gradient_norm": add_gradient(problem, rollouts, seen, source)}
