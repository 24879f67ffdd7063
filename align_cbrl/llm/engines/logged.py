"""Leader steps from a file of logs: `align-cbrl step`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.llm import LoggedFollower, load_leader
from align_cbrl.llm.engines.settings import SCORES, StepSettings
from align_cbrl.llm.followers.stepwise import StepwiseHPGD
from align_cbrl.llm.logs import load_rollouts
from align_cbrl.llm.scoring import check_scores
from align_cbrl.llm.settings.response import BestResponseSettings
from align_cbrl.problem import Leader, Problem
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.lock import LOCK, only_here

SCORE = "score"
"""The column of logs with the judge's scores."""


def steps_from_logs(
    settings: StepSettings, leader: Path, rollouts: Path, out: Path, *, trust_code: bool = False
) -> list[dict[str, float]]:
    """Take leader steps on logs, and save the leader that they lead to.

    Args:
        settings: of the steps.
        leader: folder of the leader to begin with, as `save_pretrained` writes it.
        rollouts: file of the logs, as `load_rollouts` reads it.
        out: folder of the new leader.
        trust_code: import the reward functions that the leader's folder names.

    Returns:
        A row of metrics for each step, see `HPGD`.

    Raises:
        InputError: a folder `out` with files in it; logs or a leader that do not load; no scores; further steps around
            a best response without log-probabilities.
    """
    if out.exists() and (not out.is_dir() or any(file.name not in (LOCK, SCORES) for file in out.iterdir())):
        raise InputError(f"--out {out}: expected a folder that is new or empty; choose another, or remove it")
    learner = load_leader(leader, trust_code=trust_code)
    logs = load_rollouts(rollouts)
    best = isinstance(settings.response, BestResponseSettings)
    if best and settings.hpgd.steps > 1 and logs.log_policy is None:
        raise InputError(
            f"hpgd.steps: expected 1 around a best response without log-probabilities, got {settings.hpgd.steps}: the "
            "logs are of the policy for the present reward only, and without log_policy and log_prior they cannot be "
            "weighted; add these columns"
        )
    response = settings.response.build()
    follower = LoggedFollower(logs, response.temperature)
    with only_here(out):
        objective = settings.objective.build(_judge(settings, logs, out), natural=settings.hpgd.step == "natural")
        problem = Problem(learner, objective, follower)
        prompts = settings.prompts_per_step or len(follower.contexts)
        config = settings.hpgd.build(contexts_per_step=prompts, group_size=logs.size, seed=0)
        response.check(config)
        loop = StepwiseHPGD(problem, settings.hpgd.optimizer(learner), response.estimator, config)
        loop.begin(None)
        for step in range(config.steps):
            batch, _ = follower.turn(learner, step, contexts_per_step=prompts, group_size=logs.size, seed=0)
            loop.take(batch)
        learner.save_pretrained(out)
    return loop.history


def _judge(settings: StepSettings, logs: Rollouts, out: Path) -> Any:
    if settings.judge is None:
        if SCORE not in logs.steps:
            raise InputError(
                f"judge: expected one, or a column {SCORE!r} in the logs, got columns {sorted(logs.steps)}; set judge "
                "in --config, such as judge: {function: my_judge.py:judge}"
            )
        check_scores(f"column {SCORE!r}", logs.steps[SCORE], logs.size)
        return _logged_score
    judge = settings.judge
    return (judge if judge.cache is not None else dataclasses.replace(judge, cache=SCORES)).build(out)


def _logged_score(leader: Leader | None, rollouts: Rollouts) -> Tensor:
    """The score that stands beside each completion, [B, 1]."""
    return torch.tensor([float(score) for score in rollouts.steps[SCORE]], dtype=torch.float64)[:, None]
