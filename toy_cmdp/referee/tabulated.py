"""Objectives as tables: their observations over all states and actions, and J linearised around a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.objectives import GroupLabel, LogRatio, Reward, Utility
from align_cbrl.objectives.preference_data import PairLikelihood
from align_cbrl.problem import ONE_STEP, Objective, Observation, Observed, Term, combined, require_still
from toy_cmdp.tables.cmdp import ContextualMDP, Tables, TabularLeader, TabularUtility


@dataclasses.dataclass(frozen=True)
class World:
    """Where an observation is tabulated.

    Attributes:
        leader: of the problem.
        cmdp: of the problem.
        tables: the leader's.
        log_policy: [C, S, A], of the follower; gradients may flow through it.
    """

    leader: TabularLeader
    cmdp: ContextualMDP
    tables: Tables
    log_policy: Tensor


def tabulated_terms(
    objective: Objective, leader: TabularLeader, cmdp: ContextualMDP, log_policy: Tensor, tables: Tables
) -> list[Term]:
    """The terms of an objective as tables [C, S, A], with their graph to the leader and to `log_policy`.

    Raises:
        InputError: an observation that has no table, or an objective for problems of one step on a longer one.
    """
    world = World(leader, cmdp, tables, log_policy)
    values = {o: table_of(o, world) for o in dict.fromkeys(objective.observations())}
    for observation, table in values.items():
        if not observation.moves:
            require_still(observation.name, leader, table)
    if objective.one_step and not bool(cmdp.terminal.all()):
        going_on = int((~cmdp.terminal).sum())
        raise InputError(
            ONE_STEP.format(name=type(objective).__name__, what=f"{going_on} states of its contexts where it goes on")
        )
    policy = log_policy.exp()
    if torch.is_grad_enabled():  # terms and risks see the leader through observations only
        probabilities = cmdp.context_probabilities.to(policy.dtype)
        for term in objective.terms(Observed({o: t.detach() for o, t in values.items()}, policy=policy.detach())):
            risk = term.risk.aggregate(torch.zeros_like(probabilities), probabilities)
            require_still(f"{type(objective).__name__}: its terms or risk", leader, term.utility, term.credit, risk)
    return objective.terms(Observed(values, policy=policy))


@singledispatch
def table_of(observation: Observation, world: World) -> Tensor:
    """An observation over all states and actions, [C, S, A]; register a function for a kind of one's own.

    Raises:
        InputError: it is made of sampled data.
    """
    raise InputError(
        f"objective: the exact route has no table for the observation {observation.name!r} "
        f"({type(observation).__name__}); register one with toy_cmdp.referee.tabulated.table_of"
    )


@table_of.register
def _(observation: Utility, world: World) -> Tensor:
    if not isinstance(observation.function, TabularUtility):
        what = "objective" if observation.name == "utility" else observation.name
        raise InputError(f"{what}: the exact route takes a TabularUtility, got {observation.function!r}")
    table = observation.function.table(world.leader)
    if table.shape != world.log_policy.shape:
        raise InputError(
            f"{observation.name}: expected shape {tuple(world.log_policy.shape)} (C, S, A), got {tuple(table.shape)}"
        )
    world.cmdp.check_finite(observation.name, table)
    return table


@table_of.register
def _(observation: LogRatio, world: World) -> Tensor:
    log_prior = world.tables.log_prior
    return world.log_policy if log_prior is None else world.log_policy - log_prior


@table_of.register
def _(observation: Reward, world: World) -> Tensor:
    return world.tables.reward


@table_of.register
def _(observation: PairLikelihood, world: World) -> Tensor:
    return observation.data.likelihood(world.leader).to(world.log_policy).expand(world.log_policy.shape)


@table_of.register
def _(observation: GroupLabel, world: World) -> Tensor:
    raise InputError("WorstGroup: its groups are a column of sampled data, so it has no exact value on a table")


@dataclasses.dataclass(frozen=True)
class Linearised:
    """J around a policy: an expectation with the same derivative.

    Attributes:
        value: J, a scalar.
        utility: [C, S, A], the sum of the terms' utilities, each weighted by the derivative of J with respect to its
            context's value over the context's probability; for an expectation it is the utility itself.
        credit: [C, S, A], the same sum of the credits.
        in_context: [C], what the policy is worth in each context; of a risk, what the risk is taken of.
    """

    value: Tensor
    utility: Tensor
    credit: Tensor
    in_context: Tensor


def linearised(
    objective: Objective, terms: Sequence[Term], context_values: Callable[[Tensor], Tensor], probabilities: Tensor
) -> Linearised:
    """Linearise an objective at what its terms are worth in each context.

    Args:
        objective: whose terms these are.
        terms: as tables.
        context_values: maps a utility [C, S, A] to the contexts' values [C] under the policy, without graph.
        probabilities: [C], nature's law. What the objective makes of a context that nature never draws does not count.
    """
    leaves = [context_values(term.utility.detach()).detach().requires_grad_(True) for term in terms]
    with torch.enable_grad():
        value = worth(objective, terms, leaves, probabilities)
        slopes = torch.autograd.grad(value, leaves)
    utility, credit = None, None
    for term, slope in zip(terms, slopes, strict=True):
        importance = torch.where(probabilities > 0, slope / probabilities, 0.0)[:, None, None]  # [C, 1, 1]
        utility = importance * term.utility if utility is None else utility + importance * term.utility
        credit = importance * term.credit if credit is None else credit + importance * term.credit
    assert utility is not None and credit is not None  # an objective has at least one term
    return Linearised(value.detach(), utility, credit, of_contexts(objective, [leaf.detach() for leaf in leaves]))


def of_contexts(objective: Objective, values: Sequence[Tensor]) -> Tensor:
    """The contexts' values [C] from those of the terms: their sum, or what the risk is taken of.

    A function of means over all contexts has none; of such an objective it is what was added to it, such as a price.
    """
    return torch.stack(list(values)).sum(0) if objective.is_mean else values[0]


def worth(objective: Objective, terms: Sequence[Term], values: Sequence[Tensor], probabilities: Tensor) -> Tensor:
    """J from the contexts' values [C] of each term, differentiable in them."""
    worths = [term.risk.aggregate(value, probabilities) for term, value in zip(terms, values, strict=True)]
    return combined(terms, worths) + objective.constant
