"""`ExactFollower`: a follower that best-responds by soft policy iteration and is sampled path by path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.problem import Follower, Leader, check_discount, check_temperature
from align_cbrl.rollouts import Rollouts
from toy_cmdp.cmdp import ContextualMDP, Tables, require_tabular
from toy_cmdp.solve import SoftSolution, soft_policy_iteration
from toy_cmdp.sparse import SparseTransition

_NEGLIGIBLE = 1e-3


class ExactFollower(Follower):
    """Best-responds exactly, in all contexts, and warm-starts from its last response.

    Args:
        cmdp: nature and the ends of episodes.
        temperature: lambda > 0; a tensor [C] where it depends on the context.
        discount: gamma in [0, 1); likewise.
        horizon: longest path that `rollout` samples; by default the smallest T with discount^T <= 1e-3, which needs
            the larger of the two discounts when `leader_discount` is given.
        leader_discount: gammaF, used for the default horizon only.

    Raises:
        InputError: a temperature, discount or horizon out of range.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> follower = problem.follower
        >>> _ = follower.respond(problem.leader, torch.tensor([0]))
        >>> follower.rollout(torch.tensor([0, 1]), 4, torch.Generator().manual_seed(0)).size
        8
    """

    def __init__(
        self,
        cmdp: ContextualMDP,
        temperature: float | Tensor,
        discount: float | Tensor,
        *,
        horizon: int | None = None,
        leader_discount: float = 0.0,
    ) -> None:
        check_temperature("temperature", temperature, cmdp.contexts)
        check_discount("discount", discount, cmdp.contexts)
        check_discount("leader_discount", leader_discount)
        if horizon is not None and horizon < 1:
            raise InputError(f"horizon: expected at least one step, got {horizon}")
        self.cmdp = cmdp
        self.temperature = temperature
        self.discount = discount
        longest = max(float(torch.as_tensor(discount).max()), leader_discount)
        self.horizon = default_horizon(longest) if horizon is None else horizon
        self._value: Tensor | None = None  # the last response's V, which the next one starts from
        self._sampler: PathSampler | None = None
        self._latest: Tensor | None = None  # the same for `solve`: evaluating J must not change what a run repeats

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts by nature's law, long [count]."""
        return torch.multinomial(self.cmdp.context_probabilities, count, replacement=True, generator=generator)

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Solve for the best response in all contexts. Metrics: `iterations`, `residual` of the Bellman equation."""
        with torch.no_grad():
            tables = require_tabular(leader).tables()
            solution = self._solve(tables, self._value)
        self._value = self._latest = solution.value  # so that what a critic solves next does not depend on the past
        self._sampler = PathSampler(tables, solution.log_policy)
        return {"iterations": float(solution.iterations), "residual": solution.residual}

    def solve(self, leader: Leader) -> tuple[Tables, SoftSolution]:
        """The leader's tables, with their graph, and the best response to them; the follower's state stays."""
        tables = require_tabular(leader).tables()
        solution = self._solve(tables, self._latest)
        self._latest = solution.value
        return tables, solution

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Sample paths of the last response.

        `steps` hold "state" (long [B, T + 1], -1 once the episode is over), "action" (long [B, T]), "ended" (bool [B])
        and "log_policy_all" ([B, T, A], the log-probabilities of all actions). Steps share a `group` number where
        they are the first of paths from the same state in the same context; later ones have a number of their own.

        Raises:
            InputError: contexts out of range, a group size below one, or no response yet.
        """
        if self._sampler is None:
            raise InputError("rollout: the follower has no policy yet; call respond(leader, contexts) first")
        if group_size < 1:
            raise InputError(f"group_size: expected at least 1, got {group_size}")
        if contexts.numel() == 0 or not bool(((contexts >= 0) & (contexts < self.cmdp.contexts)).all()):
            raise InputError(f"contexts: expected numbers in [0, {self.cmdp.contexts}), got {contexts.tolist()}")
        return self._sampler.sample(contexts.repeat_interleave(group_size), self.horizon, self.cmdp, generator)

    def state_dict(self) -> dict[str, Any]:
        """The last response's V_lambda, [C, S]: where the next response starts, hence all that a resumed run needs."""
        return {"value": None if self._value is None else self._value.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; `respond` has to be called before the next `rollout`."""
        value = state["value"]
        if value is not None and tuple(value.shape) != (self.cmdp.contexts, self.cmdp.states):
            raise InputError(
                f"value: expected shape {(self.cmdp.contexts, self.cmdp.states)}, got {tuple(value.shape)}; "
                "the state belongs to another problem"
            )
        self._value = None if value is None else value.clone()
        self._sampler = None

    def _solve(self, tables: Tables, start: Tensor | None) -> SoftSolution:
        return soft_policy_iteration(
            self.cmdp, tables, temperature=self.temperature, discount=self.discount, start=start
        )


class PathSampler:
    """Samples paths by inversion: each law is a stretch (row, row + 1] of one sorted array, searched all at once.

    Args:
        tables: the leader's, of which P and rho are used.
        log_policy: [C, S, A].
    """

    def __init__(self, tables: Tables, log_policy: Tensor) -> None:
        self._log_policy = log_policy
        self._log_prior = tables.log_prior
        self._actions = tables.reward.shape[-1]
        self._action_law = _stretches(log_policy.exp())
        self._first_law = _stretches(tables.initial)
        transition = tables.transition
        self._successor = transition.successor.reshape(-1) if isinstance(transition, SparseTransition) else None
        law = transition.probability if isinstance(transition, SparseTransition) else transition
        self._shared = law.shape[0] == 1
        self._width = law.shape[-1]
        self._next_law = _stretches(law)

    def sample(self, contexts: Tensor, horizon: int, cmdp: ContextualMDP, generator: torch.Generator) -> Rollouts:
        """One path in each of `contexts`, long [B], of at most `horizon` steps."""
        size, states, actions = len(contexts), cmdp.states, self._actions
        terminal = cmdp.terminal.reshape(-1)  # [C S]
        ends = bool(terminal.any())
        offset = contexts * states
        state = _draw(self._first_law, contexts, states, _uniform(size, generator))  # [B]
        alive = torch.ones(size, dtype=torch.bool)
        visited, taken, mask = [state], [], []
        for _ in range(horizon):
            row = offset + state.clamp(min=0)
            uniform = _uniform(2 * size, generator)
            action = _draw(self._action_law, row, actions, uniform[:size])
            mask.append(alive)
            taken.append(torch.where(alive, action, 0) if ends else action)
            state = self._following(row, action, actions, row - offset, uniform[size:])
            if ends:
                alive = alive & ~terminal[row]
                state = torch.where(alive, state, -1)
            visited.append(state)
            if ends and not alive.any():
                break
        states_seen = torch.stack(visited, 1)  # [B, T + 1]
        chosen, running = torch.stack(taken, 1), torch.stack(mask, 1)  # [B, T]
        return make_rollouts(
            contexts, states_seen, chosen, running, ended=~alive, log_policy=self._log_policy, log_prior=self._log_prior
        )

    def _following(self, row: Tensor, action: Tensor, actions: int, state: Tensor, uniform: Tensor) -> Tensor:
        pair = state * actions + action  # a place in [S, A]
        place = _draw(self._next_law, pair if self._shared else row * actions + action, self._width, uniform)
        return place if self._successor is None else self._successor[pair * self._width + place]


def make_rollouts(
    contexts: Tensor,
    state: Tensor,
    action: Tensor,
    mask: Tensor,
    *,
    ended: Tensor,
    log_policy: Tensor,
    log_prior: Tensor | None,
    weight: Tensor | None = None,
) -> Rollouts:
    """Bundle tabular paths: contexts [B], state [B, T + 1], action and mask [B, T], ended [B], policies [C, S, A].

    Without `log_prior` (entropy regularisation) the rollouts' log_prior is zero, the logarithm of the measure 1.
    """
    cells, states, actions = log_policy.shape
    row = contexts[:, None] * states + state[:, :-1].clamp(min=0)  # [B, T]
    pair = row * actions + action

    def pick(table: Tensor) -> Tensor:
        return torch.where(mask, table.reshape(-1)[pair], 0.0)

    # The first decision points are numbered by context and state, all later ones consecutively.
    group = torch.arange(mask.numel()).view(mask.shape) + cells * states
    group[:, 0] = row[:, 0]
    return Rollouts(
        contexts=contexts,
        mask=mask,
        group=group,
        steps={
            "state": state,
            "action": action,
            "ended": ended,
            "log_policy_all": log_policy.reshape(-1, actions)[row],
        },
        log_policy=pick(log_policy),
        log_prior=torch.zeros_like(pair, dtype=log_policy.dtype) if log_prior is None else pick(log_prior),
        weight=weight,
    )


def default_horizon(discount: float) -> int:
    """The smallest T >= 1 with discount^T <= 1e-3: what later steps could add to a return is negligible."""
    return 1 if discount == 0 else max(1, math.ceil(math.log(_NEGLIGIBLE) / math.log(discount)))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _stretches(law: Tensor) -> Tensor:
    """Cumulative probabilities of all rows in one sorted array: row i occupies (i, i + 1]."""
    cumulative = law.detach().double().reshape(-1, law.shape[-1]).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    return (cumulative + torch.arange(len(cumulative), dtype=torch.float64)[:, None]).reshape(-1)


def _draw(stretches: Tensor, row: Tensor, width: int, uniform: Tensor) -> Tensor:
    """One outcome in [0, width) from each of the given rows."""
    found = torch.searchsorted(stretches, row + uniform, right=True) - row * width
    return found.clamp(0, width - 1)  # row + uniform may round up to row + 1
