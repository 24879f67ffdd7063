"""Training a follower on a frozen reward: plain RLHF, logged and resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from align_cbrl.checks import Count, checked
from align_cbrl.distributed import any_rank, broadcast_, gather_rows, is_main
from align_cbrl.estimators.sampler_evidence import sampler_alarm, total_evidence
from align_cbrl.functional import best_response_gap
from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.problem import temperature_of
from align_cbrl.rollouts import Rollouts
from align_cbrl.runs.checkpoints import Identity, load_checkpoint, save_checkpoint
from align_cbrl.runs.interrupt import noted_interrupt
from align_cbrl.runs.lock import only_here
from align_cbrl.runs.metrics import MetricsLog
from align_cbrl.runs.progress import Progress, warn_beside_bars

Monitor = Callable[[Rollouts], dict[str, float]]


@checked
def train_follower(
    follower: TrainedFollower,
    leader: LanguageLeader,
    steps: Count,
    *,
    out: Path,
    fingerprint: Identity,
    monitor: Monitor | None = None,
    log_every: Count = 5,
    checkpoint_every: Count = 25,
    progress: bool = True,
    name: str = "follower",
) -> None:
    """Train `follower` for `steps` optimizer steps on the leader's present reward.

    Always continues from the newest valid checkpoint in `out`. In several processes all train on the leader of rank 0,
    and rank 0 alone writes.

    Args:
        follower: a fresh follower, or one to continue.
        leader: its reward is not changed.
        steps: optimizer steps in all.
        out: folder for metrics.jsonl (`step`, `reward`, `kl`, `gap` and `sampler_evidence` in nats, and the
            monitor's) and checkpoints/.
        fingerprint: of the configuration; a checkpoint of another one is refused.
        monitor: further metrics of the newest batch; in several processes, of rank 0's part of it.
        log_every: steps between rows.
        checkpoint_every: steps between checkpoints.
        progress: show a progress bar.
        name: beside the bar.

    Raises:
        CheckpointError: `out` holds a run of another configuration, or the disk is full, or another process works in
            it.
        KeyboardInterrupt: Ctrl-C, or a scheduler's signal, once the step under way is done and saved. Any other error
            leaves the last step that is in metrics.jsonl, or was not due there, saved too.
    """
    with only_here(out / "checkpoints"):
        broadcast_(leader)
        found = load_checkpoint(out / "checkpoints", fingerprint=fingerprint)
        done = 0
        if found is not None:
            done, state = found
            follower.load_state_dict(state)
        before, whole, warned = done, True, False
        log = MetricsLog(out / "metrics.jsonl")
        log.truncate_after(done + 1)
        bar = Progress(steps, name, done, progress and is_main())
        shown: dict[str, float] = {}

        def save() -> None:
            log.sync()
            save_checkpoint(out / "checkpoints", done, follower.state_dict(), fingerprint=fingerprint)

        def on_step(taken: int) -> bool:
            nonlocal done, whole, warned
            done, whole = before + taken, False  # its row is missing yet
            wrong = sampler_alarm(follower.sampler_evidence())
            if wrong is not None and not warned and is_main():
                warned = True
                warn_beside_bars(f"{name}, step {done}: {wrong} (docs/certificate.md)")
            if done % log_every == 0 or done == steps:
                rollouts = follower.newest
                row = {**_summary(follower, leader, rollouts), **(monitor(rollouts) if monitor else {})}
                shown.update({key: row[key] for key in ("reward", "kl") if key in row})
                log.append({"step": done, **row, **follower.trainer_metrics()})
            bar.update(**shown)
            whole = True
            interrupt.asked = any_rank(interrupt.asked)
            if done % checkpoint_every == 0 or done == steps or interrupt.asked:
                save()
            return not interrupt.asked

        with bar, log, noted_interrupt() as interrupt:
            if done < steps:
                try:
                    follower.train(leader, steps - done, on_step)
                except Exception:
                    if whole and done > before:
                        save()
                    raise
        if interrupt.asked and done < steps:
            raise interrupt.stop()


def _summary(follower: TrainedFollower, leader: LanguageLeader, rollouts: Rollouts) -> dict[str, float]:
    with torch.no_grad():
        temperature = float(temperature_of(leader, follower))
        reward = gather_rows(leader.reward(rollouts)[:, 0].double().cpu())
    rollouts = rollouts.over_ranks()  # a group may straddle ranks
    assert rollouts.log_policy is not None and rollouts.log_prior is not None  # trained followers give both
    divergence = (rollouts.log_policy - rollouts.log_prior)[:, 0]
    gap = best_response_gap(reward / temperature - divergence, rollouts.group[:, 0])
    return {
        "reward": reward.mean().item(),
        "kl": divergence.mean().item(),
        "gap": gap.mean().item(),
        "sampler_evidence": total_evidence(follower.sampler_evidence()),
    }
