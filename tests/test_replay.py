"""Judged batches used again: weighted to the present best response, drawn the same after a resume, paid once."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import numpy as np
import pytest
import torch
from known_follower import Known

import toy_cmdp
from align_cbrl import (
    HPGD,
    ExpectedUtility,
    FunctionOfMeans,
    HPGDConfig,
    InputError,
    Leader,
    Natural,
    PolicyResponse,
    Problem,
    Rollouts,
)
from align_cbrl.estimators.certificate import certify, corrected
from align_cbrl.estimators.replay import Memory, at_present, taken_for_response
from align_cbrl.llm import Judge
from align_cbrl.objectives import target_shares
from align_cbrl.runs.checkpoints import load_checkpoint, save_checkpoint


def run_of(out: Path | None, steps: int, **settings: Any) -> HPGD:
    problem = toy_cmdp.preferences(seed=2)
    optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.05, maximize=True)
    config = HPGDConfig(
        **{
            "steps": steps,
            "contexts_per_step": 4,
            "group_size": 8,
            "checkpoint_every": 3,
            "progress": False,
            **settings,
        }
    )
    return HPGD(problem, optimizer, PolicyResponse(), config, out)


def weights(run: HPGD) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.problem.parameters])


def test_an_old_batch_gives_the_hypergradient_at_the_present_leader() -> None:
    problem = toy_cmdp.preferences(seed=2)
    (x,) = problem.parameters
    contexts = torch.arange(4)
    problem.follower.respond(problem.leader, contexts)
    batches = [problem.follower.rollout(contexts, 256, torch.Generator().manual_seed(i)) for i in range(40)]
    with torch.no_grad():
        x += 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    toy_cmdp.leader_value(problem).backward()
    exact, x.grad = x.grad, None
    assert exact is not None

    def estimates(weighted: bool) -> torch.Tensor:
        rows = []
        for batch in batches:
            x.grad = None
            found = certify(problem, batch)
            assert found is not None
            PolicyResponse().backward(problem, corrected(batch, found) if weighted else batch)
            assert x.grad is not None
            rows.append(x.grad)
        return torch.stack(rows)

    rows = estimates(weighted=True)
    error = rows.std(0) / len(rows) ** 0.5
    # Self-normalised weights are biased by O(1 / 256).
    assert ((rows.mean(0) - exact).abs() < 4 * error + 0.02 * exact.norm()).all()
    stale = estimates(weighted=False)
    assert ((stale.mean(0) - exact).abs() > 4 * error + 0.02 * exact.norm()).any()  # the check can fail


def test_replays_make_more_of_what_was_judged() -> None:
    start = toy_cmdp.leader_value(run_of(None, 1).problem).item()
    gained = []
    for replays in (0, 8):
        run = run_of(None, 10, replays=replays)
        run.run()
        gained.append(toy_cmdp.leader_value(run.problem).item() - start)
    assert gained[1] > 1.5 * gained[0] > 0
    assert 0 < run.history[-1]["replay_effective_sample_size"] <= 1


@pytest.mark.parametrize("correction", ["auto", "off"])
def test_a_resumed_run_replays_the_same_batches(tmp_path: Path, correction: str) -> None:
    settings = {"replays": 3, "correction": correction}
    whole = run_of(tmp_path / "whole", 8, **settings)
    whole.run()
    run_of(tmp_path / "cut", 5, **settings).run()
    resumed = run_of(tmp_path / "cut", 8, **settings)
    resumed.run(resume=True)
    torch.testing.assert_close(weights(whole), weights(resumed), rtol=0, atol=0)


def test_a_judge_is_not_asked_again() -> None:
    run = run_of(None, 6, replays=4)
    asked = []

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        asked.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    judge = Judge(score)

    def utility(leader: Any, rollouts: Rollouts) -> torch.Tensor:
        words = [str(action) * (int(action) + 1) for action in rollouts.steps["action"][:, 0]]
        steps = {"prompt": [str(int(c)) for c in rollouts.contexts], "completion": words}
        return judge(None, Rollouts.bandit(contexts=rollouts.contexts, steps=steps))

    object.__setattr__(run.problem.objective, "utility_function", utility)
    run.run()
    assert len(asked) == len(set(asked)) == judge.calls


def test_the_memory_forgets_the_oldest() -> None:
    memory = Memory(capacity=2)
    for context in range(3):
        memory.add(Rollouts.bandit(contexts=torch.tensor([context]), steps={}))
    seen = {int(batch.contexts) for batch in memory.draw(40, seed=0)}
    assert seen == {1, 2} and len(memory) == 2


def test_paths_of_several_steps_are_refused() -> None:
    problem = toy_cmdp.random_cmdp(seed=1)
    optimizer = torch.optim.Adam(problem.leader.parameters(), lr=0.05, maximize=True)
    config = HPGDConfig(steps=2, replays=1, progress=False)
    run = HPGD(problem, optimizer, PolicyResponse(toy_cmdp.exact.ExactCritic()), config)
    with pytest.raises(InputError, match="one step"):
        run.run()
    with pytest.raises(InputError, match="replays"):
        HPGDConfig(replays=-1)


def test_columns_of_any_kind_survive_a_checkpoint(tmp_path: Path) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    columns: dict[str, Any] = {
        "when": [datetime.datetime(2024, 1, 1, 3, 4, 5, 6, tzinfo=zone), None],
        "day": [datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)],
        "at": [datetime.time(3), datetime.time(4)],
        "took": [datetime.timedelta(days=3, microseconds=1), datetime.timedelta(seconds=-1)],
        "price": [decimal.Decimal("1.50"), decimal.Decimal("NaN")],
        "raw": [b"\x00\xff", b""],
        "share": [math.inf, -math.inf],
        "nested": [[{"day": datetime.date(2024, 1, 1)}, 1], [{"day": None}]],
        "array": [np.array([1, 2]), np.float32(0.5)],
        "follower": torch.tensor([0, 1]),
    }
    memory = Memory()
    memory.add(Rollouts.bandit(contexts=torch.tensor([0, 1]), steps=columns))
    save_checkpoint(tmp_path, 1, {"memory": memory.state_dict()}, fingerprint="f")
    again = Memory()
    again.load_state_dict(load_checkpoint(tmp_path, fingerprint="f")[1]["memory"])
    steps = dict(again.draw(1, 0)[0].steps)
    assert steps.pop("array") == [[1, 2], 0.5] and steps.pop("follower").tolist() == [0, 1]
    assert {name: repr(column) for name, column in steps.items()} == {name: repr(columns[name]) for name in steps}
    assert len(steps) == len(columns) - 2


def test_a_column_that_no_checkpoint_holds_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="replays: the column 'image' holds values that a checkpoint cannot, of type"):
        Memory().add(Rollouts.bandit(contexts=torch.tensor([0]), steps={"image": [object()]}))


def test_with_the_correction_off_a_remembered_batch_keeps_how_the_follower_missed_its_best_response() -> None:
    """Exactly: weights are those of pi exp((r now - r then) / lambda), whatever pi was."""
    problem = toy_cmdp.preferences(seed=2)
    (x,) = problem.parameters
    answers = 6
    every = everything(problem, answers)
    assert every.log_policy is not None
    missed = 0.3 * torch.randn(every.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy = torch.softmax((every.log_policy[:, 0] + missed).view(4, answers), 1)  # of a follower that misses
    lagging = dataclasses.replace(every, log_policy=policy.log().view(-1, 1), weight=answers * policy.flatten())
    with torch.no_grad():
        then = problem.leader.reward(lagging)[:, 0]
        kept = {"off": taken_for_response(problem, lagging), "on": lagging}
        x += 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
        change = (problem.leader.reward(lagging)[:, 0] - then) / problem.temperature
        best = torch.softmax((every.log_policy[:, 0] + change).view(4, answers), 1)
    found = {name: at_present(problem, batch).weight.view(4, answers) / answers for name, batch in kept.items()}  # type: ignore[union-attr]
    moved = torch.softmax(policy.log() + change.view(4, answers), 1)
    torch.testing.assert_close(found["off"], moved, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["on"], best, rtol=1e-9, atol=1e-12)
    assert (moved - best).abs().max() > 0.02  # the two differ


def everything(problem: Problem, answers: int) -> Rollouts:
    """Every answer in every context, once, with the best response's log-probabilities."""
    contexts = torch.arange(4)
    problem.follower.respond(problem.leader, contexts)
    sampled = problem.follower.rollout(contexts, answers, torch.Generator().manual_seed(0))
    action = torch.arange(answers).repeat(4)[:, None]  # [B, 1]
    log_policy = sampled.steps["log_policy_all"][:, 0].gather(1, action)
    reward = problem.leader.reward(dataclasses.replace(sampled, steps={**sampled.steps, "action": action})).detach()
    return dataclasses.replace(
        sampled,
        steps={**sampled.steps, "action": action},
        log_policy=log_policy,
        log_prior=log_policy - reward / problem.temperature,  # up to a constant of the context
    )


class Missing(Known):
    """Its policy misses the best response always in the same way, as one of little capacity or patience does."""

    missed: torch.Tensor

    def respond(self, leader: Leader, contexts: torch.Tensor) -> dict[str, float]:
        self.log_policy = torch.log_softmax(self.best_response(leader) + self.missed, -1)
        return {}


@pytest.mark.parametrize(("correction", "least", "most"), [("off", 0.0, 0.02), ("on", 0.05, 0.2)])
def test_with_the_correction_off_the_policy_that_is_trained_hits_the_target(
    correction: str, least: float, most: float
) -> None:
    enumeration = lm.Enumeration.random(1)
    kind = enumeration.features[..., 0] > 0  # [P, N]
    generator = torch.Generator().manual_seed(0)
    log_prior = torch.randn(kind.shape, generator=generator, dtype=torch.float64)
    follower = Missing(enumeration, log_prior, temperature=1.0)
    follower.missed = 0.4 * kind

    def share(number: int) -> ExpectedUtility:
        def of(leader: Any, rollouts: Rollouts) -> torch.Tensor:
            place = enumeration.index(rollouts.steps["prompt"], rollouts.steps["completion_ids"])
            return (kind[place] == (number == 0)).double()[:, None]

        return ExpectedUtility(of)

    objective = FunctionOfMeans(target_shares([0.3, 0.7]), [share(0), share(1)])
    leader = lm.LinearLeader(enumeration, torch.zeros(5, dtype=torch.float64))
    config = HPGDConfig(
        steps=24, contexts_per_step=8, group_size=64, correction=correction, natural=Natural(nats=0.1, memory=8),
        progress=False,
    )  # fmt: skip
    HPGD(Problem(leader, objective, follower), config=config).run()
    follower.respond(leader, torch.arange(4))
    found = (follower.log_policy.exp() * kind).sum(-1).mean().item()
    assert least <= abs(found - 0.3) < most
