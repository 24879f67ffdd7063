"""Random numbers for estimators that need their own: reproducible, and different at every leader step."""

from __future__ import annotations

import hashlib

import torch

from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts


def generator_for(problem: Problem, rollouts: Rollouts, seed: int) -> torch.Generator:
    """A generator seeded by `seed`, the leader's parameters and the rollouts' contexts, lengths and log-probabilities.

    An estimator that kept a counter instead would have to be stored in checkpoints. A resumed run hands over the same
    parameters and rollouts at the same step, bit by bit, so that it repeats itself; and no two steps of a run share
    their parameters. Independent estimates at one and the same point need seeds of their own.

    Example:
        >>> import toy_cmdp
        >>> problem = toy_cmdp.random_cmdp()
        >>> rollouts = Rollouts.bandit(contexts=torch.tensor([0]), steps={})
        >>> one, other = (generator_for(problem, rollouts, seed).initial_seed() for seed in (0, 1))
        >>> one == other
        False
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for value in (*problem.parameters, rollouts.contexts, rollouts.mask, rollouts.log_policy):
        if value is not None:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)
