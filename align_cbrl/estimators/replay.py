"""Batches that earlier leader steps were taken on, kept so that what was judged can be used again."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_cbrl.distributed import gather_lists, gather_rows, own_rows, rank, world_size
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.estimators.certificate import can_be_weighted, log_ratio_to_response
from align_cbrl.functional import effective_sample_size, tilt_weights
from align_cbrl.groups import Groups
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts

_LARGEST = 4.0  # weight of a path, of a mean of one; measured with natural steps (docs/derivation.md)
_REMEMBERED = 64  # batches; older ones are from policies too far from the present best response


def at_present(problem: Problem, rollouts: Rollouts, chunks: int = 1) -> Rollouts:
    """Paths of an earlier best response, or of a follower on its way, as weighted samples of the present one.

    Each group's weights are proportional to those that the paths have already, times pi* / pi, and are cut at four
    times their mean: a group that is nearly one path would otherwise be all variance. Log-probabilities become those
    of the best response, as the group estimates them.

    Args:
        problem: its leader's present reward is what the best response answers.
        rollouts: of one step; in several processes, this rank's part.
        chunks: into how many pieces the paths are cut when they are scored.

    Raises:
        InputError: paths of several steps, or without log-probabilities.
    """
    if not can_be_weighted(problem, rollouts) or rollouts.log_policy is None:
        raise InputError(
            "HPGDConfig.replays, HPGDConfig.natural: expected rollouts of one step with log_policy and log_prior, "
            "which can be weighted; set replays=0 and natural=None for this follower"
        )
    with torch.no_grad():
        log_ratio, _, whole = log_ratio_to_response(problem, rollouts, chunks)
        old, group = whole.path_weight().to(log_ratio), whole.group[:, 0].to(log_ratio.device)
        weight = tilt_weights(log_ratio + old.log(), group).clamp(max=_LARGEST)
        groups = Groups.of(group)
        weight = weight / groups.mean(weight)[groups.place]
        change = (weight / old.clamp(min=math.ulp(0.0))).clamp(min=math.ulp(0.0)).log()
        own = own_rows(rollouts.size)
    log_policy = rollouts.log_policy + change[own, None].to(rollouts.log_policy)
    return dataclasses.replace(rollouts, weight=weight[own].to(rollouts.mask.device), log_policy=log_policy)


def taken_for_response(problem: Problem, rollouts: Rollouts, chunks: int = 1) -> Rollouts:
    """Paths of a follower that is not at its best response, with the log-probabilities that that would give them.

    Remembered so, they are weighted later (`at_present`) by what has changed in the leader's reward since, and by that
    alone: log pi* is log pi + rho, where rho = r / lambda - log(pi / prior), up to a constant of the group. They then
    stand for a follower that misses its best response as it did, instead of for the best response.

    Args:
        problem: its leader's present reward is what the best response answers.
        rollouts: of one step, with log_policy and log_prior; in several processes, this rank's part.
        chunks: into how many pieces the paths are cut when they are scored.
    """
    with torch.no_grad():
        log_ratio, _, whole = log_ratio_to_response(problem, rollouts, chunks)
        lacking = Groups.of(whole.group[:, 0].to(log_ratio.device)).centred(log_ratio)
        assert rollouts.log_policy is not None  # `can_be_weighted`
        lacking = lacking[own_rows(rollouts.size), None].to(rollouts.log_policy)
    return dataclasses.replace(rollouts, log_policy=rollouts.log_policy + lacking)


def all_at_present(problem: Problem, batches: Sequence[Rollouts], newest: Rollouts, chunks: int = 1) -> Rollouts:
    """Remembered batches and the newest one, as it is, as samples of the present best response: one batch.

    A remembered batch counts as much as its weights leave of it (their effective sample size).

    Raises:
        InputError: as `at_present`.
    """
    if not batches:
        return newest
    older = at_present(problem, Rollouts.joined(batches), chunks)
    assert older.weight is not None
    numbers = torch.cat([torch.full((batch.size,), i) for i, batch in enumerate(batches)])  # the batch of each path
    whole, number = older.over_ranks(), gather_rows(numbers)
    group = whole.group[:, 0].cpu()
    left = effective_sample_size(whole.path_weight().cpu(), group) / Groups.of(group).sizes  # [K], a share
    share = Groups.of(number).mean(left[Groups.of(group).place])  # [batches], over paths
    weight = torch.cat([older.path_weight().cpu() * share[numbers], newest.path_weight().cpu()])
    mean = gather_rows(weight).mean()  # of all ranks
    whole = Rollouts.joined([_unweighted(older), _unweighted(newest)])
    return dataclasses.replace(whole, weight=(weight / mean).to(whole.mask.device))


def _unweighted(rollouts: Rollouts) -> Rollouts:
    """Without weights, whose estimates of log pi* may exceed zero; no policy does, but a density."""
    log_policy = rollouts.log_policy
    if log_policy is not None and not rollouts.density:
        log_policy = log_policy.clamp(max=0.0)
    return dataclasses.replace(rollouts, weight=None, log_policy=log_policy)


class Memory:
    """The newest batches of rollouts, drawn from at random.

    In several processes each keeps its part of every batch; where they are to be saved, also what the others have, so
    that rank 0 can save without asking anybody.

    Args:
        capacity: how many batches are kept.
        saved: whether `state_dict` will be asked for.

    Example:
        >>> memory = Memory()
        >>> memory.add(Rollouts.bandit(contexts=torch.tensor([3]), steps={"completion": ["yes"]}))
        >>> [batch.contexts.tolist() for batch in memory.draw(2, seed=0)]
        [[3], [3]]
    """

    def __init__(self, capacity: int = _REMEMBERED, saved: bool = True) -> None:
        self.capacity, self.saved = capacity, saved
        self.batches: list[Rollouts] = []
        self._states: list[list[dict[str, Any]]] = []  # of each batch, on every rank

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, rollouts: Rollouts) -> None:
        """Keep a batch, and forget the oldest where there are too many.

        Raises:
            InputError: a column of values that no checkpoint can hold, such as images; before anything is lost by it.
        """
        if self.saved:
            self._states.append(gather_lists([_state(rollouts)]))
        self.batches.append(rollouts)
        for kept in (self.batches, self._states):
            del kept[: max(0, len(kept) - self.capacity)]

    def draw(self, count: int, seed: int) -> list[Rollouts]:
        """`count` batches, uniformly and with replacement; they depend on the seed and on what is kept alone."""
        generator = torch.Generator().manual_seed(seed)
        return [self.batches[int(torch.randint(len(self.batches), (1,), generator=generator))] for _ in range(count)]

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """The batches as plain data and tensors, each a list over ranks."""
        return list(self._states)

    def load_state_dict(self, state: list[list[dict[str, Any]]]) -> None:
        """Restore what `state_dict` returned. Raises CheckpointError for another number of processes."""
        if any(len(parts) != world_size() for parts in state):
            raise CheckpointError(
                f"remembered batches: expected the parts of {world_size()} processes, got those of {len(state[0])}; "
                "resume with as many processes as the run was started with"
            )
        self._states = list(state)
        mine = [parts[rank()] for parts in state]
        self.batches = [Rollouts(**{**fields, "steps": _unpacked(fields["steps"])}) for fields in mine]


def _state(batch: Rollouts) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Rollouts) if field.name != "known"]
    return {name: _plain(getattr(batch, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: column if isinstance(column, Tensor) else _packed(name, column) for name, column in value.items()}
    return value


_KIND = "kind of value"
_KINDS: dict[str, tuple[type[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda value: value // datetime.timedelta(microseconds=1),
        lambda value: datetime.timedelta(microseconds=value),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "float": (float, repr, float),  # NaN and infinities, which are no JSON
}
"""What columns of data hold besides numbers, texts, lists and dictionaries, and how a checkpoint holds it."""


def _packed(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {key: _packed(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(name, item) for item in value]
    if hasattr(value, "tolist"):  # an array, or a number of NumPy's
        return _packed(name, value.tolist())
    for kind, (of, pack, _) in _KINDS.items():
        if isinstance(value, of):
            return {_KIND: kind, "value": pack(value)}
    raise InputError(
        f"replays: the column {name!r} holds values that a checkpoint cannot, of type {type(value).__name__}; drop the "
        f"column, dataset.remove_columns({name!r}), or set replays to 0"
    )


def _unpacked(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {_KIND, "value"}:
            return _KINDS[value[_KIND]][2](value["value"])
        return {key: _unpacked(item) for key, item in value.items()}
    return [_unpacked(item) for item in value] if isinstance(value, list) else value
