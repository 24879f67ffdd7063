"""One exact hypergradient step on Four Rooms, on one core (`python -m align_cbrl.recipes.benchmarks.exact_step`)."""

from __future__ import annotations

import statistics
import time

import torch

import toy_cmdp


def main(repetitions: int = 200) -> None:
    """Print the median and the quartiles of a step: best response, J, its gradient, Adam."""
    torch.set_num_threads(1)
    for temperature, price in ((0.001, 1.0), (0.003, 3.0), (0.005, 5.0)):
        problem = toy_cmdp.four_rooms(temperature=temperature, price=price, seed=0)
        optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.1, maximize=True)
        seconds = []
        for _ in range(repetitions + 20):
            began = time.perf_counter()
            optimizer.zero_grad()
            toy_cmdp.exact.leader_value(problem).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds[20:], n=4))  # the first steps warm up
        print(f"lambda {temperature}, price {price}: median {middle:.2f} ms, quartiles {low:.2f} to {high:.2f} ms")


if __name__ == "__main__":
    main()
