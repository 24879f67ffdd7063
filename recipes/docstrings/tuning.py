"""The stages with a leader: HPGD around a follower in training, and a fresh follower on the learned, frozen reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, KLPriced, PolicyResponse, Problem
from align_cbrl.llm import LanguageLeader, RewardMixture, RLOOFollower, load_leader, train_follower
from align_cbrl.runs.config import fingerprint, to_dict

from .config import Config
from .stages import Workbench


def tune(bench: Workbench, out: Path, seed: int) -> tuple[LanguageLeader, RLOOFollower, HPGD]:
    """HPGD: the leader tunes the reward while the follower trains on it.

    Continues from the newest checkpoint in `out`, and returns at once when that is the last step.

    Returns:
        The leader with the learned reward, the follower as it stands, and the finished run.
    """
    config = bench.config
    leader, follower, judge = bench.leader(), bench.follower(seed), bench.judge()
    tracker = config.tracking.build(out, to_dict(config), leader)
    objective = KLPriced(ExpectedUtility(tracker.watch(judge)), price=config.hpgd.kl_price)
    parameters = [p for p in leader.parameters() if p.requires_grad]
    run = HPGD(
        Problem(leader, objective, follower),
        torch.optim.Adam(parameters, lr=config.hpgd.learning_rate, maximize=True),
        PolicyResponse(),
        HPGDConfig(
            steps=config.hpgd.steps,
            contexts_per_step=config.follower.prompts_per_step,
            group_size=config.follower.group_size,
            seed=seed,
            checkpoint_every=5,
        ),
        out,
        fingerprint=fingerprint({**_lasting(config), "model": bench.model, "proxy": bench.proxy}),
        observers=[tracker],
    )
    with tracker:
        run.run(resume=True)
    return leader, follower, run


def train_fresh(bench: Workbench, reward: Path, out: Path, seed: int) -> tuple[LanguageLeader, RLOOFollower]:
    """A follower that never met the leader, trained on the saved reward as anybody would load it."""
    config = bench.config
    leader, judge = load_leader(reward), bench.judge()
    follower = bench.follower(seed)
    train_follower(
        follower, leader, config.follower.steps, out=out,
        fingerprint=fingerprint({**_lasting(config), "reward": (reward / "reward.json").read_text()}),
        monitor=lambda rollouts: {"judge": judge(None, rollouts).mean().item()}, name="fresh follower",
    )  # fmt: skip
    return leader, follower


def _lasting(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share: all but where it is tracked."""
    return {name: value for name, value in to_dict(config).items() if name != "tracking"}


def describe_leader(leader: LanguageLeader, follower: RLOOFollower, run: HPGD) -> dict[str, Any]:
    """What the leader learned, what it saw, and what it cost."""
    config = run.config
    judged = run.step * config.contexts_per_step * config.group_size
    if isinstance(leader, RewardMixture):
        reward = ", ".join(f"{name} {weight:+.2f}" for name, weight in leader.weights().items())
    else:
        count = sum(p.numel() for p in leader.parameters() if p.requires_grad)
        reward = f"the proxy with {count:,} parameters of its head retrained"
    return {
        "reward": reward,
        "judge_calls": judged,
        "completions": follower.completions_seen,
        "judge_share": judged / follower.completions_seen,
        "leader_share": run.history[-1]["leader_share"],
    }
