"""A batch's rewards over HTTP against the call in process (`python -m align_cbrl.recipes.benchmarks.served_reward`)."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from align_cbrl.llm import RewardMixture, RewardModel
from align_cbrl.llm.engines import client
from align_cbrl.llm.scoring import ScoreFunction

from ..served_script import configuration, served
from ..trl_script import REWARDS
from ..worlds.replies.data import load_requests


def main(arguments: list[str] | None = None) -> None:
    """Print medians and quartiles of both, in pairs, and the ratio of the medians; every batch is another one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="completions of a request")
    parser.add_argument("--proxy", help="folder of a reward model that the mixture has besides its three functions")
    given = parser.parse_args(arguments)
    repetitions, batch = given.repetitions, given.batch
    torch.set_num_threads(1)
    functions = RewardMixture.of(REWARDS)
    config = configuration(functions, batch=batch, every=10**6)  # no leader step is timed
    leader = functions
    if given.proxy is not None:
        config["proxy"] = str(Path(given.proxy).resolve())
        terms: dict[str, ScoreFunction] = {"proxy": RewardModel(given.proxy), **functions.terms}
        leader = RewardMixture(terms, functions.weights(), functions.budget)
    reward = leader.reward_function()
    rows = load_requests()["train"][: 8 * 4096]
    seconds: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), config) as address:
        os.environ["REWARD_URL"] = address
        for repetition in range(repetitions + 20):
            places = [(repetition * batch + 8 * i) % len(rows["prompt"]) for i in range(batch)]
            prompts = [rows["prompt"][places[i // 8]] for i in range(batch)]
            completions = [rows["completion"][place] for place in places]
            began = time.perf_counter()
            own = reward(prompts, completions)
            between = time.perf_counter()
            theirs = client.reward(prompts, completions)
            ended = time.perf_counter()
            if max(abs(a - b) for a, b in zip(own, theirs, strict=True)) > 1e-6:
                raise RuntimeError("the server's rewards are others")
            seconds["in process"].append(between - began)
            seconds["over HTTP"].append(ended - between)
    for name, values in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(values[20:], n=4))  # the first ones warm up
        print(f"{name}: median {middle:.2f} ms, quartiles {low:.2f} to {high:.2f} ms")
    one, other = (statistics.median(values[20:]) for values in seconds.values())
    print(f"ratio of medians {other / one:.2f}, difference {1e3 * (other - one):.2f} ms, {batch} completions")


if __name__ == "__main__":
    main()
