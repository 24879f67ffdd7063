"""Spreads of rewards among completions of the same prompt, by which leaders standardise rewards and keep budgets."""

from __future__ import annotations

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


def deviation_within_prompts(name: str, scores: Tensor, rollouts: Rollouts) -> float:
    """Standard deviation within a prompt of `scores` [B], by which a reward is standardised.

    Raises:
        InputError: no prompt has two completions, or all completions of each prompt score the same.
    """
    within, freedom = within_prompts(scores, rollouts)
    deviation = float((within.pow(2).sum() / freedom).sqrt())
    if deviation <= 1e-8:
        raise InputError(
            f"{name}: cannot be standardised, since it gives all completions of a prompt the same score; calibrate on "
            "rollouts whose completions differ"
        )
    return deviation
