"""An engineer's own trl script, without and with a leader (docs/trl_script.md).

`python -m align_cbrl.recipes.trl_script`. The desk of the world of replies is rewarded for words that it shares with
the request, for a full stop at the end, and for big words, which the judge does not like: the one that is hacked.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from align_cbrl import ExpectedUtility, KLPriced
from align_cbrl.llm import Judge, LeaderCallback, RewardMixture, sample_completions

from .statistics import interval, shown
from .worlds.replies.data import load_requests
from .worlds.replies.judge import reply_judge
from .worlds.replies.rewards import final_period, overlap, promises
from .worlds.world import Replies

REWARDS = [overlap, promises, final_period]
LENGTH = 24


class Script(NamedTuple):
    """A script's trainer, and what it sets besides what all of them do."""

    config: Any
    trainer: Any
    settings: dict[str, Any]


SCRIPTS = {
    "grpo": Script(GRPOConfig, GRPOTrainer, {}),
    "grpo-beta": Script(GRPOConfig, GRPOTrainer, {"beta": 0.04}),
    "rloo": Script(RLOOConfig, RLOOTrainer, {"num_generations": 8}),
}


def train(
    name: str, model: str, *, seed: int, led: bool, steps: int, every: int, batch: int, learning_rate: float
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train the script's policy; it, and the weights of its rewards at the end.

    Args:
        name: of `SCRIPTS`.
        model: folder of the policy.
        seed: of trl's training.
        led: whether a leader learns the weights, or they stay at 1.
        steps: optimizer steps.
        every: optimizer steps between leader steps.
        batch: completions of an optimizer step.
        learning_rate: of the policy, at first; trl lets it decay to zero.
    """
    leader = RewardMixture.of(REWARDS)
    wants = KLPriced(ExpectedUtility(Judge(reply_judge)), price=0.01)
    policy = trained(
        name,
        model,
        leader.reward_function() if led else REWARDS,
        [LeaderCallback(leader, wants, every=every)] if led else [],
        seed=seed, steps=steps, batch=batch, learning_rate=learning_rate,
    )  # fmt: skip
    return policy, leader.raw_weights()


def trained(
    name: str, model: str, reward_funcs: Any, callbacks: list[Any], *, seed: int, steps: int, batch: int,
    learning_rate: float,
) -> PreTrainedModel:  # fmt: skip
    """The policy that a script of `SCRIPTS` ends with; the other arguments are those of trl and of `train`."""
    script, data = SCRIPTS[name], load_requests()["train"].remove_columns("completion")
    with tempfile.TemporaryDirectory() as out:
        args = script.config(
            output_dir=out, max_steps=steps, per_device_train_batch_size=batch, max_completion_length=LENGTH,
            learning_rate=learning_rate, seed=seed, logging_steps=steps, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, activation_checkpointing=False, disable_tqdm=True, **script.settings,
        )  # fmt: skip
        trainer = script.trainer(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=data,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def judged(policy: PreTrainedModel, model: str, seed: int) -> float:
    """The judge's mean score of four completions of each test prompt."""
    prompts, tokenizer = load_requests()["test"], AutoTokenizer.from_pretrained(model, padding_side="left")
    prompts = prompts.remove_columns("completion")
    seen = sample_completions(policy, None, tokenizer, prompts, range(len(prompts)), 4, LENGTH, seed)
    scores = reply_judge(seen.columns["prompt"], seen.text)
    return sum(scores) / len(scores)


def main(arguments: list[str] | None = None) -> None:
    """Train each script without and with a leader, and print the judge's scores and their differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--model", help="folder of a policy; the world's own, of seed 0, by default")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where that is kept")
    given = parser.parse_args(arguments)
    model = given.model or Replies().make_policy(load_requests(), 0, given.cache)
    sizes = {name: getattr(given, name) for name in ("steps", "every", "batch", "learning_rate")}
    for name in given.scripts:
        differences = []
        for seed in given.seeds:
            scores = {}
            for led in (False, True):
                began = time.perf_counter()
                policy, weights = train(name, model, seed=seed, led=led, **sizes)
                seconds = time.perf_counter() - began
                scores[led] = judged(policy, model, seed)
                row = {"script": name, "seed": seed, "led": led, "judge": scores[led], "seconds": seconds}
                print(json.dumps({**row, "weights": weights}), flush=True)
            differences.append(scores[True] - scores[False])
        print(f"{name}: with a leader less without, {shown(interval(differences))}", flush=True)


if __name__ == "__main__":
    main()
