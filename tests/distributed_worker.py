"""What tests/test_distributed.py starts in two processes: `torchrun distributed_worker.py TASK FOLDER`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import enumerable_lm as lm
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from align_cbrl import (
    HPGD,
    BestOf,
    Constrained,
    CVaR,
    EntropicRisk,
    ExpectedUtility,
    FunctionOfMeans,
    HPGDConfig,
    InputError,
    KLPriced,
    MeanVariance,
    Natural,
    PolicyResponse,
    PreferenceLikelihood,
    Problem,
    Rollouts,
    RunStopped,
    SetUtility,
    StepResponse,
    WorstContext,
    ZerothOrder,
)
from align_cbrl.distributed import barrier, initialize, rank, world_size
from align_cbrl.estimators import metric
from align_cbrl.llm import Judge, LeaderCallback, RewardMixture, RLOOFollower
from align_cbrl.objectives import ratio
from align_cbrl.problem import Follower, Objective, OnRollouts

TEMPERATURE = 2.0
GROUP = 5  # completions of a prompt: 20 rows for four prompts, of which the third straddles the cut
CUTS = {1: [0, 20], 2: [0, 13, 20]}  # ranks need not have equally many
warnings.filterwarnings("ignore", category=FutureWarning)


class Scripted(Follower):
    """Hands out the same rollouts again and again, each rank its own rows."""

    temperature, discount = TEMPERATURE, 0.0
    identity = "scripted"  # each rank has its own rollouts, and is meant to

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("the rollouts are fixed")

    def respond(self, leader: Any, contexts: Tensor) -> dict[str, float]:
        raise AssertionError("the rollouts are fixed")

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        raise AssertionError("the rollouts are fixed")

    def follow(self, leader: Any, on_rollouts: OnRollouts, *, start: int, steps: int, **_: Any) -> None:
        for _step in range(start, steps):
            if not on_rollouts(self.rollouts, {}):
                return


def scripted(enumeration: lm.Enumeration) -> Scripted:
    """This rank's rows of twenty fixed completions, with log-probabilities that need not be anybody's."""
    generator = torch.Generator().manual_seed(5)
    context = torch.arange(len(lm.PROMPTS)).repeat_interleave(GROUP)
    ids = [enumeration.completions[i] for i in torch.randint(len(enumeration.completions), (20,), generator=generator)]
    whole = Rollouts.bandit(
        contexts=context,
        steps={"prompt": [lm.PROMPTS[c] for c in context], "completion": ["" for _ in ids], "completion_ids": ids},
        log_policy=-torch.rand(20, generator=generator, dtype=torch.float64),
        log_prior=-torch.rand(20, generator=generator, dtype=torch.float64),
    )
    cuts = CUTS[world_size()]
    return Scripted(whole.select(slice(cuts[rank()], cuts[rank() + 1])))


def objectives(enumeration: lm.Enumeration) -> dict[str, Objective]:
    """Every objective, on judge, length and reward."""

    def length(leader: Any, rollouts: Rollouts) -> Tensor:
        return torch.tensor([[float(len(ids))] for ids in rollouts.steps["completion_ids"]], dtype=torch.float64)

    judge = ExpectedUtility(enumeration.judge)
    return {
        "expected": judge,
        "direct": ExpectedUtility(lambda leader, rollouts: leader.reward(rollouts), depends_on_leader=True),
        "CVaR": CVaR(judge, 0.5),
        "mean-variance": MeanVariance(judge, 0.7),
        "entropic": EntropicRisk(judge, 0.9),
        "worst": WorstContext(judge),
        "KL-priced": KLPriced(judge, 0.3),
        "constrained": Constrained(judge, cost=ExpectedUtility(length), bound=1.5, rate=0.5, multiplier=0.2),
        "preferences": PreferenceLikelihood(enumeration.judge, scale=0.8),
        "sets": SetUtility(BestOf(enumeration.judge), size=2),
        "means": FunctionOfMeans(ratio, [judge, ExpectedUtility(length)], memory=8),
    }


def start_of(enumeration: lm.Enumeration) -> lm.LinearLeader:
    return lm.LinearLeader(enumeration, torch.tensor([0.3, -0.5, 0.2, 0.9, -0.1], dtype=enumeration.features.dtype))


def gradients() -> dict[str, Any]:
    """One leader step of every objective in two precisions: gradient, row of metrics, and the leader after it."""
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        enumeration = lm.Enumeration.random(1)
        enumeration.features = enumeration.features.to(dtype)
        follower = scripted(enumeration)
        for name, objective in objectives(enumeration).items():
            for correction in ("off", "on"):
                leader = start_of(enumeration)
                estimator = PolicyResponse(chunks=2)
                optimizer = torch.optim.SGD(leader.parameters(), lr=0.1, maximize=True)
                config = HPGDConfig(correction=correction, max_gradient_norm=None)
                run = HPGD(Problem(leader, objective, follower), optimizer, estimator, config)
                row = run.leader_step(follower.rollouts)
                assert leader.x.grad is not None
                found[f"{name}, correction {correction}, {str(dtype)[6:]}"] = {
                    "gradient": leader.x.grad.double().clone(),
                    "x": leader.x.detach().double(),
                    "row": row,
                }
    return found


def natural() -> dict[str, Any]:
    """Two natural steps of every objective, the second on both batches: metrics of both, and the leader after them.

    Once with the metric's matrix, and once by its products alone.
    """
    found = natural_steps()
    with mock.patch.object(metric, "LARGE", 1):
        return {**found, **{f"{name}, products": steps for name, steps in natural_steps().items()}}


def natural_steps() -> dict[str, Any]:
    """Of each objective."""
    enumeration = lm.Enumeration.random(1)
    follower, found = scripted(enumeration), {}
    for name, objective in objectives(enumeration).items():
        if objective.remembers:
            continue
        leader = start_of(enumeration)
        run = HPGD(Problem(leader, objective, follower), config=HPGDConfig(natural=Natural(nats=0.02)))
        rows = [run.leader_step(follower.rollouts) for _ in range(2)]
        found[name] = {"x": leader.x.detach().clone(), "rows": rows}
    return found


def twice() -> Tensor:
    """What was in `.grad` before is neither lost nor counted once a rank."""
    enumeration = lm.Enumeration.random(1)
    leader = start_of(enumeration)
    follower = scripted(enumeration)
    problem = Problem(leader, ExpectedUtility(enumeration.judge), follower)
    for _ in range(2):
        PolicyResponse().backward(problem, follower.rollouts)
    assert leader.x.grad is not None
    return leader.x.grad


def stops(folder: Path) -> dict[str, Any]:
    """Runs that one rank alone has a reason to end: where each rank stopped, and with what."""
    enumeration = lm.Enumeration.random(1)
    leader = start_of(enumeration)
    optimizer = torch.optim.SGD(leader.parameters(), lr=0.1, maximize=True)
    config = HPGDConfig(steps=5, checkpoint_every=100, progress=False)
    asked = 0

    def broke(leader: Any, rollouts: Rollouts) -> Tensor:
        nonlocal asked
        asked += 1
        if rank() == 1 and asked == 3:
            raise RunStopped("the judge's budget is spent")
        return enumeration.judge(leader, rollouts)

    def interrupted(leader: Any, rollouts: Rollouts) -> Tensor:
        nonlocal asked
        asked += 1
        if rank() == 1 and asked == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return enumeration.judge(leader, rollouts)

    found: dict[str, Any] = {}
    for name, judge in {"judge": broke, "interrupt": interrupted}.items():
        asked = 0
        problem = Problem(leader, ExpectedUtility(judge), scripted(enumeration))
        run = HPGD(problem, optimizer, config=config, out=folder / name)
        try:
            run.run()
        except (RunStopped, KeyboardInterrupt) as error:
            found[name] = (run.step, type(error).__name__, str(error))
    zero = ExpectedUtility(lambda leader, rollouts: torch.zeros(rollouts.mask.shape), discount=0.5)
    for name, run in {
        "estimator": HPGD(problem, optimizer, ZerothOrder(radius=0.1), config),
        "horizon": HPGD(Problem(leader, zero, Scripted(two_steps())), optimizer, config=config),
    }.items():
        try:
            run.run()
        except InputError as error:
            found[name] = str(error)
    return found


class Budgeted(lm.LinearLeader):
    """With settings of its own."""

    def __init__(self, enumeration: lm.Enumeration, x: Tensor, budget: float = 1.0) -> None:
        super().__init__(enumeration, x)
        self.budget = budget


def different(folder: Path) -> dict[str, str | None]:
    """What a run says whose ranks were built from different things; None where it would begin."""
    me = rank()
    if me == 0:
        lm.build(folder / "different")
    barrier()
    words = ["a b", "c d e", "f a c", "b e"]

    def begun(**parts: Any) -> str | None:
        enumeration = lm.Enumeration.random(parts.get("world", 1))
        follower = RLOOFollower(
            folder / "different", Dataset.from_dict({"prompt": parts.get("prompts", words)}), TEMPERATURE,
            max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4,
            learning_rate=parts.get("learning_rate", 1e-3),
        )  # fmt: skip
        x = torch.full((5,), 0.1 * (1 + me), dtype=torch.float64)  # broadcast at the start
        leader = parts.get("leader", Budgeted)(enumeration, x, **parts.get("leader_settings", {}))
        judge = Judge(parts.get("judge", lm.length_reward), budget=parts.get("budget", 100))
        judge.calls = me  # a counter, which is nobody's setting
        objective = CVaR(ExpectedUtility(judge), parts.get("share", 0.5))
        optimizer = torch.optim.Adam(leader.parameters(), lr=parts.get("lr", 0.05), maximize=True)
        config = HPGDConfig(steps=1, seed=parts.get("seed", 0), progress=me == 0)
        estimator = PolicyResponse(chunks=parts.get("chunks", 1))
        try:
            HPGD(Problem(leader, objective, follower), optimizer, estimator, config)._prepare(False)
        except InputError as error:
            return str(error)
        return None

    def threshold(least: int) -> Any:
        return lambda prompts, completions: [float(len(text) > least) for text in completions]

    judges = (lambda prompts, completions: [0.0], lambda prompts, completions: [1.0])
    return {
        "nothing": begun(),
        "data": begun(prompts=words if me == 0 else [*words[:3], "b d"]),
        "leader": begun(leader=Budgeted if me == 0 else type("Other", (Budgeted,), {})),
        "leader's budget": begun(leader_settings={"budget": 1.0 + me}),
        "reward": begun(world=1 + me),
        "judge": begun(judge=judges[me]),
        "judge's closure": begun(judge=threshold(me)),
        "judge's budget": begun(budget=100 + me),
        "objective": begun(share=0.5 + 0.1 * me),
        "config": begun(seed=me),
        "chunks": begun(chunks=1 + me),
        "optimizer": begun(lr=0.05 * (1 + me)),
        "learning rate": begun(learning_rate=1e-3 * (1 + me)),
    }


def messages() -> int:
    """How many collective messages a leader step takes."""
    enumeration = lm.Enumeration.random(1)
    follower = scripted(enumeration)
    leader = start_of(enumeration)
    optimizer = torch.optim.SGD(leader.parameters(), lr=0.1, maximize=True)
    run = HPGD(Problem(leader, ExpectedUtility(enumeration.judge), follower), optimizer)
    counted = 0
    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast"):
        original = getattr(dist, name)

        def counting(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    run.leader_step(follower.rollouts)
    return counted


def two_steps() -> Rollouts:
    return Rollouts(
        torch.zeros(2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool), torch.arange(4).view(2, 2), {}
    )


def hpgd(folder: Path, *, die_at: int | None = None, inside: bool = True) -> dict[str, Any]:
    """HPGD around a trl follower, where rank 1 may be killed in a leader step: what the rank ends with."""
    enumeration = lm.Enumeration.random(1)
    follower = RLOOFollower(
        folder / "model", lm.prompt_dataset(), TEMPERATURE, max_completion_length=lm.LENGTH,
        prompts_per_step=3, group_size=6, learning_rate=1e-3, interval=2, inside=inside,
    )  # fmt: skip
    # Ranks that start apart: only the broadcast can make them one.
    leader = lm.LinearLeader(enumeration, torch.full((5,), 0.1 * (1 + rank()), dtype=torch.float64))
    seen: list[tuple[str, list[int]]] = []

    def judge(leader: Any, rollouts: Rollouts) -> Tensor:
        if rank() == 1 and run.step == die_at:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        seen.extend(zip(rollouts.steps["prompt"], rollouts.steps["completion_ids"], strict=True))
        return enumeration.judge(leader, rollouts)

    judge.identity = "the same judge, whether rank 1 dies or not"  # type: ignore[attr-defined]
    copies, state_dict = 0, follower.state_dict

    def copied() -> dict[str, Any]:
        nonlocal copies
        copies += 1
        return state_dict()

    follower.state_dict = copied  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(leader.parameters(), lr=0.05, maximize=True)
    config = HPGDConfig(steps=4, contexts_per_step=3, group_size=6, checkpoint_every=1, progress=False)
    run = HPGD(Problem(leader, ExpectedUtility(judge), follower), optimizer, config=config, out=folder / "run")
    run.run(resume=True)
    policy = {name: value.detach() for name, value in follower.policy.named_parameters()}
    return {
        "x": leader.x.detach(),
        "policy": policy,
        "seen": seen,
        "steps": len(run.history),
        "mark": run.fingerprint,
        "copies": copies,
    }


def low(completion_ids: list[list[int]]) -> list[float]:
    """Tokens of the first half of the vocabulary."""
    return [float(sum(token < 4 for token in ids)) for ids in completion_ids]


def script(folder: Path) -> dict[str, Any]:
    """A leader in trl's own GRPO script; a prompt's group straddles the ranks, which start from other weights."""
    enumeration = lm.Enumeration.random(1)
    gradients = {}
    for scale in ("group", "batch", "none"):
        linear = start_of(enumeration)
        problem = Problem(linear, ExpectedUtility(enumeration.judge), Scripted(scripted(enumeration).rollouts))
        StepResponse(scale=scale).backward(problem, problem.follower.rollouts)
        gradients[scale] = linear.x.grad
    if world_size() == 1:
        return {"gradients": gradients}
    seen: list[dict[str, Any]] = []

    class Looking(KLPriced):
        def observe(self, leader: Any, rollouts: Rollouts) -> Any:
            names = ("contexts", "mask", "group", "steps", "log_policy", "log_prior")
            if len(rollouts.known) == 1:  # of the leader's own scores: the first look at a batch
                seen.append({name: getattr(rollouts, name) for name in names})
            return super().observe(leader, rollouts)

    leader = two_terms(0.1 * (1 + rank()))
    objective = Looking(ExpectedUtility(Judge(lm.length_reward)), 0.1)
    args = GRPOConfig(
        output_dir=str(folder / "script"), max_steps=2, per_device_train_batch_size=6, num_generations=4,
        max_completion_length=lm.LENGTH, learning_rate=1e-4, report_to="none", use_cpu=True, bf16=False,
        activation_checkpointing=False, disable_tqdm=True, save_steps=1, logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(folder / "model"), reward_funcs=leader.reward_function(), args=args, train_dataset=lm.prompt_dataset(),
        callbacks=[LeaderCallback(leader, objective)],
    )  # fmt: skip
    trainer.train()
    calls = [row["leader/judge_calls"] for row in trainer.state.log_history if "leader/judge_calls" in row]
    return {"gradients": gradients, "seen": seen, "weight": leader.weight.detach(), "calls": calls}


def two_terms(start: float) -> RewardMixture:
    """A leader of two weights."""
    return RewardMixture({"length": lm.length_reward, "low": low}, {"length": start, "low": 0.3})


def main(task: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # nobody waits for ever, and the test sees for what
    initialize()
    found: dict[str, Any]
    if task == "numbers":
        found = {"gradients": gradients(), "natural": natural(), "twice": twice(), "stops": stops(folder)}
        found |= {"different": different(folder), "messages": messages()}
    elif task == "die":
        found = hpgd(folder, die_at=2)
    elif task == "run":
        found = hpgd(folder)
    elif task == "outside":
        found = hpgd(folder, inside=False)
    elif task == "script":
        found = script(folder)
    else:
        raise AssertionError(task)
    torch.save({**found, "world": world_size()}, folder / f"{task}-{rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
