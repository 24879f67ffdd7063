"""Memory of a sampled hypergradient, by leader size (`python -m align_cbrl.recipes.benchmarks.leader_memory`).

Four Rooms, led by a network from a cell's coordinates to its share of the fines. Reads /proc, hence Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from align_cbrl import PolicyResponse, Problem
from toy_cmdp import ExactCritic, four_rooms, four_rooms_map
from toy_cmdp.problems.four_rooms import FourRoomsLeader

_BUDGET = 0.2


class NeuralLeader(FourRoomsLeader):
    """Four Rooms' leader, its weights the output of a network with two hidden layers, in single precision."""

    def __init__(self, base: FourRoomsLeader, width: int) -> None:
        super().__init__(base.goal, base.transition, base.initial, torch.zeros(1, dtype=torch.float64))
        self.register_buffer("features", torch.tensor(four_rooms_map(), dtype=torch.float32) / 6 - 1)  # [S, 2]
        self.network = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def incentive(self) -> Tensor:
        """-0.2 softmax of the network's outputs [S] and of one weight for the share that is left unspent."""
        logits = torch.cat([self.network(self.features)[:, 0].double(), self.weights])
        return -_BUDGET * torch.softmax(logits, 0)[:-1]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one PolicyResponse.backward in bytes.

    Attributes:
        parameters: number of the leader's parameters.
        own: what the leader cannot do without: its gradient and one copy of its activations.
        held: resident set before the step, with the parameters and the paths.
        peak: largest resident set during the step.
    """

    parameters: int
    own: int
    held: int
    peak: int

    @property
    def beyond(self) -> int:
        """What the step takes for itself."""
        return self.peak - self.held - self.own


def measure(width: int, paths: int) -> Usage:
    """One hypergradient from `paths` sampled paths for a leader of about width^2 parameters."""
    torch.manual_seed(0)
    base = four_rooms(temperature=0.003)
    assert isinstance(base.leader, FourRoomsLeader)
    leader = NeuralLeader(base.leader, width)
    problem = Problem(leader, base.objective, base.follower)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        problem.follower.respond(leader, torch.arange(2))
        rollouts = problem.follower.rollout(problem.follower.sample_contexts(paths, generator), 1, generator)
    parameters = problem.parameters
    activations = 4 * len(four_rooms_map()) * width * 4  # four vectors of float32 per cell
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    held = _status("VmRSS")
    PolicyResponse(ExactCritic()).backward(problem, rollouts)
    gradient = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
    return Usage(sum(p.numel() for p in parameters), gradient + activations, held, _status("VmHWM"))


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    """Print a line for each leader, each measured in a process of its own, and how much more the largest takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 97, 997, 3160], help="of the hidden layers")
    parser.add_argument("--paths", type=int, default=128, help="sampled paths")
    arguments = parser.parse_args()
    print(" parameters  peak MiB  held before  gradient and activations  beyond")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        usages = pool.starmap(measure, [(width, arguments.paths) for width in arguments.widths], chunksize=1)
    for usage in usages:
        megabytes = [number / 2**20 for number in (usage.peak, usage.held, usage.own, usage.beyond)]
        print("{:11,} {:9.1f} {:12.1f} {:25.1f} {:7.1f}".format(usage.parameters, *megabytes))
    first, last = usages[0], usages[-1]
    print(
        f"{last.parameters:,} against {first.parameters:,} parameters, beyond parameters, gradient and activations: "
        f"{last.beyond / first.beyond:.2f} times the step's memory, "
        f"{(first.held + last.beyond) / first.peak:.2f} times the process's"
    )


if __name__ == "__main__":
    main()
