"""What is measured: every estimator on the same batches of paths, against the exact hypergradient."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from align_cbrl import Critic, Critique, DirectOnly, FittedCritic, Hypergradient, InputError, PolicyResponse, Problem
from align_cbrl.estimators.baselines import Myopic
from align_cbrl.estimators.geometric import GradientEstimator
from align_cbrl.problem import step_seed
from align_cbrl.rollouts import Rollouts
from toy_cmdp import ContextualMDP, ExactCritic, ExactFollower, ImplicitHypergradient, four_rooms
from toy_cmdp.estimators.amd import AMD
from toy_cmdp.estimators.bchg import BCHG, SarsaCritic
from toy_cmdp.estimators.plug_in import PlugIn, TransitionMemory
from toy_cmdp.estimators.value_penalty import ValuePenalty
from toy_cmdp.estimators.visit_averaged import VisitAveraged
from toy_cmdp.validate import PROBLEMS, estimate, implicit_gradient

ORACLES = ("exact critic", "AMD, 100 sweeps", "value penalty 1e4")
"""They know what the follower's world is: no competitors, shown for comparison."""

CLIMBERS = ("exact", "plug-in", "visit-averaged", "BC-HG")
"""Whose ascents leaders are taken from."""

_PILOT = 500  # paths that the mean length of an episode is measured on
_PATHS, _RATE = 50, 0.1  # of a leader step, and of Adam, on an ascent: the recipe four_rooms' defaults


def climbers(cmdp: ContextualMDP) -> dict[str, Hypergradient]:
    """Who leads the ascents along which leaders are taken: nobody, the plug-in itself, or a rival."""
    return {
        "exact": ImplicitHypergradient(),
        "plug-in": PlugIn(cmdp),
        "visit-averaged": VisitAveraged(cmdp.cell),
        "BC-HG": BCHG(SarsaCritic(cmdp.cell, memory=[]), cmdp.cell),
    }


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an ascent's batches have left behind: counts of transitions, and BC-HG's Q."""

    transitions: TransitionMemory = dataclasses.field(default_factory=TransitionMemory)
    q: list[float] = dataclasses.field(default_factory=list)

    def estimators(self, cmdp: ContextualMDP) -> dict[str, Hypergradient]:
        """Those that begin with a copy of it, by name."""
        own = copy.deepcopy(self)
        return {
            "plug-in, remembering": PlugIn(cmdp, memory=own.transitions),
            "BC-HG, Q carried": BCHG(SarsaCritic(cmdp.cell, memory=own.q), cmdp.cell),
        }


class SharedCritic(Critic):
    """Asks a critic once for each batch, so that estimators with the same critic do not fit it again."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self._last: tuple[Rollouts, Critique] | None = None

    def evaluate(self, problem: Problem, rollouts: Rollouts, credit: Tensor) -> Critique:
        """What the critic says."""
        if self._last is None or self._last[0] is not rollouts:
            self._last = rollouts, self._critic.evaluate(problem, rollouts, credit)
        return self._last[1]


def sampled_estimators(cmdp: ContextualMDP) -> dict[str, Hypergradient]:
    """Estimators from paths, by name. Those that share the fitted critic follow the one that is charged for it."""
    fitted = SharedCritic(FittedCritic(cmdp.cell))
    return {
        "plug-in": PlugIn(cmdp, shrinkage=1.0, damping=0.5, memory=None),  # what helps a batch on its own
        "visit-averaged": VisitAveraged(cmdp.cell),
        "BC-HG": BCHG(SarsaCritic(cmdp.cell), cmdp.cell),
        "policy response": PolicyResponse(fitted),
        "geometric": GradientEstimator(fitted),
        "myopic": Myopic(fitted),
        "direct only": DirectOnly(fitted),
        "exact critic": PolicyResponse(ExactCritic()),
    }


def model_based() -> dict[str, Hypergradient]:
    """Rivals that need no paths but the whole model."""
    return {"AMD, 100 sweeps": AMD(100), "value penalty 1e4": ValuePenalty(1e4)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One leader, one budget.

    Attributes:
        problem: `four_rooms`, or a name in `toy_cmdp.validate.PROBLEMS`.
        seed: of the leader; the batches have seeds of their own.
        steps: environment steps of a batch, in expectation.
        repetitions: independent batches.
        temperature, price: of Four Rooms; None elsewhere.
        ascent: whose ascent the leader is taken from (`climbers`); None: weights N(0, 1).
        leader_steps: of that ascent, from the published start N(0, 0.01^2).
    """

    problem: str
    seed: int
    steps: int
    repetitions: int
    temperature: float | None = None
    price: float | None = None
    ascent: str | None = None
    leader_steps: int = 0

    @property
    def key(self) -> str:
        """A name for files."""
        temperature = "" if self.temperature is None else f"-{self.temperature:g}"
        ascent = "" if self.ascent is None else f"-{self.ascent}-step{self.leader_steps}"
        return f"{self.problem}{temperature}-leader{self.seed}{ascent}-{self.steps}"

    def build(self) -> tuple[Problem, Seen | None]:
        """The problem, and what its ascent has seen, if there was one.

        Four Rooms is at weights N(0, 1), drawn from the seed, or where the ascent has come to.
        """
        if self.temperature is None or self.price is None:
            return PROBLEMS[self.problem](self.seed), None
        problem = four_rooms(temperature=self.temperature, price=self.price, seed=self.seed)
        if self.ascent is None:
            with torch.no_grad():
                problem.parameters[0].normal_(generator=torch.Generator().manual_seed(self.seed))
            return problem, None
        return problem, self._climb(problem)

    def _climb(self, problem: Problem) -> Seen:
        follower = problem.follower
        assert isinstance(follower, ExactFollower)
        cmdp, seen = follower.cmdp, Seen()
        climber = climbers(cmdp)[self.ascent or "exact"]
        witnesses = PlugIn(cmdp, memory=seen.transitions), BCHG(SarsaCritic(cmdp.cell, memory=seen.q), cmdp.cell)
        optimizer = torch.optim.Adam(problem.parameters, lr=_RATE, maximize=True)
        for step in range(self.leader_steps):
            generator = torch.Generator().manual_seed(step_seed(step_seed(self.seed, -2), step))
            contexts = follower.sample_contexts(_PATHS, generator)
            follower.respond(problem.leader, contexts)
            rollouts = follower.rollout(contexts, 1, generator)
            for witness in witnesses:  # they see every batch, whoever leads
                estimate(problem, witness, rollouts)
            problem.parameters[0].grad = estimate(problem, climber, rollouts)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return seen


def measure(cell: Cell, directions: int) -> dict[str, Any]:
    """Errors of all estimators in one cell, on common batches.

    Returns:
        `steps`, the mean number of environment steps of a batch; `sampling_seconds`; `estimators`, by name a dictionary
        with `mse`, `mse_se`, `bias2` (unbiased, hence at times below zero) and `variance` relative to the squared norm
        of the exact gradient, and `seconds`, processor time of a call; or `refused`, why an estimator does not apply.
        `coverage`: of the plug-in's 95 % intervals, `given` (the share of batches with intervals), `inside` and
        `outside`, numbers of intervals over the gradient's own direction and `directions` random ones.
    """
    problem, seen = cell.build()
    follower = problem.follower
    assert isinstance(follower, ExactFollower)
    follower.respond(problem.leader, torch.arange(1))
    truth = implicit_gradient(problem)
    scale = float(truth.pow(2).sum())

    pilot = torch.Generator().manual_seed(step_seed(cell.seed, -1))
    lengths = follower.rollout(follower.sample_contexts(_PILOT, pilot), 1, pilot).mask.sum(1)
    paths = max(2, round(cell.steps / float(lengths.double().mean())))

    axes = torch.randn(directions, len(truth), generator=torch.Generator().manual_seed(cell.seed), dtype=truth.dtype)
    axes = torch.cat([truth[None], axes])
    axes = axes / axes.norm(dim=1, keepdim=True)
    estimators = sampled_estimators(follower.cmdp)
    if seen is not None:
        estimators |= seen.estimators(follower.cmdp)
    errors: dict[str, list[Tensor]] = {name: [] for name in estimators}
    seconds = dict.fromkeys(estimators, 0.0)
    refused: dict[str, str] = {}
    sampling, steps, given, inside, outside = 0.0, 0, 0, 0, 0
    for repetition in range(cell.repetitions):
        generator = torch.Generator().manual_seed(step_seed(step_seed(cell.seed, cell.steps), repetition))
        began = time.process_time()
        rollouts = follower.rollout(follower.sample_contexts(paths, generator), 1, generator)
        sampling += time.process_time() - began
        steps += int(rollouts.mask.sum())
        if seen is not None:  # the ascent's batches and this one, no other
            estimators |= seen.estimators(follower.cmdp)
        for name, estimator in estimators.items():
            if name in refused:
                continue
            began = time.process_time()
            try:
                found = estimate(problem, estimator, rollouts)
            except InputError as error:
                if repetition > 0:  # it applied so far: this is no matter of the problem
                    raise
                refused[name] = str(error)
                continue
            seconds[name] += time.process_time() - began
            errors[name].append(found - truth)
        if "plug-in" in refused:
            continue
        projected = PlugIn(follower.cmdp, memory=None).project(problem, rollouts, axes)
        if bool(projected.standard_error.isfinite().all()):
            target = axes @ truth
            hits = int(((projected.lower <= target) & (target <= projected.upper)).sum())
            given, inside, outside = given + 1, inside + hits, outside + len(axes) - hits

    results: dict[str, dict[str, Any]] = {name: {"refused": reason} for name, reason in refused.items()}
    for name, off in errors.items():
        if off:
            results[name] = _moments(torch.stack(off), scale) | {"seconds": seconds[name] / len(off)}
    for name, estimator in model_based().items():
        began = time.process_time()
        try:
            distance = estimate(problem, estimator) - truth
        except InputError as error:
            results[name] = {"refused": str(error)}
            continue
        share = float(distance.pow(2).sum()) / scale
        spent = time.process_time() - began
        results[name] = {"mse": share, "mse_se": 0.0, "bias2": share, "variance": 0.0, "seconds": spent}
    return {
        **dataclasses.asdict(cell),
        "batch_steps": steps / cell.repetitions,
        "sampling_seconds": sampling / cell.repetitions,
        "estimators": results,
        "coverage": {"given": given / cell.repetitions, "inside": inside, "outside": outside},
    }


def _moments(errors: Tensor, scale: float) -> dict[str, float]:
    count = len(errors)
    squares = errors.pow(2).sum(1) / scale  # [R]
    variance = float(errors.var(0).sum()) / scale
    mse = float(squares.mean())
    bias2 = float(errors.mean(0).pow(2).sum()) / scale - variance / count
    return {"mse": mse, "mse_se": float(squares.std()) / count**0.5, "bias2": bias2, "variance": variance}
