"""Groups of completions that say nothing: all alike, or all judged alike."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from align_cbrl.distributed import any_rank, gather_rows
from align_cbrl.groups import Groups
from align_cbrl.rollouts import Rollouts


def degenerate_groups(rollouts: Rollouts, whole: Rollouts, credit: Tensor, advantage: Tensor) -> tuple[Tensor, float]:
    """Mask of completions whose group contributes no gradient, and the share of such groups.

    That is a group whose completions are identical, so that a deterministic reward has one gradient and the advantages,
    a judge's noise, sum to zero against it; or one whose credit is the same for all, so that no advantage is left but
    rounding. A group whose *rewards* move alike is not looked for: its covariance comes out as zero.

    Args:
        rollouts: this process's own paths; what is compared is "completion_ids" of their `steps`, or "completion".
        whole: the same, or the paths of all processes (`Rollouts.over_ranks`).
        credit: [B, 1], of the whole.
        advantage: [B, 1], of the whole.

    Returns:
        bool [B] of the whole, and the share of its groups that are such.

    Example:
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 1, 1]), steps={"completion": ["a", "a", "b", "c"]})
        >>> noise = torch.tensor([[0.1], [-0.1], [0.5], [-0.5]])
        >>> degenerate_groups(rollouts, rollouts, noise, noise)
        (tensor([ True,  True, False, False]), 0.5)
    """
    groups = Groups.of(whole.group[:, 0].to(advantage.device))
    rounding = 16 * torch.finfo(advantage.dtype).eps * groups.max(credit[:, 0].abs().to(advantage))
    empty = groups.max(advantage[:, 0].abs()) <= rounding
    said = rollouts.steps.get("completion_ids", rollouts.steps.get("completion"))
    if not any_rank(said is None) and said is not None:
        rows = said.tolist() if isinstance(said, Tensor) else said
        own = [zlib.crc32(repr(row).encode()) for row in rows]
        code = gather_rows(torch.tensor(own, dtype=torch.float64)).to(groups.place.device)
        empty = empty | (groups.max(code) == -groups.max(-code))
    return empty[groups.place], float(empty.double().mean())
