"""Gridworlds: time and peak memory of an exact hypergradient (`python -m align_cbrl.recipes.benchmarks.gridworld`)."""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import resource
import sys
import time

import torch

from toy_cmdp import ImplicitHypergradient
from toy_cmdp.problems.gridworld import gridworld

_WALLS = 0.1


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one exact hypergradient, from a cold start, its validation and sparsity analysis included.

    Attributes:
        states: free cells.
        seconds, processor_seconds: wall time, and that of all threads together.
        gibibytes: peak memory of the process, interpreter and libraries included.
        value, gradient_norm: J and the Euclidean norm of its gradient.
    """

    states: int
    seconds: float
    processor_seconds: float
    gibibytes: float
    value: float
    gradient_norm: float


def measure(states: int) -> Cost:
    """Solve a square map of about `states` free cells in two contexts, at incentives limit * tanh(N(0, 1))."""
    side = math.ceil((states / (1 - _WALLS)) ** 0.5)
    problem = gridworld(side, side, walls=_WALLS)
    with torch.no_grad():
        problem.parameters[0].mul_(100)
    began, busy = time.perf_counter(), time.process_time()
    metrics = ImplicitHypergradient().backward(problem)
    return Cost(
        states=problem.parameters[0].numel(),
        seconds=time.perf_counter() - began,
        processor_seconds=time.process_time() - busy,
        gibibytes=peak_bytes() / 2**30,
        value=metrics["objective"],
        gradient_norm=metrics["gradient_norm"],
    )


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print a line for each size, each measured in a process of its own, and the growth exponent of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="sizes, ascending")
    sizes = parser.parse_args().states
    print("   states   seconds  processor s   GiB            J     |dJ/dx|")
    # A fresh process each: the peak of one does not hide that of another.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        costs = []
        for cost in pool.imap(measure, sizes):
            costs.append(cost)
            print(
                f"{cost.states:9,} {cost.seconds:9.2f} {cost.processor_seconds:12.2f} {cost.gibibytes:5.2f} "
                f"{cost.value:12.6f} {cost.gradient_norm:11.3e}",
                flush=True,
            )
    first, last = costs[0], costs[-1]
    if last.states > first.states:
        growth = math.log(last.states / first.states)
        wall = math.log(last.seconds / first.seconds) / growth
        busy = math.log(last.processor_seconds / first.processor_seconds) / growth
        print(f"growth exponent, {first.states:,} to {last.states:,} states: {wall:.2f} (of processor time {busy:.2f})")


if __name__ == "__main__":
    main()
