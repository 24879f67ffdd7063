"""Estimators, critics and the certificate by their definitions; each test notices a fault that was put in by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from align_cbrl import (
    HPGD,
    ExpectedUtility,
    FittedCritic,
    Follower,
    HPGDConfig,
    InputError,
    Leader,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.estimators import geometric
from align_cbrl.estimators.certificate import Certificate, certify, corrected
from align_cbrl.estimators.degenerate import degenerate_groups
from align_cbrl.estimators.hypergradient import accumulate
from align_cbrl.estimators.random_numbers import generator_for
from align_cbrl.estimators.replay import Memory
from align_cbrl.estimators.sampler_evidence import ALARM
from align_cbrl.functional import debiased_gap, effective_sample_size, group_advantage, returns_to_go, tilt_weights
from toy_cmdp import ExactCritic, preferences, random_cmdp


def paths_of(problem: Problem, count: int, seed: int = 0) -> Rollouts:
    contexts = torch.arange(count) % problem.follower.cmdp.contexts  # type: ignore[attr-defined]
    problem.follower.respond(problem.leader, contexts)
    return problem.follower.rollout(contexts, 1, torch.Generator().manual_seed(seed))


# ---- FittedCritic: cross-fitting, its averages and what stands in where nothing was seen ----


@dataclasses.dataclass
class ByDefinition:
    """FittedCritic in loops: returns of the *other* folds' visits, averaged by cell and by (cell, action)."""

    rollouts: Rollouts
    cell: Tensor  # [B, T + 1]
    returns: Tensor  # [B, T]
    folds: int

    def mean(self, fold: int, cell: int | None = None, action: int | None = None) -> float:
        found = [
            self.returns[b, t].item()
            for b in range(self.rollouts.size)
            for t in range(self.rollouts.horizon)
            if b % self.folds != fold
            and self.rollouts.mask[b, t]
            and (cell is None or self.cell[b, t] == cell)
            and (action is None or self.rollouts.steps["action"][b, t] == action)
        ]
        if found:
            return sum(found) / len(found)
        return self.mean(fold) if action is None else self.mean(fold, cell)

    def advantage(self, b: int, t: int) -> float:
        cell, fold = int(self.cell[b, t]), b % self.folds
        policy = self.rollouts.steps["log_policy_all"][b, t].exp().tolist()
        q = [self.mean(fold, cell, action) for action in range(len(policy))]
        return q[int(self.rollouts.steps["action"][b, t])] - sum(p * v for p, v in zip(policy, q, strict=True))


@pytest.mark.parametrize("horizon", [None, 3])
@pytest.mark.parametrize("folds", [2, 3])
def test_the_fitted_critic_by_its_definition(horizon: int | None, folds: int) -> None:
    """Few paths of many cells, so that every kind of gap occurs; a leader that moves everything, P included."""
    problem = random_cmdp(seed=4, states=4, actions=3, horizon=horizon)
    rollouts = paths_of(problem, 7)
    if horizon is None:
        rollouts = dataclasses.replace(
            rollouts,
            mask=rollouts.mask[:, :4],
            group=rollouts.group[:, :4],
            log_policy=rollouts.log_policy[:, :4],  # type: ignore[index]
            log_prior=rollouts.log_prior[:, :4],  # type: ignore[index]
            steps={
                "state": rollouts.steps["state"][:, :5],
                "action": rollouts.steps["action"][:, :4],
                "log_policy_all": rollouts.steps["log_policy_all"][:, :4],
                "ended": torch.zeros(7, dtype=torch.bool),
            },
        )
    cmdp = problem.follower.cmdp  # type: ignore[attr-defined]
    credit = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = FittedCritic(cmdp.cell, folds).evaluate(problem, rollouts, credit)
    assert found.value is not None and found.soft_value is not None
    assert rollouts.log_policy is not None and rollouts.log_prior is not None

    discount, temperature = problem.follower.discount, problem.follower.temperature
    own = problem.leader.reward(rollouts).detach() - temperature * (rollouts.log_policy - rollouts.log_prior)
    cell, mask = cmdp.cell(rollouts), rollouts.mask
    leader = ByDefinition(rollouts, cell, returns_to_go(credit, mask, problem.objective.discount), folds)
    soft = ByDefinition(rollouts, cell, returns_to_go(own, mask, discount), folds)
    survives = [horizon is None] * rollouts.size
    for b in range(rollouts.size):
        for t in range(rollouts.horizon + 1):
            met = survives[b] if t == rollouts.horizon else bool(mask[b, t])
            here, fold = int(cell[b, t]), b % folds
            assert found.value[b, t].item() == pytest.approx(leader.mean(fold, here) if met else 0, abs=1e-12)
            assert found.soft_value[b, t].item() == pytest.approx(soft.mean(fold, here) if met else 0, abs=1e-12)
            if t < rollouts.horizon:
                want = leader.advantage(b, t) if mask[b, t] else 0
                assert found.advantage[b, t].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("folds", [2, 3])
def test_no_path_is_judged_by_its_own_future(folds: int) -> None:
    problem = random_cmdp(seed=1)
    rollouts = paths_of(problem, 12)
    critic = FittedCritic(problem.follower.cmdp.cell, folds)  # type: ignore[attr-defined]
    credit = torch.zeros(rollouts.mask.shape, dtype=torch.float64)
    before = critic.evaluate(problem, rollouts, credit)
    for b in range(12):
        moved = credit.clone()
        moved[b] = 100.0
        after = critic.evaluate(problem, rollouts, moved)
        assert after.value is not None and before.value is not None
        assert torch.equal(after.advantage[b], before.advantage[b])
        assert torch.equal(after.value[b], before.value[b])
        assert not torch.equal(after.value, before.value)  # the others learn of it


# ---- the certificate, on log-ratios of one's choice ----


class Scaled(Leader):
    """A reward that is a column of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def reward(self, rollouts: Rollouts) -> Tensor:
        return self.scale * rollouts.steps["reward"][:, None]


class Standing(Follower):
    """Only its temperature and discount are asked for."""

    def __init__(self, temperature: float = 1.0, discount: float | Tensor = 0.0) -> None:
        self.temperature, self.discount = temperature, discount

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("not needed")

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        raise AssertionError("not needed")

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        raise AssertionError("not needed")


def standing(**options: Any) -> Problem:
    utility = ExpectedUtility(lambda leader, rollouts: rollouts.steps["reward"][:, None])
    return Problem(Scaled(), utility, Standing(**options))


def with_log_ratios(rows: list[list[float]], **fields: Tensor) -> Rollouts:
    """A group for each row; log pi* / pi of its completions up to a constant, at temperature 1."""
    ratio = torch.tensor(rows, dtype=torch.float64)
    count, size = ratio.shape
    even = torch.full((count * size,), -2.0, dtype=torch.float64)
    steps = {"reward": ratio.reshape(-1), "completion": [str(i) for i in range(count * size)]}
    contexts = torch.arange(count).repeat_interleave(size)
    return Rollouts.bandit(contexts=contexts, steps=steps, **{"log_policy": even, "log_prior": even, **fields})


def certified(rows: list[list[float]], history: list[float] | None = None, correctable: bool = False) -> Certificate:
    earlier = [{"gap_debiased": gap} for gap in ([1.0] * 20 if history is None else history)]
    found = certify(standing(), with_log_ratios(rows), earlier, correctable=correctable)
    assert found is not None
    return found


FAR = [[2.0, -2.0, 2.0, -2.0]] * 3  # about 1.5 nats, the same in every group
NEAR = [[0.6, -0.6, 0.6, -0.6]] * 100  # about 0.2 nats


def test_an_alarm_needs_a_distance_beyond_two_standard_errors() -> None:
    unsure = certified([FAR[0], [0.0] * 4])
    assert unsure.gap_debiased is not None and unsure.gap_debiased_se is not None
    assert unsure.gap_debiased > 0.3 and unsure.gap_debiased - 2 * unsure.gap_debiased_se < 0
    assert unsure.alarm is None
    sure = certified(FAR)
    assert sure.gap_debiased_se == 0 and sure.alarm is not None


def test_the_first_alarm_comes_at_the_sixth_leader_step() -> None:
    assert certified(FAR, [1.0] * 4).alarm is None
    assert certified(FAR, [1.0] * 5).alarm is not None


def test_a_follower_that_is_corrected_for_may_be_farther_away() -> None:
    near = certified(NEAR)
    assert near.correction_pays and near.gap_debiased is not None and 0.1 < near.gap_debiased < 0.3
    assert near.alarm is not None and certified(NEAR, correctable=True).alarm is None
    assert certified(FAR * 100, correctable=True).alarm is not None


def test_the_trend_is_that_of_ten_leader_steps() -> None:
    gap = certified(FAR).gap_debiased
    assert gap is not None
    for history, words in (
        ([0.0] * 20 + [gap] * 9, "distance stays"),
        ([0.0] * 4 + [gap] * 5, "has been rising"),
        ([2 * gap] * 4 + [gap] * 5, "is falling"),
    ):
        alarm = certified(FAR, history).alarm
        assert alarm is not None and words in alarm


def test_a_trend_is_told_from_the_noise_of_both_halves_means() -> None:
    gap = certified(FAR).gap_debiased
    assert gap is not None
    noise = 0.1 * gap
    after = [gap + noise, gap - noise, gap + noise, gap - noise]  # and the present gap: deviation .1 of it
    for change, words in ((0.15, "has been rising"), (0.05, "distance stays"), (-0.15, "is falling")):
        alarm = certified(FAR, [(1 - change) * gap] * 5 + after).alarm
        assert alarm is not None and words in alarm


def test_beyond_a_nat_the_advice_is_a_higher_temperature() -> None:
    beyond, within = certified(FAR), certified(NEAR)
    assert beyond.gap_debiased is not None and beyond.gap_debiased > 1
    assert beyond.effective_sample_size * beyond.group_size > 2
    assert beyond.alarm is not None and "raise the temperature" in beyond.alarm
    assert within.alarm is not None and "raise the temperature" not in within.alarm


def test_the_rule_of_the_correction_at_its_edges() -> None:
    """2 c B gap > exp(2 gap) - 1 with c = 0.015, gap > 2 standard errors, and at least 0.001 nats."""
    sure = Certificate(0.2, 0.0, 0.2, 0.0, 0.8, 0.5, 512, 8.0, weight=None)
    edge = math.expm1(0.4) / (2 * 0.015 * 0.2)  # 81.97 paths
    assert dataclasses.replace(sure, paths=math.ceil(edge)).correction_pays
    assert not dataclasses.replace(sure, paths=math.floor(edge)).correction_pays
    assert dataclasses.replace(sure, gap_debiased_se=0.099).correction_pays
    assert not dataclasses.replace(sure, gap_debiased_se=0.101).correction_pays
    assert dataclasses.replace(sure, gap_debiased=0.0011).correction_pays
    assert not dataclasses.replace(sure, gap_debiased=0.0009).correction_pays


def test_one_follower_of_several_steps_is_enough_for_no_certificate() -> None:
    rollouts = with_log_ratios(FAR)
    assert certify(standing(discount=torch.tensor([0.0, 0.0, 0.0])), rollouts) is not None
    assert certify(standing(discount=torch.tensor([0.0, 0.9, 0.0])), rollouts) is None


def test_the_divergence_of_weighted_samples_is_weighted() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    rollouts = with_log_ratios([[0.0] * 4], log_policy=policy, log_prior=2 * policy, weight=weight)
    found = certify(standing(), rollouts)
    assert found is not None
    assert found.kl == pytest.approx((2 * 1 + 1 * 2 + 1 * 3) / 4, rel=1e-12)


def test_a_sample_without_weight_keeps_a_finite_log_probability() -> None:
    found = certified([[0.0, -2000.0, 0.0, 0.0]])
    rollouts = corrected(with_log_ratios([[0.0, -2000.0, 0.0, 0.0]]), found)
    assert rollouts.weight is not None and rollouts.log_policy is not None
    assert rollouts.weight[1] == 0
    assert torch.isfinite(rollouts.log_policy).all()


def test_corrected_samples_have_the_best_responses_log_probabilities() -> None:
    rows = [[0.3, -0.2, 0.5], [1.0, 0.0, -1.0]]
    found, rollouts = certified(rows), with_log_ratios(rows)
    ratio = torch.tensor(rows, dtype=torch.float64)
    weight = (ratio.exp() / ratio.exp().mean(1, keepdim=True)).reshape(-1)
    moved = corrected(rollouts, found)
    assert moved.weight is not None and moved.log_policy is not None and rollouts.log_policy is not None
    torch.testing.assert_close(moved.weight, weight)
    torch.testing.assert_close(moved.log_policy, rollouts.log_policy + weight.log()[:, None])
    assert corrected(moved, found).weight is not None


def test_the_numbers_of_a_certificate_by_their_definition() -> None:
    """Of several groups, of one, whose error is the delta method's, and of one completion, which says nothing."""
    rows = torch.tensor([[0.3, -0.2, 0.5, 0.1], [1.0, 0.0, -1.0, 2.0], [0.0, 0.1, 0.0, 0.2]], dtype=torch.float64)
    gaps = rows.exp().mean(1).log() - rows.mean(1)
    found = certified(rows.tolist())
    assert found.gap == pytest.approx(gaps.mean().item()) and found.gap_se == pytest.approx(gaps.std().item() / 3**0.5)
    share = rows.softmax(1)
    assert found.effective_sample_size == pytest.approx((1 / share.square().sum(1)).mean().item() / 4)
    assert (found.group_size, found.paths) == (4.0, 12)

    alone = certified(rows[1:2].tolist())
    influence = rows[1].exp() / rows[1].exp().mean() - rows[1]
    assert alone.gap == pytest.approx(gaps[1].item()) and alone.gap_se == pytest.approx(influence.std().item() / 2)
    one = certified([[0.3]])
    assert (one.gap, one.gap_se, one.gap_debiased, one.gap_debiased_se) == (None, None, None, None)
    assert (one.alarm, one.correction_pays, one.effective_sample_size) == (None, False, 1.0)


def test_log_ratios_are_in_nats_at_every_temperature() -> None:
    reward = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    rollouts = with_log_ratios(reward.tolist(), log_policy=policy, log_prior=2 * policy)
    for temperature in (0.25, 1.0, 3.0):
        found = certify(standing(temperature=temperature), rollouts)
        rho = reward[0] / temperature + policy
        assert found is not None and found.gap == pytest.approx((rho.exp().mean().log() - rho.mean()).item(), rel=1e-9)


class Suspected(Standing):
    """Its sampler has so many nats of evidence against it."""

    nats = 0.0

    def sampler_evidence(self) -> dict[str, float]:
        return {"flatter": self.nats, "ends": -50.0}


def test_evidence_against_the_sampler_comes_before_any_other_alarm() -> None:
    follower = Suspected()
    problem = dataclasses.replace(standing(), follower=follower)
    history = [{"gap_debiased": 1.0}] * 20
    for nats, wrong in ((ALARM - 0.1, False), (ALARM + 0.1, True)):
        follower.nats = nats
        for rows in ([[0.0] * 4], FAR):
            found = certify(problem, with_log_ratios(rows), history)
            assert found is not None and found.sampler_evidence == pytest.approx(nats)
            assert found.missampled == wrong
            assert ("not samples of the policy" in (found.alarm or "")) == wrong
            assert (found.alarm is None) == (not wrong and rows is not FAR)


# ---- weights of groups of different sizes ----


def test_weights_have_mean_one_in_groups_of_every_size() -> None:
    group = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    ratio = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = tilt_weights(ratio, group)
    means = torch.zeros(3, dtype=torch.float64).index_add(0, group, weight) / torch.tensor([2.0, 4.0, 1.0])
    torch.testing.assert_close(means, torch.ones(3, dtype=torch.float64))
    assert (effective_sample_size(weight, group) <= torch.tensor([2.0, 4.0, 1.0]) + 1e-12).all()
    assert debiased_gap(ratio, group)[2] == 0  # one sample has nothing to be compared with


def test_a_group_without_any_weight_is_refused() -> None:
    group, weight = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    for function in (effective_sample_size, lambda w, g: group_advantage(torch.ones(4), g, w)):
        with pytest.raises(InputError, match="importance weights of a group are all zero"):
            function(weight, group)


def test_scores_that_differ_little_beside_their_size_still_count() -> None:
    credit = torch.tensor([[1000.0], [1000.5], [2000.0], [2000.0]], dtype=torch.float64)
    rollouts = Rollouts.bandit(contexts=torch.tensor([0, 0, 1, 1]), steps={"completion": ["a", "b", "c", "d"]})
    advantage = (credit.view(2, 2) - credit.view(2, 2).mean(1, keepdim=True)).view(4, 1)
    empty, share = degenerate_groups(rollouts, rollouts, credit, advantage)
    assert empty.tolist() == [False, False, True, True] and share == 0.5


def test_what_is_judged_alike_points_nowhere_at_all() -> None:
    """Exactly: an optimizer with momentum must be able to tell that there is no gradient from a small one."""
    for value in (0.1 + 0.2, 0.7, 1 / 3, 1e6 / 7):
        for size in (3, 5, 6, 7):
            rollouts = with_log_ratios([[0.1 * i for i in range(size)]] * 2)
            objective = ExpectedUtility(lambda leader, rollouts: torch.full(rollouts.mask.shape, value).double())  # noqa: B023
            metrics = PolicyResponse().backward(dataclasses.replace(standing(), objective=objective), rollouts)
            assert (metrics["gradient_norm"], metrics["degenerate_groups"]) == (0.0, 1.0)


# ---- PolicyResponse and the loop ----


def test_gradients_add_up_and_the_norm_is_of_what_was_added() -> None:
    problem, ones = random_cmdp(), torch.ones(5, dtype=torch.float64)
    assert accumulate(problem, [ones]) == pytest.approx(5**0.5)
    assert accumulate(problem, [2 * ones]) == pytest.approx(20**0.5)
    assert accumulate(problem, [None]) == 0
    (x,) = problem.parameters
    assert x.grad is not None and x.grad.tolist() == [3.0] * 5


def test_chunks_that_a_shortage_of_memory_has_made_stay() -> None:
    for stored, after in ((2, 4), (8, 8)):
        estimator = PolicyResponse(chunks=4)
        estimator.load_state_dict({"chunks": stored})
        assert estimator.chunks == after


class BrokenReplays(PolicyResponse):
    """Of every two gradients, the leader's and that of the batch it replays, the second is infinite."""

    calls = 0

    def backward(self, problem: Problem, rollouts: Rollouts) -> dict[str, float]:
        metrics = super().backward(problem, rollouts)
        self.calls += 1
        if self.calls % 2:
            return metrics
        for parameter in problem.parameters:
            assert parameter.grad is not None
            parameter.grad.fill_(math.inf)
        return {**metrics, "gradient_norm": math.inf}


def test_a_replayed_gradient_that_is_not_finite_is_left_out() -> None:
    found = []
    for replays, estimator in ((0, PolicyResponse()), (1, BrokenReplays())):
        problem = preferences(seed=2)
        optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.05, maximize=True)
        config = HPGDConfig(steps=1, contexts_per_step=4, group_size=4, replays=replays, progress=False)
        HPGD(problem, optimizer, estimator, config).run()
        found.append(problem.parameters[0].detach())
    assert torch.equal(*found)


def test_the_norm_of_a_single_precision_gradient_does_not_overflow() -> None:
    class Single(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def reward(self, rollouts: Rollouts) -> Tensor:
            return self.scale * 1e15 * rollouts.steps["reward"][:, None].float()

    rollouts = with_log_ratios([[1e10, 0.0, 0.0, 0.0]])
    problem = dataclasses.replace(standing(), leader=Single())
    norm = PolicyResponse().backward(problem, rollouts)["gradient_norm"]
    assert math.isfinite(norm) and norm > 1e30


def test_every_leader_step_and_every_run_replay_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    draw = Memory.draw

    def noted(self: Memory, count: int, seed: int) -> list[Rollouts]:
        seeds.append(seed)
        return draw(self, count, seed)

    monkeypatch.setattr(Memory, "draw", noted)
    for seed in (0, 1):
        problem = preferences(seed=2)
        optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.05, maximize=True)
        config = HPGDConfig(steps=4, contexts_per_step=4, group_size=4, replays=2, progress=False, seed=seed)
        HPGD(problem, optimizer, PolicyResponse(), config).run()
    assert len(seeds) == len(set(seeds)) == 8


# ---- GradientEstimator, at horizons of one's choice ----


def test_the_gradient_estimator_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum of its docstring in loops, on paths that end and horizons that reach beyond their ends."""
    problem = random_cmdp(seed=3, states=2, actions=2, horizon=4)
    rollouts = paths_of(problem, 4)
    until, reach, far = torch.tensor([0, 1, 2, 9]), torch.tensor([2, 0, 5, 1]), torch.tensor([3, 1, 2, 2])
    horizons = iter((until, reach, far))
    monkeypatch.setattr(geometric, "_geometric", lambda discount, generator: next(horizons))
    problem.leader.zero_grad(set_to_none=True)
    geometric.GradientEstimator(ExactCritic()).backward(problem, rollouts)
    (x,) = problem.parameters
    assert x.grad is not None

    leader, objective = problem.leader, problem.objective
    assert rollouts.log_policy is not None and rollouts.log_prior is not None
    gamma, temperature, gamma_f = 0.9, 0.5, 0.8
    assert (problem.follower.discount, problem.temperature, objective.discount) == (gamma, temperature, gamma_f)
    utility = objective.utility(leader, rollouts)  # type: ignore[attr-defined]
    critique = ExactCritic().evaluate(problem, rollouts, utility.detach())
    reward, prior = leader.reward(rollouts), leader.log_prior(rollouts)
    law, first = leader.log_transition(rollouts), leader.log_initial(rollouts)
    assert prior is not None and law is not None and first is not None and critique.value is not None
    own = reward.detach() - temperature * (rollouts.log_policy - rollouts.log_prior)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        taken = [t for t in range(rollouts.horizon) if rollouts.mask[i, t]]
        m = int(until[i])
        total = total + critique.value[i, 0] * first[i]
        for t in (t for t in taken if t <= m):
            total = total + utility[i, t] + gamma_f * critique.value[i, t + 1] * law[i, t]
        if m not in taken:
            continue
        weight = critique.advantage[i, m] / ((1 - gamma_f) * temperature)
        for k in (k for k in taken if m <= k <= m + int(reach[i])):
            total = total + weight * (reward[i, k] + temperature * prior[i, k])
        for j in (j for j in taken if m <= j <= m + int(far[i])):
            total = total + weight * gamma ** ((j - m) / 2) * own[i, j] * law[i, m:j].sum()
    (want,) = torch.autograd.grad(total / 4, [x])
    torch.testing.assert_close(x.grad, want, rtol=1e-9, atol=1e-12)


def test_random_numbers_change_with_what_the_paths_did() -> None:
    """The same contexts and lengths at the same leader: another batch, other directions and levels."""
    problem, rollouts = standing(), with_log_ratios(FAR)
    assert rollouts.log_policy is not None
    other = dataclasses.replace(rollouts, log_policy=rollouts.log_policy - 1e-9)
    seeds = [generator_for(problem, batch, 0).initial_seed() for batch in (rollouts, other, rollouts)]
    assert seeds[0] == seeds[2] != seeds[1]
