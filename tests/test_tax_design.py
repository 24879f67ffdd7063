"""Tax design: the reduction, the discretisation and its order, the routes to the gradient, and the recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from oracles import assert_close, finite_differences, implicit_gradient, relative_error
from rebuilt import report_is_rebuilt
from scipy import stats

from align_cbrl.cli import main
from align_cbrl.errors import InputError
from align_cbrl.objectives import CVaR, KLPriced
from align_cbrl.runs.metrics import MetricsLog
from toy_cmdp import expected_policy_response, leader_value, random_cmdp
from toy_cmdp.estimators.observed_policy import ObservedPolicyResponse
from toy_cmdp.followers.exact import make_rollouts
from toy_cmdp.problems.tax_design import tax_design
from toy_cmdp.tables.line_transition import LineTransition
from toy_cmdp.tables.transition import between, expected_next, policy_system, pushed

D = torch.float64
UNEVEN = (0.1, 0.6, 0.3, 0.5)
# Exact J and dJ/d(rates) at 0.3 in the limit of fine grids (docs/tax_design.md).
LIMIT = {
    0.1: (28.735778, [-2.971116, -4.738610, -1.205989, 34.506352]),
    0.3: (35.173046, [-0.819575, -1.950992, 0.337746, 27.253436]),
}


def expected(problem):
    return torch.cat([g.reshape(-1) for g in expected_policy_response(problem)])


def by_rates(problem):
    """dJ / d(rates) of a gradient in the logits."""
    rates = problem.leader.rates.detach()
    return implicit_gradient(problem) / (rates * (1 - rates / 2))


# The problem


def test_rewards_welfare_and_savings_are_the_published_ones():
    problem = tax_design(temperature=0.2, grid=41, rates=UNEVEN, joint=True)
    leader = problem.leader
    tables, welfare = leader.tables(), leader.welfare()
    baskets = list(itertools.product(range(5), repeat=3))
    tau = UNEVEN[3]
    for context, preference in enumerate(((0.6, 0.3, 0.1), (0.1, 0.7, 0.2))):
        for state, hour, basket in ((3, 0, 7), (25, 4, 124), (40, 9, 61), (12, 2, 0)):
            s, h = leader.assets[state].item(), 0.89 * hour
            c = [1.25 * n for n in baskets[basket]]
            action = hour * len(baskets) + basket
            goods = math.prod((ci / (1 + v)) ** p for ci, v, p in zip(c, UNEVEN[:3], preference, strict=True))
            reward = (math.log(1 + s / 20) if s > 0 else s) - 0.1 * h**2 + goods
            revenue = sum(v * ci / (1 + v) for ci, v in zip(c, UNEVEN[:3], strict=True)) + tau * h
            net = sum(ci / (1 + v) for ci, v in zip(c, UNEVEN[:3], strict=True)) / 3
            social = (0 if s > 0 else s) + 15 * net / 5 + 5 * math.log(1 + revenue)
            assert tables.reward[context, state, action].item() == pytest.approx(reward, abs=1e-12)
            assert welfare[context, state, action].item() == pytest.approx(social, abs=1e-12)
            assert tables.transition.shift[action].item() == pytest.approx((1 - tau) * h - sum(c), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_130_actions_have_the_value_and_gradient_of_1250(temperature):
    reduced = tax_design(temperature=temperature, grid=21, rates=UNEVEN)
    joint = tax_design(temperature=temperature, grid=21, rates=UNEVEN, joint=True)
    assert reduced.leader.tables().reward.shape[-1] == 130
    assert joint.leader.tables().reward.shape[-1] == 1250
    assert leader_value(reduced).item() == pytest.approx(leader_value(joint).item(), rel=1e-12)
    assert_close(implicit_gradient(reduced), implicit_gradient(joint), 1e-10)


def test_mean_consumption_of_a_level_is_the_level():
    problem = tax_design(grid=21, rates=UNEVEN)
    total = problem.leader.consumed().sum(-1)
    assert torch.allclose(total, problem.leader.consumption.expand_as(total), atol=1e-12)


@pytest.mark.parametrize(("grid", "temperature"), [(21, 0.1), (21, 0.3), (201, 0.1)])
def test_routes_agree(grid, temperature):
    problem = tax_design(temperature=temperature, grid=grid, rates=UNEVEN)
    referee = implicit_gradient(problem)
    assert bool((referee != 0).all())
    assert_close(finite_differences(problem), referee, 1e-6)
    assert_close(expected(problem), referee, 1e-9)


@pytest.mark.parametrize("rates", [(0.001,) * 4, (1.999,) * 4, (1.999, 0.001, 1.0, 1.999)])
def test_extreme_rates_give_finite_gradients(rates):
    problem = tax_design(grid=21, rates=rates)
    assert bool(torch.isfinite(implicit_gradient(problem)).all())
    assert bool(torch.isfinite(leader_value(problem)))


# The discretisation


def test_value_and_gradient_converge_with_order_four():
    rows = []
    for grid in (101, 201, 401):
        problem = tax_design(temperature=0.3, grid=grid)
        rows.append(torch.cat([leader_value(problem).detach()[None], by_rates(problem)]))
    order = ((rows[1] - rows[0]) / (rows[2] - rows[1])).log2()
    assert bool((order > 3.5).all()) and bool((order < 5).all()), order.tolist()


@pytest.mark.parametrize("temperature", LIMIT)
def test_default_grid_is_close_to_the_limit(temperature):
    problem = tax_design(temperature=temperature)
    value, gradient = LIMIT[temperature]
    assert leader_value(problem).item() == pytest.approx(value, rel=3e-5)
    assert_close(by_rates(problem), torch.tensor(gradient, dtype=D), 1e-5)


@pytest.mark.parametrize("mean", [-100.0, -97.0, 3.3, 99.0, 100.0])
def test_the_law_is_the_truncated_normal(mean):
    line = LineTransition(torch.linspace(-100, 100, 801, dtype=D), torch.tensor([mean], dtype=D), 5.0)
    law = line.to_dense()[0, 400, 0]  # from zero
    truth = stats.truncnorm((-100 - mean) / 5, (100 - mean) / 5, loc=mean, scale=5)
    first = float(law @ line.positions)
    second = float(law @ line.positions**2) - first**2
    assert first == pytest.approx(truth.mean(), abs=2e-3)
    assert second == pytest.approx(truth.var(), rel=1e-3)


SHIFTS = [-20.0, -3.3, 0.1, 7.1, 30.0]


@pytest.mark.parametrize(("states", "noise"), [(21, 5.0), (201, 5.0), (81, 0.7), (2, 40.0)])
@pytest.mark.parametrize("shifts", [SHIFTS, [60.0], [-250.0, 250.0]])
def test_line_transition_is_its_dense_table(states, noise, shifts):
    generator = torch.Generator().manual_seed(0)
    shift = torch.tensor(shifts, dtype=D, requires_grad=True)
    line = LineTransition(torch.linspace(-100, 100, states, dtype=D), shift, noise)
    dense = line.to_dense()
    value = torch.randn(2, states, generator=generator, dtype=D, requires_grad=True)
    mass = torch.rand(2, states, len(shifts), generator=generator, dtype=D, requires_grad=True)
    for call, inputs in (
        (lambda law: expected_next(law, value), (shift, value)),
        (lambda law: pushed(law, mass), (shift, mass)),
    ):
        outputs = [call(law) for law in (line, dense)]
        weights = torch.randn(outputs[0].shape, generator=generator, dtype=D)
        gradients = [torch.autograd.grad((o * weights).sum(), inputs, retain_graph=True) for o in outputs]
        for ours, theirs in ((outputs[:1], outputs[1:]), gradients):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    weights = 0.9 * torch.softmax(mass.detach(), -1)
    for transpose in (False, True):
        solved = [
            policy_system(law.detach(), weights).solve(value.detach(), transpose=transpose) for law in (line, dense)
        ]
        assert torch.allclose(*solved, rtol=1e-9, atol=1e-10)
    index = [torch.randint(n, (50,), generator=generator) for n in (2, states, len(shifts), states)]
    assert torch.allclose(between(line, *index), between(dense, *index), rtol=1e-12, atol=1e-300)


def test_what_a_line_transition_keeps_has_its_graph_whoever_asks_first():
    shift = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
    line = LineTransition(torch.linspace(-20, 20, 41, dtype=D), shift, 3.0)
    value = torch.linspace(0, 1, 41, dtype=D)[None] ** 2
    with torch.no_grad():
        line.expect(value)
        assert line.probability.shape == (1, 41, 2, 41)
    (gradient,) = torch.autograd.grad(line.expect(value).sum(), shift)
    (other,) = torch.autograd.grad(expected_next(line.probability, value).sum(), shift)
    assert torch.allclose(gradient, other) and bool((gradient > 0).all())


# The observed policy


def every_state(problem, log_policy):
    """One path of each household through all states."""
    cmdp = problem.follower.cmdp
    contexts = torch.arange(cmdp.contexts)
    state = torch.cat([torch.arange(cmdp.states), torch.tensor([0])]).expand(cmdp.contexts, -1)
    action = torch.zeros_like(state[:, 1:])
    mask = torch.ones_like(action, dtype=torch.bool)
    ended = torch.zeros(cmdp.contexts, dtype=torch.bool)
    return make_rollouts(contexts, state, action, mask, ended=ended, log_policy=log_policy, log_prior=None)


def observed_gradient(problem, rollouts, position=None):
    cmdp = problem.follower.cmdp
    response = ObservedPolicyResponse(cmdp, problem.leader.assets if position is None else position)
    for parameter in problem.parameters:
        parameter.grad = None
    metrics = response.backward(problem, rollouts)
    gradient = torch.cat([p.grad.reshape(-1) for p in problem.parameters])
    for parameter in problem.parameters:
        parameter.grad = None
    return gradient, metrics


def test_a_policy_observed_everywhere_gives_the_exact_gradient():
    problem = tax_design(grid=41, rates=UNEVEN)
    _, solution = problem.follower.solve(problem.leader)
    gradient, metrics = observed_gradient(problem, every_state(problem, solution.log_policy))
    assert_close(gradient, implicit_gradient(problem), 1e-9)
    assert metrics["objective"] == pytest.approx(leader_value(problem).item(), rel=1e-10)
    off = torch.log_softmax(0.5 * solution.log_policy, -1)  # not the best response
    gradient, _ = observed_gradient(problem, every_state(problem, off))
    assert relative_error(gradient, implicit_gradient(problem)) > 0.05


def test_observed_policies_work_with_priors_that_the_leader_moves():
    problem = random_cmdp(states=5, leader_discount=0.8)
    _, solution = problem.follower.solve(problem.leader)
    rollouts = every_state(problem, solution.log_policy)
    gradient, _ = observed_gradient(problem, rollouts, position=torch.arange(5.0, dtype=D))
    assert_close(gradient, implicit_gradient(problem), 1e-9)


def test_a_policy_seen_along_sampled_paths_gives_nearly_the_exact_gradient():
    problem = tax_design(temperature=0.3, grid=81)
    problem.follower.respond(problem.leader, torch.arange(2))
    rollouts = problem.follower.rollout(torch.arange(2).repeat(25), 1, torch.Generator().manual_seed(0))
    gradient, metrics = observed_gradient(problem, rollouts)
    assert_close(gradient, implicit_gradient(problem), 0.02)
    assert {"objective_0", "objective_1"} <= set(metrics)


@pytest.mark.parametrize("wrap", [lambda o: KLPriced(o, 0.1), lambda o: CVaR(KLPriced(o, 0.1), 0.3)])
def test_other_objectives_see_the_observed_policy_too(wrap):
    base = tax_design(grid=41, temperature=0.3)
    problem = dataclasses.replace(base, objective=wrap(base.objective))
    problem.follower.respond(problem.leader, torch.arange(2))
    contexts = torch.arange(2).repeat_interleave(300)
    rollouts = problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(0))
    gradient, metrics = observed_gradient(problem, rollouts)
    assert_close(gradient, implicit_gradient(problem), 0.02)
    assert metrics["objective"] == pytest.approx(leader_value(problem).item(), rel=1e-3)


def test_a_context_that_was_not_drawn_is_left_out():
    problem = tax_design(grid=41)
    problem.follower.respond(problem.leader, torch.arange(2))
    rollouts = problem.follower.rollout(torch.zeros(20, dtype=torch.long), 1, torch.Generator().manual_seed(0))
    _, metrics = observed_gradient(problem, rollouts)
    assert "objective_1" not in metrics
    assert metrics["objective"] == metrics["objective_0"]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"grid": 200}, "grid: expected an odd number"),
        ({"grid": 1}, "grid"),
        ({"rates": (0.3, 0.3)}, "rates: expected vat_1"),
        ({"rates": (0.3, 0.3, 0.3, 2.0)}, "each in"),
        ({"rates": (math.nan, 0.3, 0.3, 0.3)}, r"rates\[0\]: expected a finite number, got nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        tax_design(**arguments)


GRID = torch.linspace(-1, 1, 5, dtype=D)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GRID[:1], torch.zeros(1, dtype=D), 1.0), "positions"),
        ((GRID**3, torch.zeros(1, dtype=D), 1.0), "equally spaced"),
        ((GRID, torch.zeros(1), 1.0), "shift"),
        ((GRID, torch.zeros(0, dtype=D), 1.0), "shift"),
        ((GRID, torch.zeros(1, dtype=D), 0.0), "noise"),
        ((GRID, torch.zeros(1, dtype=D), 1.0, -torch.ones(5, dtype=D)), "weight"),
    ],
)
def test_bad_lines_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        LineTransition(*arguments)


def test_shifts_that_are_not_finite_are_named():
    problem = tax_design(grid=21)
    with torch.no_grad():
        problem.leader.logits[3] = math.nan
    with pytest.raises(InputError, match=r"shift|reward"):
        leader_value(problem)


def test_observed_policy_response_names_what_it_lacks():
    problem = tax_design(grid=21)
    cmdp = problem.follower.cmdp
    with pytest.raises(InputError, match="position"):
        ObservedPolicyResponse(cmdp, -problem.leader.assets)
    problem.follower.respond(problem.leader, torch.arange(2))
    rollouts = problem.follower.rollout(torch.arange(2), 1, torch.Generator().manual_seed(0))
    response = ObservedPolicyResponse(cmdp, problem.leader.assets)
    bare = dataclasses.replace(rollouts, steps={k: v for k, v in rollouts.steps.items() if k != "log_policy_all"})
    with pytest.raises(InputError, match="log_policy_all"):
        response.backward(problem, bare)


# The recipe


def run_recipe(folder, *settings):
    assert main(["run", "tax_design", "--out", str(folder), "--resume", "--set", "grid=21", *settings]) == 0
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("follower", ["exact", "sampled", "neural"], ids=lambda name: f"{name}_follower")
def test_recipe_runs_and_a_resumed_run_is_the_same(tmp_path, follower):
    settings = [f"follower={follower}", "paths=8", "updates=2", "first_updates=3", "optimizer=adam"]
    for steps in (2, 4):
        resumed = run_recipe(tmp_path / "resumed", *settings, f"steps={steps}")
    whole = run_recipe(tmp_path / "whole", *settings, "steps=4")
    bare = [[{k: v for k, v in row.items() if "seconds" not in k} for row in run["rows"]] for run in (resumed, whole)]
    assert bare[0] == bare[1]
    assert [row["follower"] for row in whole["rows"]] == ([follower] if follower == "exact" else [follower, "exact"])
    if follower != "neural":  # a network of three updates knows nothing yet
        assert whole["rows"][0]["value"] > whole["rows"][0]["start"]
    for name in ("progress.png", "behaviour.png", "report.html"):
        assert (tmp_path / "whole" / name).stat().st_size > 10_000
    assert report_is_rebuilt(tmp_path / "whole")
    log = MetricsLog.read(tmp_path / "whole" / "seed-0" / "metrics.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert {"vat_1", "tau", "objective_0"} <= set(log[0])


def test_recipe_starts_where_the_seed_says(tmp_path):
    summary = run_recipe(tmp_path / "run", "steps=1", "spread=0.5", "seeds=2", "tail=1")
    taus = [run["tau"] for run in summary["runs"]]
    assert taus[0] != taus[1]
    assert summary["rows"][0]["tau_se"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "tau"), [(0.1, 0.637), (0.3, 0.601)])
def test_published_settings_reach_the_optimum(tmp_path, temperature, tau):
    assert main(["run", "tax_design", "--out", str(tmp_path / "run"), "--set", f"temperature={temperature}"]) == 0
    (row,) = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert row["tau"] == pytest.approx(tau, abs=0.03)
    assert row["seconds_per_step"] < 0.3
