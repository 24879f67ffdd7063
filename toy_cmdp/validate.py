"""Every gradient route against one referee, the implicit hypergradient, on named problems."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from align_cbrl.errors import InputError
from align_cbrl.estimators.baselines import DirectOnly, Myopic
from align_cbrl.estimators.critics import FittedCritic
from align_cbrl.estimators.geometric import GradientEstimator
from align_cbrl.estimators.hypergradient import Hypergradient
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.estimators.regression_critic import RegressionCritic
from align_cbrl.estimators.truncated import RandomlyTruncated
from align_cbrl.estimators.zeroth_order import ZerothOrder
from align_cbrl.objectives import (
    BestOf,
    CVaR,
    ExpectedUtility,
    FunctionOfMeans,
    KLPriced,
    PreferenceLikelihood,
    SetUtility,
    target_shares,
)
from align_cbrl.problem import Objective, Problem, step_seed
from align_cbrl.rollouts import Rollouts
from toy_cmdp.estimators.amd import AMD
from toy_cmdp.estimators.bchg import BCHG, SarsaCritic
from toy_cmdp.estimators.fitted_system import FittedSystem
from toy_cmdp.estimators.observed_policy import ObservedPolicyResponse
from toy_cmdp.estimators.plug_in import PlugIn
from toy_cmdp.estimators.value_penalty import ValuePenalty
from toy_cmdp.estimators.visit_averaged import VisitAveraged
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.followers.iterative import NaturalPolicyGradient
from toy_cmdp.followers.linear_quadratic import LinearQuadraticFollower
from toy_cmdp.problems.building import building
from toy_cmdp.problems.discrete_toy import discrete_toy
from toy_cmdp.problems.four_rooms import four_rooms
from toy_cmdp.problems.free_rewards import free_rewards
from toy_cmdp.problems.gridworld import gridworld
from toy_cmdp.problems.linear_feedback import lqr
from toy_cmdp.problems.mechanism import mechanism
from toy_cmdp.problems.meta_rl import meta_rl
from toy_cmdp.problems.preferences import preferences
from toy_cmdp.problems.principal_agent import principal_agent
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.problems.random_linear import random_linear
from toy_cmdp.problems.stackelberg_game import stackelberg_game
from toy_cmdp.problems.tax_design import TaxLeader, tax_design
from toy_cmdp.referee.exact import ExactCritic, expected_policy_response, leader_value
from toy_cmdp.referee.frozen_policy import PresentPolicyResponse
from toy_cmdp.tables.cmdp import ContextualMDP, TabularLeader, TabularUtility, require_tabular
from toy_cmdp.tables.linear_systems import LinearLeader, QuadraticUtility, StructuredLeader
from toy_cmdp.tables.sparse import SparseTransition

REFEREE = "implicit"
_FALSE_ALARM = 0.01  # probability that a report on routes that are all right has a sampled row that fails
_ROUNDING = 1e-9  # as a share of the referee: what exact routes may be off by; a sampled one may be exact as well
_DIRECTIONS = 8
_SWEEPS = 3_000  # gamma^3000 = 8e-14 at 0.99
_RADIUS = 1e-4  # of the smoothing
_LEVELS = 3  # 16 iterations at most, of a follower that converges quadratically


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """How one route to dJ/dx compares with the referee on one problem.

    Attributes:
        problem, route: their names.
        relative_error: |g - referee| / |referee|, Euclidean norms; g is the mean over repetitions of a sampled route.
        standard_error: of that mean, as a share of |referee|; 0 for exact routes.
        z: largest deviation in standard errors (see `deviations`), less `allowance`; 0 for exact routes.
        passed: relative_error <= tolerance of an exact route. Of a sampled one, p >= 1 - 0.99^(1/m) with m the
            report's sampled rows that are judged: where every route is right, one report in a hundred has a row that
            fails, however many problems it is about. None for a rival, which is not expected to be right: its error is
            there to be seen.
        seconds: wall time.
        allowance: bias that is forgiven before z is formed, as a share of |referee|: zero but for fitted critics and
            models, which are biased where they have seen too little (`bias_bound`), and for
            `sampled_observed_policy`, which interpolates between the states it has seen.
        p: of so large a z where a route is right (`chance`); 1 for exact routes, NaN for rivals.
    """

    problem: str
    route: str
    relative_error: float
    standard_error: float
    z: float
    passed: bool | None
    seconds: float
    allowance: float = 0.0
    p: float = 1.0


def spread_four_rooms(temperature: float = 0.001, price: float = 1.0, seed: int = 0) -> Problem:
    """Four Rooms at weights N(0, 1): the published start, N(0, 0.01^2), is nearly symmetric."""
    problem = four_rooms(temperature=temperature, price=price, seed=seed)
    with torch.no_grad():
        problem.parameters[0].mul_(100)
    return problem


def _scattered(problem: Problem, seed: int, scale: float = 0.5) -> Problem:
    """The problem at parameters moved by N(0, scale^2): at a builder's symmetric start some gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in problem.parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    problem.leader.project()
    return problem


def population(seed: int = 0) -> Problem:
    """A random problem in which every context has a follower of its own: temperature, discount and rewards differ."""
    base = random_cmdp(seed=seed, contexts=3)
    assert isinstance(base.follower, ExactFollower)
    generator = torch.Generator().manual_seed(seed)
    temperature = 0.1 + torch.rand(3, generator=generator, dtype=torch.float64)
    discount = 0.9 * torch.rand(3, generator=generator, dtype=torch.float64)
    follower = ExactFollower(base.follower.cmdp, temperature, discount, leader_discount=base.objective.discount)
    return Problem(base.leader, base.objective, follower)


def _worst_contexts(seed: int) -> Problem:
    base = random_cmdp(seed=seed + 400, contexts=4)
    return Problem(base.leader, CVaR(KLPriced(base.objective, 0.2), share=0.4), base.follower)


def _best_of_three(score: TabularUtility) -> Objective:
    """The best score among three responses, less a price."""
    return KLPriced(SetUtility(BestOf(score), size=3), 0.2)


def _targets(score: TabularUtility) -> Objective:
    """Half of the responses in the lower third of scores, a fifth in the upper one."""

    def share(low: float, high: float) -> ExpectedUtility:
        def inside(leader: TabularLeader) -> Tensor:
            table = score.table(leader)
            return ((table > low) & (table <= high)).to(table)

        return ExpectedUtility(TabularUtility(inside))

    classes = [share(-math.inf, -0.5), share(-0.5, 0.5), share(0.5, math.inf)]
    return FunctionOfMeans(target_shares([0.5, 0.3, 0.2]), classes)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "four_rooms": lambda seed: spread_four_rooms(seed=seed),
    "four_rooms_warm": lambda seed: spread_four_rooms(temperature=0.005, price=3.0, seed=seed),
    "tax_design": lambda seed: _scattered(tax_design(grid=21, temperature=0.3), seed, 0.1),
    "principal_agent": lambda seed: _scattered(principal_agent(seed=seed, periods=2), seed),
    "mechanism": lambda seed: _scattered(mechanism(seed=seed, discount=0.8), seed),
    "meta_rl": lambda seed: _scattered(meta_rl(seed=seed), seed),
    "preferences": lambda seed: _scattered(
        preferences(seed=seed, temperature=1.0, objective=PreferenceLikelihood), seed
    ),
    "sets": lambda seed: _scattered(preferences(seed=seed, temperature=1.0, objective=_best_of_three), seed),
    "function_of_means": lambda seed: _scattered(preferences(seed=seed, temperature=1.0, objective=_targets), seed),
    "free_rewards": lambda seed: _scattered(free_rewards(seed=seed), seed, 0.1),
    "stackelberg_game": lambda seed: _scattered(stackelberg_game(seed=seed), seed),
    "discrete_toy": lambda seed: discrete_toy(seed=seed),
    "gridworld": lambda seed: _scattered(gridworld(6, 6, seed=seed, discount=0.9), seed),
    "population": population,
    "random_cmdp": lambda seed: random_cmdp(seed=seed),
    "random_cmdp_priced": lambda seed: random_cmdp(seed=seed + 100, price=0.3),
    "random_cmdp_cold": lambda seed: random_cmdp(seed=seed + 200, temperature=0.1, leader_discount=0.9),
    "random_cmdp_risk": _worst_contexts,
    "layered": lambda seed: random_cmdp(seed=seed + 300, horizon=3),
    "lqr": lambda seed: _scattered(lqr(gain=[[-9.0, -9.0]], horizon=20), seed),
    "building": lambda seed: building(horizon=20),
    "random_linear": lambda seed: random_linear(seed=seed),
    "random_linear_bump": lambda seed: random_linear(seed=seed, utility="bump", leader_discount=1.0),
}
"""Builders seed -> Problem, by name; add a problem here to have it validated."""


@dataclasses.dataclass(frozen=True)
class Route:
    """A way to the gradient from paths.

    Attributes:
        name: shown in the table.
        estimator: made for a problem.
        allowance: bias that is forgiven, as a share of the referee's norm; None for a rival that is not judged.
        applies: whether the estimator is defined for a problem.
        fitted: whether it is made of a critic or model fitted on the paths, whose bias is told from half of them.
    """

    name: str
    estimator: Callable[[Problem], Hypergradient]
    allowance: float | None
    applies: Callable[[Problem], bool] = lambda problem: True
    fitted: bool = False


def _cmdp(problem: Problem) -> ContextualMDP:
    assert isinstance(problem.follower, ExactFollower)
    return problem.follower.cmdp


def _is_tabular(problem: Problem) -> bool:
    return isinstance(problem.leader, TabularLeader)


def _is_dense(problem: Problem) -> bool:
    return _is_tabular(problem) and not isinstance(
        require_tabular(problem.leader).tables().transition, SparseTransition
    )


def _is_expectation(problem: Problem) -> bool:
    return isinstance(problem.objective, ExpectedUtility)


def _is_tabular_expectation(problem: Problem) -> bool:
    return _is_tabular(problem) and _is_expectation(problem)


def _is_quadratic(problem: Problem) -> bool:
    """Whether Q_F is a quadratic function, which the critic's ridge regression can be."""
    objective, follower = problem.objective, problem.follower
    return (
        isinstance(objective, ExpectedUtility)
        and isinstance(objective.utility_function, QuadraticUtility)
        and isinstance(follower, LinearQuadraticFollower)
        and follower.contexts == 1
    )


def _moves_rewards_only(problem: Problem) -> bool:
    if not _is_tabular(problem):
        return False
    tables = require_tabular(problem.leader).tables()
    others = (tables.transition, tables.initial, tables.log_prior)
    return _is_expectation(problem) and not any(table is not None and table.requires_grad for table in others)


class _Trained(Hypergradient):
    """RT-Q around a follower that trains by natural policy gradient, in place of the problem's exact follower."""

    def __init__(self, max_level: int) -> None:
        self._estimator = RandomlyTruncated(PresentPolicyResponse(), max_level)

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        """See `Hypergradient.backward`."""
        exact = problem.follower
        follower = NaturalPolicyGradient(_cmdp(problem), exact.temperature, exact.discount, iterations=0, horizon=1)
        return self._estimator.backward(dataclasses.replace(problem, follower=follower), rollouts)


def _is_structured(problem: Problem) -> bool:
    return isinstance(problem.leader, StructuredLeader)


def _on_a_line(problem: Problem) -> bool:
    return isinstance(problem.leader, TaxLeader)


def _observed(problem: Problem) -> Hypergradient:
    assert isinstance(problem.leader, TaxLeader)
    return ObservedPolicyResponse(_cmdp(problem), problem.leader.assets)


SAMPLED: tuple[Route, ...] = (
    Route("sampled_exact_critic", lambda problem: PolicyResponse(ExactCritic()), 0.0),
    Route("sampled_geometric", lambda problem: GradientEstimator(ExactCritic()), 0.0, _is_expectation),
    Route(
        "sampled_fitted_critic",
        lambda problem: PolicyResponse(FittedCritic(_cmdp(problem).cell)),
        0.0,
        _is_tabular,
        fitted=True,
    ),
    Route(
        "sampled_regression_critic",
        lambda problem: PolicyResponse(RegressionCritic(lambda rollouts: rollouts.steps["state"])),
        0.0,
        _is_quadratic,
        fitted=True,
    ),
    Route("sampled_fitted_system", lambda problem: FittedSystem(), 0.0, _is_structured, fitted=True),
    Route("sampled_plug_in", lambda problem: PlugIn(_cmdp(problem), memory=None), 0.0, _is_dense, fitted=True),
    Route("rival_visit_averaged", lambda problem: VisitAveraged(_cmdp(problem).cell), None, _moves_rewards_only),
    Route(
        "rival_bc_hg",
        lambda problem: BCHG(SarsaCritic(_cmdp(problem).cell), _cmdp(problem).cell),
        None,
        _moves_rewards_only,
    ),
    Route("sampled_observed_policy", _observed, 0.05, _on_a_line),
    Route("rt_q", lambda problem: _Trained(_LEVELS), 0.0, _is_tabular_expectation),
    Route("zeroth_order", lambda problem: ZerothOrder(_RADIUS, directions=_DIRECTIONS, value=leader_value), 0.0),
    Route("rival_myopic", lambda problem: Myopic(ExactCritic()), None),
    Route("rival_direct_only", lambda problem: DirectOnly(ExactCritic()), None),
)
"""Estimators from paths, all judged on the same batches."""


def validate(
    problems: Sequence[str] | Mapping[str, Callable[[int], Problem]] | None = None,
    *,
    seed: int = 0,
    repetitions: int = 40,
    paths: int = 1024,
) -> list[ValidationRow]:
    """Compare every route to dJ/dx with the referee: differences, expectations, model-based and sampled estimators.

    Args:
        problems: names of `PROBLEMS`, all by default; or builders seed -> problem of one's own, by name.
        seed: of the problems and of the samples.
        repetitions: independent batches of the sampled routes, at least 2.
        paths: in a batch.

    Returns:
        A row for each problem and route that applies to it: `finite_differences`, `expected_policy_response`, `amd`,
        `rival_value_penalty`, and those of `SAMPLED`. The referee's own row, `implicit`, tells its time.

    Raises:
        InputError: an unknown name, fewer than 2 repetitions or paths.

    Example:
        >>> rows = validate(["layered"], repetitions=10, paths=64)
        >>> [row.route for row in rows][:2], all(row.passed is not False for row in rows)
        (['implicit', 'finite_differences'], True)
    """
    if not isinstance(problems, Mapping):
        names = list(PROBLEMS) if problems is None else list(problems)
        for name in names:
            if name not in PROBLEMS:
                raise InputError(f"validate: unknown problem {name!r}; known are {', '.join(PROBLEMS)}")
        problems = {name: PROBLEMS[name] for name in names}
    if repetitions < 2 or paths < 2:
        raise InputError(f"validate: expected at least 2 repetitions and paths, got {repetitions} and {paths}")
    built = {name: build(seed) for name, build in problems.items()}
    judged = sum(
        route.allowance is not None and route.applies(problem) for problem in built.values() for route in SAMPLED
    )
    least = _of_several(_FALSE_ALARM, 1 / max(judged, 1))
    return [
        row for name, problem in built.items() for row in _validate_one(name, problem, seed, repetitions, paths, least)
    ]


def check_problem(problem: Any, name: str) -> Problem:
    """The problem, if the referee knows it: a tabular leader and an exact follower, or both of linear systems.

    Args:
        problem: what a user's function returned.
        name: of that function, for the error.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(problem, Problem):
        raise InputError(f"{name}: expected a function that returns an align_cbrl.Problem, got {problem!r}")
    linear = isinstance(problem.leader, LinearLeader)
    for role, part, expected in (
        ("leader", problem.leader, LinearLeader if linear else TabularLeader),
        ("follower", problem.follower, LinearQuadraticFollower if linear else ExactFollower),
    ):
        if not isinstance(part, expected):
            raise InputError(
                f"{name}: expected a problem whose {role} is a toy_cmdp.{expected.__name__}, which the referee needs, "
                f"got {type(part).__name__}"
            )
    return problem


def _validate_one(
    name: str, problem: Problem, seed: int, repetitions: int, paths: int, least: float
) -> list[ValidationRow]:
    started = time.perf_counter()
    referee = implicit_gradient(problem)
    rows = [ValidationRow(name, REFEREE, 0.0, 0.0, 0.0, True, time.perf_counter() - started)]

    exact: dict[str, tuple[Callable[[Problem], Tensor], float | None]] = {
        "finite_differences": (finite_differences, 1e-6),
        "expected_policy_response": (lambda p: _flat(expected_policy_response(p)), 1e-9),
    }
    if _is_tabular_expectation(problem):
        exact["amd"] = (lambda p: estimate(p, AMD(_SWEEPS)), 1e-6)
        if bool((torch.as_tensor(problem.follower.discount) == problem.objective.discount).all()):
            exact["rival_value_penalty"] = (lambda p: estimate(p, ValuePenalty()), None)
    for title, (gradient, tolerance) in exact.items():
        started = time.perf_counter()
        error = _relative(gradient(problem), referee)
        passed = None if tolerance is None else error <= tolerance
        rows.append(ValidationRow(name, title, error, 0.0, 0.0, passed, time.perf_counter() - started))

    judged = [route for route in SAMPLED if route.applies(problem)]
    estimates, halves, seconds = _on_the_same_paths(problem, judged, repetitions=repetitions, paths=paths, seed=seed)
    for route, found, half, spent in zip(judged, estimates, halves, seconds, strict=True):
        error = _relative(found.mean(0), referee)
        share = float(found.var(0).sum().div(repetitions).sqrt() / referee.norm())
        if route.allowance is None:
            rows.append(ValidationRow(name, route.name, error, share, math.nan, None, spent, p=math.nan))
            continue
        bound = None if half is None else bias_bound(found, half)
        off = deviations(found, referee, allowance=route.allowance, bound=bound).abs()
        z, p = float(off.max()), chance(off, repetitions)
        allowance = route.allowance if bound is None else float(bound.norm() / referee.norm())
        rows.append(ValidationRow(name, route.name, error, share, z, p >= least, spent, allowance, p))
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
    route = Route("", lambda problem: estimator, 0.0)
    estimates, _, _ = _on_the_same_paths(problem, [route], repetitions=repetitions, paths=paths, seed=seed)
    return estimates[0]


def _on_the_same_paths(
    problem: Problem, routes: Sequence[Route], *, repetitions: int, paths: int, seed: int
) -> tuple[list[Tensor], list[Tensor | None], list[float]]:
    """Estimates [repetitions, n] of each route, those from half of the paths where fitted, and seconds of each."""
    estimators = [route.estimator(problem) for route in routes]
    estimates: list[list[Tensor]] = [[] for _ in routes]
    from_half: list[list[Tensor]] = [[] for _ in routes]
    seconds = [0.0 for _ in routes]
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(step_seed(seed, repetition))
        contexts = problem.follower.sample_contexts(paths, generator)
        problem.follower.respond(
            problem.leader, contexts
        )  # each time: zeroth-order estimators make it respond to others
        rollouts = problem.follower.rollout(contexts, 1, generator)
        for i, estimator in enumerate(estimators):
            started = time.perf_counter()
            estimates[i].append(estimate(problem, estimator, rollouts))
            if routes[i].fitted:
                middle = rollouts.size // 2
                halves = (rollouts.select(slice(0, middle)), rollouts.select(slice(middle, None)))
                from_half[i].append(torch.stack([estimate(problem, estimator, half) for half in halves]).mean(0))
            seconds[i] += time.perf_counter() - started
    halved = [torch.stack(one) if one else None for one in from_half]
    return [torch.stack(one) for one in estimates], halved, seconds


def estimate(problem: Problem, estimator: Any, rollouts: Rollouts | None = None) -> Tensor:
    """What an estimator adds to `.grad`, [n]; `.grad` is None afterwards. Those with a full model need no rollouts."""
    for parameter in problem.parameters:
        parameter.grad = None
    estimator.backward(problem, rollouts)
    gradient = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters])
    for parameter in problem.parameters:
        parameter.grad = None
    return gradient


def bias_bound(estimates: Tensor, from_half: Tensor) -> Tensor:
    """What the bias of a fitted estimator may be, [n], from what twice as many paths change.

    A bias b n^(-p) changes by (2^p - 1) of itself from n / 2 to n paths. A smooth function of averages has p = 1, rows
    and cells that are hardly seen less; here p >= 1/2 is asked for, the rate of the estimates' own noise. The two are
    made of the same paths, so that their difference has little noise.

    Args:
        estimates: [R, n].
        from_half: [R, n], the mean of the estimates from the two halves of the same paths.

    Example:
        >>> whole = torch.tensor([[1.1]])  # the truth is 1, and the bias one over the number of paths, 10
        >>> bool(bias_bound(whole, torch.tensor([[1.2]])).abs() > 0.1)
        True
    """
    return (estimates - from_half).mean(0) / (2**0.5 - 1)


def deviations(estimates: Tensor, referee: Tensor, *, allowance: float = 0.0, bound: Tensor | None = None) -> Tensor:
    """How many standard errors the mean of `estimates` [R, n] is off along each of min(n, 8) directions.

    The directions are orthonormal: the referee's own, then random ones. Single coordinates would not do: those that
    are hardly ever sampled are far from normal.

    Args:
        estimates: [R, n], independent.
        referee: [n].
        allowance: deviations up to this share of |referee|, at least those of rounding, count as zero.
        bound: [n], likewise up to its size along the direction.
    """
    count = min(len(referee), _DIRECTIONS)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(referee), count, generator=generator, dtype=referee.dtype)
    basis[:, 0] = referee
    directions = torch.linalg.qr(basis).Q  # [n, count]
    along = (estimates - referee) @ directions  # [R, count]
    mean = along.mean(0)
    forgiven = max(allowance, _ROUNDING) * referee.norm()
    if bound is not None:
        forgiven = forgiven + (bound @ directions).abs()
    excess = mean.sign() * (mean.abs() - forgiven).clamp(min=0)
    error = along.std(0) / len(estimates) ** 0.5
    return torch.where(excess == 0, 0.0, excess / error)  # an estimator may be exact: 0 / 0


def chance(deviations: Tensor, repetitions: int) -> float:
    """Probability that an unbiased estimator deviates so much along one of these directions, or more.

    Student's t with `repetitions` - 1 degrees of freedom: the standard errors are estimated from as few batches. With
    40 of them and eight directions, 4 standard errors are exceeded once in 460 rows, and by one row or more in every
    fifth report on a hundred.

    Args:
        deviations: [m], in standard errors, as `deviations` returns them.
        repetitions: that they were estimated from.

    Example:
        >>> round(chance(torch.tensor([4.0] + 7 * [0.0]), 40), 4)
        0.0022
    """
    one = 2 * float(scipy.stats.t.sf(float(deviations.abs().max()), repetitions - 1))
    return _of_several(one, len(deviations))


def _of_several(one: float, count: float) -> float:
    """Probability that one event in `count` happens, each with probability `one` (Sidak)."""
    return 1 - (1 - one) ** count


def _relative(gradient: Tensor, referee: Tensor) -> float:
    return float((gradient - referee).norm() / referee.norm())


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
