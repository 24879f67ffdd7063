"""Natural steps: the metric against its definition, the step against refitting, and what they make of labels."""

from __future__ import annotations

import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_reward_models
import torch
from torch import Tensor

import toy_cmdp
from align_cbrl import (
    HPGD,
    CrossFitted,
    CVaR,
    ExpectedUtility,
    FunctionOfMeans,
    HPGDConfig,
    InputError,
    KLPriced,
    Leader,
    Natural,
    PolicyResponse,
    Problem,
    Rollouts,
    certify,
)
from align_cbrl.estimators import metric as metrics
from align_cbrl.estimators.metric import MatrixMetric, ProductMetric, response_gradients, response_metric
from align_cbrl.estimators.natural import natural_step
from align_cbrl.estimators.replay import all_at_present, at_present
from align_cbrl.functional import group_advantage
from align_cbrl.hpgd import _flat
from align_cbrl.llm import RewardModel, RewardModelLeader
from align_cbrl.objectives import harmonic_mean, target_shares
from toy_cmdp.referee.exact import exact_world


def priced(seed: int, price: float, **sizes: int) -> Problem:
    return toy_cmdp.preferences(seed=seed, objective=lambda u: KLPriced(ExpectedUtility(u), price), **sizes)


def exact_metric(problem: Problem) -> Tensor:
    """E Cov(dr, dr) / lambda^2, of the definition."""
    leader: Any = problem.leader
    world = exact_world(problem)
    policy = world.policy[:, 0]
    features = leader.features / problem.temperature  # [C, A, D]
    mean = (policy[..., None] * features).sum(1, keepdim=True)
    within = torch.einsum("ca,cai,caj->cij", policy, features - mean, features - mean)
    return torch.einsum("c,cij->ij", problem.follower.cmdp.context_probabilities.to(policy), within)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(10))
def test_the_fixed_point_of_refitting_is_the_stationary_point_of_a_kl_priced_mean(seed: int) -> None:
    """natural step of length 1 / price = least squares of the score on the features, times lambda / price."""
    price = 0.3
    problem = priced(seed, price)
    (x,) = problem.parameters
    leader: Any = problem.leader

    def refit() -> Tensor:
        """Weights that describe the score best on the present best response, at strength lambda / price."""
        policy = exact_world(problem).policy[:, 0]
        within = leader.features - (policy[..., None] * leader.features).sum(1, keepdim=True)
        score = leader.score[:, 0] - (policy * leader.score[:, 0]).sum(1, keepdim=True)
        share = problem.follower.cmdp.context_probabilities.to(policy)[:, None] * policy  # type: ignore[attr-defined]
        root = share.sqrt()[..., None]
        fitted = torch.linalg.lstsq((root * within).flatten(0, 1), (root[..., 0] * score).flatten()[:, None])
        return problem.temperature / price * fitted.solution[:, 0]

    def natural(scale: float = 1.0) -> Tensor:
        x.grad = None
        toy_cmdp.leader_value(problem).backward()
        assert x.grad is not None
        settings = Natural(nats=1e9, ridge=1e-14)
        return x.detach() + natural_step(x.grad, MatrixMetric(exact_metric(problem)), settings, scale * price).change

    with torch.no_grad():
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype))
    assert torch.allclose(natural(), refit(), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(natural(1.05), refit(), rtol=1e-3)  # the test can fail
    for _ in range(200):  # damped refits
        with torch.no_grad():
            x.copy_((x + refit()) / 2)
    x.grad = None
    toy_cmdp.leader_value(problem).backward()
    assert x.grad is not None and float(x.grad.norm()) < 1e-8
    with torch.no_grad():
        x.mul_(1.05)  # as if price or temperature were off by 5 %
    x.grad = None
    toy_cmdp.leader_value(problem).backward()
    assert x.grad is not None and float(x.grad.norm()) > 1e-4


def test_the_metric_of_samples_is_the_exact_one() -> None:
    problem = toy_cmdp.preferences(seed=3)
    exact = exact_metric(problem)
    contexts = torch.arange(4)
    problem.follower.respond(problem.leader, contexts)
    found = []
    for i in range(200):
        batch = problem.follower.rollout(contexts, 16, torch.Generator().manual_seed(i))
        metric = response_metric(problem, batch)
        assert isinstance(metric, MatrixMetric)
        found.append(metric.matrix)
    rows = torch.stack(found)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - exact).abs() < 4.5 * error).all()
    assert ((1.1 * rows.mean(0) - exact).abs() > 4.5 * error).any()  # the test can fail


def test_the_metric_moves_with_prior_and_temperature() -> None:
    class Everything(Leader):
        def __init__(self) -> None:
            super().__init__()
            self.reward_, self.prior, self.heat = (
                torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, 0.2, -0.3)
            )

        def reward(self, rollouts: Rollouts) -> Tensor:
            return self.reward_ * rollouts.steps["a"][:, None]

        def log_prior(self, rollouts: Rollouts) -> Tensor:
            return torch.log_softmax(self.prior * torch.arange(5, dtype=torch.float64), 0)[rollouts.steps["i"]][:, None]

        def follower_temperature(self) -> Tensor:
            return self.heat.exp()

    leader = Everything()
    a = torch.tensor([0.1, 0.9, -0.4, 0.3, 1.2], dtype=torch.float64)
    rollouts = Rollouts.bandit(contexts=torch.zeros(5, dtype=torch.long), steps={"a": a, "i": torch.arange(5)})

    def log_best(values: Tensor) -> Tensor:
        return torch.log_softmax(
            values[0] * a / values[2].exp() + values[1] * torch.arange(5.0, dtype=torch.float64), 0
        )

    x = torch.tensor([0.7, 0.2, -0.3], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(log_best, x)  # [5, 3]
    problem = Problem(leader, ExpectedUtility(lambda leader, rollouts: rollouts.steps["a"][:, None]), known_follower())
    slope = response_gradients(problem, rollouts)
    policy = log_best(x).exp()
    centred = slope - policy @ slope
    assert torch.allclose(centred, jacobian, atol=1e-12)


def known_follower() -> Any:
    return toy_cmdp.preferences(seed=0).follower


@pytest.mark.parametrize("seed", range(3))
def test_natural_steps_end_where_the_target_shares_are(seed: int) -> None:
    """A nat between policies moves shares by a nat at most: without that bound each step is as long as the last."""
    answer = torch.arange(6)
    classes = [ExpectedUtility(toy_cmdp.TabularUtility(lambda _, i=i: (answer % 3 == i).double().expand(4, 1, 6)))
               for i in range(3)]  # fmt: skip
    objective = FunctionOfMeans(target_shares([0.5, 0.2, 0.3]), classes)
    assert KLPriced(objective, 0.25).price_of_a_nat == 1.25
    assert FunctionOfMeans(harmonic_mean, classes[:2]).price_of_a_nat == 0

    def ends(price: float) -> tuple[float, list[float]]:
        problem, nats = toy_cmdp.preferences(seed=seed, objective=lambda _: objective), []
        (x,) = problem.parameters
        for _ in range(60):
            x.grad = None
            toy_cmdp.leader_value(problem).backward()
            step = natural_step(x.grad, MatrixMetric(exact_metric(problem)), Natural(nats=0.1), price)
            nats.append(step.nats)
            with torch.no_grad():
                x += step.change
        return toy_cmdp.leader_value(problem).item(), nats

    value, nats = ends(objective.price_of_a_nat)
    assert value > -1e-5 and nats[-1] < 1e-5
    hovering, nats = ends(0.0)
    assert hovering < 2 * value and nats[-1] == pytest.approx(0.1)


def test_a_step_is_as_long_as_it_says() -> None:
    """d'F d / 2 is the divergence between the best responses, to second order, and the bound holds."""
    problem = toy_cmdp.preferences(seed=1)
    (x,) = problem.parameters
    toy_cmdp.leader_value(problem).backward()
    assert x.grad is not None
    before = exact_world(problem).policy
    for nats in (1e-6, 1e-4):
        step = natural_step(x.grad, MatrixMetric(exact_metric(problem)), Natural(nats=nats, ridge=1e-12))
        assert step.nats == pytest.approx(nats)
        with torch.no_grad():
            x += step.change
        after = exact_world(problem).policy
        weight = problem.follower.cmdp.context_probabilities  # type: ignore[attr-defined]
        moved = float((weight * (before * (before / after).log()).sum((1, 2))).sum())
        assert moved == pytest.approx(nats, rel=20 * nats**0.5)
        with torch.no_grad():
            x -= step.change


def run_of(problem: Problem, out: Path | None = None, **settings: Any) -> HPGD:
    kept = {"steps": 20, "contexts_per_step": 8, "group_size": 8, "progress": False, "natural": Natural(), **settings}
    optimizer = None
    if kept["natural"] is None:
        optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.1, maximize=True)
    return HPGD(problem, optimizer, config=HPGDConfig(**kept), out=out)


def shares_of_the_gain(problems: int, steps: int) -> tuple[Tensor, Tensor]:
    """What part of the possible gain natural steps reach from 64 labels a step, and Adam with four replays."""
    shares: dict[str, list[float]] = {"natural": [], "replays": []}
    sizes = {"prompts": 8, "responses": 12, "features": 6}
    for seed in range(problems):
        problem = priced(seed, 0.1, **sizes)
        start = toy_cmdp.leader_value(problem).item()
        ascent = torch.optim.LBFGS(problem.leader.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(ascent: Any = ascent, problem: Problem = problem) -> Tensor:
            ascent.zero_grad()
            value = -toy_cmdp.leader_value(problem)
            value.backward()
            return value

        ascent.step(loss)
        best = toy_cmdp.leader_value(problem).item()
        for name, settings in (("natural", {}), ("replays", {"natural": None, "replays": 4})):
            run = run_of(priced(seed, 0.1, **sizes), steps=steps, seed=seed, **settings)
            run.run()
            shares[name].append((toy_cmdp.leader_value(run.problem).item() - start) / (best - start))
    return torch.tensor(shares["natural"]), torch.tensor(shares["replays"])


@pytest.mark.filterwarnings("ignore:the leader's gradient is zero")
def test_natural_steps_find_what_a_few_labels_tell() -> None:
    natural, _ = shares_of_the_gain(problems=2, steps=12)
    assert float(natural.min()) > 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the leader's gradient is zero")
def test_natural_steps_are_not_behind_adam_with_replays() -> None:
    """After 30 leader steps, over problems that nothing was tuned on."""
    natural, replays = shares_of_the_gain(problems=16, steps=30)
    difference = natural - replays
    print(f"natural {natural.mean():.3f}, replays {replays.mean():.3f}, difference {difference.mean():+.3f} "
          f"+- {difference.std() / len(difference) ** 0.5:.3f}")  # fmt: skip
    # Measured: .977 and .922; the difference, .055 +- .042, is one problem in which Adam goes astray.
    assert float(natural.mean()) > 0.95
    assert float(difference.min()) > -0.1


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    whole = run_of(priced(2, 0.1), tmp_path / "whole", steps=7)
    whole.run()
    first = run_of(priced(2, 0.1), tmp_path / "cut", steps=4)
    first.run()
    second = run_of(priced(2, 0.1), tmp_path / "cut", steps=7)
    second.run(resume=True)
    assert torch.equal(whole.problem.parameters[0], second.problem.parameters[0])
    assert [row["objective"] for row in whole.history] == [row["objective"] for row in second.history]


def test_remembered_batches_stand_for_the_present_best_response() -> None:
    """The gradient on all of them is the exact one where they were drawn from other leaders' responses."""
    problem = toy_cmdp.preferences(seed=2)
    (x,) = problem.parameters
    contexts = torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    start, estimates = x.detach().clone(), []
    with torch.no_grad():
        x += 0.2
    exact = torch.autograd.grad(toy_cmdp.leader_value(problem), x)[0]
    for _ in range(30):
        batches = []
        for shift in (0.0, 0.1, 0.4):
            with torch.no_grad():
                x.copy_(start + shift)
            problem.follower.respond(problem.leader, contexts)
            batches.append(problem.follower.rollout(contexts, 128, generator))
        with torch.no_grad():
            x.copy_(start + 0.2)
        x.grad = None
        whole = all_at_present(problem, batches[:-1], at_present(problem, batches[-1]))
        PolicyResponse().backward(problem, whole)
        assert x.grad is not None
        estimates.append(x.grad)
    rows = torch.stack(estimates)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - exact).abs() < 4 * error + 0.01 * exact.norm()).all()


def test_weighted_batches_are_weighted_anew_and_not_past_four() -> None:
    problem = toy_cmdp.preferences(seed=2)
    (x,) = problem.parameters
    contexts = torch.arange(4)
    problem.follower.respond(problem.leader, contexts)
    rollouts = problem.follower.rollout(contexts, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        x += 0.3
    once = at_present(problem, rollouts)
    again = at_present(problem, once)
    assert once.weight is not None and again.weight is not None and float(once.weight.max()) <= 4.2
    assert torch.allclose(once.weight, again.weight)  # nothing has moved since
    with torch.no_grad():
        x += 0.3
    direct, through = at_present(problem, rollouts).weight, at_present(problem, once).weight
    assert direct is not None and through is not None and torch.allclose(direct, through, rtol=0.05)


def test_terms_that_are_copies_share_their_weight_and_it_is_said_once() -> None:
    class Copies(Leader):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def reward(self, rollouts: Rollouts) -> Tensor:
            return (rollouts.steps["features"] @ self.x)[:, None]

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    steps = {"features": torch.cat([features, features[:, :1]], 1), "score": features[:, 0]}
    leader = Copies()
    problem = Problem(leader, ExpectedUtility(lambda leader, r: r.steps["score"][:, None]), known_follower())
    run = HPGD(problem, config=HPGDConfig(natural=Natural(), progress=False))
    batch = Rollouts.bandit(contexts=torch.arange(4).repeat_interleave(8), steps=steps)
    with pytest.warns(UserWarning, match=r"x\[0\] and x\[2\] of Copies reward the same"):
        run.leader_step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.leader_step(batch)
    x = leader.x.detach()
    assert float(x[0]) == pytest.approx(float(x[2])) and float(x[0]) > 0.1


class Bounded(Leader):
    """A reward whose features vary by `scale`, within a norm of the parameters."""

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([0.5, 0.0], dtype=torch.float64))
        self.budget = budget

    def reward(self, rollouts: Rollouts) -> Tensor:
        return (rollouts.steps["features"] @ self.x)[:, None]

    def project(self) -> None:
        with torch.no_grad():
            self.x.mul_(min(1.0, self.budget / float(self.x.norm())))


@pytest.mark.parametrize(
    ("scale", "budget", "told"),
    [
        (1e-3, 1.0, True),  # a nat is a step of a thousand, of which a norm of one leaves nothing
        (1e-3, 1e6, False),
        (1.0, 0.5, False),  # a budget that binds from the start, in the units of the step
    ],
)
def test_a_budget_that_takes_natural_steps_back_is_told_of_once(scale: float, budget: float, told: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    steps = {"features": scale * features, "score": features[:, 1]}
    problem = Problem(Bounded(budget), ExpectedUtility(lambda leader, r: r.steps["score"][:, None]), known_follower())
    run = HPGD(problem, config=HPGDConfig(natural=Natural(nats=1.0), progress=False))
    batch = Rollouts.bandit(contexts=torch.arange(4).repeat_interleave(8), steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run.leader_step(batch)
    said = [str(warning.message) for warning in caught if "budget" in str(warning.message)]
    assert len(said) == told
    if told:
        assert "leader step 1: the leader's budget takes 100% of a natural step back" in said[0]
        assert "parameters of Bounded" in said[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nats": 0.0}, "nats: expected a finite number > 0"),
        ({"nats": float("nan")}, "nats"),
        ({"ridge": -0.1}, "ridge: expected a finite number > 0"),
        ({"memory": 0}, "memory"),
    ],
)
def test_a_step_that_is_none_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Natural(**settings)


def test_what_natural_steps_cannot_do_is_refused_in_words() -> None:
    problem = toy_cmdp.preferences(seed=0)
    adam = torch.optim.Adam(problem.leader.parameters(), maximize=True)
    with pytest.raises(InputError, match="which need none; got both"):
        HPGD(problem, adam, config=HPGDConfig(natural=Natural()))
    with pytest.raises(InputError, match="which need none; got neither"):
        HPGD(problem)
    with pytest.raises(InputError, match="replays: expected 0 with natural steps"):
        HPGDConfig(natural=Natural(), replays=2)
    remembering = toy_cmdp.preferences(seed=0, objective=lambda u: CrossFitted(CVaR(ExpectedUtility(u), 0.5), memory=8))
    with pytest.raises(InputError, match="use CrossFitted"):
        HPGD(remembering, config=HPGDConfig(natural=Natural()))
    longer = toy_cmdp.random_cmdp(seed=0)
    with pytest.raises(InputError, match="expected rollouts of one step"):
        run_of(longer, steps=1).run()
    with pytest.raises(InputError, match="does not depend on the leader's parameters"):
        natural_step(torch.ones(2), MatrixMetric(torch.zeros(2, 2)), Natural())


def test_without_log_probabilities_a_step_uses_its_own_batch() -> None:
    problem = toy_cmdp.preferences(seed=0)
    contexts = torch.arange(4)
    problem.follower.respond(problem.leader, contexts)
    batch = problem.follower.rollout(contexts, 8, torch.Generator().manual_seed(0))
    run = HPGD(problem, config=HPGDConfig(natural=Natural(), progress=False))
    row = run.leader_step(dataclasses.replace(batch, log_policy=None, log_prior=None))
    assert row["step_nats"] == pytest.approx(0.3) and certify(problem, batch) is not None and len(run._memory) == 0


class Network(Leader):
    """A reward of two layers, whose gradient moves with its parameters."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        self.layers = torch.nn.Sequential(*layers).double()

    def reward(self, rollouts: Rollouts) -> Tensor:
        return self.layers(rollouts.steps["features"])


def scored(weighted: bool, paths: int = 40) -> Rollouts:
    """Completions in groups of unequal size, with weights that are nobody's."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(paths, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(paths, generator=generator, dtype=torch.float64)
    return Rollouts.bandit(
        contexts=torch.arange(paths) % 7,
        steps={"features": features, "score": features[:, 0] + features[:, 1] ** 2},
        weight=weight / weight.mean() if weighted else None,
    )


def by_matrix(problem: Problem, rollouts: Rollouts, gradient: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(F + D)^-1 g and its square, from the matrices and the damping of large leaders."""
    found = response_metric(problem, rollouts)
    assert isinstance(found, MatrixMetric)
    matrix, sampled = found.matrix, found.matrix if found.sampled is None else found.sampled
    stretch = max(float(gradient @ m @ gradient) for m in (matrix, sampled)) / float(gradient @ gradient)
    damped = matrix + ridge * stretch * torch.eye(len(gradient), dtype=matrix.dtype)
    direction = torch.linalg.solve(damped, gradient)
    return direction, max(float(direction @ m @ direction) for m in (damped, sampled))


def gradient_of(problem: Problem, rollouts: Rollouts) -> Tensor:
    problem.leader.zero_grad()
    PolicyResponse().backward(problem, rollouts)
    return torch.cat([p.grad.double().flatten() for p in problem.parameters if p.grad is not None])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_products_give_the_step_of_the_matrix(weighted: bool, chunks: int) -> None:
    rollouts = scored(weighted)
    objective = ExpectedUtility(lambda leader, r: r.steps["score"][:, None])
    problem = Problem(Network(), objective, known_follower())
    gradient = gradient_of(problem, rollouts)
    expected, square = by_matrix(problem, rollouts, gradient, 0.05)
    found = ProductMetric(problem, rollouts, chunks, iterations=200, tolerance=1e-12).solve(gradient, 0.05)
    assert float((found.value - expected).norm()) < 1e-9 * float(expected.norm())
    assert found.square == pytest.approx(square, rel=1e-9)
    torch.testing.assert_close(by_rows(problem, rollouts, gradient, 0.05)[0], expected)
    # The test can fail: another damping, other weights, too few iterations.
    for other in (
        by_matrix(problem, rollouts, gradient, 0.0501)[0],
        by_matrix(problem, scored(not weighted), gradient, 0.05)[0],
        ProductMetric(problem, rollouts, chunks, iterations=3).solve(gradient, 0.05).value,
    ):
        assert float((other - expected).norm()) > 1e-4 * float(expected.norm())


def by_rows(problem: Problem, rollouts: Rollouts, gradient: Tensor, ridge: float) -> tuple[Tensor, float]:
    """As `by_matrix`, from the paths' own gradients, of which there are fewer than parameters (Woodbury)."""
    rows, group = response_gradients(problem, rollouts), rollouts.group[:, 0]
    one = torch.ones(rollouts.size, dtype=torch.float64)
    mixing = [
        weight[:, None] * group_advantage(torch.eye(rollouts.size, dtype=torch.float64), group, weight) / rollouts.size
        for weight in (rollouts.path_weight(), one)
    ]
    slope = rows @ gradient
    damping = ridge * max(float(slope @ mix @ slope) for mix in mixing) / float(gradient @ gradient)
    inner = damping * torch.eye(rollouts.size, dtype=torch.float64) + rows @ rows.T @ mixing[0]
    direction = (gradient - rows.T @ (mixing[0] @ torch.linalg.solve(inner, slope))) / damping
    moved = rows @ direction
    damped = float(moved @ mixing[0] @ moved) + damping * float(direction @ direction)
    return direction, max(damped, float(moved @ mixing[1] @ moved))


@pytest.mark.parametrize("trainable", ["lora", "all"])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_give_the_step_of_a_reward_models_rows(trainable: Any, weighted: bool, tmp_path: Path) -> None:
    """Attention has a second derivative, and an adapter's first matrix none yet."""
    leader = RewardModelLeader(RewardModel(tiny_reward_models.build(tmp_path / "model")), trainable)
    words = random.Random(1)
    texts = [" ".join(words.choices("abcdef", k=words.randint(1, 6))) for _ in range(24)]
    weight = torch.tensor([words.random() for _ in texts], dtype=torch.float64)
    rollouts = Rollouts.bandit(
        contexts=torch.arange(24) % 4,
        steps={"prompt": ["a b"] * 24, "completion": texts},
        weight=weight / weight.mean() if weighted else None,
    )
    objective = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(t))] for t in r.steps["completion"]]))
    problem = Problem(leader, objective, known_follower())
    PolicyResponse().backward(problem, rollouts)
    gradient = torch.cat([_flat(p.grad, p) for p in problem.parameters])
    expected, square = by_rows(problem, rollouts, gradient, 0.05)
    found = ProductMetric(problem, rollouts, iterations=100, tolerance=1e-12).solve(gradient, 0.05)
    assert gradient.dtype == torch.float64 and float(gradient.norm()) > 1e-3
    error = float((found.value - expected).norm() / expected.norm())
    print(f"{trainable}, weighted {weighted}: {len(gradient)} parameters, relative difference {error:.1e}")
    assert error < 1e-6
    assert found.square == pytest.approx(square, rel=1e-6)
    wrong = by_rows(problem, rollouts, gradient, 0.0501)[0]
    assert float((wrong - expected).norm()) > 1e-5 * float(expected.norm())  # the test can fail


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    """Layers are computed again in every backward pass, by the attention of the forward pass."""
    model = tiny_reward_models.build(tmp_path / "model")
    rollouts = Rollouts.bandit(
        contexts=torch.tensor([0, 0, 1, 1]),
        steps={"prompt": ["a b"] * 4, "completion": ["a", "b c", "d", "e f a"]},
    )
    objective = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(t))] for t in r.steps["completion"]]))
    found = []
    for checkpointing in (False, True):
        leader = RewardModelLeader(RewardModel(model), "all", gradient_checkpointing=checkpointing)
        problem = Problem(leader, objective, known_follower())
        PolicyResponse().backward(problem, rollouts)
        gradient = torch.cat([_flat(p.grad, p) for p in problem.parameters])
        found.append(ProductMetric(problem, rollouts).solve(gradient, 0.05).value)
    torch.testing.assert_close(found[0], found[1])


def test_a_large_leader_takes_bounded_steps_on_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LARGE", 10)
    objective = ExpectedUtility(lambda leader, r: r.steps["score"][:, None])
    problem = Problem(Network(), objective, known_follower())
    rollouts = scored(weighted=True)
    gradient = gradient_of(problem, rollouts)
    metric = response_metric(problem, rollouts)
    assert isinstance(metric, ProductMetric) and Natural().remembered(problem) == 4
    for nats in (1e-3, 0.1):
        assert natural_step(gradient, metric, Natural(nats=nats)).nats == pytest.approx(nats)
    free = metric.solve(gradient, 0.05).value
    step = natural_step(gradient, metric, Natural(nats=1e9), price=0.3)
    torch.testing.assert_close(step.change, free / 0.3)
    run = HPGD(problem, config=HPGDConfig(natural=Natural(), progress=False))
    row = run.leader_step(rollouts)
    assert row["step_nats"] == pytest.approx(0.3)
    assert float(gradient_of(problem, rollouts).norm()) < float(gradient.norm())  # it went where the score grows
    assert Natural(memory=7).remembered(problem) == 7


def test_what_products_cannot_do_is_refused_in_words() -> None:
    class Numb(Network):
        def reward(self, rollouts: Rollouts) -> Tensor:
            return 0 * super().reward(rollouts)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return 2 * value

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Fused(Network):
        def reward(self, rollouts: Rollouts) -> Tensor:
            out: Tensor = Once.apply(super().reward(rollouts))
            return out

    rollouts, objective = scored(weighted=False), ExpectedUtility(lambda leader, r: r.steps["score"][:, None])
    for leader, words in (
        (Numb(), "does not depend on the leader's parameters"),
        (Fused(), "the reward of Fused has no second derivative"),
    ):
        problem = Problem(leader, objective, known_follower())
        gradient = torch.ones(sum(p.numel() for p in problem.parameters), dtype=torch.float64)
        with pytest.raises(InputError, match=words):
            ProductMetric(problem, rollouts).solve(gradient, 0.05)


def test_products_go_on_in_smaller_pieces_where_memory_runs_out() -> None:
    class Big(Network):
        def reward(self, rollouts: Rollouts) -> Tensor:
            if rollouts.size > 10:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().reward(rollouts)

    rollouts, objective = scored(weighted=True), ExpectedUtility(lambda leader, r: r.steps["score"][:, None])
    problem, same = (Problem(leader, objective, known_follower()) for leader in (Big(), Network()))
    gradient = gradient_of(same, rollouts)
    with pytest.warns(UserWarning, match="ran out of memory with [24]0 paths at once"):
        found = ProductMetric(problem, rollouts).solve(gradient, 0.05).value
    torch.testing.assert_close(found, ProductMetric(same, rollouts).solve(gradient, 0.05).value)
