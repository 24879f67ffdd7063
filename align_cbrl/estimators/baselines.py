"""Biased baselines on the interface of `PolicyResponse`: ignoring the response, or looking one step ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.functional import eligibility_trace
from align_cbrl.problem import Critique, Problem
from align_cbrl.rollouts import Rollouts


class DirectOnly(PolicyResponse):
    """The gradient of a leader who takes the follower's policy as given: no response term (a biased baseline).

    It is what alternating retraining follows; where the utility does not depend on x it is zero.
    """

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        return torch.zeros_like(critique.advantage)


class Myopic(PolicyResponse):
    """`PolicyResponse` of a follower who, at each step, cares for that step's reward only: dA = dr - E_pi dr.

    It is PolicyResponse with the trace w_k = gammaF^k A_F(s_k, a_k) instead of w_k = gamma w_{k-1} + gammaF^k A_F:
    what later rewards do to earlier actions is left out. It stands for rivals that centre rewards step by step, such as
    the SoBiRL baseline (Yang, Gao, Yuan 2024, arXiv 2405.19697) of BC-HG's code. The bias does not vanish with more
    paths; for T = 1 there is none.

    Attributes, errors: as `PolicyResponse`.

    Example:
        >>> import torch
        >>> from align_cbrl import ExpectedUtility, Follower, Leader, Problem
        >>> class Weights(Leader):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.zeros(2))
        ...     def reward(self, rollouts):
        ...         return self.w[rollouts.steps["y"]][:, None]
        >>> class Silent(Follower):
        ...     temperature, discount = 1.0, 0.0
        ...     def sample_contexts(self, count, generator): ...
        ...     def respond(self, leader, contexts): ...
        ...     def rollout(self, contexts, group_size, generator): ...
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"y": torch.tensor([0, 1])})
        >>> objective = ExpectedUtility(lambda leader, rollouts: rollouts.steps["y"][:, None].float())
        >>> problem = Problem(Weights(), objective, Silent())
        >>> _ = Myopic().backward(problem, rollouts)
        >>> problem.leader.w.grad.tolist()  # the covariance of two completions
        [-0.5, 0.5]
    """

    def _trace(self, problem: Problem, rollouts: Rollouts, critique: Critique) -> Tensor:
        mask = rollouts.mask.to(critique.advantage.device)
        return eligibility_trace(critique.advantage, mask, 0.0, problem.objective.discount)
