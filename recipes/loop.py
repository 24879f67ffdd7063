"""Read this first: a policy, two rewards, a judge, and HPGD around trl, in one loop that prints what happens.

    python -m align_cbrl.recipes.loop

Plain RLHF on the first reward makes answers longer, which the judge does not want. The leader learns how much of each
reward to pay, from the judge's scores of completions that trl's RLOO samples while it trains the policy.
"""

from __future__ import annotations

from pathlib import Path

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, Natural, Problem, Rollouts
from align_cbrl.llm import Judge, RewardMixture, RLOOFollower, Schedule, load_prompts

from .worlds.cache import cached
from .worlds.replies.policy import train_policy


def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward that is easily hacked: more words."""
    return [len(text.split()) / 10 for text in completions]


def names_product(prompts: list[str], completions: list[str], product: list[str], **columns: object) -> list[float]:
    """A reward that is worth something: the reply names the product (a column of the prompts' data)."""
    return [float(name in text.split()) for name, text in zip(product, completions, strict=True)]


def wanted(prompts: list[str], completions: list[str], product: list[str], **columns: object) -> list[float]:
    """The judge, in [0, 1]: the product is named, in ten words at most."""
    named = names_product(prompts, completions, product)
    return [0.5 * n + 0.5 * (len(text.split()) <= 10) for n, text in zip(named, completions, strict=True)]


def main(out: Path = Path("runs/loop"), steps: int = 20, rows: int = 3000, seed: int = 0) -> RewardMixture:
    """Tune the two weights around a follower in training, and return them."""
    # The policy: any folder or hub id of a causal language model. This one is made here, once, in a few seconds.
    policy = cached(out, "policy", {"seed": seed, "rows": rows}, lambda to: train_policy(to, seed=seed, rows=rows))
    prompts = load_prompts("align_cbrl.recipes.worlds.replies.data.load_requests")["train"].remove_columns("completion")

    # The follower: trl's RLOO maximises reward - temperature * KL(policy || reference). The leader steps every five of
    # its optimizer steps, on the completions that it has just been trained on.
    follower = RLOOFollower(
        policy, prompts, temperature=0.5, max_completion_length=16, prompts_per_step=8, group_size=8,
        learning_rate=1e-3, schedule=Schedule(interval=5, warmup=10), seed=seed,
    )  # fmt: skip

    # The leader: x, the weights of the rewards, starts at plain RLHF on the first of them.
    leader = RewardMixture({"length": length, "names_product": names_product}, {"length": 1.0}, budget=1.0)
    every_tenth = range(0, len(prompts), 10)
    reference = follower.answers(follower.policy, None, prompts, every_tenth, 8, seed=seed)
    leader.calibrate(reference.rollouts())  # so that weights are of standardised rewards

    # What the leader wants: the judge's mean score of the best response to its reward.
    problem = Problem(leader, ExpectedUtility(Judge(wanted)), follower)

    def show(row: dict[str, float], rollouts: Rollouts) -> None:
        weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in leader.weights().items())
        print(f"leader step {row['step']:2.0f}: judge {row['objective']:.3f}, KL {row['kl']:.2f} nats, {weights}")
        print(f"    {rollouts.steps['prompt'][0]}{rollouts.steps['completion'][0]}")

    # Each of its steps is taken on all completions judged so far, and moves the best response by a bounded amount.
    config = HPGDConfig(steps=steps, contexts_per_step=8, group_size=8, natural=Natural(), seed=seed)
    HPGD(problem, config=config, observers=[show]).run()
    return leader


if __name__ == "__main__":
    main()
