"""Objectives: closed forms, gradients of what is aggregated, samples against the exact route, and bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracles import assert_close, enumerated_gradient, finite_differences, implicit_gradient

from align_cbrl import (
    HPGD,
    Constrained,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    GroupCritic,
    HPGDConfig,
    InputError,
    KLPriced,
    Leader,
    MeanVariance,
    PolicyResponse,
    PreferenceLikelihood,
    Problem,
    Rollouts,
    WorstContext,
)
from toy_cmdp import (
    ContextualMDP,
    ExactCritic,
    ExactFollower,
    ImplicitHypergradient,
    Tables,
    TabularLeader,
    TabularUtility,
    expected_policy_response,
    leader_value,
    random_cmdp,
)
from toy_cmdp.referee.exact import context_values
from toy_cmdp.validate import deviations, sample_gradients

BARE = ExpectedUtility(lambda leader, rollouts: rollouts.steps["u"])
RISKS = [
    MeanVariance(BARE, 0.7),
    CVaR(BARE, 0.4),
    EntropicRisk(BARE, 2.0),
    WorstContext(BARE),
    WorstContext(BARE, 0.3),
]


def on(objective, base):
    """The same risk over another objective."""
    return dataclasses.replace(objective, objective=base)


@pytest.mark.parametrize("objective", RISKS)
def test_risk_of_a_sure_thing_is_the_thing(objective):
    values = torch.full((3,), 1.7, dtype=torch.float64)
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert objective.aggregate(values, probabilities).item() == pytest.approx(1.7, abs=1e-12)


@pytest.mark.parametrize("objective", RISKS)
def test_risk_is_at_most_the_mean_and_its_slope_is_right(objective):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        values = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
        probabilities = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
        if not (isinstance(objective, WorstContext) and objective.temperature > 0):
            assert objective.aggregate(values, probabilities) <= (probabilities * values).sum()
        assert torch.autograd.gradcheck(lambda v, p=probabilities: objective.aggregate(v, p), values)


def test_cvar_is_the_rockafellar_uryasev_maximum():
    generator = torch.Generator().manual_seed(1)
    for share in (0.1, 0.35, 0.8, 1.0):
        values = torch.randn(9, generator=generator, dtype=torch.float64)
        probabilities = torch.softmax(torch.randn(9, generator=generator, dtype=torch.float64), 0)
        best = max((q - ((q - values).clamp(min=0) * probabilities).sum() / share).item() for q in values)
        assert CVaR(BARE, share).aggregate(values, probabilities).item() == pytest.approx(best, abs=1e-12)


def test_limits_of_risk():
    values, probabilities = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    mean = (probabilities * values).sum().item()
    assert EntropicRisk(BARE, 1e-6).aggregate(values, probabilities).item() == pytest.approx(mean, abs=1e-5)
    assert EntropicRisk(BARE, 1e3).aggregate(values, probabilities).item() == pytest.approx(1.0, abs=0.01)
    assert CVaR(BARE, 1.0).aggregate(values, probabilities).item() == pytest.approx(mean)
    assert CVaR(BARE, 0.1).aggregate(values, probabilities).item() == pytest.approx(1.0)
    assert WorstContext(BARE, 1e-3).aggregate(values, probabilities).item() == pytest.approx(1.0, abs=0.01)
    assert WorstContext(BARE).aggregate(values, torch.tensor([0.5, 0.0, 0.5])).item() == 2.0


@pytest.mark.parametrize("objective", RISKS)
def test_a_batch_weighs_contexts_by_their_share(objective):
    u = torch.tensor([[1.0], [3.0], [4.0], [4.0], [-1.0]], dtype=torch.float64)
    rollouts = Rollouts.bandit(contexts=torch.tensor([7, 7, 2, 2, 5]), steps={"u": u})
    values, shares = torch.tensor([2.0, 4.0, -1.0]).double().requires_grad_(), torch.tensor([0.4, 0.4, 0.2]).double()
    value = objective.aggregate(values, shares)
    (slope,) = torch.autograd.grad(value, values)
    evaluation = objective.evaluate(None, rollouts)
    assert evaluation.value.item() == pytest.approx(value.item())
    importance = (slope / shares)[[0, 0, 1, 1, 2]]
    assert torch.allclose(evaluation.credit, importance[:, None] * u)


@pytest.mark.parametrize("objective", RISKS)
def test_exact_routes_agree_and_samples_follow(objective):
    base = random_cmdp(seed=4, contexts=3, states=3, horizon=3)
    problem = Problem(base.leader, on(objective, base.objective), base.follower)
    referee = implicit_gradient(problem)
    assert_close(finite_differences(problem), referee, 1e-6)
    assert_close(torch.cat([g.reshape(-1) for g in expected_policy_response(problem)]), referee, 1e-9)
    # On all paths the shares and the values are exact, so that the sampled objective is too.
    assert_close(enumerated_gradient(problem, 3, PolicyResponse(ExactCritic())), referee, 1e-9)


def test_context_values_are_what_is_aggregated():
    base = random_cmdp(seed=5, contexts=4)
    risky = Problem(base.leader, CVaR(base.objective, 0.3), base.follower)
    values = context_values(risky)
    law = base.follower.cmdp.context_probabilities
    assert leader_value(risky).item() == pytest.approx(risky.objective.aggregate(values, law).item())
    assert leader_value(base).item() == pytest.approx((law * values).sum().item())


# ------------------------------------------------------------------------------------------------- constrained


def constrained(bound=0.0, rate=0.5, multiplier=0.0):
    base, other = random_cmdp(seed=6), random_cmdp(seed=6)
    cost = ExpectedUtility(
        TabularUtility(lambda leader: torch.sigmoid(leader._field("utility").flip(-1))),
        discount=other.objective.discount,
        depends_on_leader=True,
    )
    return Problem(base.leader, Constrained(base.objective, cost, bound, rate, multiplier), base.follower), cost


def test_the_lagrangian_has_the_right_value_and_gradient():
    problem, cost = constrained(bound=0.3, multiplier=0.8)
    plain = Problem(problem.leader, problem.objective.objective, problem.follower)
    of_cost = Problem(problem.leader, cost, problem.follower)
    expected = leader_value(plain) - 0.8 * (leader_value(of_cost) - 0.3)
    assert leader_value(problem).item() == pytest.approx(expected.item(), abs=1e-12)
    assert_close(implicit_gradient(problem), implicit_gradient(plain) - 0.8 * implicit_gradient(of_cost), 1e-12)
    estimates = sample_gradients(problem, PolicyResponse(ExactCritic()), repetitions=40, paths=256, seed=0)
    assert deviations(estimates, implicit_gradient(problem)).abs().max() <= 4


class FreeRewards(TabularLeader):
    """One state, one step, a free reward for each action, a uniform prior."""

    def __init__(self, actions):
        super().__init__()
        self.rewards = torch.nn.Parameter(torch.zeros(1, 1, actions, dtype=torch.float64))
        self.prior = torch.full((1, 1, actions), -math.log(actions), dtype=torch.float64)
        self.law, self.first = torch.ones(1, 1, actions, 1).double(), torch.ones(1, 1).double()

    def tables(self):
        return Tables(self.rewards, self.law, self.first, self.prior)


def test_dual_ascent_finds_the_multiplier():
    u, c = torch.tensor([1.0, 0.3, 0.0]).double(), torch.tensor([1.0, 0.2, 0.0]).double()
    price, bound = 0.5, 0.35

    def spent(multiplier):  # of the priced Lagrangian's optimum, which is a Boltzmann law
        return (torch.softmax((u - multiplier * c) / price, 0) * c).sum().item()

    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > bound else (low, middle)
    assert spent(0.0) > bound  # the bound binds

    def table(values):
        return ExpectedUtility(TabularUtility(lambda leader: values.view(1, 1, 3)))

    objective = Constrained(KLPriced(table(u), price), table(c), bound, rate=0.05)
    cmdp = ContextualMDP(torch.ones(1).double(), torch.ones(1, 1, dtype=torch.bool))
    problem = Problem(FreeRewards(3), objective, ExactFollower(cmdp, temperature=1.0, discount=0.0))
    optimizer = torch.optim.Adam(problem.parameters, lr=0.05, maximize=True)
    config = HPGDConfig(steps=400, contexts_per_step=256, group_size=1, progress=False, max_gradient_norm=None)
    run = HPGD(problem, optimizer, ImplicitHypergradient(), config)
    run.run()
    late = run.history[-100:]
    assert sum(row["multiplier"] for row in late) / 100 == pytest.approx(high, abs=0.03)
    assert sum(row["constraint"] for row in late) / 100 == pytest.approx(bound, abs=0.01)
    assert run.history[-1]["multiplier"] == objective.multiplier


def test_the_multiplier_is_in_the_checkpoint(tmp_path):
    def start(steps):
        problem, _ = constrained(bound=-1.0)
        optimizer = torch.optim.SGD(problem.parameters, lr=0.1, maximize=True)
        config = HPGDConfig(steps=steps, contexts_per_step=8, group_size=1, progress=False, checkpoint_every=2)
        return problem, HPGD(problem, optimizer, PolicyResponse(ExactCritic()), config, tmp_path / str(steps > 0))

    whole, run = start(6)
    run.run()
    for steps in (3, 6):
        resumed, run = start(steps)
        run.out = tmp_path / "parts"
        run.run(resume=True)
    assert resumed.objective.multiplier == whole.objective.multiplier > 0
    assert torch.equal(resumed.leader.x, whole.leader.x)


def test_priced_and_risky_constraints_keep_their_state():
    problem, _ = constrained(multiplier=0.4)
    outer = CVaR(KLPriced(problem.objective, 0.1), 0.5)
    assert outer.state_dict() == {"multiplier": 0.4, "objective": {}}
    outer.load_state_dict({"multiplier": 1.5, "objective": {}})
    assert problem.objective.multiplier == 1.5


# ------------------------------------------------------------------------------------------------- preferences


class Rewards(Leader):
    """One prompt a context, a reward for each of its answers."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards = torch.nn.Parameter(rewards)

    def reward(self, rollouts):
        return self.rewards[rollouts.contexts, rollouts.steps["answer"]][:, None]


def preference_problem(seed, answers=5):
    generator = torch.Generator().manual_seed(seed)
    rewards, scores = torch.randn(2, 2, answers, generator=generator, dtype=torch.float64)
    objective = PreferenceLikelihood(lambda leader, r: scores[r.contexts, r.steps["answer"]][:, None], scale=0.7)
    return rewards, scores, objective


def exact_preferences(rewards, scores, objective, temperature):
    policy = torch.softmax(rewards / temperature, -1)  # uniform prior
    pairs = objective.pair(rewards[:, :, None] - rewards[:, None, :], scores[:, :, None] - scores[:, None, :])
    return ((policy[:, :, None] * policy[:, None, :]) * pairs).sum((1, 2)).mean()


@pytest.mark.parametrize("size", [3, 6])
def test_preferences_are_unbiased_within_groups(size):
    rewards, scores, objective = preference_problem(seed=0)
    temperature = 0.8
    leaf = rewards.clone().requires_grad_(True)
    exact_value = exact_preferences(leaf, scores, objective, temperature)
    (referee,) = torch.autograd.grad(exact_value, leaf)

    leader = Rewards(rewards.clone())
    policy = torch.softmax(rewards / temperature, -1)
    follower = type("Fixed", (), {"temperature": temperature, "discount": 0.0})()
    problem = Problem(leader, objective, follower)
    generator = torch.Generator().manual_seed(1)
    groups, estimates, values = 600, [], []
    for _ in range(60):
        contexts = torch.arange(groups) % 2
        answer = torch.multinomial(policy[contexts], size, replacement=True, generator=generator).reshape(-1)
        rollouts = Rollouts(
            contexts=contexts.repeat_interleave(size),
            mask=torch.ones(groups * size, 1, dtype=torch.bool),
            group=torch.arange(groups).repeat_interleave(size)[:, None],
            steps={"answer": answer},
        )
        leader.zero_grad()
        values.append(PolicyResponse(GroupCritic(), chunks=3).backward(problem, rollouts)["objective"])
        estimates.append(leader.rewards.grad.reshape(-1).clone())
    estimates, values = torch.stack(estimates), torch.tensor(values).double()
    assert deviations(estimates, referee.reshape(-1)).abs().max() <= 4
    assert abs(values.mean() - exact_value) <= 4 * values.std() / 60**0.5
    # The test can fail: without the factor (G - 1) / (G - 2) the response is off by far more.
    error = (estimates.mean(0) - referee.reshape(-1)).norm() / referee.norm()
    assert error < 0.05


def test_groups_of_different_sizes_are_averaged():
    rewards, scores, objective = preference_problem(seed=2)
    answers = torch.tensor([0, 1, 2, 3, 4, 1, 0, 2])
    contexts = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    rollouts = Rollouts.bandit(contexts=contexts, steps={"answer": answers})
    evaluation = objective.evaluate(Rewards(rewards), rollouts)
    means = []
    for context in (0, 1):
        mine = answers[contexts == context].tolist()
        r, s = rewards[context], scores[context]
        pairs = [
            objective.pair(r[i] - r[j], s[i] - s[j]) for a, i in enumerate(mine) for b, j in enumerate(mine) if a != b
        ]
        means.append(torch.stack(pairs).mean())
    assert evaluation.value.item() == pytest.approx(torch.stack(means).mean().item(), abs=1e-12)


def test_small_groups_and_long_paths_are_refused():
    rewards, _, objective = preference_problem(seed=3)
    pair = Rollouts.bandit(contexts=torch.tensor([0, 0]), steps={"answer": torch.tensor([0, 1])})
    with pytest.raises(InputError, match=r"groups of at least 3 answers, got one of 2"):
        objective.evaluate(Rewards(rewards), pair)
    bad = PreferenceLikelihood(lambda leader, rollouts: torch.zeros(2))
    with pytest.raises(InputError, match=r"PreferenceLikelihood.score: expected shape \(2, 1\)"):
        bad.evaluate(Rewards(rewards), pair)
    base = random_cmdp()
    still = TabularUtility(lambda leader: torch.zeros(2, 4, 3, dtype=torch.float64))
    long = Problem(base.leader, PreferenceLikelihood(still), base.follower)
    with pytest.raises(InputError, match="every state is terminal"):
        leader_value(long)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanVariance(BARE, -1.0), "MeanVariance.aversion: expected a finite number >= 0, got -1.0"),
        (lambda: MeanVariance(BARE, float("nan")), "MeanVariance.aversion"),
        (lambda: CVaR(BARE, 0.0), r"CVaR.share: expected a finite number > 0 and <= 1, got 0.0"),
        (lambda: CVaR(BARE, 1.5), "CVaR.share"),
        (lambda: EntropicRisk(BARE, 0.0), "EntropicRisk.aversion: expected a finite number > 0, got 0.0"),
        (lambda: WorstContext(BARE, -0.1), "WorstContext.temperature"),
        (lambda: Constrained(BARE, BARE, float("inf"), 0.1), "Constrained.bound: expected a finite number, got inf"),
        (lambda: Constrained(BARE, BARE, 0.0, 0.0), "Constrained.rate"),
        (lambda: Constrained(BARE, BARE, 0.0, 0.1, -1.0), "Constrained.multiplier"),
        (
            lambda: Constrained(BARE, ExpectedUtility(BARE.utility_function, discount=0.5), 0.0, 0.1),
            "Constrained.cost: expected the objective's discount 0.0, got 0.5",
        ),
        (lambda: PreferenceLikelihood(BARE.utility_function, scale=0.0), "PreferenceLikelihood.scale"),
        (
            lambda: CVaR(KLPriced(MeanVariance(BARE, 0.1), 0.1), 0.5),
            "got KLPriced, which is a risk already",
        ),
        (lambda: Constrained(BARE, CVaR(BARE, 0.5), 0.0, 0.1), "Constrained.cost: expected a mean over contexts"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_nan_cost_stops_before_the_multiplier():
    cost = ExpectedUtility(lambda leader, rollouts: torch.full((2, 1), float("nan")))
    objective = Constrained(BARE, cost, 0.0, 0.1, multiplier=0.2)
    rollouts = Rollouts.bandit(contexts=torch.tensor([0, 1]), steps={"u": torch.zeros(2, 1)})
    with pytest.raises(InputError, match=r"Constrained.cost: expected a finite cost, got NaN"):
        objective.update(lambda: objective.observe(None, rollouts))
    assert objective.multiplier == 0.2
