"""`StepResponse`: the hypergradient through the next step of a trainer that has no best response."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.distributed import gather_rows, together
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import check_reward
from align_cbrl.estimators.metric import Metric
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.groups import Groups
from align_cbrl.problem import Critique, Problem
from align_cbrl.rollouts import Rollouts

Scale = Literal["group", "batch", "none"]
"""By what a trainer divides centred rewards: the standard deviation of the group, of the batch, or nothing."""

_FLOOR = 1e-4  # what trl adds to a standard deviation
_ALIKE = 1e-8  # a standard deviation that trl calls zero


@checked
@dataclasses.dataclass
class StepResponse(PolicyResponse):
    """The gradient through one step of a policy gradient on normalised advantages, as GRPO takes by default.

    Without a KL term there is no Boltzmann response, and with rewards divided by their spread none at a temperature
    that anybody set. But the next policy is known: pi' ~ pi exp(eta A_x), A_x(y) what the trainer's advantage of y is
    on average over the rest of its batch. To first order in the step size eta, dJ(pi')/dx = eta Cov_pi(phi, dA_x),
    phi the objective's credit: `PolicyResponse` with the advantage in the place of the reward, and 1 / eta in that of
    the temperature. For the scale "group", with s the group's standard deviation + 1e-4,

        dA_i = (dr_i - mean dr) / s - A_i sum_j A_j dr_j / ((G - 1) s'),    s' = s - 1e-4,

    and the estimate is unbiased for every group size, up to the factor G / (G - 1), which belongs to eta
    (docs/trl_script.md; theory: sections 5 and 6 of docs/derivation.md, with A in the place of r). Groups whose rewards
    are all alike have A = 0 and a derivative of 1 / 1e-4, true for weights that move by less than that; the spread of
    the other groups stands in for theirs.

    It sees no further than the next step, and has no gap to certify. A policy whose completions are all alike gives it
    nothing to go by.

    Attributes:
        critic, chunks: as for `PolicyResponse`.
        scale: by what the trainer divides its centred rewards, as trl's `scale_rewards`.

    Raises:
        InputError: weighted rollouts, paths of several steps, or whatever `PolicyResponse` refuses.

    Example:
        >>> import toy_cmdp
        >>> problem = toy_cmdp.preferences(seed=0)
        >>> _ = problem.follower.respond(problem.leader, torch.arange(2))
        >>> rollouts = problem.follower.rollout(torch.arange(2), 8, torch.Generator().manual_seed(0))
        >>> StepResponse(scale="batch").backward(problem, rollouts)["gradient_norm"] > 0
        True
    """

    scale: Scale = "group"
    best_response: ClassVar[bool] = False
    _reward: Tensor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`."""
        if rollouts.horizon != 1 or rollouts.weight is not None:
            what = "importance weights" if rollouts.horizon == 1 else f"paths of {rollouts.horizon} steps"
            raise InputError(
                f"StepResponse: expected the trainer's own batch of completions, got {what}; a step has no best "
                "response that samples could be weighted for"
            )
        with torch.no_grad(), together("scoring the completions"):
            scored = torch.cat([problem.leader.reward(piece).double() for piece in rollouts.chunks(self.chunks)])
            check_reward(problem.leader, scored, rollouts)
        self._reward = gather_rows(scored[:, 0])
        return super().backward(problem, rollouts)

    def metric(self, problem: Problem, rollouts: Rollouts) -> Metric:
        """Refused: nats are those of a best response, which there is not."""
        raise InputError(
            "HPGDConfig.natural: expected none with a StepResponse, since a trainer's next step has no metric in nats; "
            "use an optimizer, or a KL term (beta > 0, and no scaling of rewards), which makes a best response"
        )

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        """What each reward weighs in the surrogate: the advantages' weights, carried through their normalisation.

        Here the whole batch is known, of all chunks and processes, which groups and the batch's spread need.
        """
        assert self._reward is not None
        trace = super()._trace(problem, rollouts, critique)  # [B, 1]
        with torch.enable_grad():
            reward = self._reward.to(trace).requires_grad_()
            advantage = scaled_advantage(reward, rollouts.group[:, 0].to(trace.device), self.scale)
            (weight,) = torch.autograd.grad(advantage, reward, grad_outputs=trace[:, 0])
        return weight[:, None]


def scaled_advantage(reward: Tensor, group: Tensor, scale: Scale) -> Tensor:
    """The advantage of each completion as trl's GRPO computes it, differentiable in the rewards.

    Args:
        reward: [B].
        group: long [B], completions of one prompt.
        scale: of the rewards less their group's mean.

    Returns:
        [B]. Where rewards are all alike it is zero, with the derivative that `StepResponse` describes.

    Example:
        >>> reward = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64)
        >>> group = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> [round(advantage, 3) for advantage in scaled_advantage(reward, group, "group").tolist()]
        [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    groups = Groups.of(group)
    centred = groups.centred(reward)
    if scale == "none":
        return centred
    if scale == "batch":
        squares, freedom = (reward - reward.mean()).square().sum(), torch.tensor(max(len(reward) - 1, 1))
    else:
        squares, freedom = groups.sum(centred.square()), (groups.sizes - 1).clamp(min=1)
    variance = squares / freedom
    alike = variance <= _ALIKE**2
    usual = (squares.sum() / freedom.sum()).detach()  # the mean variance of a group
    spread = torch.where(alike, usual, variance).clamp(min=_ALIKE**2).sqrt() + _FLOOR
    return centred / (spread[groups.place] if scale == "group" else spread)
