"""An adapter's reward to first order: one pass for everything, and the same leader step as without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_reward_models
import torch
from known_follower import Samples
from torch import Tensor

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, Natural, Problem, Rollouts
from align_cbrl.llm import LearnedBeta, LoRA, RewardModel, RewardModelLeader
from align_cbrl.llm.leaders import reward_model as leaders

TEXTS = ["a", "b c", "d", "e f a", "b b b", "c", "d e", "f f a b", "a c", "b", "e", "d d d"]


def batch(seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(TEXTS), generator=generator).tolist()
    log_policy = -2 - torch.rand(len(TEXTS), generator=generator, dtype=torch.float64)
    return Rollouts.bandit(
        contexts=torch.arange(len(TEXTS)) // 4,
        steps={"prompt": ["a b"] * len(TEXTS), "completion": [TEXTS[i] for i in order]},
        log_policy=log_policy,
        log_prior=log_policy - 0.1 * torch.rand(len(TEXTS), generator=generator, dtype=torch.float64),
    )


def adapted(path: Path, batch_size: int = 64, **options: Any) -> RewardModelLeader:
    """An adapter that has moved: at the start half of the gradient is zero."""
    torch.manual_seed(1)
    leader = RewardModelLeader(RewardModel(path, batch_size=batch_size), "lora", lora=LoRA(rank=2), **options)
    with torch.no_grad():
        for parameter in leader.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return leader


def by_definition(leader: RewardModelLeader, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    parameters = [p for p in leader.parameters() if p.requires_grad]
    reward = leader.reward(rollouts)[:, 0]
    each = [torch.autograd.grad(r, parameters, retain_graph=True) for r in reward]
    return reward.detach(), torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])


@pytest.mark.parametrize("architecture", tiny_reward_models.ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [64, 5])
def test_it_is_the_reward_and_each_paths_gradient(architecture: str, batch_size: int, tmp_path: Path) -> None:
    leader = adapted(tiny_reward_models.build(tmp_path / "model", architecture), batch_size, strength=1.7)
    leader.scale.fill_(0.6)
    found = leader.first_order(batch())
    reward, gradients = by_definition(leader, batch())
    assert found is not None and float(gradients.norm(dim=1).min()) > 1e-3
    torch.testing.assert_close(found[:, 1], reward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, 2:], gradients, rtol=1e-10, atol=1e-12)
    known = batch().knowing({leader: found})
    again = by_definition(leader, known)
    torch.testing.assert_close(again[0], reward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again[1], gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(leader.reward(known.select([3, 7]))[:, 0].detach(), reward[[3, 7]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("config", [HPGDConfig(natural=Natural()), HPGDConfig(natural=None, replays=3)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_leader_steps_are_those_without_it(
    config: HPGDConfig, chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_reward_models.build(tmp_path / "model", "gpt2")  # the others compute norms in single precision
    objective = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(t))] for t in r.steps["completion"]]))
    ends, passes = [], []
    for expanded in (True, False):
        leader = adapted(path)
        asked = [0]

        def score(*arguments: Any, inner: Any = leader.score, asked: list[int] = asked, **columns: Any) -> Tensor:
            asked[0] += 1
            return inner(*arguments, **columns)  # type: ignore[no-any-return]

        monkeypatch.setattr(leader, "score", score)
        if not expanded:
            monkeypatch.setattr(leader, "first_order", lambda rollouts: None)
        optimizer = torch.optim.SGD([p for p in leader.parameters() if p.requires_grad], 0.01, maximize=True)
        run = HPGD(
            Problem(leader, objective, Samples()),
            None if config.natural else optimizer,
            config=dataclasses.replace(config, progress=False),
        )
        run.hypergradient.chunks = chunks
        rows = [run.leader_step(batch(seed)) for seed in range(3)]
        assert all(leader not in remembered.known for remembered in run._memory.batches)  # worth nothing later
        ends.append(torch.cat([p.detach().flatten() for p in leader.parameters() if p.requires_grad]))
        passes.append(asked[0])
        assert rows[-1]["gradient_norm"] > 1e-4
    error = float((ends[0] - ends[1]).norm() / ends[1].norm())
    # Twelve paths say nothing of most parameters, in which a natural step amplifies rounding.
    assert error < (1e-5 if config.natural else 1e-9), error
    batches = 3 + (1 + 2 if config.natural else 3 * config.replays)  # those of each step, and the remembered ones
    assert passes[0] == chunks * batches < passes[1]


def test_a_learned_beta_passes_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_reward_models.build(tmp_path / "model", "gpt2")
    objective = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(t))] for t in r.steps["completion"]]))
    ends = []
    for expanded in (True, False):
        leader = LearnedBeta(adapted(path), beta=0.5, low=0.1, high=2.0)
        found = leader.first_order(batch())
        assert found is not None
        torch.testing.assert_close(found[:, 1], leader.reward(batch())[:, 0].detach(), rtol=1e-12, atol=1e-12)
        if not expanded:
            monkeypatch.setattr(leader, "first_order", lambda rollouts: None)
        run = HPGD(Problem(leader, objective, Samples()), config=HPGDConfig(natural=Natural(), progress=False))
        rows = [run.leader_step(batch(seed)) for seed in range(2)]
        ends.append(torch.cat([p.detach().flatten() for p in leader.parameters() if p.requires_grad]))
        assert rows[-1]["gradient_norm"] > 1e-4 and leader.beta != pytest.approx(0.5, abs=1e-6)
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 1e-5


def test_it_is_worth_nothing_once_the_parameters_have_moved(tmp_path: Path) -> None:
    leader = adapted(tiny_reward_models.build(tmp_path / "model"))
    found = leader.first_order(batch())
    assert found is not None
    with torch.no_grad():
        next(p for p in leader.parameters() if p.requires_grad).add_(1e-3)
    with pytest.raises(AssertionError, match="after the parameters had moved"):
        leader.reward(batch().knowing({leader: found}))


def test_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that sees tokens of all paths in a heap, as an expert does; checkpointing; other parts; no room."""
    path = tiny_reward_models.build(tmp_path / "model")
    leader = adapted(path)
    assert leader.adapter is not None
    layer: Any = next(iter(leader.adapter.layers.values()))
    inner = layer.forward
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda x: inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        reward = leader.reward(batch())
        assert leader.first_order(batch()) is None
    torch.testing.assert_close(reward, leader.reward(batch()))  # the model was the same
    assert adapted(path, gradient_checkpointing=True).first_order(batch()) is None
    assert RewardModelLeader(RewardModel(path), "head").first_order(batch()) is None
    more = adapted(path)
    next(iter(more.reward_model.head.parameters())).requires_grad_(True)
    assert more.first_order(batch()) is None
    monkeypatch.setattr(leaders, "_LARGEST_EXPANSION", 10)
    assert leader.first_order(batch()) is None


def test_where_memory_runs_out_the_step_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = adapted(tiny_reward_models.build(tmp_path / "model"))
    objective = ExpectedUtility(lambda leader, r: torch.tensor([[float(len(t))] for t in r.steps["completion"]]))

    def full(rollouts: Rollouts) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(leader, "first_order", full)
    run = HPGD(Problem(leader, objective, Samples()), config=HPGDConfig(natural=Natural(), progress=False))
    assert run.leader_step(batch())["step_nats"] > 0
