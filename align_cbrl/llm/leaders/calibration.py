"""Spreads of rewards among completions of the same prompt, by which leaders standardise rewards and keep budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.groups import Groups
from align_cbrl.rollouts import Rollouts


def within_prompts(scores: Tensor, rollouts: Rollouts) -> tuple[Tensor, int]:
    """The scores minus the mean of their prompt's group, and the remaining degrees of freedom.

    Only differences between completions of one prompt move a policy, so spreads are measured within groups.

    Args:
        scores: [B, K], or [B].
        rollouts: the completions; their `group` numbers the prompts.

    Returns:
        The centred scores, in the shape of `scores`, and B minus the number of groups. The sum of the squared centred
        scores divided by that number is the mean variance within a prompt.

    Raises:
        InputError: no prompt has two completions.

    Example:
        >>> import torch
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 1, 1]), steps={})
        >>> within_prompts(torch.tensor([1.0, 3.0, 5.0, 5.0]), rollouts)
        (tensor([-1.,  1.,  0.,  0.]), 2)
    """
    groups = Groups.of(rollouts.group[:, 0].to(scores.device))
    freedom = len(scores) - groups.count
    if freedom == 0:
        raise InputError(
            f"calibrate: expected at least two completions of some prompt, got {len(scores)} completions of "
            f"{groups.count} prompts; raise group_size"
        )
    return groups.centred(scores), freedom


def deviations(within: Tensor, freedom: int) -> Tensor:
    """Standard deviations within a prompt, [K], of centred scores [B, K] with so many degrees of freedom.

    Scores may be as small or as large as their type allows: likelihoods are.

    Example:
        >>> deviations(torch.tensor([[1e-300], [-1e-300]], dtype=torch.float64), 2)
        tensor([1.0000e-300], dtype=torch.float64)
    """
    largest = within.abs().amax(0)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))  # whose square neither vanishes nor overflows
    return unit * ((within / unit).pow(2).sum(0) / freedom).sqrt()


def constant(scores: Tensor, deviation: Tensor) -> Tensor:
    """Which of K scores [B, K] do not vary within prompts, bool [K]: their deviation [K] is no more than rounding.

    Rounding is relative to a score's size; and it is that of single precision where all of its values are such numbers,
    as a reward model's are.

    Example:
        >>> scores = torch.tensor([[1e-12, 0.1], [3e-12, 0.1 + 1e-17]], dtype=torch.float64)
        >>> constant(scores, torch.tensor([1.4e-12, 7e-18], dtype=torch.float64)).tolist()
        [False, True]
    """
    single = (scores.float().to(scores.dtype) == scores).all(0)
    precision = torch.where(single, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)
    return deviation <= 8 * precision * scores.abs().amax(0)


def deviation_within_prompts(name: str, scores: Tensor, rollouts: Rollouts) -> float:
    """Standard deviation within a prompt of `scores` [B], by which a reward is standardised.

    Raises:
        InputError: no prompt has two completions, or all completions of each prompt score the same.
    """
    within, freedom = within_prompts(scores, rollouts)
    deviation = deviations(within[:, None], freedom)
    if constant(scores[:, None], deviation):
        raise InputError(
            f"{name}: cannot be standardised, since it gives all completions of a prompt the same score; calibrate on "
            "rollouts whose completions differ"
        )
    return float(deviation)
