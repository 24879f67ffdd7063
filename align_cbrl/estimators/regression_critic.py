"""`RegressionCritic`: the leader's advantage by regression, for states and actions of any kind."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from align_cbrl.checks import Count, Several, Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.critics import soft_reward
from align_cbrl.estimators.regression import Function, Regressor, Ridge
from align_cbrl.functional import returns_to_go
from align_cbrl.problem import Critic, Critique, Problem, per_path
from align_cbrl.rollouts import Rollouts

Nodes = Callable[[Rollouts], tuple[Tensor, Tensor]]
"""Actions [B, T, N, m] that stand for the policy at every step, and their weights [N], which sum to one."""


@checked
@dataclasses.dataclass(frozen=True)
class NormalNodes:
    """Quadrature (Gauss and Hermite) for a normal policy: exact for polynomials of the action up to 2 `order` - 1.

    Rollouts carry, in `steps`, "action_mean" [B, T, m] and "action_root" [B, T, m, m], a root of the covariance.

    Attributes:
        order: nodes in each of the m directions.

    Example:
        >>> steps = {"action_mean": torch.ones(1, 1, 1), "action_root": 2 * torch.ones(1, 1, 1, 1)}
        >>> actions, weight = NormalNodes(3)(Rollouts.bandit(contexts=torch.tensor([0]), steps=steps))
        >>> round(float((weight * actions[..., 0] ** 2).sum()), 5)  # mean^2 + variance
        5.0
    """

    order: Count = 3

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See `Nodes`. Raises InputError for rollouts that do not describe a normal policy."""
        for name in ("action_mean", "action_root"):
            if name not in rollouts.steps:
                raise InputError(
                    f'rollouts.steps: NormalNodes expected "{name}" of a normal policy, got {sorted(rollouts.steps)}; '
                    "for another policy use DrawnNodes"
                )
        mean, root = rollouts.steps["action_mean"], rollouts.steps["action_root"]
        one, share = np.polynomial.hermite_e.hermegauss(self.order)
        size = mean.shape[-1]
        white = torch.tensor(list(itertools.product(one.tolist(), repeat=size))).to(mean)  # [N, m]
        weight = torch.tensor([math.prod(w) for w in itertools.product(share.tolist(), repeat=size)]).to(mean)
        return mean[..., None, :] + white @ root.mT, weight / weight.sum()


@checked
@dataclasses.dataclass(frozen=True)
class DrawnNodes:
    """Fresh actions of any policy that can be sampled again in the states that were visited.

    Attributes:
        draw: maps (rollouts, generator) to actions [B, T, m], independent of those taken.
        count: how many are averaged.
        seed: of the generator.

    Example:
        >>> def standard_normal(rollouts, generator):
        ...     return torch.randn(rollouts.size, rollouts.horizon, 1, generator=generator)
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={})
        >>> tuple(DrawnNodes(standard_normal, count=5)(rollouts)[0].shape)
        (2, 1, 5, 1)
    """

    draw: Callable[[Rollouts, torch.Generator], Tensor]
    count: Count = 8
    seed: Whole = 0

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """See `Nodes`."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.stack([self.draw(rollouts, generator) for _ in range(self.count)], 2)
        return drawn, torch.full((self.count,), 1 / self.count).to(drawn)


RIDGE = Ridge()
THREE_NODES = NormalNodes()


@checked
@dataclasses.dataclass(frozen=True)
class RegressionCritic(Critic):
    """For T > 1 and continuous states or actions: returns regressed on (state, action), fitted on *other* paths.

    Q_F is fitted on all folds of paths but one and used on that one, so that no path is judged by its own future. The
    advantage is Q_F(s, a) less its own mean over the policy's actions in s, whatever the fit is worth: one that is
    off leaves a bias in its slope along the actions, never in its centre.

    A leader that moves transitions needs V_F(s') and V_lambda(s') too. They are returned less a second regression of
    them on (s, a): the score that they multiply has mean zero, and without that its noise would drown everything.

    Rollouts carry "action" [B, T, m] in `steps`.

    Attributes:
        state: maps rollouts to what the regression sees of every state, [B, T + 1, k]. Contexts whose values differ
            must differ there.
        nodes: the policy at the visited states: `NormalNodes`, `DrawnNodes`, or a function of your own.
        regressor: fits Q_F and the values.
        pooled: one regression for all steps, which suits long stationary paths; else one a step, which suits a finite
            horizon and needs paths of equal length.
        folds: number of folds.

    Raises:
        InputError: from `evaluate`: fewer paths than folds, paths of several lengths without `pooled`, a `state` of
            another shape.

    Example:
        >>> from align_cbrl import PolicyResponse
        >>> from toy_cmdp import building
        >>> problem = building(horizon=5)
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0]))
        >>> rollouts = problem.follower.rollout(torch.zeros(100, dtype=torch.long), 1, torch.Generator().manual_seed(0))
        >>> critic = RegressionCritic(lambda rollouts: rollouts.steps["state"])
        >>> sorted(PolicyResponse(critic).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    state: Callable[[Rollouts], Tensor]
    nodes: Nodes = THREE_NODES
    regressor: Regressor = RIDGE
    pooled: bool = False
    folds: Several = 2

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T], and values [B, T + 1] for leaders that move the transitions or the first state."""
        if rollouts.size < self.folds:
            raise InputError(f"RegressionCritic: expected at least {self.folds} paths, one a fold, got {rollouts.size}")
        if "action" not in rollouts.steps:
            raise InputError(f'rollouts.steps: RegressionCritic expected "action", got {sorted(rollouts.steps)}')
        if not self.pooled and not bool(rollouts.mask.all()):
            raise InputError(
                "RegressionCritic: expected paths of equal length for one regression a step; pass pooled=True"
            )
        state, action = self.state(rollouts), rollouts.steps["action"]
        if state.ndim != 3 or tuple(state.shape[:2]) != (rollouts.size, rollouts.horizon + 1):
            raise InputError(
                f"RegressionCritic.state: expected shape [{rollouts.size}, {rollouts.horizon + 1}, k], got "
                f"{list(state.shape)}"
            )
        mask = rollouts.mask
        pair = torch.cat([state[:, :-1], action], -1)  # [B, T, k + m]
        nodes, weight = self.nodes(rollouts)
        there = torch.cat([state[:, :-1, None].expand(-1, -1, nodes.shape[2], -1), nodes], -1)  # [B, T, N, k + m]
        returned = returns_to_go(credit, mask, problem.objective.discount)
        moves = problem.leader.log_transition(rollouts) is not None
        soft = None
        if moves:
            discount = per_path(problem.follower.discount, rollouts.contexts)
            soft = returns_to_go(soft_reward(problem, rollouts, "RegressionCritic"), mask, discount)
        moves = moves or problem.leader.log_initial(rollouts) is not None

        advantage = torch.zeros_like(credit)
        value, soft_value = credit.new_zeros(2, rollouts.size, rollouts.horizon + 1)
        fold = torch.arange(rollouts.size) % self.folds
        for k in range(self.folds):
            here, used = fold == k, fold != k
            q = self._fitted(pair[used], returned[used], mask[used])
            mean = q(there) @ weight  # [B, T]
            advantage[here] = torch.where(mask[here], q(pair[here]) - mean[here], 0.0)
            if moves:
                value[here] = self._centred(mean, pair, mask, here, used)
            if soft is not None:
                v = self._fitted(state[used][:, :-1], soft[used], mask[used])
                soft_value[here] = self._centred(v(state[:, :-1]), pair, mask, here, used)
        return Critique(advantage, value if moves else None, soft_value if soft is not None else None)

    def _fitted(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Function:
        """Fit inputs [b, T, k] to targets [b, T] at steps that were taken; the result takes [b', T, ..., k]."""
        if self.pooled:
            pooled = self.regressor.fit(inputs[mask][None], targets[mask][None])
            return lambda at: pooled(at.reshape(1, -1, at.shape[-1])).reshape(at.shape[:-1])
        by_step = self.regressor.fit(inputs.transpose(0, 1), targets.T)

        def fitted(at: Tensor) -> Tensor:
            rows = at.transpose(0, 1)
            return by_step(rows.flatten(1, -2)).reshape(rows.shape[:-1]).transpose(0, 1)

        return fitted

    def _centred(self, value: Tensor, pair: Tensor, mask: Tensor, here: Tensor, used: Tensor) -> Tensor:
        """What value [B, T] of the paths `here` is above its mean given the pair before: [b, T + 1], at s_0 to s_T.

        Of the last state nothing is known, and a path that is over is worth nothing.
        """
        following = torch.nn.functional.pad(torch.where(mask, value, 0.0)[:, 1:], (0, 1))  # V(s_{t + 1}), [B, T]
        expected = self._fitted(pair[used], following[used], mask[used])(pair[here])
        first = value[here][:, :1] - value[used][:, 0].mean()
        return torch.cat([first, torch.where(mask[here], following[here] - expected, 0.0)], 1)
