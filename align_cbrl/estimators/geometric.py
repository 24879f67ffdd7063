"""`GradientEstimator`: the paper's estimator, in which random horizons stand in for discounting."""

from __future__ import annotations

import dataclasses
import struct

import torch
from torch import Tensor

from align_cbrl.checks import Whole, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.critics import GroupCritic
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.observing import derivatives, direct_term, observe
from align_cbrl.functional import returns_to_go
from align_cbrl.objectives.expected import mean_term
from align_cbrl.problem import Critic, Problem, check_discount, per_path, step_seed
from align_cbrl.rollouts import Rollouts, check_finite


@checked
@dataclasses.dataclass(frozen=True)
class GradientEstimator(Hypergradient):
    """HPGD's GradientEstimator (Thoma et al. 2024, Algorithm 2) on given paths, cut at geometric horizons.

    For a sum of h_t with weights g^t, draw T with P(T >= t) = g^t and add h_0 + ... + h_T without weights: the mean
    is the same. With T_F ~ Geo(1 - gammaF) for the leader, T ~ Geo(1 - gamma) and U ~ Geo(1 - gamma^{1/2}) for the
    follower, all independent, each path contributes the gradient of

        sum_{t <= T_F} u_t + V_F(s_0) log rho(s_0) + gammaF sum_{t <= T_F} V_F(s_{t+1}) log P_t
        + A_F(s_m, a_m) / ((1 - gammaF) lambda) {
              sum_{k = m}^{m + T} (r_k + lambda log prior_k)
              + sum_{j = m}^{m + U} gamma^{(j - m)/2} b_j sum_{k = m}^{j - 1} log P_k }

    at m = T_F, where b_j = r_j - lambda log(pi / prior)_j is the follower's regularised reward: the inner double sum is
    that of gamma^{j-m} b_j, one half of whose discount is a horizon and the other a weight, so that its variance stays
    bounded. Contributions past the end of an episode are zero.

    Unbiased as far as the critic is, and as far as the paths reach: what a horizon would have added after a path was
    cut is lost. Its variance is much larger than that of `PolicyResponse`, which averages over all of these horizons.

    Attributes:
        critic: gives A_F at every step and, for leaders that move transitions or the initial state, V_F.
        seed: of the horizons, together with a checksum of the paths, so that a resumed run repeats itself.

    Raises:
        InputError: utilities, advantages or rewards that are not finite; a leader that moves transitions or the initial
            state with a critic that gives no values; transitions that move and rollouts without log-probabilities; a
            discount outside [0, 1).

    Example:
        >>> from toy_cmdp import ExactCritic, random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> sorted(GradientEstimator(ExactCritic()).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    critic: Critic = dataclasses.field(default_factory=GroupCritic)
    seed: Whole = 0

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; `objective` is the sum up to the leader's horizons."""
        leader, leader_discount = problem.leader, problem.objective.discount
        check_discount("objective.discount", leader_discount)
        mask, size = rollouts.mask, rollouts.size
        steps = torch.arange(rollouts.horizon)
        objective = problem.objective
        if not objective.is_mean:
            raise InputError(
                f"GradientEstimator: expected a mean over contexts, got {type(objective).__name__}; use PolicyResponse"
            )
        observed = observe(problem, rollouts)
        with torch.no_grad():
            term = mean_term(objective, observed)
            utility = term.utility
            critique = self.critic.evaluate(problem, rollouts, term.credit)
            check_finite("advantage", critique.advantage, rollouts)
        dtype = critique.advantage.dtype
        gamma = torch.as_tensor(per_path(problem.follower.discount, rollouts.contexts), dtype=dtype).expand(size)
        temperature = torch.as_tensor(per_path(problem.temperature, rollouts.contexts), dtype=dtype)
        temperature = temperature.expand(size)[:, None]  # [B, 1], with a graph where the leader sets it
        fixed = temperature.detach()

        generator = torch.Generator().manual_seed(step_seed(self.seed, _checksum(rollouts)))
        until = _geometric(torch.full_like(gamma, leader_discount), generator)  # [B]: the leader's m
        reach, far = _geometric(gamma, generator), _geometric(gamma.sqrt(), generator)
        counted = mask & (steps <= until[:, None])  # [B, T]
        weight = rollouts.path_weight(dtype)[:, None] / size  # [B, 1]

        inside = until < rollouts.horizon
        chosen = until.clamp(max=rollouts.horizon - 1)
        alive = inside & mask.gather(1, chosen[:, None])[:, 0]
        advantage = torch.where(alive, critique.advantage.gather(1, chosen[:, None])[:, 0], 0.0) / (1 - leader_discount)
        after = mask & (steps >= until[:, None])
        responds = after & (steps <= (until + reach)[:, None])
        response = weight * advantage[:, None]  # [B, 1], of what is in nats

        reward = leader.reward(rollouts)
        check_finite(f"{type(leader).__name__}.reward", reward, rollouts)
        surrogate = torch.where(responds, response * (reward / temperature), 0.0).sum()
        direct = torch.where(counted, weight.expand_as(utility), torch.zeros_like(utility))
        weights = derivatives(lambda seen: (direct * mean_term(objective, seen).utility).sum(), observed)
        own = direct_term(leader, rollouts, weights)
        if own is not None:
            surrogate = surrogate + own
        log_prior = leader.log_prior(rollouts)
        if log_prior is not None:
            surrogate = surrogate + torch.where(responds, response * log_prior, 0.0).sum()
        log_transition = leader.log_transition(rollouts)
        if log_transition is not None:
            value = self._value(critique.value)[:, 1:]
            credit = leader_discount * torch.where(counted, weight * value, 0.0)
            later = _later(self._soft_reward(problem, rollouts, reward.detach()), after, until, far, gamma)
            surrogate = surrogate + torch.where(mask, (credit + response / fixed * later) * log_transition, 0.0).sum()
        log_initial = leader.log_initial(rollouts)
        if log_initial is not None:
            surrogate = surrogate + (weight[:, 0] * self._value(critique.value)[:, 0] * log_initial).sum()

        gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
        norm = accumulate(problem, gradients)
        return {"objective": float((direct * utility).sum()) + objective.constant, "gradient_norm": norm}

    def _value(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise InputError(
                f"{type(self.critic).__name__} gives no value, which a leader that moves transitions or the initial "
                "state needs"
            )
        return value

    def _soft_reward(self, problem: Problem, rollouts: Rollouts, reward: Tensor) -> Tensor:
        if rollouts.log_policy is None or rollouts.log_prior is None:
            raise InputError(
                "GradientEstimator: a leader that moves the transitions needs log_policy and log_prior in Rollouts"
            )
        temperature = torch.as_tensor(per_path(problem.temperature, rollouts.contexts), dtype=reward.dtype).detach()
        return reward - temperature.reshape(-1, 1) * (rollouts.log_policy - rollouts.log_prior)


def _geometric(discount: Tensor, generator: torch.Generator) -> Tensor:
    """T >= 0 with P(T >= t) = g^t, long [B], for g [B]."""
    uniform = 1 - torch.rand(len(discount), generator=generator, dtype=torch.float64)  # in (0, 1]
    drawn = torch.floor(uniform.log() / discount.double().clamp(min=1e-300).log())
    return torch.where(discount > 0, drawn, torch.zeros_like(drawn)).long()


def _later(soft_reward: Tensor, after: Tensor, start: Tensor, far: Tensor, gamma: Tensor) -> Tensor:
    """sum_{k < j <= m + U} gamma^{(j - m)/2} b_j at every k >= m, [B, T]; start is m, far is U."""
    steps = torch.arange(after.shape[1])
    since = (steps - start[:, None]).clamp(min=0).to(soft_reward.dtype)
    near = after & (steps <= (start + far)[:, None])
    discounted = torch.where(near, gamma.sqrt()[:, None] ** since * soft_reward, 0.0)
    from_here = returns_to_go(discounted, near, 1.0)
    return torch.where(after, from_here - discounted, 0.0)


def _checksum(rollouts: Rollouts) -> int:
    """A number that other paths would hardly have."""
    seen = rollouts.mask.double() if rollouts.log_policy is None else rollouts.log_policy.double()
    places = torch.arange(1, seen.numel() + 1, dtype=torch.float64, device=seen.device).sqrt()
    (number,) = struct.unpack("<q", struct.pack("<d", float((seen.reshape(-1) * places).sum())))
    return int(number)
