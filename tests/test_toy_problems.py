"""Every problem of the laboratory: all gradient routes agree for every objective, known optima are reached."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from oracles import (
    assert_close,
    assert_unbiased,
    enumerated_gradient,
    finite_differences,
    implicit_gradient,
)

from align_cbrl.errors import InputError
from align_cbrl.estimators.policy_response import PolicyResponse
from align_cbrl.objectives import (
    Constrained,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    KLPriced,
    MeanVariance,
    PreferenceLikelihood,
    WorstContext,
)
from align_cbrl.problem import Objective, Problem
from toy_cmdp.followers.exact import ExactFollower
from toy_cmdp.problems.free_rewards import free_rewards
from toy_cmdp.problems.gridworld import gridworld
from toy_cmdp.problems.mechanism import mechanism
from toy_cmdp.problems.meta_rl import average_response, meta_rl
from toy_cmdp.problems.preferences import preferences
from toy_cmdp.problems.principal_agent import principal_agent
from toy_cmdp.problems.random_cmdp import random_cmdp
from toy_cmdp.problems.stackelberg_game import stackelberg_game
from toy_cmdp.problems.tax_design import tax_design
from toy_cmdp.referee.closed_forms import (
    logit_price,
    optimal_bonus,
    optimal_prices,
    threshold_rewards,
    wright_omega,
)
from toy_cmdp.referee.exact import ExactCritic, expected_policy_response, leader_value
from toy_cmdp.tables.cmdp import Tables, TabularUtility
from toy_cmdp.validate import spread_four_rooms


def per_context(*values):
    return torch.tensor(values, dtype=torch.float64)


# Builders of small instances. Those with tensors have a follower of its own in each context: temperature, patience and
# reward all differ.
PROBLEMS = {
    "principal_agent": lambda: principal_agent(temperature=0.1),
    "principal_agent_periods": lambda: principal_agent(
        outcome_law=((0.6, 0.3, 0.1), (0.3, 0.4, 0.3), (0.1, 0.3, 0.6)),
        output=(0.0, 1.0, 2.0),
        costs=((0.0, 0.1, 0.3), (0.0, 0.2, 0.7)),
        periods=2,
        temperature=per_context(0.1, 0.3),
        discount=per_context(0.5, 0.9),
    ),
    "principal_agent_capped": lambda: principal_agent(max_payment=0.8, type_probabilities=(0.3, 0.7)),
    "free_rewards": lambda: free_rewards(contexts=2, actions=4),
    "mechanism": lambda: mechanism(welfare_weight=0.3),
    "mechanism_patient": lambda: mechanism(
        inventory=3,
        max_quantity=2,
        satiation=0.8,
        temperature=per_context(0.1, 0.3),
        discount=per_context(0.0, 0.9),
    ),
    "meta_rl": lambda: meta_rl(length=5, goals=(0, 1, 4), task_probabilities=(0.2, 0.3, 0.5)),
    "meta_rl_tasks_differ": lambda: meta_rl(
        length=5, goals=(0, 4), temperature=per_context(0.1, 0.5), discount=per_context(0.95, 0.5)
    ),
    "preferences": lambda: preferences(prompts=3, responses=4),
    "preferences_tempers": lambda: preferences(prompts=3, responses=4, temperature=per_context(0.2, 0.5, 2.0)),
    "stackelberg_game": lambda: stackelberg_game(states=3),
    "stackelberg_game_types": lambda: stackelberg_game(
        states=3, temperature=per_context(0.1, 0.4), discount=per_context(0.0, 0.95), leader_discount=0.8
    ),
    "four_rooms": lambda: spread_four_rooms(temperature=0.005, price=3.0),
    "random_cmdp": lambda: random_cmdp(seed=5),
    "gridworld": lambda: gridworld(3, 3, walls=0.0),
    "tax_design": lambda: tax_design(temperature=0.3, grid=5, rates=(0.3, 0.5, 0.2, 0.4)),
}


def cost(leader):
    """Some cost table: the square of the follower's reward, which moves with x wherever the reward does."""
    return leader.tables().reward.square()


OBJECTIVES = {
    "expected": lambda objective: objective,
    "kl_priced": lambda objective: KLPriced(objective, 0.3),
    "mean_variance": lambda objective: MeanVariance(objective, 0.7),
    "cvar": lambda objective: CVaR(objective, 0.6),
    "entropic": lambda objective: EntropicRisk(objective, 1.5),
    "worst": lambda objective: WorstContext(objective),
    "soft_worst": lambda objective: WorstContext(objective, 0.1),
    "constrained": lambda objective: Constrained(
        objective,
        cost=ExpectedUtility(TabularUtility(cost), discount=objective.discount, depends_on_leader=True),
        bound=0.1,
        rate=1.0,
        multiplier=0.4,
    ),
    "nested": lambda objective: EntropicRisk(KLPriced(objective, 0.2), 1.0),
}


def given(problem: Problem, objective: Objective) -> Problem:
    return Problem(problem.leader, objective, problem.follower)


def expected(problem):
    return torch.cat([g.reshape(-1) for g in expected_policy_response(problem)])


def directional_differences(problem, directions, step=1e-5):
    """Central differences of J along directions [n, D] of the only parameter: as many values of J as directions."""
    (parameter,) = problem.parameters
    start = parameter.detach().clone()
    slopes = []
    with torch.no_grad():
        for direction in directions.T:
            values = []
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction.view_as(start))
                values.append(leader_value(problem))
            slopes.append((values[0] - values[1]) / (2 * step))
        parameter.copy_(start)
    return torch.stack(slopes)


def assert_routes_agree(problem):
    referee = implicit_gradient(problem)
    assert referee.norm() > 0
    if len(referee) <= 30:
        assert_close(finite_differences(problem), referee, 1e-6)
    else:
        directions = torch.randn(len(referee), 5, generator=torch.Generator().manual_seed(0), dtype=referee.dtype)
        assert_close(directional_differences(problem, directions), referee @ directions, 1e-6)
    assert_close(expected(problem), referee, 1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_routes_agree(name, objective):
    problem = PROBLEMS[name]()
    assert_routes_agree(given(problem, OBJECTIVES[objective](problem.objective)))


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("name", ["preferences", "preferences_tempers", "free_rewards"])
def test_routes_agree_on_preferences(name, scale):
    problem = PROBLEMS[name]()
    assert_routes_agree(given(problem, PreferenceLikelihood(problem.objective.utility_function, scale)))


def test_contexts_are_followers_of_their_own():
    """Two agents that differ in temperature, patience and reward, together and one by one."""
    temperature, discount, costs = (0.1, 0.4), (0.3, 0.9), ((0.0, 0.1), (0.0, 0.4))
    together = principal_agent(
        costs=costs, periods=2, temperature=per_context(*temperature), discount=per_context(*discount)
    )
    values, gradients = [], []
    for t, d, c in zip(temperature, discount, costs, strict=True):
        alone = principal_agent(costs=(c,), periods=2, temperature=t, discount=d)
        values.append(leader_value(alone).item())
        gradients.append(implicit_gradient(alone))
    assert leader_value(together).item() == pytest.approx(sum(values) / 2, abs=1e-14)
    assert_close(implicit_gradient(together), (gradients[0] + gradients[1]) / 2, 1e-12)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


HORIZONS = {
    "principal_agent": 1,
    "principal_agent_periods": 2,
    "mechanism": 4,
    "mechanism_patient": 4,
    "preferences_tempers": 1,
    "free_rewards": 1,
}


@pytest.mark.parametrize("objective", ["expected", "kl_priced", "entropic", "constrained"])
@pytest.mark.parametrize("name", HORIZONS)
def test_the_estimator_on_all_paths(name, objective):
    problem = PROBLEMS[name]()
    problem = given(problem, OBJECTIVES[objective](problem.objective))
    gradient = enumerated_gradient(problem, HORIZONS[name], PolicyResponse(ExactCritic()))
    assert_close(gradient, implicit_gradient(problem), 1e-9)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in ("four_rooms", "random_cmdp")])
def test_sampled_gradients_are_unbiased(name):
    assert_unbiased(PROBLEMS[name](), PolicyResponse(ExactCritic()), repetitions=20, paths=256)


@pytest.mark.parametrize("name", PROBLEMS)
def test_constant_tables_are_the_same_tensors_and_laws_are_right(name):
    problem = PROBLEMS[name]()
    first, again = problem.leader.tables(), problem.leader.tables()
    moved = {n for n in ("reward", "transition", "initial", "log_prior") if getattr(first, n) is not None}
    constant = {n for n in moved if not getattr(first, n).requires_grad}
    assert moved - constant, "nothing moves"
    for n in constant:
        assert getattr(first, n) is getattr(again, n), n
    problem.follower.cmdp.check(first)


BUILDERS = (principal_agent, free_rewards, mechanism, meta_rl, preferences, stackelberg_game)


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_seeds(builder):
    x = [torch.cat([p.detach().flatten() for p in builder(seed=seed).parameters]) for seed in (0, 0, 1)]
    assert x[0].equal(x[1])
    assert not x[0].equal(x[2])


def climb(problem, iterations=100):
    """Ascend the exact J with L-BFGS: a few dozen evaluations where Adam needs hundreds."""
    optimizer = torch.optim.LBFGS(
        problem.parameters,
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        value = -leader_value(problem)
        value.backward()
        return value

    optimizer.step(loss)
    return leader_value(problem).item()


def continued(build, temperatures):
    """Optima along falling temperatures, each started at the last: a cold follower's landscape is flat elsewhere."""
    weights = None
    for temperature in temperatures:
        problem = build(temperature)
        if weights is not None:
            with torch.no_grad():
                problem.parameters[0].copy_(weights)
        value = climb(problem)
        weights = problem.parameters[0].detach().clone()
        yield temperature, problem, value


# Principal and agent


def test_the_contract_is_the_textbook_one_as_the_temperature_falls():
    low, high, effort = 0.2, 0.8, 0.15
    limit, best = optimal_bonus((low, high), effort)
    assert (limit, best) == (pytest.approx(0.25), pytest.approx(0.6))
    errors = []
    for temperature, problem, profit in continued(
        lambda t: principal_agent(costs=((0.0, effort),), temperature=t), (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    ):
        failure, success = problem.leader.payments()[0].tolist()
        bonus, closed = optimal_bonus((low, high), effort, temperature=temperature)
        assert success - failure == pytest.approx(bonus, abs=1e-4)
        assert failure < 1e-3  # nothing is paid for a failure: softplus comes as near to zero as it is driven
        assert profit == pytest.approx(closed, abs=1e-3)
        assert profit <= closed
        first_order = temperature / 0.6 * (math.log(1 / temperature) + math.log(0.36 * 0.75 / 0.8))
        errors.append((bonus - limit - first_order) / temperature)
    assert all(abs(later) < abs(sooner) for sooner, later in itertools.pairwise(errors))
    assert abs(errors[-1]) < 0.03  # the remainder is o(lambda)
    assert bonus - limit < 0.01 and best - profit < 0.01


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.2, 1.0])
@pytest.mark.parametrize(
    ("low", "high", "effort"), [(0.2, 0.8, 0.15), (0.0, 0.7, 0.1), (0.05, 0.5, 0.3), (0.4, 0.6, 0.0)]
)
def test_the_bonus_beats_a_grid(low, high, effort, temperature):
    bonus, profit = optimal_bonus((low, high), effort, temperature=temperature)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    profits = (low + (high - low) * torch.sigmoid((grid * (high - low) - effort) / temperature)) * (1 - grid)
    assert profit == pytest.approx(profits.max().item(), abs=1e-8)
    assert bonus == pytest.approx(grid[profits.argmax()].item(), abs=1e-3)
    problem = principal_agent(outcome_law=((1 - low, low), (1 - high, high)), costs=((0.0, effort),))
    problem = Problem(
        problem.leader, problem.objective, ExactFollower(problem.follower.cmdp, temperature, 0.0, horizon=1)
    )
    with torch.no_grad():
        problem.leader.weights.copy_(torch.tensor([[-50.0, math.log(math.expm1(bonus)) if bonus > 0 else -50.0]]))
    assert leader_value(problem).item() == pytest.approx(profit, abs=1e-9)


def test_without_luck_the_bonus_is_lamberts():
    high, effort, temperature = 0.7, 0.1, 0.05
    bonus, _ = optimal_bonus((0.0, high), effort, temperature=temperature)
    assert bonus == pytest.approx(
        1 - temperature / high * (1 + wright_omega((high - effort) / temperature - 1)), abs=1e-9
    )


def test_two_periods_pay_for_the_history():
    """Where the future is worth most, a success is rewarded by the right to the next period's rent."""
    low, high, effort, patience = 0.3, 0.8, 0.25, 0.9
    law = ((1 - low, low), (1 - high, high))
    *_, (_, problem, profit) = continued(
        lambda t: principal_agent(
            outcome_law=law,
            costs=((0.0, effort),),
            periods=2,
            temperature=t,
            discount=patience,
            leader_discount=patience,
        ),
        (0.1, 0.05, 0.02),
    )
    once = optimal_bonus((low, high), effort, temperature=0.02)[1]
    assert profit > (1 + patience) * once + 1e-3
    after_failure, after_success = (problem.leader.payments()[k] for k in (1, 2))
    assert after_success[1] - after_success[0] > after_failure[1] - after_failure[0] + 1e-2


# Free rewards


@pytest.mark.parametrize("seed", range(5))
def test_a_bounded_leader_ends_at_thresholds(seed):
    temperature, bounds = 0.4, (-0.5, 1.0)
    problem = free_rewards(contexts=3, actions=7, bounds=bounds, temperature=temperature, seed=seed)
    utility = problem.leader.utility
    rewards, values = threshold_rewards(utility, bounds, temperature)
    optimizer = torch.optim.SGD(problem.parameters, lr=500.0, maximize=True)
    for _ in range(60):
        optimizer.zero_grad()
        leader_value(problem).backward()
        optimizer.step()
        problem.leader.project()
    assert problem.leader.rewards.detach().equal(rewards)  # to the last bit: bounds are reached
    assert leader_value(problem).item() == pytest.approx(values.mean().item(), abs=1e-12)
    low, high = bounds
    assert rewards.equal(torch.where(utility > values[:, None], high, low).double())  # the threshold is the value


def test_thresholds_beat_all_other_extremes():
    utility = torch.randn(1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    corners = torch.tensor([[b >> k & 1 for k in range(6)] for b in range(64)], dtype=torch.float64)
    values = (torch.softmax(corners / 0.3, -1) * utility).sum(-1)
    assert threshold_rewards(utility, (0.0, 1.0), 0.3)[1].item() == pytest.approx(values.max().item(), abs=1e-14)


# Posted prices


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_one_unit_one_period_has_the_logit_price(temperature):
    problem = mechanism(valuations=(0.9,), inventory=1, horizon=1, temperature=temperature)
    value = climb(problem)
    price = logit_price(0.9, temperature)
    assert problem.leader.prices().item() == pytest.approx(price, abs=1e-5)
    assert value == pytest.approx(price - temperature, abs=1e-9)  # lambda W
    accepted = 1 / (1 + math.exp((price - 0.9) / temperature))
    assert price == pytest.approx(temperature / (1 - accepted), abs=1e-9)  # p - 1 / slope of log demand = 0


def test_ascent_finds_the_dynamic_program_and_its_monotone_prices():
    inventory, horizon = 3, 4
    problem = mechanism(valuations=(1.0,), inventory=inventory, horizon=horizon)
    value = climb(problem)
    prices, revenue = optimal_prices(1.0, inventory, horizon, 0.2, 0.95)
    assert value == pytest.approx(revenue[-1, 0].item(), abs=1e-9)
    # Prices of inventories that cannot be left over so early are never posted.
    reachable = torch.tensor([[inventory - n <= t for t in range(horizon)] for n in range(1, inventory + 1)])
    assert torch.allclose(problem.leader.prices().detach()[reachable], prices[reachable], atol=1e-4)
    assert bool((prices.diff(dim=0) <= 1e-12).all()) and bool((prices.diff(dim=1) <= 1e-12).all())


def test_welfare_wants_lower_prices_than_revenue():
    prices = []
    for weight in (0.0, 0.5):
        problem = mechanism(valuations=(1.0,), inventory=1, horizon=1, welfare_weight=weight)
        climb(problem)
        prices.append(problem.leader.prices().item())
    assert prices[1] < prices[0] - 0.1


def test_orders_are_filled_from_stock_and_the_empty_shop_closes():
    problem = mechanism(valuations=(1.0,), inventory=2, horizon=2, max_quantity=3, satiation=0.5)
    tables, leader = problem.leader.tables(), problem.leader
    assert leader.sold[:4].tolist() == [[0, 1, 1, 1]] * 2 + [[0, 1, 2, 2]] * 2
    assert leader.value[0, 2].tolist() == [0, 1, 1.5, 1.5]  # the first two units
    assert leader.value[0, 0].tolist() == [0, 0.5, 0.5, 0.5]  # the second only
    following = tables.transition[0].argmax(-1)
    assert following[2].tolist() == [3, 1, 4, 4]  # two units in period 0; 4 is the empty shop
    assert problem.follower.cmdp.terminal[0].tolist() == [False, True, False, True, True]
    assert problem.follower.solve(leader)[1].value[0, 4].abs() < 1e-12  # under a uniform prior it is worth nothing


# Meta-RL


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8])
def test_the_best_prior_of_two_tasks_is_that_of_rational_inattention(share):
    temperature = 0.5
    problem = meta_rl(
        length=3, goals=(0, 2), task_probabilities=(share, 1 - share), slip=0.0, price=temperature,
        temperature=temperature, discount=0.0, leader_discount=0.0,
    )  # fmt: skip
    climb(problem)
    odds = math.exp(1 / temperature)
    prior = torch.softmax(problem.leader.weights.detach(), -1)
    assert prior[1, 0].item() == pytest.approx((share * odds - (1 - share)) / (odds - 1), abs=1e-6)
    assert torch.allclose(average_response(problem)[1], prior[1], atol=1e-6)


def test_the_best_prior_is_the_average_response():
    problem, alternating = (meta_rl(price=0.2, discount=0.8, leader_discount=0.8) for _ in range(2))
    value = climb(problem)
    average = average_response(problem)
    assert torch.allclose(average, torch.softmax(problem.leader.weights.detach(), -1), atol=2e-3)
    values = [leader_value(alternating).item()]
    for _ in range(60):
        with torch.no_grad():
            alternating.leader.weights.copy_(average_response(alternating).log())
        values.append(leader_value(alternating).item())
    assert all(later >= sooner - 1e-12 for sooner, later in itertools.pairwise(values))
    assert values[0] < values[-1] - 0.01 and values[-1] <= value < values[-1] + 5e-4  # it converges slowly


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_best_prior_for_the_return_alone_is_a_grids(share):
    def build():
        return meta_rl(
            length=3, goals=(0, 2), task_probabilities=(share, 1 - share), temperature=0.5, discount=0.0,
            leader_discount=0.0,
        )  # fmt: skip

    problem, probe = build(), build()
    value = climb(problem)
    found = []
    with torch.no_grad():
        for logit in torch.linspace(-6, 6, 121):
            probe.leader.weights[1] = torch.tensor([logit, 0.0])
            found.append(leader_value(probe).item())
    assert value == pytest.approx(max(found), abs=1e-3)
    assert value >= max(found) - 1e-9


# Preferences


def test_at_fixed_sampling_the_likelihood_finds_the_truth_and_on_policy_it_does_not():
    scale = 0.5
    problem = preferences(prompts=5, misspecification=0.0)
    likelihood = PreferenceLikelihood(problem.objective.utility_function, scale)
    truth = problem.leader.truth / scale  # r_x explains preferences of log-odds (score - score') / scale
    leader, follower = problem.leader, problem.follower
    with torch.no_grad():
        _, solution = follower.solve(leader)
        law = solution.log_policy.exp()[:, 0]  # [C, A], now held fixed
    score = leader.score[:, 0]

    def at_fixed_sampling():
        reward = leader.features @ leader.x
        pairs = likelihood.pair(reward[:, :, None] - reward[:, None], score[:, :, None] - score[:, None])
        return (law[:, :, None] * law[:, None] * pairs).sum((1, 2)).mean()

    optimizer = torch.optim.LBFGS(
        leader.parameters(), max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -at_fixed_sampling()
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.allclose(leader.x.detach(), truth, atol=1e-4)
    on_policy = given(problem, likelihood)
    assert (
        implicit_gradient(on_policy).norm() > 0.01
    )  # the pairs that are drawn respond: the truth is no stationary point


def test_a_kl_price_makes_the_best_reward_model_a_multiple_of_the_truth():
    price = 0.25
    problem = preferences(misspecification=0.0, objective=lambda score: KLPriced(ExpectedUtility(score), price))
    climb(problem)
    # E[score] - kappa KL is largest at prior * exp(score / kappa), which r_x = (lambda / kappa) score brings about.
    assert torch.allclose(problem.leader.x.detach(), 0.5 / price * problem.leader.truth, atol=1e-5)


# Stackelberg games


def test_a_cold_follower_makes_the_commitment_value_of_a_matrix_game():
    """The leader's second row is dominated, yet committing to it half of the time is worth 3.5 instead of 2."""
    leader_payoff = torch.tensor([[2.0, 1.0], [4.0, 3.0]])[None, None]  # [follower's column, leader's row]
    follower_payoff = torch.eye(2)[None, None]

    def build(temperature):
        return stackelberg_game(
            contexts=1, states=1, actions=2, leader_actions=2, successors=1, follower_payoff=follower_payoff,
            leader_payoff=leader_payoff, temperature=temperature, discount=0.0, leader_discount=0.0,
        )  # fmt: skip

    shortfalls = []
    found = list(continued(build, (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)))
    for temperature, _, value in found:
        up = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        right = torch.sigmoid((1 - 2 * up) / temperature)
        grid = ((1 - right) * (2 * up + (1 - up)) + right * (4 * up + 3 * (1 - up))).max().item()
        assert value == pytest.approx(grid, abs=1e-8)
        shortfalls.append((3.5 - value) / (temperature * math.log(1 / temperature)))
    assert 3.5 - value < 0.04 and all(b < a for a, b in itertools.pairwise(shortfalls))
    coldest = found[-1][1]
    assert coldest.leader.policy()[0, 0].item() == pytest.approx(0.5, abs=0.05)


def test_impossible_moves_stay_impossible():
    problem = stackelberg_game(states=6, successors=1, leader_actions=2)
    possible = problem.leader.moves.sum(2) > 0
    law = problem.leader.tables().transition[0]
    assert bool((law[~possible] == 0).all()) and not possible.all()
    law[0, 0][possible[0, 0]].log().sum().backward()
    assert torch.isfinite(problem.leader.weights.grad).all()


def test_histories_are_the_states():
    problem = principal_agent(periods=3)
    tables, cmdp = problem.leader.tables(), problem.follower.cmdp
    assert isinstance(tables, Tables)
    assert cmdp.terminal[0].tolist() == [False] * 3 + [True] * 4
    assert tables.transition[0, 0, 1].nonzero()[:, 0].tolist() == [1, 2]
    assert tables.transition[0, 2, 1].nonzero()[:, 0].tolist() == [5, 6]
    assert tables.transition[0, 2, 1, 5:].tolist() == pytest.approx([0.2, 0.8])


# Bad input

NAN = float("nan")


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (principal_agent, {"periods": 0}, "periods: expected a whole number >= 1, got 0"),
        (principal_agent, {"periods": 1.5}, "periods: expected a whole number >= 1, got 1.5"),
        (principal_agent, {"costs": ((0.0, NAN),)}, r"costs: expected finite numbers, got nan at \[0, 1\]"),
        (principal_agent, {"costs": ((0.0, -0.1),)}, "costs: expected numbers >= 0, got -0.1"),
        (principal_agent, {"costs": (0.0, 0.1)}, r"costs: expected shape \[C, A\], got \[2\]"),
        (principal_agent, {"costs": ((0.0,),)}, r"costs: expected two or more efforts \(columns\), got 1"),
        (principal_agent, {"costs": "free"}, r"costs: expected numbers of shape \[C, A\], got 'free'"),
        (principal_agent, {"output": (1.0,)}, "output: expected two or more outcomes, got 1"),
        (principal_agent, {"outcome_law": ((0.5, 0.5),)}, r"outcome_law: expected shape \[2, 2\], got \[1, 2\]"),
        (principal_agent, {"outcome_law": ((0.5, 0.5), (0.5, 0.6))}, r"outcome_law: .*one, got 1.1 in row \[1\]"),
        (principal_agent, {"outcome_law": ((1.5, -0.5), (0.5, 0.5))}, r"outcome_law: .*got -0.5 at \[0, 1\]"),
        (principal_agent, {"type_probabilities": (0.5, 0.6)}, "type_probabilities: .*sum to one, got 1.1"),
        (principal_agent, {"type_probabilities": (1.0,)}, r"type_probabilities: expected shape \[2\], got \[1\]"),
        (principal_agent, {"max_payment": -1.0}, "max_payment: expected a finite number > 0, got -1.0"),
        (principal_agent, {"max_payment": 0.0}, "max_payment: expected a finite number > 0, got 0.0"),
        (principal_agent, {"temperature": 0.0}, "temperature: expected a positive"),
        (principal_agent, {"temperature": torch.ones(3)}, "temperature: "),
        (principal_agent, {"discount": 1.0}, "discount: expected a discount"),
        (principal_agent, {"leader_discount": NAN}, "leader_discount: expected a finite number >= 0 and < 1, got nan"),
        (free_rewards, {"contexts": 0}, "contexts: expected a whole number"),
        (free_rewards, {"bounds": (1.0, 0.0)}, r"bounds: expected \(lowest, highest\) reward in that order"),
        (free_rewards, {"bounds": (0.0, NAN)}, r"bounds\[1\]: expected a finite number, got nan"),
        (free_rewards, {"utility": ((0.0, float("inf")),)}, "utility: expected finite numbers, got inf"),
        (free_rewards, {"utility": (0.0, 1.0)}, r"utility: expected shape \[C, A\], got \[2\]"),
        (free_rewards, {"temperature": -1.0}, "temperature: expected a positive"),
        (mechanism, {"inventory": 0}, "inventory: expected a whole number"),
        (mechanism, {"horizon": -1}, "horizon: expected a whole number"),
        (mechanism, {"max_quantity": True}, "max_quantity: expected a whole number"),
        (mechanism, {"valuations": ()}, r"valuations: expected shape \[C\], got \[0\]"),
        (mechanism, {"valuations": (NAN, 1.0)}, "valuations: expected finite numbers, got nan"),
        (mechanism, {"satiation": 1.5}, "satiation: expected a finite number > 0 and <= 1, got 1.5"),
        (mechanism, {"welfare_weight": -0.1}, "welfare_weight: expected a finite number >= 0 and <= 1, got -0.1"),
        (mechanism, {"welfare_weight": NAN}, "welfare_weight: expected a finite number >= 0 and <= 1, got nan"),
        (mechanism, {"type_probabilities": (0.2, 0.2)}, "type_probabilities: .*sum to one, got 0.4"),
        (mechanism, {"discount": 1.0}, "discount: expected a discount"),
        (meta_rl, {"length": 1}, "length: expected at least 2 cells, got 1"),
        (meta_rl, {"goals": ()}, r"goals: expected cells in \[0, 7\), one or more, got \[\]"),
        (meta_rl, {"goals": (0, 7)}, r"goals: expected cells in \[0, 7\), one or more, got \[0, 7\]"),
        (meta_rl, {"goals": (0, 3)}, r"goals: expected cells other than the start, 3, got \[0, 3\]"),
        (meta_rl, {"slip": 1.1}, "slip: expected a finite number >= 0 and <= 1, got 1.1"),
        (meta_rl, {"price": -1.0}, "price: expected a finite number >= 0, got -1.0"),
        (meta_rl, {"price": NAN}, "price: expected a finite number >= 0, got nan"),
        (meta_rl, {"task_probabilities": (0.5, 0.5)}, r"task_probabilities: expected shape \[3\], got \[2\]"),
        (meta_rl, {"temperature": NAN}, "temperature: expected a finite number"),
        (preferences, {"responses": 0}, "responses: expected a whole number"),
        (preferences, {"misspecification": -1.0}, "misspecification: expected a finite number >= 0, got -1.0"),
        (preferences, {"misspecification": NAN}, "misspecification: expected a finite number >= 0, got nan"),
        (preferences, {"temperature": 0.0}, "temperature: expected a positive"),
        (stackelberg_game, {"leader_actions": 0}, "leader_actions: expected a whole number"),
        (stackelberg_game, {"successors": 5}, "successors: expected at most states = 4, got 5"),
        (stackelberg_game, {"follower_payoff": torch.zeros(2, 4)}, r"follower_payoff: expected shape \[2, 4, 3, 3\]"),
        (stackelberg_game, {"leader_payoff": torch.full((2, 4, 3, 3), NAN)}, "leader_payoff: expected finite numbers"),
        (stackelberg_game, {"discount": -0.1}, "discount: expected a discount"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(builder, arguments, message):
    with pytest.raises(InputError, match=message):
        builder(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_bonus((0.8, 0.2), 0.1), "success: expected probabilities 0 <= p < P <= 1"),
        (lambda: optimal_bonus((0.2, 0.8), -0.1), "cost: expected a finite number >= 0, got -0.1"),
        (
            lambda: optimal_bonus((0.2, 0.8), 0.1, temperature=NAN),
            "temperature: expected a finite number >= 0, got nan",
        ),
        (lambda: optimal_bonus((0.2, 0.8), 0.1, output=NAN), "output: expected a finite number >= 0, got nan"),
        (lambda: threshold_rewards([[0.0]], (1.0, 0.0), 0.5), "bounds: expected"),
        (lambda: threshold_rewards([[0.0]], (0.0, 1.0), 0.0), "temperature: expected a positive"),
        (lambda: logit_price(1.0, 0.0), "temperature: expected a finite number > 0, got 0.0"),
        (lambda: optimal_prices(1.0, 0, 1, 0.2, 0.9), "inventory: expected a whole number"),
        (
            lambda: optimal_prices(1.0, 1, 1, 0.2, 1.0),
            "leader_discount: expected a finite number >= 0 and < 1, got 1.0",
        ),
        (lambda: average_response(principal_agent()), "leader: expected one that moves the prior"),
        (
            lambda: average_response(types.SimpleNamespace(leader=meta_rl().leader, follower=None)),
            "follower: expected an ExactFollower, got NoneType",
        ),
    ],
)
def test_bad_arguments_of_closed_forms(call, message):
    with pytest.raises(InputError, match=message):
        call()
