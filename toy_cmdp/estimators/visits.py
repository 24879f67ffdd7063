"""What the visit-averaged rivals share: averages over visits, and their gradients as one backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import accumulate
from align_cbrl.estimators.observing import derivatives, direct_term, observe
from align_cbrl.functional import discount_powers, eligibility_trace
from align_cbrl.objectives import ExpectedUtility
from align_cbrl.objectives.expected import mean_term
from align_cbrl.problem import Problem, per_path
from align_cbrl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Averages:
    """Averages over the visits of each index.

    Attributes:
        place: long [N], where the N steps that were taken stand in a flattened [B, T].
        index: long [N], what each of them visited.
        count: [K], visits of each index.
    """

    place: Tensor
    index: Tensor
    count: Tensor

    def mean(self, value: Tensor) -> Tensor:
        """Averages of value [B, T] over the visits of each index, [K]; zero where there was none."""
        return self._total(value) / self.count.clamp(min=1).to(value)

    def along(self, table: Tensor, shape: torch.Size) -> Tensor:
        """table [K] read at every step, [B, T]; zero where no step was taken."""
        flat = table.new_zeros(shape[0] * shape[1])
        flat[self.place] = table[self.index]
        return flat.view(shape)

    def spread(self, value: Tensor) -> Tensor:
        """Every step's share of its index's total, [B, T]: the adjoint of `mean` and `along` together."""
        return self.along(self.mean(value), value.shape)

    def _total(self, value: Tensor) -> Tensor:
        return value.new_zeros(len(self.count)).index_add(0, self.index, value.reshape(-1)[self.place])


@dataclasses.dataclass(frozen=True)
class Visits:
    """Which cell and which (cell, action) pair the steps of a batch visited.

    Attributes:
        cell, pair: averages over the visits of either; a pair's number is cell * actions + action.
        actions: how many there are.
    """

    cell: Averages
    pair: Averages
    actions: int


def visits(rollouts: Rollouts, cell: Callable[[Rollouts], Tensor]) -> Visits:
    """The visits of a batch; `cell` as for `FittedCritic`."""
    for name in ("action", "log_policy_all"):
        if name not in rollouts.steps:
            raise InputError(f'rollouts.steps: expected "{name}", got {sorted(rollouts.steps)}')
    place = rollouts.mask.reshape(-1).nonzero()[:, 0]
    cells = cell(rollouts)[:, :-1].reshape(-1)[place]
    actions = rollouts.steps["log_policy_all"].shape[-1]
    pairs = cells * actions + rollouts.steps["action"].reshape(-1)[place]
    count = torch.bincount(cells)
    return Visits(
        Averages(place, cells, count),
        Averages(place, pairs, torch.bincount(pairs, minlength=len(count) * actions)),
        actions,
    )


def add_gradient(problem: Problem, rollouts: Rollouts, visits: Visits, source: Tensor) -> float:
    """Add the gradient of the visit-averaged value plus that of sum_t source_t dQ_t to `.grad`; returns its norm.

    source [B, T] weighs dQ_t = sum_{k >= t} gamma^{k-t} dr_k, so that dr_k has the weight w_k = gamma w_{k-1} +
    source_k: an eligibility trace, hence one backward pass whatever the size of x. The direct term is the average, over
    *all* visits of the starting cells, of sum_{k >= t} gammaF^{k-t} du_k.
    """
    leader = problem.leader
    if leader.log_transition(rollouts) is not None or leader.log_initial(rollouts) is not None:
        raise InputError(
            f"{type(leader).__name__} moves the transitions or the initial state, for which this rival has no terms; "
            "use PolicyResponse or PlugIn"
        )
    discount = per_path(problem.follower.discount, rollouts.contexts)
    temperature = torch.as_tensor(per_path(problem.temperature, rollouts.contexts), dtype=source.dtype)
    temperature = temperature.reshape(-1, 1)
    trace = eligibility_trace(source, rollouts.mask, discount, 1.0)
    surrogate = (trace * (leader.reward(rollouts) / temperature)).sum()
    log_prior = leader.log_prior(rollouts)
    if log_prior is not None:
        surrogate = surrogate + (trace * log_prior).sum()
    first = torch.zeros_like(source)
    first[:, 0] = 1 / rollouts.size
    starts = visits.cell.spread(first)
    direct = eligibility_trace(starts, rollouts.mask, problem.objective.discount, 1.0)
    observed = observe(problem, rollouts)
    weights = derivatives(lambda seen: (direct * mean_term(problem.objective, seen).utility).sum(), observed)
    own = direct_term(leader, rollouts, weights)
    if own is not None:
        surrogate = surrogate + own
    gradients = torch.autograd.grad(surrogate, problem.parameters, allow_unused=True)
    return accumulate(problem, gradients)


def expected_utility(problem: Problem, rollouts: Rollouts, name: str) -> Tensor:
    """The utility of every step, [B, T]. Raises `InputError` unless the objective is a plain expected utility."""
    objective = problem.objective
    if not isinstance(objective, ExpectedUtility):
        raise InputError(f"objective: {name} takes an ExpectedUtility, got {type(objective).__name__}")
    return objective.utility(problem.leader, rollouts)


def discounted(value: Tensor, problem: Problem) -> Tensor:
    """gammaF^t value_t, [B, T]."""
    return discount_powers(problem.objective.discount, value.shape[1], value) * value
