"""How far the follower is, when its samples are corrected, when the alarm goes off; empty groups; memory."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from known_follower import EnumeratedCritic, Known
from policies import at_distances
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    HPGDConfig,
    InputError,
    KLPriced,
    Leader,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.estimators.certificate import Certificate, certify, corrected

TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = lm.build(tmp_path_factory.mktemp("enumerable"))
    enumeration = lm.Enumeration.random(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    x = 0.65 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    follower = Known(enumeration, enumeration.log_probs(model, tokenizer), TEMPERATURE)
    return Problem(lm.LinearLeader(enumeration, x), ExpectedUtility(enumeration.judge), follower)


def known(problem: Problem) -> Known:
    assert isinstance(problem.follower, Known)
    return problem.follower


def sampled(problem: Problem, policy: Tensor, groups: int, size: int, generator: torch.Generator) -> Rollouts:
    """Completions of prompts that nature draws."""
    known(problem).log_policy = policy
    return known(problem).rollout(torch.randint(4, (groups,), generator=generator), size, generator)


def measured(problem: Problem, size: int, groups: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Truth [100], and estimates with their standard errors [100, 2] each, plain and debiased."""
    best = known(problem).best_response(problem.leader)
    distances = torch.logspace(-3, math.log10(3), 100, dtype=torch.float64).tolist()
    generator, truth, estimates, errors = torch.Generator().manual_seed(5), [], [], []
    for policy in at_distances(best, known(problem).log_prior, distances):
        truth.append(lm.kl(policy, best))
        found = certify(problem, sampled(problem, policy, groups, size, generator))
        assert found is not None
        estimates.append([found.gap, found.gap_debiased])
        errors.append([found.gap_se, found.gap_debiased_se])
    return torch.tensor(truth), torch.tensor(estimates), torch.tensor(errors)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([value.argsort().argsort().double() for value in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_gap_over_a_hundred_policies(problem: Problem, size: int) -> None:
    """0.001 to 3 nats: ranked as the true divergence, and not above it by more than two standard errors on average."""
    truth, estimates, errors = measured(problem, size)
    assert truth[0] == pytest.approx(0.001, rel=1e-3) and truth[-1] == pytest.approx(3, rel=1e-3)
    for kind, column in (("plain", 0), ("debiased", 1)):
        z = (estimates[:, column] - truth) / errors[:, column]
        rank, excess = rank_correlation(truth, estimates[:, column]), float(z.mean())
        shares = [float((estimates[part, column] / truth[part]).mean()) for part in _THIRDS]
        print(f"G={size} {kind}: rank {rank:.4f}, mean z {excess:+.2f}, share of the truth {shares}")
        assert rank >= 0.95
        assert excess <= 2
    near = slice(0, 33)  # below 0.014 nats
    assert float((estimates[near, 0] / truth[near]).mean()) == pytest.approx((size - 1) / size, abs=0.05)
    assert float((estimates[near, 1] / truth[near]).mean()) == pytest.approx(1, abs=0.06)


_THIRDS = (slice(0, 33), slice(33, 66), slice(66, 100))


def test_the_standard_error_is_that_of_repetition(problem: Problem) -> None:
    best = known(problem).best_response(problem.leader)
    (policy,) = at_distances(best, known(problem).log_prior, [0.1])
    generator = torch.Generator().manual_seed(1)
    for groups in (16, 1):  # over groups, and within one
        found = [certify(problem, sampled(problem, policy, groups, 32, generator)) for _ in range(200)]
        gaps = torch.tensor([[f.gap, f.gap_debiased] for f in found if f is not None])
        errors = torch.tensor([[f.gap_se, f.gap_debiased_se] for f in found if f is not None])
        prompts = gaps.std(0) if groups > 1 else within_one_prompt(problem, policy, generator)
        assert (errors.mean(0) / prompts).tolist() == pytest.approx([1, 1], abs=0.15)


def within_one_prompt(problem: Problem, policy: Tensor, generator: torch.Generator) -> Tensor:
    """What a single group cannot know is how prompts differ: deviation over repetitions of the same prompt."""
    spreads = []
    for prompt in range(4):
        known(problem).log_policy = policy
        found = [certify(problem, known(problem).rollout(torch.tensor([prompt]), 32, generator)) for _ in range(100)]
        spreads.append(torch.tensor([[f.gap, f.gap_debiased] for f in found if f is not None]).std(0))
    return torch.stack(spreads).mean(0)


# ---- correction ----


def exact_gradient(problem: Problem) -> Tensor:
    follower = known(problem)
    follower.respond(problem.leader, torch.arange(4))
    return gradient(problem, follower.everything(), PolicyResponse(EnumeratedCritic()))


def gradient(problem: Problem, rollouts: Rollouts, estimator: PolicyResponse | None = None) -> Tensor:
    problem.leader.zero_grad(set_to_none=True)
    (PolicyResponse() if estimator is None else estimator).backward(problem, rollouts)
    (parameter,) = problem.parameters
    assert parameter.grad is not None
    return parameter.grad.clone()


def squared_errors(
    problem: Problem, policy: Tensor, exact: Tensor, size: int, groups: int, repetitions: int, seed: int
) -> Tensor:
    """Of the uncorrected, the corrected and the chosen hypergradient, and how often it was corrected: [4]."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(repetitions):
        rollouts = sampled(problem, policy, groups, size, generator)
        found = certify(problem, rollouts)
        assert found is not None
        off, on = (gradient(problem, r) for r in (rollouts, corrected(rollouts, found)))
        errors = [float(((g - exact) ** 2).sum() / (exact**2).sum()) for g in (off, on)]
        rows.append([*errors, errors[found.correction_pays], float(found.correction_pays)])
    return torch.tensor(rows).mean(0)


def compared(
    problem: Problem, distances: list[float], sizes: list[tuple[int, int]], repetitions: int
) -> dict[tuple[int, int, float], Tensor]:
    """By group size, groups and distance: `squared_errors` of policies of every kind, [4, 4]."""
    exact = exact_gradient(problem)
    best = known(problem).best_response(problem.leader)
    table = {}
    for size, groups in sizes:
        for distance in distances:
            policies = at_distances(best, known(problem).log_prior, [distance] * 4)
            rows = [
                squared_errors(problem, p, exact, size, groups, repetitions, seed=k) for k, p in enumerate(policies)
            ]
            table[size, groups, distance] = torch.stack(rows)
    return table


def regrets(rows: Tensor) -> list[float]:
    """Squared error over that of the better of the two, as geometric means: off, on, chosen."""
    better = rows[:, :2].min(1, keepdim=True).values
    return (rows[:, :3] / better).log().mean(0).exp().tolist()


def test_the_rule_chooses_nearly_the_better(problem: Problem) -> None:
    """In small batches variance is what counts, in large ones bias; docs/certificate.md has the whole table."""
    table = compared(problem, [0.005, 0.2, 1.2], [(4, 8), (16, 16)], repetitions=15)
    off, on, chosen = regrets(torch.cat(list(table.values())))
    assert chosen < 1.12
    assert chosen < min(off, on)


@pytest.mark.slow
def test_the_table_of_corrections(problem: Problem) -> None:
    """On rewards and utilities other than those on which the rule's constant was chosen; printed for the docs."""
    base = known(problem)
    enumeration = lm.Enumeration.random(3)
    x = 0.65 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    enumeration.utility = enumeration.utility + 0.25 * enumeration.features @ x
    follower = Known(enumeration, base.log_prior, TEMPERATURE)
    other = Problem(lm.LinearLeader(enumeration, x), ExpectedUtility(enumeration.judge), follower)
    distances = [0.002, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    table = compared(other, distances, [(8, 8), (8, 32), (16, 32)], repetitions=40)
    for (size, groups, distance), rows in table.items():
        off, on, chosen, share = rows.mean(0).tolist()
        print(f"| {size} x {groups} | {distance} | {off:.3f} | {on:.3f} | {chosen:.3f} | {share:.0%} |")
    every = torch.cat(list(table.values()))
    off, on, chosen = regrets(every)
    better = every[:, :2].min(1, keepdim=True).values
    worst = (every[:, :3] / better).max(0).values.tolist()
    print(f"squared error over that of the better: never {off:.3f}, always {on:.3f}, by the rule {chosen:.3f}; {worst}")
    assert chosen < 1.1
    assert worst[2] <= max(worst[:2])


def test_corrected_samples_stand_for_the_best_response(problem: Problem) -> None:
    """Large groups: the exact hypergradient of a priced objective, whose price is that of the best response."""
    priced = dataclasses.replace(problem, objective=KLPriced(problem.objective, 0.3))
    exact = exact_gradient(priced)
    best = known(problem).best_response(problem.leader)
    (policy,) = at_distances(best, known(problem).log_prior, [0.15])
    generator, rows = torch.Generator().manual_seed(2), []
    for _ in range(40):
        rollouts = sampled(priced, policy, 4, 512, generator)
        found = certify(priced, rollouts)
        assert found is not None and found.correction_pays
        rows.append(torch.stack([gradient(priced, r) for r in (rollouts, corrected(rollouts, found))]))
    estimates = torch.stack(rows)
    z = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(rows)))
    assert z[1].abs().max() < 4
    assert z[0].abs().max() > 8  # uncorrected, the bias shows


def run_of(problem: Problem, steps: int, **settings: Any) -> HPGD:
    optimizer = torch.optim.Adam(problem.parameters, lr=0.01, maximize=True)
    config = {"contexts_per_step": 64, "group_size": 8, "progress": False, **settings}
    return HPGD(problem, optimizer, config=HPGDConfig(steps=steps, **config))


class Stubborn(Known):
    """Keeps a policy that is not its best response, or walks away from it."""

    drift: Tensor | None = None

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        if self.drift is not None:
            self.log_policy = torch.log_softmax(self.log_policy + self.drift, -1)
        return {}


def stubborn(problem: Problem, distance: float, drift: float = 0.0) -> Problem:
    base = known(problem)
    follower = Stubborn(base.enumeration, base.log_prior, TEMPERATURE)
    best = base.best_response(problem.leader)
    (policy,) = at_distances(best, base.log_prior, [distance])
    follower.log_policy = policy
    follower.drift = drift * (base.log_prior - best) if drift else None
    leader = lm.LinearLeader(base.enumeration, problem.parameters[0].detach())
    return Problem(leader, problem.objective, follower)


@pytest.mark.parametrize(
    ("distance", "drift", "advice"),
    [
        (0.25, 0.0, "distance stays.*larger batch, or lower the follower's learning rate"),
        (0.1, 0.15, "has been rising.*longer interval"),
        (1.0, -0.05, "is falling.*longer warmup"),
        (2.5, 0.0, "raise the temperature"),
    ],
)
def test_the_alarm_says_what_to_change_and_says_it_once(
    problem: Problem, distance: float, drift: float, advice: str
) -> None:
    lagging = stubborn(problem, distance, drift)
    run = run_of(lagging, 12, correction="off")
    with pytest.warns(UserWarning, match=advice) as caught:
        run.run()
    assert len(caught) == 1
    assert [row["alarm"] for row in run.history[:5]] == [0] * 5  # too early to judge
    assert any(row["alarm"] == 1 for row in run.history)
    keys = {"gap", "gap_se", "gap_debiased", "effective_sample_size", "kl", "alarm", "corrected", "skipped_steps"}
    assert keys <= set(run.history[-1])


def test_no_alarm_without_lag_and_none_for_paths_of_several_steps(problem: Problem) -> None:
    base = known(problem)
    follower = Known(base.enumeration, base.log_prior, TEMPERATURE)
    leader = lm.LinearLeader(base.enumeration, problem.parameters[0].detach())
    run = run_of(Problem(leader, problem.objective, follower), 8)
    run.run()
    assert all(row["alarm"] == 0 and row["corrected"] == 0 and row["gap"] < 1e-12 for row in run.history)


def test_few_effective_samples_of_a_tilt_raise_the_alarm(problem: Problem) -> None:
    rollouts = sampled(problem, known(problem).log_prior, 8, 4, torch.Generator().manual_seed(0))
    weight = torch.tensor([4.0, 0.0, 0.0, 0.0]).repeat(8)
    found = certify(problem, dataclasses.replace(rollouts, weight=weight))
    assert found is not None and found.gap is None and found.effective_sample_size == pytest.approx(0.25)
    assert found.alarm is not None and "1.0 of 4 completions" in found.alarm
    assert not found.correction_pays


@pytest.mark.parametrize(("correction", "expected"), [("on", 1), ("off", 0), ("auto", 1)])
def test_the_correction_is_an_option_of_the_loop(problem: Problem, correction: str, expected: int) -> None:
    run = run_of(stubborn(problem, 0.2), 2, correction=correction)
    run.run()
    assert [row["corrected"] for row in run.history] == [expected] * 2
    with pytest.raises(InputError, match=r"HPGDConfig.correction: expected 'auto' or 'on' or 'off', got 'maybe'"):
        HPGDConfig(correction="maybe")


def test_the_rule_at_its_ends() -> None:
    sure = Certificate(0.2, 0.01, 0.2, 0.01, 0.8, 0.5, 512, 8.0, weight=None)
    assert sure.correction_pays
    assert not dataclasses.replace(sure, gap_debiased=0.0).correction_pays  # nothing to correct
    assert not dataclasses.replace(sure, gap_debiased_se=0.15).correction_pays  # not known to be there
    assert not dataclasses.replace(sure, paths=8).correction_pays  # too few paths for the weights' variance
    assert not dataclasses.replace(sure, gap_debiased=4.0).correction_pays  # too far
    assert not dataclasses.replace(sure, gap_debiased=1e6).correction_pays


# ---- groups without information ----


class Network(Leader):
    """A reward from features by a small network in single precision; fails when it is asked for too much at once."""

    def __init__(self, limit: int | None = None, message: str = "DefaultCPUAllocator: can't allocate memory") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
        self.limit, self.message = limit, message

    def reward(self, rollouts: Rollouts) -> Tensor:
        hidden = self.body[:2](rollouts.steps["features"])
        out: Tensor = self.body[2](hidden)
        if self.limit is not None and torch.is_grad_enabled() and rollouts.size > self.limit:
            hidden.register_hook(self._fail)  # in the backward pass, when the last layer's .grad is there already
        return out

    def _fail(self, gradient: Tensor) -> Tensor:
        raise RuntimeError(self.message)


def batch(groups: int = 32, size: int = 8) -> Rollouts:
    generator = torch.Generator().manual_seed(1)
    count = groups * size
    steps = {
        "features": torch.randn(count, 16, generator=generator),
        "score": torch.randn(count, 1, generator=generator, dtype=torch.float64),
        "completion": [f"text {i}" for i in range(count)],
    }
    return Rollouts.bandit(contexts=torch.arange(groups).repeat_interleave(size), steps=steps)


class Asked:
    """A judge that counts what it is asked."""

    def __init__(self) -> None:
        self.paths = 0

    def __call__(self, leader: Leader, rollouts: Rollouts) -> Tensor:
        self.paths += rollouts.size
        score: Tensor = rollouts.steps["score"]
        return score


def network_problem(problem: Problem, leader: Leader, judge: Any = None) -> Problem:
    return Problem(leader, ExpectedUtility(Asked() if judge is None else judge), problem.follower)


def gradients(leader: Leader) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in leader.parameters() if p.grad is not None])


def test_groups_that_say_nothing_are_skipped_and_counted(problem: Problem) -> None:
    rollouts = batch(4, 4)
    rollouts.steps["completion"][0:4] = ["same"] * 4
    rollouts.steps["features"][0:4] = rollouts.steps["features"][0]
    rollouts.steps["score"][4:8] = 0.1 + 0.2  # judged alike, and no round number
    noisy = network_problem(problem, Network())
    metrics = PolicyResponse().backward(noisy, rollouts)
    assert metrics["degenerate_groups"] == 0.5
    mixed = gradients(noisy.leader)
    noisy.leader.zero_grad(set_to_none=True)
    PolicyResponse().backward(noisy, rollouts.select(slice(8, 16)))
    torch.testing.assert_close(2 * mixed, gradients(noisy.leader), rtol=1e-5, atol=1e-8)


def test_a_step_without_any_information_is_skipped(problem: Problem) -> None:
    """Adam's momentum must not move the leader where nothing points."""
    base = known(problem)
    leader = lm.LinearLeader(base.enumeration, problem.parameters[0].detach())
    judged: list[Any] = [base.enumeration.judge]
    objective = ExpectedUtility(lambda leader, rollouts: judged[0](leader, rollouts))
    run = run_of(Problem(leader, objective, Known(base.enumeration, base.log_prior, TEMPERATURE)), 3)
    run.run()
    before = leader.x.detach().clone()
    judged[0] = lambda leader, rollouts: torch.full((rollouts.size, 1), 0.7, dtype=torch.float64)
    run.config = dataclasses.replace(run.config, steps=6)
    with pytest.warns(UserWarning, match="gradient is zero, so that its step is skipped") as caught:
        run.run()
    assert len(caught) == 1
    assert torch.equal(leader.x.detach(), before)
    assert [row["skipped_steps"] for row in run.history] == [0, 0, 0, 1, 2, 3]
    assert run.history[-1]["degenerate_groups"] == 1


def test_a_gradient_that_is_not_finite_leaves_the_leader_alone(problem: Problem) -> None:
    class Root(lm.LinearLeader):
        def score(self, *arguments: Any, **columns: Any) -> Tensor:
            return super().score(*arguments, **columns) + (self.x - self.x.detach()).abs().sum().sqrt()

    base = known(problem)
    leader = Root(base.enumeration, problem.parameters[0].detach())
    run = run_of(Problem(leader, problem.objective, Known(base.enumeration, base.log_prior, TEMPERATURE)), 2)
    with pytest.raises(InputError, match=r"gradient is not finite at leader step 1 .*square root"):
        run.run()
    assert torch.isfinite(leader.x).all()


# ---- memory ----


def test_eight_chunks_are_one(problem: Problem) -> None:
    """In single precision as well, relative to the whole gradient."""
    rows = []
    for chunks in (1, 8):
        leader = Network()
        PolicyResponse(chunks=chunks).backward(network_problem(problem, leader), batch(64, 8))
        rows.append(gradients(leader).double())
    assert (rows[0] - rows[1]).norm() <= 1e-6 * rows[0].norm()


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB", "can't allocate memory: 12"])
@pytest.mark.parametrize("before", [False, True])
def test_memory_that_runs_out_halves_the_chunks(problem: Problem, message: str, before: bool) -> None:
    """The same gradient, the judge asked once, what was in .grad kept, and the new size remembered."""
    whole, small, judge = Network(), Network(limit=50, message=message), Asked()
    start = [torch.ones_like(p) for p in whole.parameters()] if before else [None] * 4
    for leader in (whole, small):
        for parameter, old in zip(leader.parameters(), start, strict=True):
            parameter.grad = None if old is None else old.clone()
    PolicyResponse().backward(network_problem(problem, whole), batch())
    estimator = PolicyResponse()
    with pytest.warns(UserWarning, match=r"ran out of memory with chunks of (256|128|64) paths") as caught:
        metrics = estimator.backward(network_problem(problem, small, judge), batch())
    assert len(caught) == 3  # 256 -> 128 -> 64 -> 32
    assert estimator.chunks == 8 and judge.paths == 256
    torch.testing.assert_close(gradients(small), gradients(whole), rtol=1e-5, atol=1e-8)
    assert metrics["gradient_norm"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.backward(network_problem(problem, small), batch())  # it starts where it has ended
    again = PolicyResponse()
    again.load_state_dict(estimator.state_dict())
    assert again.chunks == 8


def test_memory_that_does_not_hold_one_path_is_an_error(problem: Problem) -> None:
    with (
        pytest.warns(UserWarning, match="ran out of memory"),
        pytest.raises(InputError, match=r"a single path \(CUDA out of memory\); train fewer of its parameters"),
    ):
        PolicyResponse().backward(network_problem(problem, Network(0, "CUDA out of memory")), batch(2, 4))


def test_other_errors_pass_through(problem: Problem) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PolicyResponse().backward(network_problem(problem, Network(0, "shapes cannot be multiplied")), batch(2, 4))
