"""A sampled hypergradient step on Four Rooms, on one core (`python -m align_cbrl.recipes.benchmarks.sampled_step`)."""

from __future__ import annotations

import statistics
import time

import torch

import toy_cmdp
from align_cbrl import FittedCritic, Hypergradient, PolicyResponse

_PILOT = 500  # paths that the mean length of an episode is measured on
_HORIZON = 200  # the authors' episodes end there


def main(environment_steps: int = 10_000, repetitions: int = 100) -> None:
    """Print the median and the quartiles of a step: best response, paths, estimate, Adam; wall and processor time."""
    torch.set_num_threads(1)
    for temperature, price in ((0.001, 1.0), (0.003, 3.0), (0.005, 5.0)):
        problem = toy_cmdp.four_rooms(temperature=temperature, price=price, seed=0, horizon=_HORIZON)
        follower = problem.follower
        assert isinstance(follower, toy_cmdp.ExactFollower)
        generator = torch.Generator().manual_seed(0)
        contexts = follower.sample_contexts(_PILOT, generator)
        follower.respond(problem.leader, contexts)
        length = float(follower.rollout(contexts, 1, generator).mask.sum()) / _PILOT
        paths = round(environment_steps / length)
        estimators: dict[str, Hypergradient] = {
            "plug-in": toy_cmdp.PlugIn(follower.cmdp),
            "plug-in, each batch on its own": toy_cmdp.PlugIn(follower.cmdp, 1.0, 1.0, 0.5, memory=None),
            "policy response, fitted critic": PolicyResponse(FittedCritic(follower.cmdp.cell)),
        }
        for name, estimator in estimators.items():
            optimizer = torch.optim.Adam(problem.leader.parameters(), lr=1e-4, maximize=True)
            wall, processor = [], []
            for _ in range(repetitions + 10):
                began, worked = time.perf_counter(), time.process_time()
                optimizer.zero_grad()
                contexts = follower.sample_contexts(paths, generator)
                follower.respond(problem.leader, contexts)
                estimator.backward(problem, follower.rollout(contexts, 1, generator))
                optimizer.step()
                wall.append(time.perf_counter() - began)
                processor.append(time.process_time() - worked)
            low, middle, high = (1e3 * q for q in statistics.quantiles(wall[10:], n=4))  # the first steps warm up
            print(
                f"lambda {temperature}, price {price}, {paths} paths, {name}: median {middle:.1f} ms, quartiles "
                f"{low:.1f} to {high:.1f} ms; processor {1e3 * statistics.median(processor[10:]):.1f} ms"
            )


if __name__ == "__main__":
    main()
