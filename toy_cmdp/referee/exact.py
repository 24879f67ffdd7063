"""The referee: exact J, its implicit hypergradient, an exact critic, and exact expectations of PolicyResponse."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.estimators.metric import MatrixMetric, Metric
from align_cbrl.problem import Critic, Critique, Problem, Term
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.exact import ExactFollower, make_rollouts, require_exact
from toy_cmdp.followers.linear_quadratic import require_normal
from toy_cmdp.followers.solve import SoftSolution, by_context, continuation, per_state, soft_logits
from toy_cmdp.referee.linear_quadratic import expected_linear_response, linear_critique, linear_values
from toy_cmdp.referee.metric import exact_metric
from toy_cmdp.referee.tabulated import linearised, of_contexts, tabulated_terms, worth
from toy_cmdp.tables.arguments import check_size
from toy_cmdp.tables.cmdp import Tables, TabularLeader, gather_steps, require_tabular
from toy_cmdp.tables.linear_systems import LinearLeader
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import PolicySystem, expected_next, policy_system, pushed


@checked
def leader_value(problem: Problem) -> Tensor:
    """J(x), exact, a scalar whose `backward` is the implicit hypergradient: sum_c Xi(c) sum_s rho_x(s) V_F(c, s) for an
    expectation, and what the objective makes of the contexts' values otherwise.

    Both fixed points, the follower's V = T_x(V) and the leader's V_F = T^F_{x, pi}(V_F), are solved without a graph;
    what is differentiated is V + (I - dT/dV)^{-1} (T_x(V) - V), whose backward pass is one solve with the transpose
    of the factored matrix (implicit function theorem). Memory does not grow with the number of iterations. The
    follower starts from the fixed point of the last call.

    Args:
        problem: its leader a `TabularLeader`, its follower an `ExactFollower`, its objective an `ExpectedUtility` of a
            `TabularUtility`, or a `PreferenceLikelihood` or `SetUtility` of one where every state is terminal; or what
            is made of such (a KL price, a constraint, risk over contexts, a function of means). Or a `LinearLeader`, a
            `LinearQuadraticFollower` and an `ExpectedUtility` of a `MomentUtility` (`linear_values`).

    Returns:
        Scalar; first derivatives only.

    Raises:
        InputError: another kind of problem, tables that are no laws, utilities that are not finite.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> leader_value(problem).backward()
        >>> problem.leader.x.grad.shape
        torch.Size([5])
    """
    if isinstance(problem.leader, LinearLeader):
        return (require_normal(problem.follower).context_probabilities * linear_values(problem)).sum()
    terms, values = _values(problem)
    probabilities = require_exact(problem.follower).cmdp.context_probabilities.to(values[0].dtype)
    return worth(problem.objective, terms, values, probabilities)


def _values(problem: Problem) -> tuple[list[Term], list[Tensor]]:
    """The terms of the objective, and what each is worth in every context, [C], with graph."""
    leader, follower = _tabular(problem)
    cmdp, temperature = follower.cmdp, problem.temperature
    tables, solution = follower.solve(leader)
    go_on = continuation(cmdp, follower.discount, tables.reward)
    go_on_leader = continuation(cmdp, problem.objective.discount, tables.reward)

    with torch.no_grad():
        law = tables.detach().transition
        policy = solution.log_policy.exp()
        factors = policy_system(law, go_on * policy)
        leader_factors = factors if _same(follower.discount, problem) else policy_system(law, go_on_leader * policy)

    q = tables.reward + go_on * expected_next(tables.transition, solution.value)
    image = torch.logsumexp(soft_logits(q, tables.log_prior, temperature), -1) * per_state(temperature, q)
    value = _fixed_point(image, solution.value, factors)
    q = tables.reward + go_on * expected_next(tables.transition, value)
    log_policy = torch.log_softmax(soft_logits(q, tables.log_prior, temperature), -1)

    policy = log_policy.exp()
    terms = tabulated_terms(problem.objective, leader, cmdp, log_policy, tables)
    values = []
    for term in terms:
        with torch.no_grad():
            leader_fixed = leader_factors.solve((policy * term.utility).sum(-1))
        q_leader = term.utility + go_on_leader * expected_next(tables.transition, leader_fixed)
        leader_values = _fixed_point((policy * q_leader).sum(-1), leader_fixed, leader_factors)
        values.append((tables.initial * leader_values).sum(-1))
    return terms, values


class ImplicitHypergradient(Hypergradient):
    """The referee on the estimators' interface: the exact dJ/dx, whatever the rollouts.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> sorted(ImplicitHypergradient().backward(problem))
        ['gradient_norm', 'objective']
    """

    def backward(self, problem: Problem, rollouts: Rollouts | None = None) -> dict[str, float]:
        """Add the exact gradient to `.grad`; `objective` is the exact J, and the rollouts are not looked at."""
        value = leader_value(problem)
        gradients = torch.autograd.grad(value, problem.parameters, allow_unused=True)
        norm = accumulate(problem, gradients)
        return {"objective": value.item(), "gradient_norm": norm}

    def metric(self, problem: Problem, rollouts: Rollouts | None = None) -> Metric:
        """The exact metric; the rollouts are not looked at."""
        return MatrixMetric(exact_metric(problem))


def context_values(problem: Problem) -> Tensor:
    """f(x, pi*, c) of every context, [C], without graph; of a risk, what the risk is taken of.

    Raises:
        InputError: as `leader_value`, and for a function of means, which has no value in a context.
    """
    with torch.no_grad():
        if isinstance(problem.leader, LinearLeader):
            return linear_values(problem)
        terms, values = _values(problem)
        if any(term.joint is not None for term in terms):
            raise InputError("context_values: a function of means over all contexts has no value in a single one")
        return of_contexts(problem.objective, values)


@dataclasses.dataclass(frozen=True)
class ExactWorld:
    """Everything there is to know at the leader's present parameters; only `tables` and `utility` carry a graph.

    Attributes:
        tables: the leader's.
        solution: the follower's best response.
        objective: J, a scalar.
        utility: [C, S, A], the leader's, less any prices, with the policy held constant. Where the objective is more
            than a mean over contexts it is linearised: each context counts by the derivative of J (`Linearised`).
        advantage, q: [C, S, A], A_F = Q_F - V_F and Q_F of the leader's credit, which is the utility unless the
            objective is made of pairs.
        value: [C, S], the leader's V_F.
        policy: [C, S, A], pi*.
    """

    tables: Tables
    solution: SoftSolution
    objective: Tensor
    utility: Tensor
    advantage: Tensor
    q: Tensor
    value: Tensor
    policy: Tensor


def exact_world(problem: Problem) -> ExactWorld:
    """Solve follower and leader at the present parameters; same requirements as `leader_value`.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> world = exact_world(random_cmdp())
        >>> bool((world.policy * world.advantage).sum(-1).abs().max() < 1e-12)
        True
    """
    leader, follower = _tabular(problem)
    tables, solution = follower.solve(leader)
    terms = tabulated_terms(problem.objective, leader, follower.cmdp, solution.log_policy, tables)
    policy, law = solution.log_policy.exp().detach(), tables.detach().transition
    with torch.no_grad():
        go_on = continuation(follower.cmdp, problem.objective.discount, tables.reward)
        system = policy_system(law, go_on * policy)

    def in_context(utility: Tensor) -> Tensor:
        with torch.no_grad():
            return (tables.initial * system.solve((policy * utility).sum(-1))).sum(-1)

    probabilities = follower.cmdp.context_probabilities.to(policy)
    whole = linearised(problem.objective, terms, in_context, probabilities)
    with torch.no_grad():
        value = system.solve((policy * whole.utility).sum(-1))
        q = whole.credit + go_on * expected_next(law, value)
        advantage = q - (policy * q).sum(-1, keepdim=True)
    return ExactWorld(tables, solution, whole.value, whole.utility, advantage, q, value, policy)


class ExactCritic(Critic):
    """A_F, V_F and V_lambda from the tables or linear systems, at the leader's present parameters.

    It ignores the sampled `credit`, which for the objectives that it supports (those of `leader_value`) it computes
    itself.

    Example:
        >>> from align_cbrl.estimators.policy_response import PolicyResponse
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 8, torch.Generator().manual_seed(0))
        >>> sorted(PolicyResponse(ExactCritic()).backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """Advantage [B, T], value and soft value [B, T + 1], zero once the episode is over."""
        if isinstance(problem.leader, LinearLeader):
            return linear_critique(problem, rollouts)
        with torch.no_grad():
            world = exact_world(problem)
            state = rollouts.steps["state"]
            flat = rollouts.contexts[:, None] * world.value.shape[1] + state.clamp(min=0)  # [B, T + 1]

            def along(table: Tensor) -> Tensor:
                return torch.where(state >= 0, table.reshape(-1)[flat], 0.0)

            return Critique(
                advantage=gather_steps(world.advantage, rollouts),
                value=along(world.value),
                soft_value=along(world.solution.value),
            )


@checked
def expected_policy_response(problem: Problem, world: ExactWorld | None = None) -> list[Tensor]:
    """The exact expectation of `PolicyResponse` with an exact critic over all infinite paths, one tensor a parameter.

    With mu(s, a) = sum_t gammaF^t Pr(s_t = s, a_t = a) and eta(s, a) = E sum_k w_k 1{s_k = s, a_k = a}, w the
    eligibility trace, the surrogate's expectation is

        sum_s rho(s) V_F(s) + sum_{s,a} { mu u + eta (r / lambda) + eta log prior
              + sum_{s'} [gammaF mu V_F(s') + (gamma / lambda) eta V_lambda(s')] P(s'|s,a) }

    with everything detached but rho, u, r / lambda, log prior and P. E[A_F] = 0 in every state, so eta's state
    marginal h solves h = gamma P_pi^T h + gamma P^T (mu A_F), and eta = pi h + mu A_F: two transposed solves in all.

    Requirements and errors as for `leader_value`.

    Args:
        problem: as for `leader_value`.
        world: `exact_world(problem)`, if it has been solved already.

    Returns:
        dJ / dx, a tensor for each of `problem.parameters`; their `.grad` is left alone.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> leader_value(problem).backward()
        >>> torch.allclose(expected_policy_response(problem)[0], problem.leader.x.grad)
        True
    """
    if isinstance(problem.leader, LinearLeader):
        return expected_linear_response(problem)
    _, follower = _tabular(problem)
    world = exact_world(problem) if world is None else world
    tables, leader_discount = world.tables, problem.objective.discount
    discount, temperature = follower.discount, problem.temperature
    with torch.no_grad():
        law = tables.detach().transition
        go_on = continuation(follower.cmdp, discount, tables.reward)  # [C, S, 1]
        go_on_leader = continuation(follower.cmdp, leader_discount, tables.reward)
        occupancy = policy_system(law, go_on_leader * world.policy).solve(tables.initial, transpose=True)
        mu = occupancy[..., None] * world.policy  # [C, S, A]
        source = pushed(law, go_on * mu * world.advantage)
        marginal = policy_system(law, go_on * world.policy).solve(source, transpose=True)
        eta = world.policy * marginal[..., None] + mu * world.advantage
        weight = eta / by_context(temperature, eta)
    next_leader = expected_next(tables.transition, world.value)
    next_soft = expected_next(tables.transition, world.solution.value)
    per_context = (
        (tables.initial * world.value).sum(-1)
        + (mu * world.utility).sum((-1, -2))
        + (eta * (tables.reward / by_context(temperature, eta))).sum((-1, -2))
        + (go_on_leader * mu * next_leader + go_on * weight * next_soft).sum((-1, -2))
    )
    if tables.log_prior is not None:
        per_context = per_context + (eta * tables.log_prior).sum((-1, -2))
    surrogate = (follower.cmdp.context_probabilities.to(per_context) * per_context).sum()
    gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(problem.parameters, gradients, strict=True)]


@checked
def enumerate_paths(problem: Problem, horizon: Count, *, max_paths: Count = 1_000_000) -> Rollouts:
    """All paths of the best response with positive probability, weighted so that means are exact expectations.

    A path's weight is B times its probability (nature's draw included), which has mean one.

    Args:
        problem: as for `leader_value`, with episodes that end for certain.
        horizon: number of steps after which every episode is over.
        max_paths: a guard of the memory.

    Raises:
        InputError: an episode that is not over after `horizon` steps, more than `max_paths` paths, or sparse
            transitions.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> rollouts = enumerate_paths(random_cmdp(horizon=2, states=2, actions=2), 2)
        >>> rollouts.size, round(rollouts.weight.mean().item(), 12)
        (32, 1.0)
    """
    leader, follower = _tabular(problem)
    cmdp = follower.cmdp
    with torch.no_grad():
        tables, solution = follower.solve(leader)
        policy = solution.log_policy.exp()
        if isinstance(tables.transition, SparseTransition):
            raise InputError("enumerate_paths: expected a dense transition table, got a SparseTransition")
        transition = tables.transition.expand(cmdp.contexts, -1, -1, -1)
        start = cmdp.context_probabilities.to(policy.dtype)[:, None] * tables.initial
        contexts, first = start.nonzero(as_tuple=True)
        probability = start[contexts, first]
        state, action = first[:, None], first.new_zeros(len(first), 0)  # [B, t + 1], [B, t]
        for _ in range(horizon):
            alive = state[:, -1] >= 0
            if not alive.any():
                break
            here = state[:, -1].clamp(min=0)
            # Of a path that is over, only the empty continuation (action 0) has probability one.
            choice = torch.where(alive[:, None], policy[contexts, here], _one_hot(policy.shape[-1], policy))
            rows, chosen = choice.nonzero(as_tuple=True)
            contexts, state, action = contexts[rows], state[rows], torch.cat([action[rows], chosen[:, None]], 1)
            probability, alive, here = probability[rows] * choice[rows, chosen], alive[rows], here[rows]
            goes_on = alive & ~cmdp.terminal[contexts, here]
            outcome = torch.where(goes_on[:, None], transition[contexts, here, chosen], _one_hot(cmdp.states, policy))
            rows, following = outcome.nonzero(as_tuple=True)
            if len(rows) > max_paths:
                raise InputError(f"enumerate_paths: more than {max_paths} paths; use a smaller problem or horizon")
            contexts, action, probability = contexts[rows], action[rows], probability[rows] * outcome[rows, following]
            state = torch.cat([state[rows], torch.where(goes_on[rows], following, -1)[:, None]], 1)
        if (state[:, -1] >= 0).any():
            raise InputError(
                f"enumerate_paths: some episodes are not over after horizon = {horizon} steps; raise it, or give the "
                "problem terminal states that every path reaches"
            )
        check_size(30 * len(contexts) * horizon, horizon=horizon)  # of every step some 30 are kept
        beyond = horizon - action.shape[1]  # nothing happens there any more
        state, action = nn.functional.pad(state, (0, beyond), value=-1), nn.functional.pad(action, (0, beyond))
        return make_rollouts(
            contexts,
            state,
            action,
            state[:, :-1] >= 0,
            ended=torch.ones(len(contexts), dtype=torch.bool),
            log_policy=solution.log_policy,
            log_prior=tables.log_prior,
            weight=probability * len(contexts),
        )


class _FixedPoint(torch.autograd.Function):
    """The value of a fixed point V = T(V), differentiated as (I - dT/dV)^{-1} T_x."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, fixed_point: Tensor, factors: PolicySystem) -> Tensor:
        ctx.factors = factors
        return fixed_point.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factors.solve(gradients[0], transpose=True), None, None


def _fixed_point(image: Tensor, fixed_point: Tensor, factors: PolicySystem) -> Tensor:
    out: Tensor = _FixedPoint.apply(image, fixed_point, factors)
    return out


def _same(discount: float | Tensor, problem: Problem) -> bool:
    return bool((torch.as_tensor(discount) == problem.objective.discount).all())


def _tabular(problem: Problem) -> tuple[TabularLeader, ExactFollower]:
    return require_tabular(problem.leader), require_exact(problem.follower)


def _one_hot(width: int, like: Tensor) -> Tensor:
    row = like.new_zeros(1, width)
    row[0, 0] = 1
    return row
