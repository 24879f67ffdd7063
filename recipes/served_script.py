"""The script of `trl_script` with its leader in a server, against the leader in the script (docs/serving.md).

`python -m align_cbrl.recipes.served_script`. The server is `align-cbrl serve` in a process of its own; the script asks
it through the client that is shipped for other engines. What is learned should not depend on where the leader is.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from align_cbrl import ExpectedUtility
from align_cbrl.llm import Judge, LeaderCallback, RewardMixture
from align_cbrl.llm.engines import client

from .statistics import interval, shown
from .trl_script import REWARDS, judged, trained
from .worlds.replies.data import load_requests
from .worlds.replies.judge import reply_judge
from .worlds.world import Replies

PLACES = ("untouched", "in the script", "in a server")


def configuration(leader: RewardMixture, *, batch: int, every: int) -> dict[str, Any]:
    """The configuration of a server whose leader starts and steps as that of a `LeaderCallback`."""
    return {
        "judge": {"function": f"{reply_judge.__module__}.{reply_judge.__name__}"},
        "rewards": {name: f"{term.__module__}.{name}" for name, term in leader.terms.items()},
        "leader": {"weights": leader.weights(), "budget": leader.budget},
        "hpgd": {"steps": 10_000, "learning_rate": 0.1 * leader.budget},
        "batch_size": batch,
        "every": every,
    }


@contextlib.contextmanager
def served(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """The address of a server with this configuration, while the block runs."""
    (folder / "leader.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "align_cbrl.cli", "serve", "leader.yaml", "--out", "out", "--port", "0"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith("serving "):
            raise RuntimeError(f"the server did not start: {line}")
        yield line.split()[1]
    finally:
        server.terminate()
        server.wait(60)


def train(place: str, model: str, *, seed: int, every: int, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    """Train the script's policy with its leader in a place of `PLACES`; it, and what is to be said of the leader."""
    leader = RewardMixture.of(REWARDS)
    if place == "untouched":
        return trained("grpo", model, REWARDS, [], seed=seed, **sizes), {}
    if place == "in the script":
        callback = LeaderCallback(leader, ExpectedUtility(Judge(reply_judge)), every=every)
        policy = trained("grpo", model, leader.reward_function(), [callback], seed=seed, **sizes)
        return policy, {"steps": len(callback.history), "reward": leader.describe()}
    with tempfile.TemporaryDirectory() as folder:
        with served(Path(folder), configuration(leader, batch=sizes["batch"], every=every)) as address:
            os.environ["REWARD_URL"] = address
            policy = trained("grpo", model, client.reward, [], seed=seed, **sizes)
        metrics = Path(folder, "out/metrics.jsonl").read_text().splitlines()
        reward = json.loads(Path(folder, "out/reward/reward.json").read_text())
        return policy, {"steps": len(metrics), "reward": {f"weight of {k}": v for k, v in reward["weights"].items()}}


def main(arguments: list[str] | None = None) -> None:
    """Train with the leader in each place, and print the judge's scores and their differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--model", help="folder of a policy; the world's own, of seed 0, by default")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where that is kept")
    given = parser.parse_args(arguments)
    model = str(Path(given.model or Replies().make_policy(load_requests(), 0, given.cache)).resolve())
    sizes = {name: getattr(given, name) for name in ("steps", "every", "batch", "learning_rate")}
    scores: dict[str, list[float]] = {place: [] for place in given.places}
    for seed in given.seeds:
        for place in given.places:
            began = time.perf_counter()
            policy, known = train(place, model, seed=seed, **sizes)
            seconds = time.perf_counter() - began
            scores[place].append(judged(policy, model, seed))
            print(json.dumps({"place": place, "seed": seed, "judge": scores[place][-1], "seconds": seconds, **known}),
                  flush=True)  # fmt: skip
    for place, other in itertools.combinations(scores, 2):
        differences = [one - two for one, two in zip(scores[other], scores[place], strict=True)]
        print(f"{other} less {place}: {shown(interval(differences))}", flush=True)


if __name__ == "__main__":
    main()
