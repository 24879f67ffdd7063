"""Objectives of sets: what k completions of one prompt are worth together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.objectives.expected import MEAN
from align_cbrl.objectives.set_scores import Said, SetScore
from align_cbrl.problem import Objective, Observation, Observed, Term
from align_cbrl.rollouts import Rollouts

_ALONE = 1e-9  # of a group's weight beyond k completions, below which there is nobody left to compare a set with
_LIGHTEST = 1e-200  # of a set's weight relative to the heaviest; lighter ones would be rounded to nothing


@checked
@dataclasses.dataclass(frozen=True)
class SetUtility(Objective):
    """What k completions of one prompt are worth together: J = E_c E g(Y_1, ..., Y_k), all drawn from the policy.

    pass@k, the best of k, the number of distinct answers, coverage, a listwise judge: whatever a mean of scores, one a
    completion, cannot say. J is a polynomial of degree k in the policy, so that the credit of y is k times the mean of
    g over the sets that hold y, taken within a group of G > k. That mean and the group's own, with which `GroupCritic`
    compares it, share most of their members; what is left of the covariance is (G - k) / (G - 1), which the credit
    makes up for:

        credit_i = k (G - 1) / (G - k) * mean of g over the sets of k that hold i.

    The estimate is unbiased, whichever sets are scored, as long as each completion is in equally many
    (docs/derivation.md). With importance weights a set counts by the product of its members' and the factor is a
    function of the weights, such that the estimate stays unbiased for weights that do not depend on the completions;
    those of a replay do, and it is consistent. What is kept with a batch are scores, never a credit: that is made of
    the batch's weights each time.

    Attributes:
        score: g, whatever the order of a set: `PassAt`, `BestOf` or `Distinct`, which have closed forms; a
            `SetFunction` of a score; or a function that maps (rollouts, sets), the latter row numbers long [M, k], to
            scores [M], such as a `SetJudge`.
        size: k. Groups of at least k + 1 completions are needed.
        subsets: the most sets of a group that are scored, where they are scored one by one.

    Raises:
        InputError: a size that is not positive; groups that are too small; a score that depends on the order of a set,
            is NaN, or is not one number a set.

    Example:
        >>> from align_cbrl import BestOf
        >>> steps = {"score": torch.tensor([1.0, 2.0, 6.0])}
        >>> rollouts = Rollouts.bandit(contexts=torch.zeros(3, dtype=torch.long), steps=steps)
        >>> score = BestOf(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> [round(c, 6) for c in SetUtility(score, size=2).evaluate(None, rollouts).credit[:, 0].tolist()]
        [16.0, 16.0, 24.0]
    """

    score: SetScore | Callable[[Rollouts, Tensor], Tensor]
    size: Count
    subsets: Count = 256

    is_linear = False
    one_step = True

    @property
    def _score(self) -> SetScore:
        return self.score if isinstance(self.score, SetScore) else Said(self.score)

    def observations(self) -> tuple[Observation, ...]:
        """What the score needs to know of every completion."""
        return self._score.observations()

    def terms(self, observed: Observed) -> list[Term]:
        """The mean over sets. A judge of sets is asked here, once about each set.

        Raises:
            InputError: paths of several steps, or as the class.
        """
        if observed.policy is not None:
            worth = self._score.on_table(observed, observed.policy, self.size)
            return [Term(worth, self.size * worth, MEAN)]
        return [self._in_groups(observed.samples, observed)]

    def _in_groups(self, rollouts: Rollouts, observed: Observed) -> Term:
        if rollouts.horizon != 1:
            raise InputError(f"SetUtility: expected rollouts of one step, got a horizon of {rollouts.horizon}")
        path_weight = rollouts.path_weight()
        groups = Groups.of(rollouts.group[:, 0])
        smallest = int(groups.sizes.min())
        if smallest <= self.size:
            raise InputError(
                f"SetUtility.size: sets of {self.size} need groups of at least {self.size + 1} completions a prompt, "
                f"got one of {smallest}: {self.size} make the set and one more is what it is compared with; raise the "
                "group size, or lower this"
            )
        utility, credit = torch.zeros_like(path_weight), torch.zeros_like(path_weight)
        for number, rows in groups.tables():  # groups of one size at a time: [N, G]
            weight = path_weight[rows]
            heaviest = weight.amax(1, keepdim=True)
            if bool((heaviest == 0).any()):
                empty = int(groups.labels[number[(heaviest == 0)[:, 0]][0]])
                raise InputError(f"SetUtility: every path of group {empty} has weight zero, so that it says nothing")
            weight = (weight / heaviest).clamp(min=_LIGHTEST ** (1 / self.size))
            means = self._score.in_groups(observed, rows, weight, self.size, self.subsets)
            whole = means.whole.to(utility)[:, None].expand(rows.shape)
            share = weight / weight.sum(1, keepdim=True)
            comparable = (means.apart > _ALONE)[:, None]
            factor = self.size * (1 - (share**2).sum(1)) / torch.where(means.apart > _ALONE, means.apart, 1.0)
            utility = utility.index_put((rows,), whole)
            credit[rows] = torch.where(comparable, factor[:, None] * means.holding, whole).detach()
        return Term(utility[:, None], credit[:, None], MEAN)
