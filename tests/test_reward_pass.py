"""One forward pass of the leader for the weights of a replay and its gradient: the same, and nothing held on to."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from known_follower import Samples
from torch import Tensor, nn

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, KLPriced, Leader, PolicyResponse, Problem, Rollouts
from align_cbrl import hpgd as loop
from align_cbrl.estimators.reward_pass import let_go, reward_of, with_reward

GROUPS, SIZE = 6, 8


class Network(Leader):
    """A reward by a small network, which counts its passes; short of memory for more than `limit` paths at once."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.limit, self.passes = limit, 0
        self.hidden: weakref.ref[Tensor] | None = None

    def reward(self, rollouts: Rollouts) -> Tensor:
        self.passes += 1
        hidden = self.body[:2](rollouts.steps["features"])
        self.hidden = weakref.ref(hidden)
        if self.limit is not None and torch.is_grad_enabled() and rollouts.size > self.limit:
            hidden.register_hook(self._fail)  # in the backward pass
        out: Tensor = self.body[2](hidden)
        return out

    def _fail(self, gradient: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def batch(seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    count = GROUPS * SIZE
    log_policy = -3 - torch.rand(count, generator=generator, dtype=torch.float64)
    return Rollouts.bandit(
        contexts=torch.arange(GROUPS).repeat_interleave(SIZE),
        steps={
            "features": torch.randn(count, 5, generator=generator, dtype=torch.float64),
            "score": torch.randn(count, 1, generator=generator, dtype=torch.float64),
        },
        log_policy=log_policy,
        log_prior=log_policy - 0.3 * torch.rand(count, generator=generator, dtype=torch.float64),
    )


def problem_of(leader: Leader) -> Problem:
    return Problem(leader, KLPriced(ExpectedUtility(lambda leader, r: r.steps["score"]), 0.1), Samples())


def run_of(leader: Leader, **options: object) -> HPGD:
    optimizer = torch.optim.Adam(leader.parameters(), lr=0.01, maximize=True)
    return HPGD(problem_of(leader), optimizer, config=HPGDConfig(progress=False, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("correction", ["auto", "on", "off"])
def test_the_steps_are_those_of_separate_passes_and_a_replay_costs_one(
    correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, passes, rows = [], [], []
    for shared in (True, False):
        leader = Network()
        run = run_of(leader, replays=3, correction=correction)
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(loop, "with_reward", lambda problem, rollouts: rollouts)
            rows.append([run.leader_step(batch(seed)) for seed in range(4)])
        ends.append(torch.cat([p.detach().flatten() for p in leader.parameters()]))
        passes.append(leader.passes)
        assert all(set(kept.known).isdisjoint({leader}) for kept in run._memory.batches)
        assert not any(value.requires_grad for kept in run._memory.batches for value in kept.known.values())
    assert torch.equal(*ends)
    assert rows[0] == rows[1]
    # Certificate, weights to remember by, gradient; and each replay.
    assert passes[0] == 4 * (2 + 3 + (correction == "off"))
    assert passes[1] == 4 * (2 + 2 * 3 + (correction == "off"))


def test_a_leader_that_also_has_fixed_features_passes_once() -> None:
    """As a frozen reward with a learned correction has."""

    class Corrected(Network):
        def fixed_features(self, rollouts: Rollouts) -> Tensor:
            return rollouts.steps["features"][:, :1]

        def reward(self, rollouts: Rollouts) -> Tensor:
            return rollouts.known[self] + super().reward(rollouts)

    leader = Corrected()
    run = run_of(leader, replays=2)
    for seed in range(2):
        run.leader_step(batch(seed))
    assert leader.passes == 2 * (2 + 2)


def test_the_graph_is_let_go_and_a_second_backward_pass_makes_its_own() -> None:
    leader = Network()
    problem = problem_of(leader)
    rollouts = with_reward(problem, batch())
    assert reward_of(leader, rollouts).requires_grad and leader.passes == 1
    found = []
    for _ in range(2):
        leader.zero_grad()
        PolicyResponse().backward(problem, rollouts)
        found.append(torch.cat([p.grad.flatten() for p in leader.parameters() if p.grad is not None]))
    assert torch.equal(*found) and float(found[0].norm()) > 1e-3
    assert leader.passes == 2
    with torch.no_grad():  # what it said is still known
        torch.testing.assert_close(reward_of(leader, rollouts), leader.reward(rollouts), rtol=0, atol=0)


def test_a_shortage_of_memory_gives_the_graph_up_before_smaller_pieces_are_tried() -> None:
    whole, small = Network(), Network(limit=GROUPS * SIZE // 4)
    PolicyResponse().backward(problem_of(whole), batch())
    rollouts = with_reward(problem_of(small), batch())
    held = small.hidden
    assert held is not None and held() is not None
    estimator = PolicyResponse()
    with pytest.warns(UserWarning, match="ran out of memory"):
        estimator.backward(problem_of(small), rollouts)
    gc.collect()
    assert held() is None
    assert estimator.chunks == 4
    for own, other in zip(small.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_a_forward_pass_without_room_for_its_graph_leaves_it_to_the_chunks() -> None:
    class Tight(Network):
        scarce = False

        def reward(self, rollouts: Rollouts) -> Tensor:
            if self.scarce and torch.is_grad_enabled() and rollouts.size > GROUPS * SIZE // 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().reward(rollouts)

    whole, tight = Tight(), Tight()
    runs = [run_of(leader, replays=1) for leader in (whole, tight)]
    for run in runs:
        run.leader_step(batch())
    tight.scarce = True
    runs[0]._replay()
    with pytest.warns(UserWarning, match="ran out of memory"):
        runs[1]._replay()
    assert [run.hypergradient.chunks for run in runs] == [1, 2]
    for own, other in zip(tight.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_a_reward_that_is_a_view_can_be_let_go() -> None:
    class Rows(Network):
        def reward(self, rollouts: Rollouts) -> Tensor:
            return super().reward(rollouts)[:, 0][:, None]

    leader = Rows()
    rollouts = with_reward(problem_of(leader), batch())
    let_go(leader, rollouts)
    assert not reward_of(leader, dataclasses.replace(rollouts, known={})).is_leaf
    with torch.no_grad():
        assert not reward_of(leader, rollouts).requires_grad
