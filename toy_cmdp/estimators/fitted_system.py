"""`FittedSystem`: the implicit gradient in linear systems that are fitted to the paths."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError
from align_cbrl.estimators.hypergradient import Hypergradient, accumulate
from align_cbrl.problem import Problem
from align_cbrl.rollouts import Rollouts
from toy_cmdp.referee.exact import context_values, leader_value
from toy_cmdp.tables.linear_systems import StructuredLeader, pairs


class SystemMemory:
    """What all paths so far say of nature's numbers, the first states and the noise; one entry a context.

    Least squares are kept as triangular factors (QR), which lose no digits where two columns are nearly alike.
    """

    def __init__(self) -> None:
        self.factors: list[Tensor] = []  # [K + 1, K + 1] each
        self.starts: list[Tensor] = []  # [1 + n, 1 + n] each, the sum of (1, s_0)(1, s_0)'
        self.off: list[Tensor] = []  # [n, n] each, sums of squares of what the fit at the time left over
        self.steps: list[int] = []


@checked
@dataclasses.dataclass(frozen=True)
class FittedSystem(Hypergradient):
    """For a `StructuredLeader`: least squares for nature's numbers, and the exact gradient in the systems they make.

    What `PlugIn` is for tables. The leader knows what it does itself, how that enters the systems, the follower's costs
    and its own utility; nature's numbers, the noise and the law of the first state come from the paths. It needs no
    score, so that a leader whose actions have hardly any noise is no harder than another, and systems without noise are
    known from one batch.

    Attributes:
        memory: an empty one to begin with carries what is known from batch to batch; None: each stands alone.

    Raises:
        InputError: from `backward`: a leader that is no `StructuredLeader`, a context without paths, or a fitted system
            without a stabilising solution.

    Example:
        >>> from toy_cmdp import lqr
        >>> problem = lqr()
        >>> _ = problem.follower.respond(problem.leader, torch.tensor([0]))
        >>> rollouts = problem.follower.rollout(torch.tensor([0]), 4, torch.Generator().manual_seed(0))
        >>> sorted(FittedSystem().backward(problem, rollouts))
        ['gradient_norm', 'objective']
    """

    memory: SystemMemory | None = None

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`; `objective` is J in the fitted systems."""
        model = self.model(problem, rollouts)
        value = leader_value(model)
        norm = accumulate(problem, torch.autograd.grad(value, problem.parameters, allow_unused=True))
        return {"objective": value.item(), "gradient_norm": norm}

    def backward_with_values(self, problem: Problem, rollouts: Rollouts) -> tuple[dict[str, float], Tensor]:
        """As `backward`; and what every context is worth in its fitted system, [C]."""
        model = self.model(problem, rollouts)
        value = leader_value(model)
        norm = accumulate(problem, torch.autograd.grad(value, problem.parameters, allow_unused=True))
        return {"objective": value.item(), "gradient_norm": norm}, context_values(model)

    def model(self, problem: Problem, rollouts: Rollouts) -> Problem:
        """The problem in the fitted systems; its leader has the same parameters."""
        leader = problem.leader
        if not isinstance(leader, StructuredLeader):
            raise InputError(
                f"leader: FittedSystem expected a StructuredLeader, which says what is to be fitted, got "
                f"{type(leader).__name__}"
            )
        with torch.no_grad():
            return dataclasses.replace(problem, leader=self._supposed(leader, rollouts))

    def _supposed(self, leader: StructuredLeader, rollouts: Rollouts) -> StructuredLeader:
        systems, numbers = leader.systems(), leader.nature()
        telling = systems.states - leader.own_states()
        contexts, count = numbers.shape
        world = (systems.noise, systems.initial_mean, systems.initial_covariance)
        none = torch.zeros_like(numbers)
        base = leader.supposing(none, *world).systems().joint  # [C, n, d]
        parts = []  # what each number adds to [A B]
        for i in range(count):
            one = none.clone()
            one[:, i] = 1
            parts.append(leader.supposing(one, *world).systems().joint - base)
        design = torch.stack(parts, 1)  # [C, K, n, d]

        memory = SystemMemory() if self.memory is None else self.memory
        found: list[list[Tensor]] = [[], [], [], []]
        for context in range(contexts):
            mine = rollouts.contexts == context
            pair = pairs(rollouts)[mine].flatten(0, 1)  # [N, d]
            first = rollouts.steps["state"][mine][:, 0]
            if len(first) == 0 and len(memory.steps) <= context:
                raise InputError(f"rollouts: FittedSystem expected paths in every context, got none in {context}")
            after = rollouts.steps["state"][mine][:, 1:].flatten(0, 1) - pair @ base[context].T  # [N, n]
            columns = torch.einsum("kij,tj->tik", design[context], pair)  # [N, n, K]
            rows = torch.cat([columns, after[..., None]], -1)[:, :telling].flatten(0, 1)
            ones = torch.cat([torch.ones_like(first[:, :1]), first], 1)
            if len(memory.steps) <= context:
                memory.factors.append(rows.new_zeros(0, count + 1))
                memory.starts.append(torch.zeros_like(ones.T @ ones))
                memory.off.append(torch.zeros_like(systems.noise[context]))
                memory.steps.append(0)
            memory.factors[context] = torch.linalg.qr(torch.cat([memory.factors[context], rows])).R
            factor = memory.factors[context]
            fitted = torch.linalg.lstsq(factor[:, :-1], factor[:, -1:], driver="gelsd").solution[:, 0]
            off = after - columns @ fitted
            memory.off[context] = memory.off[context] + off.T @ off
            memory.steps[context] += len(off)
            memory.starts[context] = memory.starts[context] + ones.T @ ones
            starts = memory.starts[context] / memory.starts[context][0, 0]
            mean = starts[0, 1:]
            estimates = (fitted, memory.off[context] / memory.steps[context], mean, starts[1:, 1:] - mean.outer(mean))
            for values, estimate in zip(found, estimates, strict=True):
                values.append(estimate)
        numbers, noise, mean, covariance = (torch.stack(values) for values in found)
        return leader.supposing(numbers, noise, mean, covariance)
