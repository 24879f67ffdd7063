"""What people run today: one RLHF run a trial, over the weights of the rewards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from align_cbrl import InputError, Rollouts
from align_cbrl.checks import Count, checked
from align_cbrl.llm import RewardMixture
from align_cbrl.runs.metrics import MetricsLog

from ..worlds.bench import Bench


@checked
@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How weights are searched.

    Attributes:
        trials: runs of RLHF, each with a fresh follower.
        steps: follower steps of each.
        prompts: training prompts that a trial is judged on.
        group_size: completions of each of them.
    """

    trials: Count = 20
    steps: Count = 40
    prompts: Count = 16
    group_size: Count = 8


def search(
    bench: Bench,
    kind: Literal["tpe", "random"],
    settings: SearchSettings,
    out: Path,
    value: Callable[[Rollouts], float] | None = None,
) -> list[dict[str, Any]]:
    """Search the directions of the weights on the boundary of the budget, as far as the leader's constraint allows.

    Continues a stopped search.

    Args:
        bench: gives followers, rewards, judge and test prompts.
        kind: Optuna's tree-structured Parzen estimator, or independent draws.
        settings: how many trials, and how long.
        out: folder of trials.jsonl.
        value: of completions of training prompts, what is searched by; None: the judge's mean.

    Returns:
        A row for each trial: `weights`, `score` (what is searched by, on training prompts), `judge` (the same
        on test prompts), `kl`, `steps` and `judged` (follower steps and completions judged so far), and `best`, the
        test score of the trial that is best by `score` so far.

    Raises:
        InputError: Optuna is not installed, or the configured leader is no mixture.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("search needs optuna, which is not installed: pip install 'align-cbrl[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = (
        optuna.samplers.TPESampler(seed=bench.seed) if kind == "tpe" else optuna.samplers.RandomSampler(bench.seed)
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    file = out / "trials.jsonl"
    done = MetricsLog.read(file) if file.exists() else []
    with MetricsLog(file) as log:
        for number in range(settings.trials):
            leader = bench.leader()
            if not isinstance(leader, RewardMixture):
                raise InputError(f"search: expected leader.kind mixture, got {type(leader).__name__}")
            trial = study.ask()
            direction = [trial.suggest_float(name, leader.lowest_direction, 1.0) for name in leader.terms]
            if number < len(done):  # the sampler repeats itself, given what it was told
                study.tell(trial, done[number]["score"])
                continue
            leader.aim(torch.tensor(direction, dtype=torch.float64))
            follower = bench.follower(bench.seed * 1000 + number)
            follower.train(leader, settings.steps)
            generator = torch.Generator().manual_seed(bench.seed * 1000 + number)
            contexts = follower.sample_contexts(min(settings.prompts, len(bench.data["train"])), generator)
            drawn = follower.rollout(contexts, settings.group_size, generator)
            score = bench.judge(None, drawn).mean().item() if value is None else value(drawn)
            study.tell(trial, score)
            found = bench.point(follower)
            rows = [*done, {"score": score, "judge": found["judge"]}]
            row = {
                "trial": number,
                "weights": leader.weights(),
                "score": score,
                **found,
                "steps": (number + 1) * settings.steps,
                "judged": (number + 1) * len(contexts) * settings.group_size,
                "best": max(rows, key=lambda r: r["score"])["judge"],
            }
            log.append(row)
            done.append(json.loads(json.dumps(row)))
    return done
