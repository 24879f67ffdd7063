"""Followers whose training is one known iteration, stopped after any number of them.

Every one of them keeps a table X [C, S, A], and its policy is log pi = log prior + X / lambda, normalised. X is Q where
the iteration is one on Q. Start: X = 0, the prior. Axes: C contexts, S states, A actions.
"""

from __future__ import annotations

import abc
from typing import Annotated, Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, Discount, Range, Whole, check, checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.truncated import IterativeFollower
from align_cbrl.problem import Leader, step_seed, temperature_of
from toy_cmdp.followers.exact import TabularFollower
from toy_cmdp.followers.solve import by_context, continuation, per_state, soft_logits
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, require_tabular
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import expected_next, policy_system


@checked
class TabularIterativeFollower(TabularFollower, IterativeFollower):
    """What the iterative followers share; a subclass writes `_iteration`.

    Args:
        cmdp: nature and the ends of episodes.
        temperature: lambda > 0; a tensor [C] where it depends on the context.
        discount: gamma in [0, 1); likewise.
        iterations: of one `respond`; 0 leaves all training to `RandomlyTruncated`.
        warm: whether `respond` continues from the last response instead of the prior.
        horizon, leader_discount: of the rollouts, as for `ExactFollower`.
        seed: of what `respond` samples.

    Attributes:
        log_policy: [C, S, A], the present policy, once there is one.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        cmdp: ContextualMDP,
        temperature: float | Tensor,
        discount: float | Tensor,
        *,
        iterations: Whole,
        warm: bool = False,
        horizon: Count | None = None,
        leader_discount: Discount = 0.0,
        seed: Whole = 0,
    ) -> None:
        super().__init__(cmdp, temperature, discount, horizon=horizon, leader_discount=leader_discount)
        self.iterations = iterations
        self.warm = warm
        self.seed = seed
        self._responses = 0
        self._warmth = self.temperature  # or the leader's, where it sets one
        self.reset()

    def reset(self) -> None:
        """Back to the prior: X = 0."""
        self._table: Tensor | None = None
        self._done = 0
        self._hide()

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Train for `iterations`, from the prior or, where `warm`, from the last response. Metrics: `iterations`."""
        if not self.warm:
            self.reset()
        generator = torch.Generator().manual_seed(step_seed(self.seed, self._responses))
        self._responses += 1
        return self.iterate(leader, contexts, self.iterations, generator)

    def iterate(
        self, leader: Leader, contexts: Tensor, iterations: int, generator: torch.Generator
    ) -> dict[str, float]:
        """Train for `iterations` more, in all contexts. Metrics: `iterations` since the last reset.

        Raises:
            InputError: a leader without tables, tables that are no laws, or a negative number of iterations.
        """
        check("iterations", iterations, Whole)
        with torch.no_grad():
            tables = require_tabular(leader).tables().detach()
            self._warmth = temperature_of(leader, self)
            self.cmdp.check(tables)
            if self._table is None:
                self._table = torch.zeros_like(tables.reward)
            self._prepare(tables)
            for _ in range(iterations):
                self._table = self._iteration(tables, self._table, self._done, generator)
                self._done += 1
        self._show(tables, torch.log_softmax(soft_logits(self._table, tables.log_prior, self._warmth), -1))
        return {"iterations": float(self._done)}

    @property
    def log_policy(self) -> Tensor:
        """The present policy, [C, S, A], log-probabilities. Raises InputError before the first response."""
        if self._shown is None:
            raise InputError("rollout: the follower has no policy yet; call respond(leader, contexts) first")
        return self._shown[1]

    def state_dict(self) -> dict[str, Any]:
        """X, the iterations done since the last reset, and the number of responses."""
        table = None if self._table is None else self._table.clone()
        return {"table": table, "done": self._done, "responses": self._responses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; `respond` or `iterate` has to be called before the next `rollout`.

        Raises:
            InputError: the state of another problem.
        """
        table = state["table"]
        if table is not None and tuple(table.shape[:2]) != (self.cmdp.contexts, self.cmdp.states):
            raise InputError(
                f"table: expected shape ({self.cmdp.contexts}, {self.cmdp.states}, A), got {tuple(table.shape)}; the "
                "state belongs to another problem"
            )
        self.reset()
        self._table = None if table is None else table.clone()
        self._done, self._responses = state["done"], state["responses"]

    def _prepare(self, tables: Tables) -> None:
        """Called once for an `iterate`, before the first iteration. Default: nothing to prepare."""

    @abc.abstractmethod
    def _iteration(self, tables: Tables, table: Tensor, done: int, generator: torch.Generator) -> Tensor:
        """The next X, [C, S, A], from the present one, which is not modified; `done` iterations came before."""

    def _soft_value(self, tables: Tables, q: Tensor) -> Tensor:
        """V(s) = lambda log sum_a prior(a|s) exp(Q(s, a) / lambda), [C, S]."""
        logits = soft_logits(q, tables.log_prior, self._warmth)
        return torch.logsumexp(logits, -1) * per_state(self._warmth, logits)


class SoftValueIteration(TabularIterativeFollower):
    """Q <- r + gamma P V(Q), a contraction: |Q_n - Q*| <= gamma^n |Q_0 - Q*| in the largest entry.

    |log pi_n - log pi*| <= 2 |Q_n - Q*| / lambda, so that the policy converges at the same rate.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> follower = SoftValueIteration(problem.follower.cmdp, 0.5, 0.9, iterations=300)
        >>> _ = follower.respond(problem.leader, torch.arange(2))
        >>> _, best = problem.follower.solve(problem.leader)
        >>> bool((follower.log_policy - best.log_policy).abs().max() < 1e-9)
        True
    """

    def _iteration(self, tables: Tables, table: Tensor, done: int, generator: torch.Generator) -> Tensor:
        go_on = continuation(self.cmdp, self.discount, table)
        return tables.reward + go_on * expected_next(tables.transition, self._soft_value(tables, table))


@checked
class NaturalPolicyGradient(TabularIterativeFollower):
    """Soft natural policy gradient with exact gradients: X <- (1 - a) X + a Q^pi, one policy evaluation an iteration.

    In the policy that is log pi <- (1 - a) log pi + a (log prior + Q^pi / lambda) + const, the natural gradient step of
    size eta = a (1 - gamma) / lambda (Cen et al. 2022). It converges linearly,

        |Q^{pi_{n+1}} - Q*| <= gamma c (1 - a (1 - gamma))^n,
        c = |Q^{pi_0} - Q*| + 2 (1 - a) lambda |log pi_0 - log pi*|,

    in the largest entry (their theorem 1), and a = 1 is soft policy iteration, which is quadratic near the end.

    Args:
        step: a in (0, 1].

    The other arguments are those of `TabularIterativeFollower`.

    Raises:
        InputError: an argument out of range.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> follower = NaturalPolicyGradient(problem.follower.cmdp, 0.5, 0.9, iterations=10)
        >>> _ = follower.respond(problem.leader, torch.arange(2))
        >>> _, best = problem.follower.solve(problem.leader)
        >>> bool((follower.log_policy - best.log_policy).abs().max() < 1e-9)
        True
    """

    def __init__(
        self,
        cmdp: ContextualMDP,
        temperature: float | Tensor,
        discount: float | Tensor,
        *,
        step: Annotated[float, Range(0, 1, open="low")] = 1.0,
        **rest: Any,
    ) -> None:
        self.step = step
        super().__init__(cmdp, temperature, discount, **rest)

    def _iteration(self, tables: Tables, table: Tensor, done: int, generator: torch.Generator) -> Tensor:
        log_policy = torch.log_softmax(soft_logits(table, tables.log_prior, self._warmth), -1)
        q = policy_q(self.cmdp, tables, log_policy, self._warmth, self.discount)[0]
        return (1 - self.step) * table + self.step * q


class SoftQLearning(TabularIterativeFollower):
    """Synchronous soft Q-learning: in each iteration every state and action sees one sampled next state.

        Q(s, a) <- Q(s, a) + alpha_n (r(s, a) + gamma V_Q(s') - Q(s, a)),   alpha_n = 1 / (1 + (1 - gamma) n),

    n = 1, 2, ...: the rescaled linear step size, with which E |Q_n - Q*|^2 = O(1 / n) (Wainwright 2019, "Stochastic
    approximation with cone-contractive operators"; the soft operator is as contractive as the hard one). An action in
    a terminal state has no next state.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> follower = SoftQLearning(problem.follower.cmdp, 0.5, 0.9, iterations=300)
        >>> follower.respond(problem.leader, torch.arange(2))
        {'iterations': 300.0}
    """

    def _prepare(self, tables: Tables) -> None:
        law = tables.transition
        self._successor = law.successor if isinstance(law, SparseTransition) else None
        probability = law.probability if isinstance(law, SparseTransition) else law
        self._cumulative = probability.cumsum(-1)  # [C or 1, S, A, S or K]

    def _iteration(self, tables: Tables, table: Tensor, done: int, generator: torch.Generator) -> Tensor:
        value = self._soft_value(tables, table)
        ahead = value[torch.arange(len(table))[:, None, None], self._next_states(table, generator)]
        target = tables.reward + continuation(self.cmdp, self.discount, table) * ahead
        rate = 1 / (1 + (1 - by_context(self.discount, table)) * (done + 1))
        return table + rate * (target - table)

    def _next_states(self, table: Tensor, generator: torch.Generator) -> Tensor:
        """One next state of every state and action in every context, long [C, S, A], by inversion."""
        upto = self._cumulative
        uniform = torch.rand(table.shape, generator=generator, dtype=torch.float64).to(table.dtype)
        if len(upto) == 1:  # one row of the law serves all contexts
            sought = uniform.permute(1, 2, 0)[None] * upto[..., -1:]  # [1, S, A, C]
            place = torch.searchsorted(upto, sought.contiguous(), right=True)[0].permute(2, 0, 1)
        else:
            place = torch.searchsorted(upto, uniform[..., None] * upto[..., -1:], right=True)[..., 0]
        place = place.clamp(max=upto.shape[-1] - 1)
        if self._successor is None:
            return place
        return self._successor.expand(len(table), -1, -1, -1).gather(-1, place[..., None])[..., 0]


def policy_q(
    cmdp: ContextualMDP,
    tables: Tables,
    log_policy: Tensor,
    temperature: float | Tensor,
    discount: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Q^pi, [C, S, A], and V^pi, [C, S], of any policy with its KL (or entropy) priced at lambda.

    V = (I - gamma P_pi)^{-1} E_pi[r - lambda log(pi / prior)], Q = r + gamma P V, one linear solve.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> tables, best = problem.follower.solve(problem.leader)
        >>> q, value = policy_q(problem.follower.cmdp, tables.detach(), best.log_policy, 0.5, 0.9)
        >>> torch.allclose(q, best.q), torch.allclose(value, best.value)
        (True, True)
    """
    policy = log_policy.exp()
    go_on = continuation(cmdp, discount, log_policy)
    log_ratio = log_policy if tables.log_prior is None else log_policy - tables.log_prior
    earned = tables.reward - log_ratio * by_context(temperature, log_ratio)
    value = policy_system(tables.transition, go_on * policy).solve((policy * earned).sum(-1))
    return tables.reward + go_on * expected_next(tables.transition, value), value
