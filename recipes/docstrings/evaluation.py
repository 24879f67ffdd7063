"""Measuring a policy on test prompts: proxy, judge, divergence from the reference, gap to the best response."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from align_cbrl.functional import best_response_gap
from align_cbrl.llm import LanguageLeader, RLOOFollower, sample_completions

from ..statistics import mean_and_error
from .stages import Workbench


def evaluate(
    bench: Workbench, policy: PreTrainedModel, follower: RLOOFollower, leader: LanguageLeader
) -> dict[str, Any]:
    """Figures of a policy on the test prompts, all policies on the same ones.

    Args:
        bench: gives prompts, judge and proxy.
        policy: what is measured.
        follower: gives reference and tokenizer.
        leader: the reward that `policy` was trained for, against which the gap is measured.

    Returns:
        judge, proxy (in standard deviations of the reference's completions of a prompt, from its mean), kl (nats to the
        reference), gap (nats to the best response to `leader`, a lower bound in expectation), length (words), each
        {mean, se} with the standard error over prompts; and `samples`, one completion of each prompt with its scores.
    """
    settings = bench.config.evaluation
    test = bench.data["test"].shuffle(seed=0)
    test = test.select(range(min(settings.prompts, len(test))))
    rollouts = sample_completions(
        policy, follower.prior, follower.tokenizer, test, list(range(len(test))), settings.group_size,
        bench.config.follower.max_completion_length, seed=bench.config.seed,
    ).rollouts()  # fmt: skip
    assert rollouts.log_policy is not None and rollouts.log_prior is not None  # sample_completions gives both
    proxy = bench.mixture()  # all of its weight lies on the proxy
    with torch.no_grad():
        reward = leader.reward(rollouts)[:, 0].double().cpu()
        proxy_score = proxy.reward(rollouts)[:, 0] / bench.config.strength
    judged = bench.judge()(None, rollouts)[:, 0]
    divergence = (rollouts.log_policy - rollouts.log_prior)[:, 0]
    ratio = reward / follower.temperature - divergence
    words = torch.tensor([float(len(str(text).split())) for text in rollouts.steps["completion"]])
    groups = (len(test), settings.group_size)
    figures = {
        "judge": judged.view(groups).mean(1),
        "proxy": proxy_score.view(groups).mean(1),
        "kl": divergence.view(groups).mean(1),
        "gap": best_response_gap(ratio, rollouts.group[:, 0]),
        "words": words.view(groups).mean(1),
    }
    samples = [
        {
            "prompt": str(rollouts.steps["prompt"][i]),
            "completion": str(rollouts.steps["completion"][i]),
            "judge": judged[i].item(),
            "proxy": proxy_score[i].item(),
        }
        for i in range(0, rollouts.size, settings.group_size)
    ]
    return {**{name: mean_and_error(values) for name, values in figures.items()}, "samples": samples}
