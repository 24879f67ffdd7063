"""Followers that trl trains against their definitions; each test notices a fault that was put in by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from align_cbrl import Rollouts
from align_cbrl.functional import best_response_gap
from align_cbrl.llm import GRPOFollower, RLOOFollower, Schedule, TrainedFollower
from align_cbrl.llm.followers.prompt_order import PromptOrder

TEMPERATURE = 2.0
TWICE = {"num_iterations": 2}  # every batch is trained on twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm.build(tmp_path_factory.mktemp("enumerable"))


def made(folder: Path, kind: type[TrainedFollower] = RLOOFollower, **options: Any) -> TrainedFollower:
    """Four prompts, two a step."""
    return kind(
        folder, lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
        **{"prompts_per_step": 2, "group_size": 4, "learning_rate": 1e-3, **options},
    )  # fmt: skip


class Asked(lm.LinearLeader):
    """Keeps what it was asked to score by the trainer."""

    def __init__(self) -> None:
        x = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.6], dtype=torch.float64)
        super().__init__(lm.Enumeration.random(1), x)
        self.batches: list[list[list[int]]] = []

    def score(self, prompts: Any, completions: Any, **columns: Any) -> torch.Tensor:
        self.batches.append([list(ids) for ids in columns["completion_ids"]])
        return super().score(prompts, completions, **columns)


def weights(follower: TrainedFollower) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in follower.policy.parameters()])


# ---- batches that are trained on twice ----


def test_training_never_begins_with_completions_of_an_earlier_reward(folder: Path) -> None:
    follower, leader = made(folder, settings=TWICE), Asked()
    follower.train(leader, 1)
    assert len(leader.batches) == 1
    with torch.no_grad():
        leader.x.neg_()
    follower.train(leader, 1)  # the second half of the first batch's turn, had the reward stayed as it was
    assert len(leader.batches) == 2


def test_the_leaders_step_ends_the_use_of_its_batch(folder: Path) -> None:
    follower, leader = made(folder, settings=TWICE, interval=1), Asked()
    seen: list[str] = []

    def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        seen.append(str(rollouts.steps["completion_ids"]))
        return True

    follower.follow(leader, on_rollouts, start=0, steps=4, contexts_per_step=2, group_size=4, seed=0)
    assert len(seen) == len(set(seen)) == 4
    assert len(leader.batches) == 4


def test_prompts_follow_the_steps_number_where_batches_are_used_twice(folder: Path) -> None:
    """Steps 0 and 1 train on the prompts of step 0, steps 2 and 3 on those of step 2, also across two calls."""
    for calls in ((4,), (2, 2), (1, 3)):
        follower, leader, seen = made(folder, settings=TWICE, seed=1), Asked(), []
        for steps in calls:
            follower.train(leader, steps, lambda step: not seen.append(set(follower.newest.contexts.tolist())))  # noqa: B023
        order = PromptOrder(len(lm.PROMPTS), 2, seed=1)
        assert set(order(1)) != set(order(2))
        assert seen == [set(order(0)), set(order(0)), set(order(2)), set(order(2))]
        assert len(leader.batches) == 2 + (calls == (1, 3))  # the second use of a forgotten batch needs another one


def test_a_call_that_begins_in_the_middle_of_a_batchs_turn_ends_it_in_time(folder: Path) -> None:
    """The second call finds no batch, draws one for what is left of the turn, and another for the next."""
    follower, seen = made(folder, settings=TWICE, seed=0), []
    for steps in (1, 3):
        follower.train(Asked(), steps, lambda step: not seen.append(set(follower.newest.contexts.tolist())))
    order = PromptOrder(len(lm.PROMPTS), 2, seed=0)
    assert set(order(0)) != set(order(2))
    assert seen == [set(order(0)), set(order(0)), set(order(2)), set(order(2))]


# ---- states, seeds and schedules ----


def test_random_numbers_follow_the_steps_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has its own, the same in one call as in two."""
    found = []
    for calls in ((2,), (1, 1)):
        seeds: list[int] = []
        monkeypatch.setattr("align_cbrl.llm.followers.trl.observed.set_seed", seeds.append)
        follower = made(folder)
        for steps in calls:
            follower.train(Asked(), steps)
        found.append(seeds)
    assert found[0] == found[1] and len(set(found[0])) == 2


def test_a_reset_forgets_the_optimizers_moments(folder: Path) -> None:
    fresh, used = made(folder), made(folder)
    used.train(Asked(), 3)
    used.reset()
    for follower in (fresh, used):
        follower.train(Asked(), 2)
    torch.testing.assert_close(weights(used), weights(fresh), rtol=0, atol=0)


def test_each_iteration_draws_other_completions(folder: Path) -> None:
    follower, leader = made(folder, learning_rate=1e-12), Asked()
    follower.iterate(leader, torch.tensor([2]), 3, torch.Generator().manual_seed(0))
    assert len({str(batch) for batch in leader.batches}) == 3


def test_every_process_has_its_own_random_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted(Exception):
        pass

    def noted(seed: int) -> None:
        seeds.append(seed)
        raise Noted

    seeds: list[int] = []
    monkeypatch.setattr("align_cbrl.llm.followers.trl.observed.set_seed", noted)
    for process in (0, 1, 2):
        monkeypatch.setattr(Accelerator, "process_index", property(lambda self: process))  # noqa: B023
        with pytest.raises(Noted):
            made(folder).train(Asked(), 1)
    assert len(set(seeds)) == 3


def test_the_warmup_is_before_the_first_leader_step_only(folder: Path) -> None:
    outside = made(folder, schedule=Schedule(interval=2, warmup=3, inside=False))
    for steps in (5, 7):
        outside.respond(Asked(), torch.arange(2))
        assert outside.steps == steps

    inside, seen = made(folder, schedule=Schedule(interval=2, warmup=3)), []

    def on_rollouts(rollouts: Rollouts, metrics: dict[str, float]) -> bool:
        seen.append(metrics["follower_steps"])
        return True

    for start, steps in ((0, 2), (2, 3)):
        inside.follow(Asked(), on_rollouts, start=start, steps=steps, contexts_per_step=2, group_size=4, seed=0)
    assert seen == [5, 7, 9]


def test_the_gap_of_the_newest_batch_by_its_definition(folder: Path) -> None:
    follower, leader = made(folder), Asked()
    follower.train(leader, 2)
    newest = follower.newest
    assert newest.log_policy is not None and newest.log_prior is not None
    reward = leader.reward(newest).detach()
    ratio = (reward / TEMPERATURE - (newest.log_policy - newest.log_prior))[:, 0]
    want = best_response_gap(ratio, newest.contexts).mean().item()
    assert want > 1e-3 and follower.newest_gap() == pytest.approx(want, rel=1e-9)


def test_completions_of_a_policy_that_is_put_back_stay_counted(folder: Path) -> None:
    follower = made(folder)
    follower.train(Asked(), 1)
    state = follower.state_dict()
    follower.train(Asked(), 2)
    follower.load_state_dict(state)
    assert (follower.steps, follower.completions_seen) == (1, 3 * 8)


@pytest.mark.parametrize("adapted", [False, True])
def test_grpo_is_charged_for_the_log_ratio_that_the_leader_sees(
    folder: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool
) -> None:
    """Also of an adapter, whose reference is the policy without it; completions of different lengths."""
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapted else None
    follower = made(folder, GRPOFollower, group_size=16, learning_rate=0.02, peft_config=peft)
    follower.train(Asked(), 4)
    trainer = follower._built()
    charged: list[torch.Tensor] = []
    log_ratio = trainer._log_ratio  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer, "_log_ratio", lambda ids: charged.append(log_ratio(ids)) or charged[-1])
    follower.train(Asked(), 1)
    newest = follower.newest
    assert newest.log_policy is not None and newest.log_prior is not None
    assert len({len(ids) for ids in newest.steps["completion_ids"]}) > 1
    seen = (newest.log_policy - newest.log_prior)[:, 0]
    assert seen.abs().max() > 1e-2
    torch.testing.assert_close(charged[0].double(), seen, rtol=0, atol=1e-5)
