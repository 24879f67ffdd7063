"""Tune reward weights so that the policy pleases the judge, not the proxy: the whole job, stage by stage."""

from __future__ import annotations

from pathlib import Path

import datasets
import transformers
from transformers import AutoModelForCausalLM

from align_cbrl.runs.run_folder import Clock, Rows, claim

from .config import Config
from .evaluation import evaluate
from .outputs import print_table, report, summarize
from .stages import prepare
from .tuning import describe_leader, train_fresh, tune

__all__ = ["Config", "report", "run"]

FRESH_SEED = 1_000_003
"""Added to the seed for the fresh follower: other prompts in another order, other samples."""


def run(config: Config, out: Path, resume: bool) -> None:
    """Base, plain RLHF, HPGD and a fresh follower, then the report.

    Writes to `out`: summary.json, metrics.jsonl (of the leader), reward/ (the learned reward), hpgd/ and fresh/ (their
    policies), curves.png and report.html. Stages before the leader are cached beside `out`, in cache/.

    Args:
        config: settings; see config.yaml.
        out: the run's folder.
        resume: whether `out` may hold an interrupted or finished run of the same settings, to be continued. Every
            stage continues from what it finds; the caller guards folders that were not meant to be.

    Raises:
        CheckpointError: `out` holds a run of another configuration.
    """
    # Bars of a fraction of a second, a hundred times over, would bury the run's own.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    claim(out, config, recipe="docstrings", free=["tracking"])
    clock, rows = Clock(out / "seconds.json"), Rows(out / "rows.json")
    bench = prepare(config, out.parent / "cache", clock.seconds)
    clock.save()

    if "plain" not in rows.done:
        with clock.measure("evaluate"):
            follower, plain_reward = bench.follower(config.seed), bench.mixture()
            rows.add("base", evaluate(bench, follower.prior, follower, plain_reward))
            plain = AutoModelForCausalLM.from_pretrained(bench.plain / "policy")
            rows.add("plain", evaluate(bench, plain, follower, plain_reward))

    if "hpgd" not in rows.done:
        with clock.measure("hpgd"):
            leader, follower, finished = tune(bench, out, config.seed)
            leader.save_pretrained(out / "reward")
            follower.save_pretrained(out / "hpgd")
        about = describe_leader(leader, follower, finished)
        with clock.measure("evaluate"):
            rows.add("hpgd", {**evaluate(bench, follower.policy, follower, leader), "leader": about})

    if "fresh" not in rows.done:
        with clock.measure("fresh"):
            frozen, follower = train_fresh(bench, out / "reward", out / "fresh", config.seed + FRESH_SEED)
            follower.save_pretrained(out / "fresh" / "policy")
        with clock.measure("evaluate"):
            rows.add("fresh", evaluate(bench, follower.policy, follower, frozen))

    summarize(out, bench.plain, rows.done, clock.seconds)
    report(out)
    print_table(out)
