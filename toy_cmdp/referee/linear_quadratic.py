"""The referee of linear systems: exact J by moments, its implicit gradient, the exact critic, expected PolicyResponse.

States and pairs of a linear system under a normal policy are normal at every step, so that a mean and a covariance say
everything, and what a utility is worth under them has a closed form (`MomentUtility`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.functional import discount_powers
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.problem import Critique, Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.linear_quadratic import NormalResponse, require_normal
from toy_cmdp.followers.riccati import lyapunov
from toy_cmdp.followers.solve import by_context
from toy_cmdp.tables.linear_systems import (
    LinearLeader,
    LinearSystems,
    MomentUtility,
    along_paths,
    form,
    pairs,
    require_linear,
)


def linear_values(problem: Problem, *, responds: bool = True) -> Tensor:
    """f(x, pi*, c) of every context, [C]; backward, the implicit hypergradient through the Riccati equations.

    Args:
        problem: its leader a `LinearLeader`, its follower a `LinearQuadraticFollower`, its objective an
            `ExpectedUtility` of a `MomentUtility`.
        responds: False leaves the response out of the gradient, as a naive leader would.

    Raises:
        InputError: another kind of problem, or systems that `LinearQuadraticFollower.solve` refuses.

    Example:
        >>> from toy_cmdp import lqr
        >>> linear_values(lqr()).shape
        torch.Size([1])
    """
    leader, utility = _parts(problem)
    systems, response = require_normal(problem.follower).solve(leader)
    if not responds:
        response = NormalResponse(response.cost_to_go.detach(), response.gain.detach(), response.covariance.detach())
    return _values(problem, leader, utility, *_pair_laws(systems, response, utility.horizon))


def expected_linear_response(problem: Problem) -> list[Tensor]:
    """The exact expectation of `PolicyResponse` with an exact critic over all endless paths, one tensor a parameter.

    Of the follower's costs and of the transitions only second moments under the trace are needed, N = E sum_k w_k p_k
    p_k', of pairs p = (s, u). The trace has mean zero, so that noise adds nothing to them, N = gamma M N M' + sum_k G_k
    with M the law of the next mean pair and

        G_k = gammaF^k E[A_F,k(p_k) p_k p_k'] = 2 S D S + S d m' + m d'S

    for p_k ~ N(m, S), where d and D are the derivatives of J in the mean and covariance of p_k, less those in the mean
    and covariance of s_k (Stein's identity).

    Args:
        problem: as for `linear_values`.

    Returns:
        dJ / dx, a tensor for each of `problem.parameters`; their `.grad` is left alone.
    """
    leader, utility = _parts(problem)
    follower = require_normal(problem.follower)
    with torch.no_grad():
        _, response = follower.solve(leader)
    with torch.enable_grad():
        systems = leader.systems()
        still = systems.detach()
        moments = _moments(still, response, utility.horizon)
        pair_mean, pair_covariance = torch.stack(moments.pair_mean, 1), torch.stack(moments.pair_covariance, 1)
        value = _values(problem, leader, utility, pair_mean, pair_covariance)
        kinds = (moments.state_mean, moments.state_covariance, moments.pair_mean, moments.pair_covariance)
        found = torch.autograd.grad(value.sum(), [x for kind in kinds for x in kind], retain_graph=True)
        horizon = utility.horizon
        in_state, of_state, in_pair, of_pair = (
            torch.stack(found[i * horizon : (i + 1) * horizon]) for i in range(4)
        )  # [T, C, ...]
        of_state, of_pair = (of_state + of_state.mT) / 2, (of_pair + of_pair.mT) / 2
        mean, covariance = (torch.stack(x).detach() for x in (moments.pair_mean, moments.pair_covariance))

        m = systems.actions
        pad = torch.nn.functional.pad
        slope = covariance @ (in_pair - pad(in_state, (0, m)))[..., None]  # [T, C, d, 1]
        cross = slope @ mean[..., None, :]
        bend = covariance @ (of_pair - pad(of_state, (0, m, 0, m))) @ covariance
        source = (2 * bend + cross + cross.mT).sum(0)  # [C, d, d]
        gamma = torch.as_tensor(follower.discount, dtype=source.dtype).reshape(-1, 1, 1)  # [C or 1, 1, 1]
        second = lyapunov(gamma.sqrt() * (response.feedback @ still.joint), source)

        joint = systems.joint
        temperature = by_context(problem.temperature, source)
        fixed = temperature.detach() if isinstance(temperature, Tensor) else temperature
        cost = systems.cost / temperature + gamma / fixed * (joint.mT @ response.cost_to_go @ joint)
        surrogate = -(second * cost).sum((-1, -2))  # [C]
        next_mean = (joint @ mean[:-1, ..., None])[..., 0]
        next_covariance = joint @ covariance[:-1] @ joint.mT + systems.noise
        surrogate = surrogate + (in_state[1:] * next_mean).sum((0, 2)) + (of_state[1:] * next_covariance).sum((0, 2, 3))
        surrogate = surrogate + (in_state[0] * systems.initial_mean).sum(-1)
        surrogate = surrogate + (of_state[0] * systems.initial_covariance).sum((-1, -2))
        direct = _values(problem, leader, utility, pair_mean.detach(), pair_covariance.detach())
        total = (follower.context_probabilities * (surrogate + direct)).sum()
        gradients = torch.autograd.grad(total, problem.parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(problem.parameters, gradients, strict=True)]


def linear_critique(problem: Problem, rollouts: Rollouts) -> Critique:
    """A_F, V_F and V_lambda along paths of linear systems, exact, less what the previous pair lets expect of them.

    Of a value only what it differs from its conditional mean is returned: it is multiplied with the score of the
    transition, whose own mean is zero, and noise of standard deviation 0.001 would otherwise be amplified a thousand
    times.

    Args:
        problem: as for `linear_values`.
        rollouts: paths from their first step on.

    Returns:
        Advantage [B, T]; value and soft value [B, T + 1], centred as above.
    """
    leader, utility = _parts(problem)
    follower = require_normal(problem.follower)
    discount, at = problem.objective.discount, rollouts.contexts
    with torch.no_grad():
        systems, response = follower.solve(leader)
        pair, state = pairs(rollouts), rollouts.steps["state"]
        size, horizon = rollouts.size, rollouts.horizon
        counted = min(utility.horizon, horizon)
        loop = response.feedback @ systems.joint  # mean pair to next mean pair, [C, d, d]
        q, value = pair.new_zeros(size, horizon + 1), pair.new_zeros(size, horizon + 1)
        mean = pair[:, :counted]
        mean_of_state = state[:, :counted] @ along_paths(response.feedback, at).mT
        onward = along_paths(loop, at).mT
        own = torch.zeros_like(loop)  # covariance of p_{t + lag} given p_t, and given s_t
        given_state = response.spread
        for lag in range(counted):
            left = counted - lag
            weight = discount**lag * utility.weight[lag:counted]
            q[:, :left] += weight * utility.mean(leader, at, mean[:, :left], along_paths(own, at)[:, None])
            value[:, :left] += weight * utility.mean(
                leader, at, mean_of_state[:, :left], along_paths(given_state, at)[:, None]
            )
            mean, mean_of_state = mean[:, : left - 1] @ onward, mean_of_state[:, : left - 1] @ onward
            fresh = response.feedback @ systems.noise @ response.feedback.mT + response.spread
            own, given_state = loop @ own @ loop.mT + fresh, loop @ given_state @ loop.mT + fresh
        advantage = q[:, :-1] - value[:, :-1]

        centred = value.clone()
        gain = utility(leader, rollouts)
        if discount > 0:
            centred[:, 1:] -= (q[:, :-1] - gain) / discount  # E[V_F(s') | p] = (Q_F - u) / gammaF
        first = _values(problem, leader, utility, *_pair_laws(systems, response, utility.horizon))
        centred[:, 0] -= first[at]
        p = response.cost_to_go
        ahead = systems.joint.mT @ p @ systems.joint
        expected = form(along_paths(ahead, at), pair) + (p * systems.noise).sum((-1, -2))[at, None]
        soft = torch.zeros_like(value)
        soft[:, 1:] = expected - form(along_paths(p, at), state[:, 1:])
    return Critique(advantage, centred, soft)


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Of states and pairs at every step: lists over T of [C, n], [C, n, n], [C, d] and [C, d, d]."""

    state_mean: list[Tensor]
    state_covariance: list[Tensor]
    pair_mean: list[Tensor]
    pair_covariance: list[Tensor]


def _moments(systems: LinearSystems, response: NormalResponse, horizon: int) -> _Moments:
    """The moments of the first `horizon` steps, one after the other, with a graph that begins at the first state."""
    mean, covariance = systems.initial_mean.requires_grad_(), systems.initial_covariance.requires_grad_()
    moments = _Moments([], [], [], [])
    for _ in range(horizon):
        pair_mean = (response.feedback @ mean[..., None])[..., 0]
        pair_covariance = response.feedback @ covariance @ response.feedback.mT + response.spread
        moments.state_mean.append(mean)
        moments.state_covariance.append(covariance)
        moments.pair_mean.append(pair_mean)
        moments.pair_covariance.append(pair_covariance)
        mean = (systems.joint @ pair_mean[..., None])[..., 0]
        covariance = systems.joint @ pair_covariance @ systems.joint.mT + systems.noise
    return moments


def _pair_laws(systems: LinearSystems, response: NormalResponse, horizon: int) -> tuple[Tensor, Tensor]:
    """Means [C, T, d] and covariances [C, T, d, d] of the pairs, by doubling: ten times as fast as step by step.

    What k steps make of a state is s -> M^k s + noise of covariance W_k; what k + l steps make of it follows from both.
    """
    further = systems.joint @ response.feedback  # M^l, [C, n, n]
    added = systems.joint @ response.spread @ systems.joint.mT + systems.noise  # W_l
    power = torch.eye(systems.states, dtype=added.dtype).expand(systems.contexts, 1, -1, -1)  # M^k, [C, l, n, n]
    noise = torch.zeros_like(power)  # W_k
    while power.shape[1] < horizon:
        onward = further[:, None]
        noise = torch.cat([noise, onward @ noise @ onward.mT + added[:, None]], 1)
        power = torch.cat([power, onward @ power], 1)
        added, further = further @ added @ further.mT + added, further @ further
    power, noise = power[:, :horizon], noise[:, :horizon]
    feedback = response.feedback[:, None]
    mean = (feedback @ (power @ systems.initial_mean[:, None, :, None]))[..., 0]
    covariance = power @ systems.initial_covariance[:, None] @ power.mT + noise
    return mean, feedback @ covariance @ feedback.mT + response.spread[:, None]


def _values(problem: Problem, leader: LinearLeader, utility: MomentUtility, mean: Tensor, covariance: Tensor) -> Tensor:
    """The discounted sum of the utility's means under the laws of the pairs, [C]."""
    gain = utility.mean(leader, torch.arange(len(mean)), mean, covariance)  # [C, T]
    powers = discount_powers(problem.objective.discount, utility.horizon, gain)
    return (powers * utility.weight * gain).sum(-1)


def _parts(problem: Problem) -> tuple[LinearLeader, MomentUtility]:
    objective = problem.objective
    if not isinstance(objective, ExpectedUtility) or not isinstance(objective.utility_function, MomentUtility):
        raise InputError(
            "objective: on linear systems expected ExpectedUtility of a MomentUtility (QuadraticUtility, BumpUtility), "
            f"whose means are known, got {type(objective).__name__}"
        )
    return require_linear(problem.leader), objective.utility_function
