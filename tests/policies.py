"""Policies at chosen distances from a best response, on an enumerable language model."""

from __future__ import annotations

import enumerable_lm as lm
import torch
from torch import Tensor


def at_distances(best: Tensor, prior: Tensor, distances: list[float], seed: int = 0) -> list[Tensor]:
    """log pi [P, N] with KL(pi || pi*) at each distance, in nats: in turn towards the reference and beyond, beyond the
    best response, in a random direction, and ever sharper.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k, distance in enumerate(distances):
        random = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        direction = (prior - best, best - prior, random, best)[k % 4]
        if lm.kl(_moved(best, direction, 1e3), best) < distance:
            direction = random  # no step in that direction is so long
        low, high = 0.0, 1e3
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if lm.kl(_moved(best, direction, middle), best) < distance else (low, middle)
        found.append(_moved(best, direction, high))
    return found


def _moved(best: Tensor, direction: Tensor, length: float) -> Tensor:
    return torch.log_softmax(best + length * direction, -1)
