"""Critics: the leader's advantage along the follower's paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.functional import group_advantage, returns_to_go
from align_cbrl.problem import Critic, Critique, Problem, per_path
from align_cbrl.rollouts import Rollouts


class GroupCritic(Critic):
    """For T = 1: compares each sample with the others of its group (the completions of one prompt).

    Unbiased for the covariance within the group, needs nothing fitted, and at least two samples a group
    (theory: section 2, "Language models are the case T = 1").
    """

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, 1]. Raises InputError for T > 1 and for groups of one."""
        if rollouts.horizon != 1:
            raise InputError(
                f"GroupCritic: expected rollouts of one step, got a horizon of {rollouts.horizon}; a sample's own "
                "future is correlated with its reward's gradient, so use FittedCritic or an exact critic"
            )
        weight = rollouts.path_weight(credit.dtype).to(credit.device)
        return Critique(group_advantage(credit[:, 0], rollouts.group[:, 0], weight)[:, None])


@checked
@dataclasses.dataclass(frozen=True)
class FittedCritic(Critic):
    """For T > 1 and finitely many actions: averages of returns by (state cell, action), fitted on *other* paths.

    The paths are dealt into folds; each fold's advantages come from averages over all the other folds, so that no
    path is judged by its own future (cross-fitting; theory: trap 1). The advantage is centred exactly under the
    follower's known policy, Q(s, a) - sum_a' pi(a'|s) Q(s, a').

    Rollouts must carry, in `steps`, "action" (long [B, T]) and "log_policy_all" (log-probabilities of all actions,
    [B, T, A]).

    Attributes:
        cell: maps rollouts to the cell of every visited state, long [B, T + 1]; states in one cell share their
            averages. Different contexts need different cells.
        folds: number of folds, at least 2.
    """

    cell: Callable[[Rollouts], Tensor]
    folds: int = 2

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(
                f"FittedCritic.folds: expected at least 2, got {self.folds}; 1 would judge a path by itself"
            )

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T], value and soft value [B, T + 1]. Raises InputError with fewer paths than folds."""
        if rollouts.size < self.folds:
            raise InputError(f"FittedCritic: expected at least {self.folds} paths, one a fold, got {rollouts.size}")
        action, log_policy = rollouts.steps["action"], rollouts.steps["log_policy_all"]
        cell = self.cell(rollouts)  # [B, T + 1]
        fold = torch.arange(rollouts.size, device=credit.device) % self.folds  # [B]
        alive = torch.cat([rollouts.mask, _survives(rollouts)[:, None]], dim=1)  # [B, T + 1]: a state was met

        ret = returns_to_go(credit, rollouts.mask, problem.objective.discount)
        soft = None
        if problem.leader.log_transition(rollouts) is not None:
            discount = per_path(problem.follower.discount, rollouts.contexts)
            soft = returns_to_go(soft_reward(problem, rollouts, "FittedCritic"), rollouts.mask, discount)

        advantage = torch.zeros_like(credit)
        value = credit.new_zeros(alive.shape)
        soft_value = credit.new_zeros(alive.shape)
        cells, actions = int(cell.max()) + 1, log_policy.shape[-1]
        for k in range(self.folds):
            here, used = fold == k, (fold != k)[:, None] & rollouts.mask  # [B], [B, T]
            visited = cell[:, :-1]
            state_mean = _mean_by(ret[used], visited[used], cells, ret[used].mean())
            pair = visited * actions + action
            fallback = state_mean.repeat_interleave(actions)
            q = _mean_by(ret[used], pair[used], cells * actions, fallback).view(cells, actions)
            q_here = q[visited[here]]  # [b, T, A]
            centre = (log_policy[here].exp() * q_here).sum(-1)
            chosen = q_here.gather(-1, action[here][..., None])[..., 0]
            advantage[here] = chosen - centre
            value[here] = state_mean[cell[here]]
            if soft is not None:
                soft_mean = _mean_by(soft[used], visited[used], cells, soft[used].mean())
                soft_value[here] = soft_mean[cell[here]]
        zero = torch.zeros_like(value)
        return Critique(
            advantage=torch.where(rollouts.mask, advantage, torch.zeros_like(advantage)),
            value=torch.where(alive, value, zero),
            soft_value=None if soft is None else torch.where(alive, soft_value, zero),
        )


def _survives(rollouts: Rollouts) -> Tensor:
    """bool [B]: the path was cut at the horizon rather than ended by its world, so its last state has a future."""
    ended = rollouts.steps.get("ended")
    return rollouts.mask[:, -1] if ended is None else rollouts.mask[:, -1] & ~ended


def soft_reward(problem: Problem, rollouts: Rollouts, name: str) -> Tensor:
    """r - lambda (log pi - log prior) [B, T], whose discounted sums are the follower's own soft value.

    Raises:
        InputError: rollouts without log-probabilities; the message begins with `name`, the critic's.
    """
    if rollouts.log_policy is None or rollouts.log_prior is None:
        raise InputError(f"{name}: a leader that moves the transitions needs log_policy and log_prior in Rollouts")
    with torch.no_grad():
        reward = problem.leader.reward(rollouts)
        temperature = per_path(problem.temperature, rollouts.contexts)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(reward).reshape(-1, 1)  # [B, 1] or [1, 1]
    return reward - temperature * (rollouts.log_policy - rollouts.log_prior)


def _mean_by(value: Tensor, index: Tensor, count: int, fallback: Tensor) -> Tensor:
    """Averages of value [N] by index [N]: [count]; `fallback` (scalar or [count]) where nothing was seen."""
    total = torch.zeros(count, dtype=value.dtype, device=value.device).index_add(0, index, value)
    seen = torch.zeros_like(total).index_add(0, index, torch.ones_like(value))
    return torch.where(seen > 0, total / seen.clamp(min=1), fallback)
