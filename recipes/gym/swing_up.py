"""Pendulum-v1 with a sparse objective and an agent that looks less than a second ahead; a leader shapes its reward."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import torch
from torch import Tensor

from align_cbrl import ExpectedUtility, Problem
from align_cbrl.gym import GymFollower, NetworkLeader
from align_cbrl.problem import Leader
from align_cbrl.rollouts import Rollouts

ENVIRONMENT = "Pendulum-v1"
COSINE, SPEED = 0.95, 1.0


def upright(rollouts: Rollouts) -> Tensor:
    """1 where a step ends within 18 degrees of the top and slower than 1 rad/s, and 0 elsewhere; [B, T]."""
    after = rollouts.steps["state"][:, 1:]  # cosine, sine, speed
    return ((after[..., 0] > COSINE) & (after[..., 2].abs() < SPEED)).double()


def upright_for(leader: Leader, rollouts: Rollouts) -> Tensor:
    """The leader's utility."""
    return upright(rollouts)


@dataclasses.dataclass(frozen=True)
class Paid:
    """So many times `upright`."""

    times: float

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """[B, T]."""
        return self.times * upright(rollouts)


def make_pendulum() -> gymnasium.Env[Any, Any]:
    """The environment as Gymnasium registers it."""
    return gymnasium.make(ENVIRONMENT)


def swing_up(
    *,
    times: float,
    temperature: float,
    discount: float,
    leader_discount: float,
    bound: float,
    warmup: int,
    steps: int,
    length: int,
    settings: dict[str, Any],
    seed: int,
) -> Problem:
    """The follower earns `times` `upright`, and at most `bound` a step of the leader, who wants `upright`."""
    leader = NetworkLeader(make_pendulum(), base=Paid(times), bound=bound, seed=seed)
    follower = GymFollower(
        [make_pendulum],
        temperature,
        discount,
        warmup=warmup,
        steps=steps,
        length=length,
        settings=settings,
        seed=seed,
    )
    return Problem(leader, ExpectedUtility(upright_for, discount=leader_discount), follower)


def share_upright(problem: Problem, paths: int, seed: int) -> float:
    """The share of its steps that the follower is upright, over fresh paths."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = problem.follower.rollout(torch.tensor([0]), paths, generator)
    return float(upright(rollouts)[rollouts.mask].mean())
