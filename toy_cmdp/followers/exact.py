"""`ExactFollower`: a follower that best-responds by soft policy iteration and is sampled path by path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import Count, Discount, checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Follower, Leader, check_discount, check_temperature, temperature_of
from align_cbrl.rollouts import Rollouts
from toy_cmdp.followers.solve import SoftSolution, soft_policy_iteration
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, require_tabular
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import Transition

_NEGLIGIBLE = 1e-3
_BLOCK = 16  # steps between two looks at whether all paths are over


class TabularFollower(Follower):
    """What all followers of a table share: nature, numbers, and paths of the policy that was shown last.

    A subclass trains in `respond`, and shows what came of it with `_show`.

    Args:
        cmdp: nature and the ends of episodes.
        temperature: lambda > 0; a tensor [C] where it depends on the context. A leader that sets the temperature
            replaces it.
        discount: gamma in [0, 1); likewise.
        horizon: longest path that `rollout` samples; by default the smallest T with discount^T <= 1e-3, which needs
            the larger of the two discounts when `leader_discount` is given.
        leader_discount: gammaF, used for the default horizon only.

    Raises:
        InputError: a temperature, discount or horizon out of range.
    """

    def __init__(
        self,
        cmdp: ContextualMDP,
        temperature: float | Tensor,
        discount: float | Tensor,
        *,
        horizon: int | None = None,
        leader_discount: Discount = 0.0,
    ) -> None:
        check_temperature("temperature", temperature, cmdp.contexts)
        check_discount("discount", discount, cmdp.contexts)
        check_discount("leader_discount", leader_discount)
        self.cmdp = cmdp
        self.temperature = temperature
        self.discount = discount
        longest = max(float(torch.as_tensor(discount).max()), leader_discount)
        self.horizon = default_horizon(longest) if horizon is None else horizon
        self._shown: tuple[Tables, Tensor] | None = None  # tables and log-policy
        self._sampler: PathSampler | None = None  # of what is shown; made when paths are first asked for

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` contexts by nature's law, long [count]."""
        return torch.multinomial(self.cmdp.context_probabilities, count, replacement=True, generator=generator)

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Sample paths of the present policy.

        `steps` hold "state" (long [B, T + 1], -1 once the episode is over), "action" (long [B, T]), "ended" (bool [B])
        and "log_policy_all" ([B, T, A], the log-probabilities of all actions). Steps share a `group` number where
        they are the first of paths from the same state in the same context; later ones have a number of their own.

        Raises:
            InputError: contexts out of range, a group size below one, or no response yet.
        """
        if self._shown is None:
            raise InputError("rollout: the follower has no policy yet; call respond(leader, contexts) first")
        if group_size < 1:
            raise InputError(f"group_size: expected at least 1, got {group_size}")
        if contexts.numel() == 0 or not bool(((contexts >= 0) & (contexts < self.cmdp.contexts)).all()):
            raise InputError(f"contexts: expected numbers in [0, {self.cmdp.contexts}), got {contexts.tolist()}")
        if self._sampler is None:
            self._sampler = PathSampler(*self._shown, self.cmdp.terminal)
        return self._sampler.sample(contexts.repeat_interleave(group_size), self.horizon, generator)

    def _show(self, tables: Tables, log_policy: Tensor) -> None:
        self._shown, self._sampler = (tables, log_policy), None

    def _hide(self) -> None:
        """`respond` has to be called before the next `rollout`."""
        self._shown = self._sampler = None


@checked
class ExactFollower(TabularFollower):
    """Best-responds exactly, in all contexts, and warm-starts from its last response.

    Arguments and errors are those of `TabularFollower`.

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
        horizon: Count | None = None,
        leader_discount: Discount = 0.0,
    ) -> None:
        super().__init__(cmdp, temperature, discount, horizon=horizon, leader_discount=leader_discount)
        self._value: Tensor | None = None  # the last response's V, which the next one starts from
        self._latest: Tensor | None = None  # the same for `solve`: evaluating J must not change what a run repeats

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Solve for the best response in all contexts. Metrics: `iterations`, `residual` of the Bellman equation."""
        with torch.no_grad():
            tables = require_tabular(leader).tables()
            solution = self._solve(tables, self._value, temperature_of(leader, self))
        self._value = self._latest = solution.value  # so that what a critic solves next does not depend on the past
        self._show(tables, solution.log_policy)
        return {"iterations": float(solution.iterations), "residual": solution.residual}

    def solve(self, leader: Leader) -> tuple[Tables, SoftSolution]:
        """The leader's tables, with their graph, and the best response to them; the follower's state stays."""
        tables = require_tabular(leader).tables()
        with torch.no_grad():
            temperature = temperature_of(leader, self)
        solution = self._solve(tables, self._latest, temperature)
        self._latest = solution.value
        return tables, solution

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
        self._hide()

    def _solve(self, tables: Tables, start: Tensor | None, temperature: float | Tensor) -> SoftSolution:
        return soft_policy_iteration(self.cmdp, tables, temperature=temperature, discount=self.discount, start=start)


def require_exact(follower: Follower) -> ExactFollower:
    """The follower, if it is one that solves its table.

    Raises:
        InputError: it is not.
    """
    if not isinstance(follower, ExactFollower):
        raise InputError(f"follower: expected an ExactFollower, got {type(follower).__name__}")
    return follower


class PathSampler:
    """Samples paths by inversion, one search a step.

    In every state of every context, the pairs (action, next state) that have any probability share the stretch
    (row, row + 1] of one sorted array: a uniform number, added to the row, finds the pair. A terminal state's pairs
    lead to one more row, that of paths which are over.

    Args:
        tables: the leader's, of which P and rho are used.
        log_policy: [C, S, A].
        terminal: bool [C, S].
    """

    def __init__(self, tables: Tables, log_policy: Tensor, terminal: Tensor) -> None:
        contexts, states, actions = log_policy.shape
        self._log_policy, self._log_prior, self._states = log_policy, tables.log_prior, states
        self._first = _stretches(tables.initial)
        place, following, probability = _entries(tables.transition, states, actions)  # [N], [N], [C or 1, N]
        state, action = place // actions, place % actions
        self._over = contexts * states
        row = (torch.arange(contexts)[:, None] * states + state).reshape(-1)  # [C N], ascending
        joint = log_policy.detach().exp().double().reshape(contexts, -1)[:, place] * probability  # [C, N]
        total = joint.reshape(-1).cumsum(0)
        ends = torch.searchsorted(row, torch.arange(self._over), right=True) - 1  # each row's last entry
        upto = torch.cat([total.new_zeros(1), total[ends]])
        within = (total - upto[row]) / (upto[row + 1] - upto[row])
        # The row of paths that are over is one entry, which leads to itself.
        self._law = torch.cat([row + within.clamp(max=1.0), total.new_full((1,), self._over + 1.0)])
        self._law[ends] = (row[ends] + 1).double()
        offset = torch.arange(contexts)[:, None] * states
        onward = torch.where(terminal[:, state], self._over, offset + following).reshape(-1)
        self._onward = torch.cat([onward, torch.tensor([self._over])])
        self._action = torch.cat([action.expand(contexts, -1).reshape(-1), torch.zeros(1, dtype=torch.long)])
        self._ends = bool(terminal.any())

    def sample(self, contexts: Tensor, horizon: int, generator: torch.Generator) -> Rollouts:
        """One path in each of `contexts`, long [B], of at most `horizon` steps."""
        size = len(contexts)
        below_one = 1 - 4 * (self._over + 1) * torch.finfo(torch.float64).eps  # row + uniform must not round up
        row = torch.searchsorted(self._first, contexts + _uniform(size, generator).clamp_(max=below_one), right=True)
        rows, entries = [row], list[Tensor]()
        while len(entries) < horizon:
            uniform = _uniform((min(_BLOCK, horizon - len(entries)), size), generator).clamp_(max=below_one)
            for step in uniform:
                entry = torch.searchsorted(self._law, row + step, right=True)
                row = self._onward[entry]
                rows.append(row)
                entries.append(entry)
            if self._ends and bool((row == self._over).all()):
                break
        place, entry = torch.stack(rows, 1), torch.stack(entries, 1)  # [B, T + 1], [B, T]
        if self._ends:  # nothing beyond the longest path
            longest = int((place[:, :-1] != self._over).any(0).sum())
            place, entry = place[:, : longest + 1], entry[:, :longest]
        alive = place != self._over
        return make_rollouts(
            contexts,
            torch.where(alive, place - contexts[:, None] * self._states, -1),
            self._action[entry],
            alive[:, :-1],
            ended=~alive[:, -1],
            log_policy=self._log_policy,
            log_prior=self._log_prior,
        )


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


def _entries(transition: Transition, states: int, actions: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs and successors that may have probability: place s A + a [N], ascending, s' [N], and P [C or 1, N]."""
    if isinstance(transition, SparseTransition):
        place = torch.arange(states * actions).repeat_interleave(transition.successor.shape[-1])
        law = transition.probability.detach().double()
        return place, transition.successor.reshape(-1), law.reshape(len(law), -1)
    law = transition.detach().double().reshape(len(transition), -1)
    kept = (law[0] if len(law) == 1 else law.amax(0)).nonzero()[:, 0]
    return kept // states, kept % states, law[:, kept]


def _uniform(shape: int | tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _stretches(law: Tensor) -> Tensor:
    """Cumulative probabilities of all rows in one sorted array: row i occupies (i, i + 1]."""
    cumulative = law.detach().double().reshape(-1, law.shape[-1]).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    return (cumulative + torch.arange(len(cumulative), dtype=torch.float64)[:, None]).reshape(-1)
