"""Groups of completions that say nothing: all alike, or all judged alike."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from align_cbrl.distributed import gather_rows
from align_cbrl.rollouts import Rollouts


def degenerate_groups(rollouts: Rollouts, whole: Rollouts, credit: Tensor, advantage: Tensor) -> tuple[Tensor, float]:
    """Which paths of one step stand in a group whose covariance of credit and reward gradient is zero for certain.

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
    _, place = torch.unique(whole.group[:, 0].to(advantage.device), return_inverse=True)
    groups = int(place.max()) + 1

    def largest(value: Tensor) -> Tensor:  # [B] -> [groups]
        return torch.full((groups,), -torch.inf, dtype=value.dtype, device=value.device).scatter_reduce(
            0, place, value, "amax"
        )

    rounding = 16 * torch.finfo(advantage.dtype).eps * largest(credit[:, 0].abs().to(advantage))
    empty = largest(advantage[:, 0].abs()) <= rounding
    said = rollouts.steps.get("completion_ids", rollouts.steps.get("completion"))
    known = gather_rows(torch.tensor([said is not None]))
    if bool(known.all()) and said is not None:
        rows = said.tolist() if isinstance(said, Tensor) else said
        own = [zlib.crc32(repr(row).encode()) for row in rows]
        code = gather_rows(torch.tensor(own, dtype=torch.float64)).to(place.device)
        empty = empty | (largest(code) == -largest(-code))
    return empty[place], float(empty.double().mean())
