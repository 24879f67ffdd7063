"""Preferences on pairs of the follower's own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from align_cbrl.checks import Count, Positive, checked
from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.objectives.expected import MEAN
from align_cbrl.objectives.observations import Reward, Utility, UtilityFunction
from align_cbrl.problem import Objective, Observation, Observed, Term
from align_cbrl.rollouts import Rollouts

_REWARD = Reward()


@checked
@dataclasses.dataclass(frozen=True)
class PreferenceLikelihood(Objective):
    """How well the leader's reward explains preferences on pairs of the follower's own answers (PARL's objective).

    For rollouts of one step,

        J = E_c E_{y, y' ~ pi*} l(y, y'),    l = p log sigma(r - r') + (1 - p) log sigma(r' - r),

    where p is the probability that y is preferred to y': sigma((score - score') / scale) where a judge scores answers
    (Bradley and Terry), or what a judge of pairs says. x enters twice: in the likelihood, the direct term, and in what
    pairs there are, the response. Pairs are those within a group. J is quadratic in the policy, so that the credit of
    y is twice its mean over partners. A group's mean, which `GroupCritic` compares with, holds the partners as well;
    that shrinks the covariance by (G - 2) / (G - 1), which the credit makes up for: groups of at least 3 are needed,
    and the estimate is then unbiased. The factor is the same however many partners an answer has, as long as all have
    as many (docs/objectives.md).

    Attributes:
        score: maps (leader, rollouts) to scores [B, 1] that do not depend on x: a judge, or a table.
        scale: of the score, > 0: smaller means surer preferences.
        preference: instead of `score`, maps (rollouts, first, second), the latter row numbers long [M], to the
            probabilities [M] that the first row's answer is preferred: a `PairwiseJudge`, or a table.
        partners: with how many others of its group each answer is paired: an even number, or None for all of them.
            A judge of pairs is asked about G * partners / 2 pairs a group.

    Raises:
        InputError: neither or both of score and preference; a scale that is not positive; an odd number of partners.

    Example:
        >>> objective = PreferenceLikelihood(lambda leader, rollouts: rollouts.steps["score"][:, None])
        >>> objective.pair(torch.tensor(0.0), torch.tensor(0.0)).item() == torch.tensor(0.5).log().item()
        True
    """

    score: UtilityFunction | None = None
    scale: Positive = 1.0
    preference: Callable[[Rollouts, Tensor, Tensor], Tensor] | None = None
    partners: Count | None = None

    is_linear = False
    one_step = True

    def __post_init__(self) -> None:
        if (self.score is None) == (self.preference is None):
            raise InputError("PreferenceLikelihood: expected either score or preference, one of the two")
        if self.partners is not None and (self.partners < 2 or self.partners % 2):
            raise InputError(f"PreferenceLikelihood.partners: expected an even number >= 2, got {self.partners}")

    def pair(self, reward_difference: Tensor, score_difference: Tensor) -> Tensor:
        """The expected log-likelihood l of a pair, from r - r' and score - score', of any shape."""
        return pair_likelihood(reward_difference, torch.sigmoid(score_difference / self.scale))

    def observations(self) -> tuple[Observation, ...]:
        """The reward r_x and, where answers are scored, the score."""
        return (_REWARD,) if self.score is None else (_REWARD, self._scored(self.score))

    def terms(self, observed: Observed) -> list[Term]:
        """The mean over pairs. A judge of pairs is asked here, once about each pair.

        Raises:
            InputError: paths of several steps, groups of fewer than 3, more partners than others in a group, or
                preferences outside [0, 1].
        """
        if observed.policy is not None:
            return [self._under(observed.policy, observed)]
        return [self._in_groups(observed.samples, observed)]

    def _scored(self, score: UtilityFunction) -> Utility:
        return Utility(score, name="PreferenceLikelihood.score")

    def _under(self, policy: Tensor, observed: Observed) -> Term:
        """All pairs of actions, as often as the policy [C, S, A] draws them."""
        if self.score is None:
            raise InputError("PreferenceLikelihood.preference: a judge of pairs has no table; give a score")
        reward, score = observed[_REWARD], observed[self._scored(self.score)]
        likelihood = self.pair(
            reward[..., :, None] - reward[..., None, :], score[..., :, None] - score[..., None, :]
        )  # [C, S, A, A]
        against_policy = (likelihood @ policy[..., None])[..., 0]  # [C, S, A]
        return Term(against_policy, 2 * against_policy, MEAN)

    def _in_groups(self, rollouts: Rollouts, observed: Observed) -> Term:
        """The pairs within the groups of a batch."""
        if rollouts.horizon != 1:
            raise InputError(
                f"PreferenceLikelihood: expected rollouts of one step, got a horizon of {rollouts.horizon}"
            )
        rewards = observed[_REWARD][:, 0]  # [B]
        scores = None if self.score is None else observed[self._scored(self.score)][:, 0].to(rewards)
        path_weight = rollouts.path_weight(rewards.dtype).to(rewards.device)
        groups = Groups.of(rollouts.group[:, 0].to(rewards.device))
        if int(groups.sizes.min()) < 3:
            raise InputError(
                f"PreferenceLikelihood: expected groups of at least 3 answers, got one of {int(groups.sizes.min())}; "
                "two make the pair and a third is what it is compared with"
            )
        utility, credit = torch.zeros_like(rewards), rewards.new_zeros(rollouts.size)
        for _, rows in groups.tables():  # groups of one size at a time: [N, G]
            size = rows.shape[1]
            reward, weight = rewards[rows], path_weight[rows]
            paired = self._paired(size).to(weight)  # [G, G]
            preferred = self._preferred(reward, scores, rollouts, rows, paired)  # [N, G, G]
            likelihood = pair_likelihood(reward[:, :, None] - reward[:, None, :], preferred)
            partner = weight[:, None, :] * paired
            tiny = torch.finfo(weight.dtype).tiny
            mean = (partner * likelihood).sum(2) / partner.sum(2).clamp(min=tiny)  # [N, G]
            share = partner.sum(2) / (weight * partner.sum(2)).sum(1, keepdim=True).clamp(min=tiny)
            # The mean over paths of the utility is that over groups of their pairs' means.
            utility = utility.index_put((rows,), share * mean * (rollouts.size / len(groups.sizes)))
            credit[rows] = (2 * (size - 1) / (size - 2) * mean).detach()
        return Term(utility[:, None], credit[:, None], MEAN)

    def _paired(self, size: int) -> Tensor:
        """bool [G, G]: who is paired with whom. Answers stand on a ring, each paired with its nearest neighbours."""
        distance = (torch.arange(size)[:, None] - torch.arange(size)[None, :]) % size
        if self.partners is None:
            return distance > 0
        if self.partners > size - 1:
            raise InputError(
                f"PreferenceLikelihood.partners: expected at most {size - 1}, the others of a group of {size}, got "
                f"{self.partners}"
            )
        return (distance > 0) & (torch.minimum(distance, size - distance) <= self.partners // 2)

    def _preferred(
        self, reward: Tensor, scores: Tensor | None, rollouts: Rollouts, rows: Tensor, paired: Tensor
    ) -> Tensor:
        """The probability that row i's answer is preferred to row j's, [N, G, G]; 1/2 where they are no pair."""
        if scores is not None:
            score = scores[rows]
            return torch.sigmoid((score[:, :, None] - score[:, None, :]) / self.scale)
        assert self.preference is not None  # either this or a score
        if not rollouts.steps:
            raise InputError(
                "PreferenceLikelihood.preference: a judge of pairs reads both answers, and in several processes "
                "they may lie in different ones; run one process, or use a score"
            )
        i, j = torch.triu(paired, 1).nonzero(as_tuple=True)
        said = self.preference(rollouts, rows[:, i].reshape(-1), rows[:, j].reshape(-1))  # [N * pairs]
        if tuple(said.shape) != (rows.shape[0] * len(i),) or not bool(((said >= 0) & (said <= 1)).all()):
            raise InputError(
                f"PreferenceLikelihood.preference: expected {rows.shape[0] * len(i)} probabilities in [0, 1], one a "
                f"pair, got shape {tuple(said.shape)}: {said.flatten()[:4].tolist()}..."
            )
        said = said.to(reward).view(rows.shape[0], -1)
        preferred = torch.full((rows.shape[0], *paired.shape), 0.5, dtype=reward.dtype, device=reward.device)
        preferred[:, i, j], preferred[:, j, i] = said, 1 - said
        return preferred


@checked
def pair_likelihood(reward_difference: Tensor, preferred: Tensor | float) -> Tensor:
    """p log sigma(d) + (1 - p) log sigma(-d), the expected log-likelihood of a pair (Bradley and Terry).

    Args:
        reward_difference: d = r(first) - r(second), of any shape.
        preferred: p, the probability that the first is preferred; 1 where that is known. Of a shape that goes with d.

    Raises:
        InputError: numbers that are no floats, or shapes that do not go together.

    Example:
        >>> pair_likelihood(torch.tensor(0.0), 1.0).item() == torch.tensor(0.5).log().item()
        True
    """
    if not reward_difference.is_floating_point():
        raise InputError(f"reward_difference: expected floating-point numbers, got {reward_difference.dtype}")
    preferred = torch.as_tensor(preferred, dtype=reward_difference.dtype, device=reward_difference.device)
    try:
        torch.broadcast_shapes(preferred.shape, reward_difference.shape)
    except RuntimeError as error:
        raise InputError(
            f"preferred: expected a number or shape {list(reward_difference.shape)}, got {list(preferred.shape)}"
        ) from error
    forward = torch.nn.functional.logsigmoid(reward_difference)
    backward = torch.nn.functional.logsigmoid(-reward_difference)
    return preferred * forward + (1 - preferred) * backward
