"""Tabular contextual MDPs whose rewards, transitions, initial law and prior are functions of the leader.

Axes: C contexts, S states, A actions; B paths of T steps.
"""

from __future__ import annotations

import abc
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts
from toy_cmdp.tables.sparse import SparseTransition
from toy_cmdp.tables.transition import Transition, between


@checked
@dataclasses.dataclass(frozen=True)
class Tables:
    """One MDP per context, at the leader's present parameters; each table is differentiable in them or constant.

    A constant table should be the same tensor object at every call (a buffer of the leader): it is then validated
    once and not at every step.

    Attributes:
        reward: [C, S, A], r_x(s, a).
        transition: [C, S, A, S], P_x(s' | s, a), or [1, S, A, S] where all contexts share it, or a `SparseTransition`.
            Rows of terminal states must be laws too, but are not used.
        initial: [C, S], rho_x(s).
        log_prior: [C, S, A], log prior_x(a | s), each law with full support. None stands for *entropy
            regularisation*, the constant measure 1: the follower maximises E[sum_t gamma^t (r + lambda H(pi))] and
            V = lambda logsumexp(Q / lambda). A uniform prior subtracts lambda log A at every step, which is another
            best response as soon as episodes end, since a longer episode collects more entropy.

    Example:
        >>> Tables(torch.zeros(1, 1, 2), torch.ones(1, 1, 2, 1), torch.ones(1, 1)).log_prior is None
        True
    """

    reward: Tensor
    transition: Transition
    initial: Tensor
    log_prior: Tensor | None = None

    def detach(self) -> Tables:
        """The same numbers without a graph. Tables that have none keep their identity."""
        return Tables(
            _cut(self.reward),
            _cut(self.transition),
            _cut(self.initial),
            None if self.log_prior is None else _cut(self.log_prior),
        )


class TabularLeader(Leader):
    """A leader given by its tables; scoring rollouts is a gather.

    Rollouts carry `steps["state"]`, long [B, T + 1], and `steps["action"]`, long [B, T]. A state of -1 says that the
    episode is over.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> tuple(problem.leader.tables().reward.shape)
        (2, 4, 3)
    """

    @abc.abstractmethod
    def tables(self) -> Tables:
        """The MDPs at the present parameters."""

    def reward(self, rollouts: Rollouts) -> Tensor:
        """r_x(s_t, a_t), [B, T]; zero after the end of a path."""
        return gather_steps(self.tables().reward, rollouts)

    def _moved(self) -> Tables:
        """The tables; gradients are on, so that `requires_grad` tells what the leader moves under no_grad as well."""
        with torch.enable_grad():
            return self.tables()

    def log_transition(self, rollouts: Rollouts) -> Tensor | None:
        """The log-probability of s_{t+1}, [B, T]; zero for the last step of an episode. None if P is constant."""
        transition = self._moved().transition
        if not transition.requires_grad:
            return None
        state = rollouts.steps["state"]
        valid = rollouts.mask & (state[:, 1:] >= 0)
        contexts = rollouts.contexts[:, None].expand(valid.shape)
        here, following = state[:, :-1].clamp(min=0), state[:, 1:].clamp(min=0)
        return _log_where(valid, between(transition, contexts, here, rollouts.steps["action"], following))

    def log_initial(self, rollouts: Rollouts) -> Tensor | None:
        """The log-probability of s_0, [B], or None if rho is constant."""
        table = self._moved().initial
        if not table.requires_grad:
            return None
        return _take(table, rollouts.contexts * table.shape[1] + rollouts.steps["state"][:, 0]).log()

    def log_prior(self, rollouts: Rollouts) -> Tensor | None:
        """The log-prior of a_t in s_t, [B, T]; zero after the end of a path. None if the prior is constant."""
        table = self._moved().log_prior
        return None if table is None or not table.requires_grad else gather_steps(table, rollouts)


@checked
class TabularUtility:
    """The leader's utility u_x(c, s, a) as a table; hand it to `ExpectedUtility`.

    Args:
        table: maps the leader to [C, S, A], differentiable in its parameters or constant.

    Example:
        >>> import torch
        >>> from align_cbrl.objectives import ExpectedUtility
        >>> objective = ExpectedUtility(TabularUtility(lambda leader: torch.ones(1, 2, 2)), discount=0.9)
    """

    def __init__(self, table: Callable[[TabularLeader], Tensor]) -> None:
        self._table = table

    def table(self, leader: TabularLeader) -> Tensor:
        """u_x, [C, S, A]."""
        return self._table(leader)

    def __call__(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        """u_x(s_t, a_t), [B, T]; zero after the end of a path."""
        return gather_steps(self.table(require_tabular(leader)), rollouts)


@checked
@dataclasses.dataclass(frozen=True)
class ContextualMDP:
    """What no leader moves: nature's law of the contexts and where episodes end.

    Attributes:
        context_probabilities: [C], nature's law Xi.
        terminal: bool [C, S]; an action taken in such a state is the last one of the episode (it is rewarded).
        context_names, state_names, action_names: used in messages.

    Raises:
        InputError: shapes that disagree, probabilities that are negative or do not sum to one, names of wrong number.

    Example:
        >>> cmdp = ContextualMDP(torch.tensor([0.5, 0.5]), torch.tensor([[False, True], [True, False]]))
        >>> cmdp.contexts, cmdp.states
        (2, 2)
    """

    context_probabilities: Tensor
    terminal: Tensor
    context_names: Sequence[str] = ()
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()
    _checked: dict[str, tuple[weakref.ref[Tensor | SparseTransition], int]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        probabilities, terminal = self.context_probabilities, self.terminal
        if probabilities.ndim != 1 or len(probabilities) == 0:
            raise InputError(f"context_probabilities: expected shape [C], C >= 1, got {tuple(probabilities.shape)}")
        if terminal.dtype != torch.bool or terminal.ndim != 2 or len(terminal) != len(probabilities):
            raise InputError(
                f"terminal: expected a bool tensor [{len(probabilities)}, S], "
                f"got {terminal.dtype} {tuple(terminal.shape)}"
            )
        total = float(probabilities.sum())
        if total == 0:
            raise InputError("context_probabilities: their total is zero; nature must draw some context")
        if not (bool((probabilities >= 0).all()) and abs(total - 1) <= _tolerance(probabilities)):
            raise InputError(
                "context_probabilities: expected non-negative numbers that sum to one, "
                f"got {probabilities.tolist()} with sum {total}"
            )
        for name, count in (("context_names", self.contexts), ("state_names", self.states)):
            if getattr(self, name) and len(getattr(self, name)) != count:
                raise InputError(f"{name}: expected {count} names, got {len(getattr(self, name))}")

    @property
    def contexts(self) -> int:
        """C, the number of contexts."""
        return self.terminal.shape[0]

    @property
    def states(self) -> int:
        """S, the number of states."""
        return self.terminal.shape[1]

    def cell(self, rollouts: Rollouts) -> Tensor:
        """The number c S + s_t, long [B, T + 1]: each state of each context is a cell of its own (`FittedCritic`)."""
        return rollouts.contexts[:, None] * self.states + rollouts.steps["state"].clamp(min=0)

    def check(self, tables: Tables) -> None:
        """Validate the tables of a leader. A constant table, met before and not modified since, is skipped.

        Raises:
            InputError: shapes or dtypes that disagree, NaN or infinite rewards, rows of P, rho or the prior that are
                no laws; the message names context, state and action.
        """
        c, s = self.contexts, self.states
        a = tables.reward.shape[-1]
        expected = {"reward": (c, s, a), "transition": (c, s, a, s), "initial": (c, s), "log_prior": (c, s, a)}
        for name, shape in expected.items():
            table: Tensor | SparseTransition | None = getattr(tables, name)
            if table is None:
                self._checked.pop(name, None)
                continue
            shared = name == "transition" and tuple(table.shape) == (1, *shape[1:])
            if tuple(table.shape) != shape and not shared:
                raise InputError(f"{name}: expected shape {shape} (C, S, A = {c}, {s}, {a}), got {tuple(table.shape)}")
            if table.dtype != tables.reward.dtype or not table.dtype.is_floating_point:
                raise InputError(
                    f"{name}: expected all tables in one floating-point dtype, got {table.dtype} and "
                    f"{tables.reward.dtype} for the reward"
                )
            version = table._version
            known = self._checked.get(name)
            if known is not None and known[0]() is table and known[1] == version:
                continue
            if isinstance(table, SparseTransition):
                table.check(self.place)
            elif name == "reward":
                self.check_finite("reward", table)
            else:
                self._check_law(name, table)
            if table.requires_grad:
                self._checked.pop(name, None)
            else:
                self._checked[name] = (weakref.ref(table), version)
        if self.action_names and len(self.action_names) != a:
            raise InputError(f"action_names: expected {a} names, got {len(self.action_names)}")

    def check_finite(self, name: str, table: Tensor) -> None:
        """Raise `InputError` naming the first context, state and action where `table` [C, S, A] is NaN or infinite."""
        table = table.detach()
        # The sum is finite if all numbers are, and needs no mask of their size; it may overflow, so look again.
        if not torch.isfinite(table.sum()) and not torch.isfinite(table).all():
            index = (~torch.isfinite(table)).nonzero()[0].tolist()
            raise InputError(
                f"{name}: expected finite numbers, got {table[tuple(index)].item()} in {self.place(index)}"
            )

    def place(self, index: Sequence[int]) -> str:
        """`context 0, state 3, action 1`, with names where they were given."""
        kinds = (("context", self.context_names), ("state", self.state_names), ("action", self.action_names))
        return ", ".join(
            f"{kind} {i}" + (f" ({names[i]})" if i < len(names) else "")
            for (kind, names), i in zip(kinds, index, strict=False)
        )

    def _check_law(self, name: str, table: Tensor) -> None:
        """Each row over the last axis must be a probability law; log_prior holds logarithms."""
        table = table.detach()
        law = table.exp() if name == "log_prior" else table
        excess = (law.sum(-1) - 1).abs()
        lowest = float(table.min())
        # Comparisons are written so that a NaN fails them.
        if float(excess.max()) <= _tolerance(table) and (lowest >= 0 or (name == "log_prior" and lowest > -torch.inf)):
            return
        if name == "log_prior":
            if not torch.isfinite(table).all():
                index = (~torch.isfinite(table)).nonzero()[0].tolist()
                raise InputError(
                    f"log_prior: expected finite log-probabilities (full support), got {table[tuple(index)].item()} "
                    f"in {self.place(index)}"
                )
        elif not (table >= 0).all():
            index = (~(table >= 0)).nonzero()[0].tolist()
            raise InputError(
                f"{name}: expected probabilities, got {table[tuple(index)].item()} in {self.place(index[:3])}"
                + (f" to state {index[3]}" if name == "transition" else "")
            )
        index = (~(excess <= _tolerance(table))).nonzero()[0].tolist()
        hint = "; pass log_prior=None for entropy regularisation" if name == "log_prior" else ""
        raise InputError(
            f"{name}: expected probabilities that sum to one, got sum {law[tuple(index)].sum().item()} "
            f"in {self.place(index)}{hint}"
        )


def gather_steps(table: Tensor, rollouts: Rollouts) -> Tensor:
    """table[c, s_t, a_t] along the paths: [C, S, A] -> [B, T], zero after the end of a path.

    Example:
        >>> from toy_cmdp import random_cmdp
        >>> problem = random_cmdp()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0, 1]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
        >>> gather_steps(torch.ones(2, 4, 3), rollouts).shape == rollouts.mask.shape
        True
    """
    if "state" not in rollouts.steps or "action" not in rollouts.steps:
        raise InputError(
            f'rollouts.steps: expected "state" [B, T + 1] and "action" [B, T] of a table, got {sorted(rollouts.steps)}'
        )
    _, states, actions = table.shape
    state = rollouts.steps["state"][:, :-1].clamp(min=0)
    values = _take(table, (rollouts.contexts[:, None] * states + state) * actions + rollouts.steps["action"])
    return torch.where(rollouts.mask, values, torch.zeros((), dtype=table.dtype, device=table.device))


def require_tabular(leader: Leader) -> TabularLeader:
    """The leader, if it is given by tables.

    Raises:
        InputError: it is not.
    """
    if not isinstance(leader, TabularLeader):
        raise InputError(f"leader: expected a TabularLeader, got {type(leader).__name__}")
    return leader


def _cut(table: Any) -> Any:
    return table.detach() if table.requires_grad else table


def _take(table: Tensor, flat: Tensor) -> Tensor:
    return table.reshape(-1).index_select(0, flat.reshape(-1)).view(flat.shape)


def _log_where(valid: Tensor, probability: Tensor) -> Tensor:
    # The inner `where` keeps an unused log 0 out of the graph: its gradient would be 0 * inf.
    return torch.where(valid, probability, torch.ones((), dtype=probability.dtype, device=probability.device)).log()


def _tolerance(table: Tensor) -> float:
    return 1e-6 if table.dtype == torch.float64 else 1e-4
