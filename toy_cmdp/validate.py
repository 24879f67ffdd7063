"""Every gradient route against one referee, the implicit hypergradient, on named problems."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align_cbrl.critics import FittedCritic
from align_cbrl.errors import InputError
from align_cbrl.hypergradient import Hypergradient, PolicyResponse
from align_cbrl.problem import Problem, step_seed
from toy_cmdp.exact import ExactCritic, expected_policy_response, leader_value
from toy_cmdp.follower import ExactFollower
from toy_cmdp.four_rooms import four_rooms
from toy_cmdp.random_cmdp import random_cmdp

REFEREE = "implicit"
_Z_LIMIT = 4.0
_DIRECTIONS = 8


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """How one route to dJ/dx compares with the referee on one problem.

    Attributes:
        problem, route: their names.
        relative_error: |g - referee| / |referee|, Euclidean norms; g is the mean over repetitions of a sampled route.
        standard_error: of that mean, as a share of |referee|; 0 for exact routes.
        z: largest deviation in standard errors (see `deviations`), less `allowance`; 0 for exact routes.
        passed: relative_error <= tolerance of an exact route, |z| <= 4 of a sampled one.
        seconds: wall time.
        allowance: bias that is forgiven before z is formed, as a share of |referee|: zero but for fitted critics,
            whose averages are biased where they have seen too little.
    """

    problem: str
    route: str
    relative_error: float
    standard_error: float
    z: float
    passed: bool
    seconds: float
    allowance: float = 0.0


def spread_four_rooms(temperature: float = 0.001, price: float = 1.0, seed: int = 0) -> Problem:
    """Four Rooms at weights N(0, 1): the published start, N(0, 0.01^2), is nearly symmetric."""
    problem = four_rooms(temperature=temperature, price=price, seed=seed)
    with torch.no_grad():
        problem.parameters[0].mul_(100)
    return problem


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "four_rooms": lambda seed: spread_four_rooms(seed=seed),
    "four_rooms_warm": lambda seed: spread_four_rooms(temperature=0.005, price=3.0, seed=seed),
    "random_cmdp": lambda seed: random_cmdp(seed=seed),
    "random_cmdp_priced": lambda seed: random_cmdp(seed=seed + 100, price=0.3),
    "random_cmdp_cold": lambda seed: random_cmdp(seed=seed + 200, temperature=0.1, leader_discount=0.9),
    "layered": lambda seed: random_cmdp(seed=seed + 300, horizon=3),
}
"""Builders seed -> Problem, by name; add a problem here to have it validated."""


def validate(
    names: Sequence[str] | None = None, *, seed: int = 0, repetitions: int = 40, paths: int = 2048
) -> list[ValidationRow]:
    """Compare finite differences, the expectation of PolicyResponse, and PolicyResponse on samples with the referee.

    Args:
        names: of `PROBLEMS`; all by default.
        seed: of the problems and of the samples.
        repetitions: independent batches of a sampled route, at least 2.
        paths: in a batch.

    Returns:
        A row for each problem and route: `finite_differences`, `expected_policy_response`, `sampled_exact_critic`,
        `sampled_fitted_critic`; the referee's own row, `implicit`, tells its time.

    Raises:
        InputError: an unknown name, fewer than 2 repetitions or paths.

    Example:
        >>> rows = validate(["layered"], repetitions=10, paths=64)
        >>> [row.route for row in rows][:2], all(row.passed for row in rows)
        (['implicit', 'finite_differences'], True)
    """
    names = list(PROBLEMS) if names is None else list(names)
    for name in names:
        if name not in PROBLEMS:
            raise InputError(f"validate: unknown problem {name!r}; known are {', '.join(PROBLEMS)}")
    if repetitions < 2 or paths < 2:
        raise InputError(f"validate: expected at least 2 repetitions and paths, got {repetitions} and {paths}")
    return [row for name in names for row in _validate_one(name, PROBLEMS[name](seed), seed, repetitions, paths)]


def _validate_one(name: str, problem: Problem, seed: int, repetitions: int, paths: int) -> list[ValidationRow]:
    started = time.perf_counter()
    referee = implicit_gradient(problem)
    rows = [ValidationRow(name, REFEREE, 0.0, 0.0, 0.0, True, time.perf_counter() - started)]

    exact: dict[str, tuple[Callable[[Problem], Tensor], float]] = {
        "finite_differences": (finite_differences, 1e-6),
        "expected_policy_response": (lambda p: _flat(expected_policy_response(p)), 1e-9),
    }
    for route, (gradient, tolerance) in exact.items():
        started = time.perf_counter()
        error = _relative(gradient(problem), referee)
        rows.append(ValidationRow(name, route, error, 0.0, 0.0, error <= tolerance, time.perf_counter() - started))

    assert isinstance(problem.follower, ExactFollower)
    sampled: dict[str, tuple[Hypergradient, float]] = {
        "sampled_exact_critic": (PolicyResponse(ExactCritic()), 0.0),
        "sampled_fitted_critic": (PolicyResponse(FittedCritic(problem.follower.cmdp.cell)), 0.05),
    }
    for route, (estimator, allowance) in sampled.items():
        started = time.perf_counter()
        estimates = sample_gradients(problem, estimator, repetitions=repetitions, paths=paths, seed=seed)
        error = _relative(estimates.mean(0), referee)
        share = float(estimates.var(0).sum().div(repetitions).sqrt() / referee.norm())
        z = float(deviations(estimates, referee, allowance=allowance).abs().max())
        seconds = time.perf_counter() - started
        rows.append(ValidationRow(name, route, error, share, z, z <= _Z_LIMIT, seconds, allowance))
    return rows


def implicit_gradient(problem: Problem) -> Tensor:
    """The referee: the exact dJ/dx of all parameters as one vector, [n]; `.grad` is left alone."""
    gradients = torch.autograd.grad(leader_value(problem), problem.parameters, allow_unused=True)
    return _flat([torch.zeros_like(p) if g is None else g for p, g in zip(problem.parameters, gradients, strict=True)])


def finite_differences(problem: Problem, step: float = 1e-5) -> Tensor:
    """Central differences of the exact J, [J(x + h) - J(x - h)] / 2h with h = step * max(1, |x_i|), as a vector [n]."""
    differences = []
    with torch.no_grad():
        for parameter in problem.parameters:
            entries = parameter.view(-1)
            for i in range(len(entries)):
                centre = entries[i].item()
                h = step * max(1.0, abs(centre))
                values = []
                for sign in (1, -1):
                    entries[i] = centre + sign * h
                    values.append(leader_value(problem))
                entries[i] = centre
                differences.append((values[0] - values[1]) / (2 * h))
    return torch.stack(differences)


def sample_gradients(problem: Problem, estimator: Hypergradient, *, repetitions: int, paths: int, seed: int) -> Tensor:
    """Independent estimates of dJ/dx from `paths` paths each, [repetitions, n]; `.grad` is overwritten with None."""
    problem.follower.respond(problem.leader, torch.arange(1))
    estimates = []
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(step_seed(seed, repetition))
        contexts = problem.follower.sample_contexts(paths, generator)
        rollouts = problem.follower.rollout(contexts, 1, generator)
        for parameter in problem.parameters:
            parameter.grad = None
        estimator.backward(problem, rollouts)
        estimates.append(_flat([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in problem.parameters]))
    for parameter in problem.parameters:
        parameter.grad = None
    return torch.stack(estimates)


def deviations(estimates: Tensor, referee: Tensor, *, allowance: float = 0.0) -> Tensor:
    """How many standard errors the mean of `estimates` [R, n] is off along each of min(n, 8) directions.

    The directions are orthonormal: the referee's own, then random ones. Single coordinates would not do: those that
    are hardly ever sampled are far from normal.

    Args:
        estimates: [R, n], independent.
        referee: [n].
        allowance: deviations up to this share of |referee| count as zero.
    """
    count = min(len(referee), _DIRECTIONS)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(referee), count, generator=generator, dtype=referee.dtype)
    basis[:, 0] = referee
    directions = torch.linalg.qr(basis).Q  # [n, count]
    along = (estimates - referee) @ directions  # [R, count]
    mean = along.mean(0)
    excess = mean.sign() * (mean.abs() - allowance * referee.norm()).clamp(min=0)
    return excess / (along.std(0) / len(estimates) ** 0.5)


def _relative(gradient: Tensor, referee: Tensor) -> float:
    return float((gradient - referee).norm() / referee.norm())


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
