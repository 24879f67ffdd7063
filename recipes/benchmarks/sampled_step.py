"""Hypergradient steps on Four Rooms in turn, on one core (`python -m align_cbrl.recipes.benchmarks.sampled_step`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

import toy_cmdp
from align_cbrl import FittedCritic, Hypergradient, PolicyResponse
from toy_cmdp.estimators.bchg import BCHG, SarsaCritic
from toy_cmdp.estimators.visit_averaged import VisitAveraged

_PILOT = 500  # paths that the mean length of an episode is measured on
_HORIZON = 200  # the authors' episodes end there
_AUTHORS = "visit-averaged, as the authors of HPGD"


class _Step:
    """Best response, paths, estimate, Adam, of a leader of its own; the exact gradient needs no paths."""

    def __init__(self, temperature: float, price: float, environment_steps: int) -> None:
        self.problem = toy_cmdp.four_rooms(temperature=temperature, price=price, seed=0, horizon=_HORIZON)
        follower = self.problem.follower
        assert isinstance(follower, toy_cmdp.ExactFollower)
        self.follower, self.generator = follower, torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(self.problem.leader.parameters(), lr=1e-4, maximize=True)
        contexts = follower.sample_contexts(_PILOT, self.generator)
        follower.respond(self.problem.leader, contexts)
        length = float(follower.rollout(contexts, 1, self.generator).mask.sum()) / _PILOT
        self.paths = round(environment_steps / length)
        self.milliseconds: list[float] = []

    def take(self, estimator: Hypergradient | None) -> None:
        """One step, by the implicit hypergradient where there is no estimator."""
        worked = time.process_time()
        self.optimizer.zero_grad()
        if estimator is None:
            toy_cmdp.exact.leader_value(self.problem).backward()
        else:
            contexts = self.follower.sample_contexts(self.paths, self.generator)
            self.follower.respond(self.problem.leader, contexts)
            estimator.backward(self.problem, self.follower.rollout(contexts, 1, self.generator))
        self.optimizer.step()
        self.milliseconds.append(1e3 * (time.process_time() - worked))


def main(environment_steps: int = 10_000, rounds: int = 40) -> None:
    """Print medians and quartiles of processor time, and what the authors' estimator takes as a multiple, by rounds.

    One step of each estimator is a round, so that a busy machine slows all of them alike.
    """
    torch.set_num_threads(1)
    for temperature, price in ((0.001, 1.0), (0.003, 3.0), (0.005, 5.0)):
        cmdp = _Step(temperature, price, environment_steps).follower.cmdp
        estimators: dict[str, Hypergradient | None] = {
            "exact": None,
            "plug-in": toy_cmdp.PlugIn(cmdp),
            "plug-in, each batch on its own": toy_cmdp.PlugIn(cmdp, 1.0, 1.0, 0.5, memory=None),
            "policy response, fitted critic": PolicyResponse(FittedCritic(cmdp.cell)),
            _AUTHORS: VisitAveraged(cmdp.cell),
            "BC-HG, Q carried": BCHG(SarsaCritic(cmdp.cell, memory=[]), cmdp.cell),
        }
        steps = {name: _Step(temperature, price, environment_steps) for name in estimators}
        for _ in range(rounds + 5):
            for name, estimator in estimators.items():
                steps[name].take(estimator)
        spent = {name: step.milliseconds[5:] for name, step in steps.items()}  # the first rounds warm up
        print(f"lambda {temperature}, price {price}, {steps[_AUTHORS].paths} paths")
        for name, own in spent.items():
            multiple = _quartiles([theirs / mine for theirs, mine in zip(spent[_AUTHORS], own, strict=True)])
            print(f"  {name}: {_quartiles(own)} ms; the authors' over it {multiple}")


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
