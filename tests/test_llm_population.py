"""Several language models as one follower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, InputError, PolicyResponse, Problem, Rollouts
from align_cbrl.llm import GRPOFollower, Judge, Population, RewardMixture, RLOOFollower, Schedule, TiltedFollower

COUNT = 4


def score(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(ord(letter) for letter in text) / 100 for text in completions]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    tiny_models.build(folder / "small", "llama", size=16)
    tiny_models.build(folder / "large", "llama", size=48, seed=1)
    tiny_models.build(folder / "other", "gpt2", seed=2)
    return folder


def dataset(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": tiny_models.prompts(False), **columns})


def member(path: Path, kind: type[Any] = RLOOFollower, temperature: float = 0.5, **options: Any) -> Any:
    defaults = {"max_completion_length": 4, "prompts_per_step": 2, "group_size": 4, "learning_rate": 1e-2}
    if kind is TiltedFollower:
        return TiltedFollower(path, dataset(), temperature, max_completion_length=4)
    return kind(path, dataset(), temperature, **{**defaults, **options})


def three(models: Path) -> Population:
    """Two sizes and two families; inside and outside; trained and not."""
    return Population([
        member(models / "small", interval=2, warmup=1),
        member(models / "other", GRPOFollower, schedule=Schedule(interval=1, inside=False)),
        member(models / "large", TiltedFollower, temperature=1.0),
    ])  # fmt: skip


def run(population: Population, out: Path | None = None, steps: int = 3) -> HPGD:
    leader = RewardMixture({"score": score}, {"score": 0.5})
    problem = Problem(leader, ExpectedUtility(Judge(score)), population)
    return HPGD(
        problem,
        torch.optim.Adam(leader.parameters(), lr=0.05, maximize=True),
        PolicyResponse(),
        HPGDConfig(steps=steps, contexts_per_step=6, group_size=4, checkpoint_every=1, progress=False),
        out=out,
    )


def test_contexts_carry_the_member(models: Path) -> None:
    population = three(models)
    assert torch.equal(
        torch.as_tensor(population.temperature), torch.tensor([0.5] * 8 + [1.0] * 4, dtype=torch.float64)
    )
    contexts = population.sample_contexts(6, torch.Generator().manual_seed(0))
    assert (contexts // COUNT).tolist() == [0, 0, 1, 1, 2, 2] and len(set(contexts.tolist())) == 6
    population.respond(RewardMixture({"score": score}), contexts)
    mixed = torch.tensor([9, 1, 6, 0])
    rollouts = population.rollout(mixed, 3, torch.Generator().manual_seed(0))
    assert rollouts.contexts.tolist() == mixed.repeat_interleave(3).tolist()
    assert torch.as_tensor(rollouts.steps["follower"]).tolist() == (mixed // COUNT).repeat_interleave(3).tolist()
    texts = tiny_models.prompts(False)
    assert rollouts.steps["prompt"] == [texts[int(c) % COUNT] for c in rollouts.contexts]
    assert rollouts.weight is not None and (rollouts.weight[3:] == 1).all()  # only the tilted member's differ


def test_hpgd_around_a_population_is_the_mean_over_its_members(models: Path) -> None:
    """The gradient on the joined rollouts is the mean of the members' own gradients."""
    population, seen = three(models), list[Rollouts]()
    hpgd = run(population)
    hpgd.run()
    assert hpgd.history[-1]["follower_steps"] == 1 + 3 * 2 + 3 * 1
    assert population.members[0].steps == 7 and population.members[1].steps == 3

    population.follow(
        hpgd.problem.leader, lambda rollouts, metrics: bool(seen.append(rollouts)),
        start=3, steps=4, contexts_per_step=6, group_size=4, seed=0,
    )  # fmt: skip
    (joined,) = seen
    leader, weight = hpgd.problem.leader, hpgd.problem.leader.weight
    weight.grad = None
    PolicyResponse().backward(hpgd.problem, joined)
    whole, parts = weight.grad.clone(), []
    for i, of_population in enumerate(population.members):
        rows = [row for row, who in enumerate(joined.steps["follower"]) if int(who) == i]
        own = joined.select(rows)
        own = Rollouts.bandit(contexts=own.contexts - i * COUNT, steps=own.steps, weight=own.weight)
        weight.grad = None
        PolicyResponse().backward(Problem(leader, hpgd.problem.objective, of_population), own)
        parts.append(weight.grad.clone())
    torch.testing.assert_close(whole, torch.stack(parts).mean(0))
    assert parts[0] != parts[2]


def test_a_population_resumes_to_the_same_bits(models: Path, tmp_path: Path) -> None:
    whole, first, second = three(models), three(models), three(models)
    run(whole).run()
    run(first, tmp_path, steps=2).run()
    resumed = run(second, tmp_path)
    resumed.run(resume=True)
    for a, b in zip(whole.members[:2], second.members[:2], strict=True):
        for p, q in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert resumed.step == 3


def test_populations_refused(models: Path) -> None:
    with pytest.raises(InputError, match="expected at least one follower"):
        Population([])
    other = RLOOFollower(models / "small", dataset(answer=[1, 2, 3, 4]), 1.0, prompts_per_step=2, group_size=2)
    with pytest.raises(InputError, match="expected prompts of one number and with the same columns"):
        Population([member(models / "small"), other])
    named = TiltedFollower(models / "small", dataset(follower=[1, 2, 3, 4]), 1.0)
    with pytest.raises(InputError, match="have a column 'follower'"):
        Population([named])
    with pytest.raises(InputError, match="the population's 3 members divide, got 4"):
        three(models).sample_contexts(4, torch.Generator())
    with pytest.raises(InputError, match="expected 3 members, got 1"):
        three(models).load_state_dict({"members": [{}]})
