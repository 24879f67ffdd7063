"""What people do instead, on the same judge budget: refitting weights by regression, and random search over weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align_cbrl.llm import RewardMixture, RLOOFollower, score_arguments
from align_cbrl.rollouts import Rollouts

from .evaluation import evaluate
from .stages import Workbench


def regression(bench: Workbench, seed: int) -> dict[str, Any]:
    """Alternate: train, have the judge label completions, refit the mixture to all labels so far, train on.

    Same follower, same batches judged at the same steps, same budget of reward spread as HPGD. Only the leader's step
    differs: least squares of the judge on the terms within prompts, scaled to the budget. It asks which weights
    *describe* the judge on today's completions, not which weights make tomorrow's better (no response term).

    Returns:
        What `evaluate` returns for the follower at the end, with the weights.
    """
    leader, follower, judge = bench.mixture(), bench.follower(seed), bench.judge()
    features: list[Tensor] = []
    labels: list[Tensor] = []

    def refit(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        features.append(_within(leader.features(**score_arguments(rollouts)), rollouts.group[:, 0]))
        labels.append(_within(judge(None, rollouts), rollouts.group[:, 0]))
        # gelsd: terms that are copies of each other share their weight instead of blowing it up
        found = torch.linalg.lstsq(torch.cat(features), torch.cat(labels), driver="gelsd").solution[:, 0]  # [K]
        with torch.no_grad():
            leader.weight.copy_(found)
            leader.weight.mul_(leader.budget / max(leader.spread(), 1e-12))
        return True

    settings = bench.config
    follower.follow(
        leader, refit, start=0, steps=settings.hpgd.steps, contexts_per_step=settings.follower.prompts_per_step,
        group_size=settings.follower.group_size, seed=seed,
    )  # fmt: skip
    return {**evaluate(bench, follower.policy, follower, leader), "weights": leader.weights()}


def random_search(bench: Workbench, seed: int, trials: int = 4) -> dict[str, Any]:
    """A new follower a trial, with weights drawn uniformly from the budget's boundary; the best by the judge wins.

    The judge's budget is split evenly over the trials and spent on completions of training prompts. A trial gets a
    third of plain RLHF's follower steps, so that all trials together take more of them than HPGD does.

    Returns:
        What `evaluate` returns for the winning trial's policy, with its weights and every trial's score.
    """
    config = bench.config
    calls = config.hpgd.steps * config.follower.prompts_per_step * config.follower.group_size
    prompts = max(1, calls // trials // config.follower.group_size)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, RLOOFollower, RewardMixture] | None = None
    scores = []
    for trial in range(trials):
        leader, follower = bench.mixture(), bench.follower(seed + trial)
        with torch.no_grad():
            direction = torch.randn(len(leader.terms), generator=generator, dtype=torch.float64)
            leader.weight.copy_(direction)
            leader.weight.mul_(leader.budget / leader.spread())
        follower.train(leader, config.follower.steps // 3)
        contexts = follower.sample_contexts(prompts, generator)
        score = bench.judge()(None, follower.rollout(contexts, config.follower.group_size, generator)).mean().item()
        scores.append({"judge": score, "weights": leader.weights()})
        if best is None or score > best[0]:
            best = (score, follower, leader)
    assert best is not None  # trials >= 1
    _, follower, leader = best
    return {**evaluate(bench, follower.policy, follower, leader), "weights": leader.weights(), "trials": scores}


def _within(values: Tensor, group: Tensor) -> Tensor:
    """Values [B, K] less their group's mean."""
    _, place, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(sizes), values.shape[1], dtype=values.dtype).index_add(0, place, values) / sizes[:, None]
    return values - mean[place]
