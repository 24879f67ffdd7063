"""Scores of sets: what k completions of one prompt are worth together."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.functional import elementary_symmetric
from align_cbrl.objectives.observations import Utility, UtilityFunction
from align_cbrl.problem import Observation, Observed
from align_cbrl.rollouts import Rollouts

_MOST_TUPLES = 1_000_000  # of a table's actions: k numbers each, for one state at a time
_SAMPLE = 8  # sets that are scored in another order, too
_ROUNDING = 1e-6  # by which scores of one set may differ, relative to 1 + |score|


@dataclasses.dataclass(frozen=True)
class SetMeans:
    """Means of a score over sets of completions, in groups of one size; a set's weight is its members' product.

    Attributes:
        whole: [N], over all sets of a group, differentiable in the observations.
        holding: [N, G], over the sets that hold each completion.
        apart: [N], with W_i a completion's share of its group's weight and P_ij the share of j among the sets that
            hold i: 1 - sum_ij W_i W_j P_ij, how far the sets of one completion are from being those of all.
    """

    whole: Tensor
    holding: Tensor
    apart: Tensor


class SetScore(abc.ABC):
    """A symmetric score g of k completions of one prompt: of `PassAt`, `BestOf`, `Distinct`, `SetFunction`."""

    @abc.abstractmethod
    def observations(self) -> tuple[Observation, ...]:
        """What it needs to know of every completion."""

    @abc.abstractmethod
    def in_groups(self, observed: Observed, rows: Tensor, weight: Tensor, size: int, subsets: int) -> SetMeans:
        """Its means over the sets of `size` in groups, from their rows [N, G] and weights [N, G].

        Args:
            observed: its observations of the batch.
            rows: long [N, G], where each group's completions stand in the batch.
            weight: [N, G], positive.
            size: k < G.
            subsets: the most sets of a group that are scored one by one.
        """

    @abc.abstractmethod
    def on_table(self, observed: Observed, policy: Tensor, size: int) -> Tensor:
        """E[g(a, Y_2 .. Y_k)] for every action, [C, S, A], the others drawn from the policy [C, S, A]."""


class _Covering(SetScore):
    """A score that is a sum over features: the height of each that some member of the set has.

    The probability that a set misses a feature is a ratio of elementary symmetric polynomials, so that no set is ever
    enumerated.
    """

    @abc.abstractmethod
    def _features(self, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Who has which feature, bool [..., n, L], and the features' heights [..., L], from labels [..., n]."""

    def in_groups(self, observed: Observed, rows: Tensor, weight: Tensor, size: int, subsets: int) -> SetMeans:
        """See `SetScore.in_groups`."""
        labels = [observed[o][:, 0].to(weight.device)[rows] for o in self.observations()]
        has, height = self._features(labels)  # [N, G, L], [N, L]
        # Features without a height, such as a score or a kind that has come before, are left out: of 256 answers of six
        # kinds only six remain.
        order = torch.argsort((height == 0).to(torch.uint8), dim=1, stable=True)[:, : int((height != 0).sum(1).max())]
        height = height.gather(1, order)
        has = has.gather(2, order[:, None].expand(-1, has.shape[1], -1))
        everybody = has.new_ones(*has.shape[:2], 1)
        lacking = torch.cat([everybody, ~has], 2).transpose(1, 2)  # [N, 1 + L, G]
        # [N, 1 + L, k + 1] and [N, 1 + L, G, k + 1]
        sums, without = elementary_symmetric(weight[:, None] * lacking, size)
        missed = sums[:, 1:, size] / sums[:, :1, size]  # [N, L]
        every_but = without[:, 0]  # [N, G, k + 1]
        missed_with = lacking[:, 1:] * without[:, 1:, :, size - 1] / every_but[:, None, :, size - 1]  # [N, L, G]
        # Over the others of i, sum_j w_j^2 e_{k-2}(without j) = p e_{k-1} - k e_k, p being their sum: that sums up P.
        share = weight / weight.sum(1, keepdim=True)
        ratio = size * every_but[..., size] / every_but[..., size - 1]  # [N, G]
        return SetMeans(
            whole=(height * (1 - missed)).sum(1),
            holding=(height[..., None] * (1 - missed_with)).sum(1).detach(),
            apart=(share * ratio).sum(1) / weight.sum(1),
        )

    def on_table(self, observed: Observed, policy: Tensor, size: int) -> Tensor:
        """See `SetScore.on_table`."""
        has, height = self._features([observed[o] for o in self.observations()])  # [C, S, A, L], [C, S, L]
        missed = (policy[..., None] * ~has).sum(-2) ** (size - 1)  # [C, S, L]
        return (height[..., None, :] * (1 - ~has * missed[..., None, :])).sum(-1)


@checked
@dataclasses.dataclass(frozen=True)
class PassAt(_Covering):
    """Whether any of k completions passes: pass@k.

    Attributes:
        score: maps (leader, rollouts) to [B, 1], independent of x: a `Judge`, or a table.
        least: the score from which on a completion passes; verdicts of 0 and 1 pass at 1.

    Example:
        >>> from align_cbrl import SetUtility
        >>> steps = {"right": torch.tensor([1.0, 0.0, 0.0, 0.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.zeros(4, dtype=torch.long), steps=steps)
        >>> right = lambda leader, rollouts: rollouts.steps["right"][:, None]
        >>> SetUtility(PassAt(right), size=2).evaluate(None, rollouts).value.item()  # 3 of 6 pairs hold the first
        0.5
    """

    score: UtilityFunction
    least: float = 0.5

    def observations(self) -> tuple[Observation, ...]:
        """The score."""
        return (Utility(self.score, name="PassAt.score"),)

    def _features(self, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        (score,) = labels
        return (score >= self.least)[..., None], torch.ones_like(score[..., :1], dtype=_floating(score))


@checked
@dataclasses.dataclass(frozen=True)
class BestOf(_Covering):
    """The highest score among k completions.

    Attributes:
        score: maps (leader, rollouts) to [B, 1], independent of x: a `Judge`, or a table.

    Example:
        >>> from align_cbrl import SetUtility
        >>> steps = {"score": torch.tensor([1.0, 2.0, 6.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.zeros(3, dtype=torch.long), steps=steps)
        >>> score = lambda leader, rollouts: rollouts.steps["score"][:, None]
        >>> round(SetUtility(BestOf(score), size=2).evaluate(None, rollouts).value.item(), 6)  # 2, 6 and 6
        4.666667
    """

    score: UtilityFunction

    def observations(self) -> tuple[Observation, ...]:
        """The score."""
        return (Utility(self.score, name="BestOf.score"),)

    def _features(self, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """To reach each of the scores; everybody reaches the lowest."""
        (score,) = labels
        level = score.to(_floating(score)).sort(-1).values  # [..., L], as many as completions
        return score[..., :, None] >= level[..., None, :], torch.diff(level, prepend=torch.zeros_like(level[..., :1]))


@checked
@dataclasses.dataclass(frozen=True)
class Distinct(_Covering):
    """The number of kinds of answers among k completions; or of good answers, those that a score accepts.

    Attributes:
        kind: maps (leader, rollouts) to numbers [B, 1] that are equal for answers of one kind: an `AnswerKind`, or a
            table.
        score: maps (leader, rollouts) to [B, 1], independent of x; None: every answer counts.
        least: the score from which on an answer counts; verdicts of 0 and 1 count at 1.

    Example:
        >>> from align_cbrl import SetUtility
        >>> steps = {"day": torch.tensor([1, 1, 2])}
        >>> rollouts = Rollouts.bandit(contexts=torch.zeros(3, dtype=torch.long), steps=steps)
        >>> day = lambda leader, rollouts: rollouts.steps["day"][:, None]
        >>> round(SetUtility(Distinct(day), size=2).evaluate(None, rollouts).value.item(), 6)  # 1, 2 and 2
        1.666667
    """

    kind: UtilityFunction
    score: UtilityFunction | None = None
    least: float = 0.5

    def observations(self) -> tuple[Observation, ...]:
        """The kind, and the score if there is one."""
        kind = Utility(self.kind, name="Distinct.kind")
        return (kind,) if self.score is None else (kind, Utility(self.score, name="Distinct.score"))

    def _features(self, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """To be a good answer of the kind of each completion; kinds count once, with their first good answer."""
        kind = labels[0]
        good = torch.ones_like(kind, dtype=torch.bool) if self.score is None else labels[1] >= self.least
        both = good[..., :, None] & good[..., None, :]
        same = (kind[..., :, None] == kind[..., None, :]) & both  # [..., n, L], L = n
        earlier = same.triu(1).any(-2)  # an earlier completion is a good answer of the same kind
        return same, (good & ~earlier).to(torch.float64)


@checked
@dataclasses.dataclass(frozen=True)
class SetFunction(SetScore):
    """Any symmetric function of the scores of k completions, by enumeration of sets.

    Attributes:
        function: maps scores [..., k] to [...], whatever their order along the last axis.
        score: maps (leader, rollouts) to [B, 1], independent of x: a `Judge`, or a table. The number of an action, on a
            table, lets the function be any symmetric function of k actions.

    Example:
        >>> from align_cbrl import SetUtility
        >>> steps = {"length": torch.tensor([1.0, 2.0, 6.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.zeros(3, dtype=torch.long), steps=steps)
        >>> length = lambda leader, rollouts: rollouts.steps["length"][:, None]
        >>> spread = SetFunction(lambda lengths: lengths.amax(-1) - lengths.amin(-1), length)
        >>> round(SetUtility(spread, size=2).evaluate(None, rollouts).value.item(), 6)  # 1, 5 and 4
        3.333333
    """

    function: Callable[[Tensor], Tensor]
    score: UtilityFunction

    def observations(self) -> tuple[Observation, ...]:
        """The score."""
        return (Utility(self.score, name="SetFunction.score"),)

    def in_groups(self, observed: Observed, rows: Tensor, weight: Tensor, size: int, subsets: int) -> SetMeans:
        """See `SetScore.in_groups`."""
        (scored,) = self.observations()
        members = subsets_of(rows.shape[1], size, subsets).to(rows.device)  # [M, k]
        score = observed[scored][:, 0].to(weight.device)[rows][:, members].flatten(0, 1)  # [N * M, k]
        said = _asked("SetFunction.function", self.function, score)
        return _enumerated(said.view(len(rows), -1), members, weight)

    def on_table(self, observed: Observed, policy: Tensor, size: int) -> Tensor:
        """See `SetScore.on_table`."""
        (scored,) = self.observations()
        table, actions = observed[scored], policy.shape[-1]
        if actions**size > _MOST_TUPLES:
            raise InputError(
                f"SetUtility.size: the exact value enumerates all draws of {size} among {actions} actions, and "
                f"expected at most {_MOST_TUPLES:,}, got {actions**size:,}; lower the size, or use PassAt, BestOf or "
                "Distinct, which have closed forms"
            )
        tuples = torch.cartesian_prod(*[torch.arange(actions)] * size).view(-1, size).to(table.device)  # [A^k, k]
        states = []
        for scores, law in zip(table.flatten(0, 1), policy.flatten(0, 1), strict=True):  # [A], [A]
            worth = _asked("SetFunction.function", self.function, scores[tuples]).view([actions] * size)
            for _ in range(size - 1):
                worth = worth @ law
            states.append(worth)
        return torch.stack(states).view_as(policy)


@dataclasses.dataclass(frozen=True)
class Said(SetScore):
    """What a function says that reads the completions of a set: a `SetJudge`.

    Attributes:
        function: maps (rollouts, sets), the latter row numbers long [M, k], to [M].
    """

    function: Callable[[Rollouts, Tensor], Tensor]

    def observations(self) -> tuple[Observation, ...]:
        """None: it reads the completions themselves."""
        return ()

    def in_groups(self, observed: Observed, rows: Tensor, weight: Tensor, size: int, subsets: int) -> SetMeans:
        """See `SetScore.in_groups`."""
        rollouts = observed.samples
        if not rollouts.steps:
            raise InputError(
                "SetUtility.score: a judge of sets reads all of their completions, and in several processes they may "
                "lie in different ones; run one process, or use a score of single completions"
            )
        members = subsets_of(rows.shape[1], size, subsets).to(rows.device)  # [M, k]
        sets = rows[:, members].flatten(0, 1)  # [N * M, k]

        def ask(some: Tensor) -> Tensor:
            return self.function(rollouts, some)

        said = _asked("SetUtility.score", ask, sets)
        return _enumerated(said.to(weight).view(len(rows), -1), members, weight)

    def on_table(self, observed: Observed, policy: Tensor, size: int) -> Tensor:
        """Refused: there is nothing to read."""
        raise InputError("SetUtility.score: a judge of sets has no table; give a SetFunction of a TabularUtility")


def subsets_of(group: int, size: int, most: int) -> Tensor:
    """Sets of `size` of a group's completions, by their numbers, long [M, size]: all of them, or `most` at most.

    Where there are more, each completion is in equally many of those that are taken: cut from one shuffle of the group
    after another. They depend on the three numbers alone, so that a replay asks a judge about the sets it has seen.

    Raises:
        InputError: `most` does not do for sets in which each completion occurs equally often.

    Example:
        >>> subsets_of(3, 2, most=9).tolist(), subsets_of(6, 3, most=4).flatten().bincount().tolist()
        ([[0, 1], [0, 2], [1, 2]], [2, 2, 2, 2, 2, 2])
    """
    if math.comb(group, size) <= most:
        return torch.tensor(list(itertools.combinations(range(group), size)))
    least = group // math.gcd(group, size)
    if most < least:
        raise InputError(
            f"SetUtility.subsets: expected at least {least}, with which each of a group's {group} completions is in "
            f"equally many sets of {size}, got {most}"
        )
    generator = torch.Generator().manual_seed(0)
    taken: list[list[int]] = []
    left: list[int] = []  # of the last shuffle, too few for a set
    while len(taken) < most // least * least:
        shuffle = torch.randperm(group, generator=generator).tolist()
        row = left + sorted(shuffle, key=lambda i: i in left)  # stable: nobody is in a set twice
        whole = len(row) // size * size
        taken += [sorted(row[start : start + size]) for start in range(0, whole, size)]
        left = row[whole:]
    return torch.tensor(taken[: most // least * least])


def _enumerated(said: Tensor, members: Tensor, weight: Tensor) -> SetMeans:
    """Means over sets that were scored one by one: scores [N, M] of the sets [M, k], weights [N, G]."""
    among = torch.zeros(len(members), weight.shape[1], dtype=weight.dtype, device=weight.device)
    among.scatter_(1, members, 1.0)  # [M, G]
    mass = weight[:, members].prod(-1)  # [N, M]
    together = torch.einsum("nm,mi,mj->nij", mass, among, among)  # [N, G, G]
    alone = together.diagonal(dim1=1, dim2=2)  # [N, G]
    share = weight / weight.sum(1, keepdim=True)
    return SetMeans(
        whole=(mass * said).sum(1) / mass.sum(1),
        holding=((mass * said).detach() @ among) / alone,
        apart=1 - torch.einsum("ni,nij,nj->n", share, together / alone[:, :, None], share),
    )


def _asked(name: str, function: Callable[[Tensor], Tensor], sets: Tensor) -> Tensor:
    """The scores of sets [M, k]: [M]; a few of them are scored with their first member put last, too."""
    said = _numbers(name, function(sets), len(sets))
    if sets.shape[1] == 1:
        return said
    some = torch.randint(len(sets), (_SAMPLE,), generator=torch.Generator().manual_seed(0)).unique().to(sets.device)
    with torch.no_grad():
        again = _numbers(name, function(sets[some].roll(-1, 1)), len(some))
    first = said[some].detach().to(again)
    apart = (first - again).abs() > _ROUNDING * (1 + first.abs())
    if bool(apart.any()):
        i = int(apart.nonzero()[0])
        raise InputError(
            f"{name}: expected a score that does not depend on the order of a set, got {float(first[i]):g} for one and "
            f"{float(again[i]):g} for the same in another order; average over orders, or sort what it reads"
        )
    return said


def _numbers(name: str, said: Tensor, count: int) -> Tensor:
    if not isinstance(said, Tensor) or tuple(said.shape) != (count,):
        came = f"shape {tuple(said.shape)}" if isinstance(said, Tensor) else f"a {type(said).__name__}"
        raise InputError(f"{name}: expected {count} scores, one for each set, got {came}")
    if not bool(torch.isfinite(said).all()):
        i = int((~torch.isfinite(said)).nonzero()[0])
        raise InputError(f"{name}: expected a finite number for each set, got {said[i].item()} for set {i}")
    return said


def _floating(label: Tensor) -> torch.dtype:
    return label.dtype if label.is_floating_point() else torch.float64
