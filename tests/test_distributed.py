"""Two processes give what one gives; they stop together; commands that would start only one are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_worker as worker
import enumerable_lm as lm
import pytest
import torch

import align_cbrl
from align_cbrl import InputError, RunStopped
from align_cbrl.cli import main
from align_cbrl.distributed import check_launch, share
from align_cbrl.llm import Judge, RLOOFollower
from align_cbrl.llm.followers.trainer_response import TrainerPolicy
from align_cbrl.runs.checkpoints import load_checkpoint
from align_cbrl.runs.metrics import MetricsLog

WORKER = Path(worker.__file__)
ROOT = Path(align_cbrl.__file__).parent.parent
CONFIGS = ROOT / "recipes" / "accelerate"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]


def launch(command: list[str], task: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a task of distributed_worker.py under a launcher."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, *command, str(WORKER), task, str(folder)],
        env={
            **clean,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (WORKER.parent, ROOT))),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(folder: Path, task: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{task}-{rank}.pt") for rank in (0, 1)]


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("numbers")
    done = launch(TORCHRUN, "numbers", folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, results(folder, "numbers")


def test_two_processes_take_the_step_of_one(numbers: tuple[Path, list[dict[str, Any]]]) -> None:
    """Every objective, with and without importance weights, on unequal parts with a prompt that straddles them."""
    _, ranks = numbers
    whole = worker.gradients()
    assert {rank["world"] for rank in ranks} == {2} and len(whole) == 2 * 2 * 11
    for name, one in whole.items():
        scale = one["gradient"].norm()
        assert scale > 0.01, name
        for rank in ranks:
            two = rank["gradients"][name]
            assert (two["gradient"] - one["gradient"]).norm() <= 1e-6 * scale, name
            assert two["row"] == pytest.approx(one["row"], rel=1e-6, abs=1e-9), name
        assert torch.equal(ranks[0]["gradients"][name]["x"], ranks[1]["gradients"][name]["x"]), name
    twice = 2 * whole["expected, correction off, float64"]["gradient"]
    torch.testing.assert_close(ranks[0]["twice"], twice, rtol=1e-12, atol=0)


def test_two_processes_take_the_natural_steps_of_one(numbers: tuple[Path, list[dict[str, Any]]]) -> None:
    """The second step is on the remembered batch as well, whose groups straddle the processes too."""
    whole = worker.natural()
    start = worker.start_of(lm.Enumeration.random(1)).x.detach()
    for name, one in whole.items():
        assert (one["x"] - start).norm() > 0.01, name
        for rank in numbers[1]:
            two = rank["natural"][name]
            assert (two["x"] - one["x"]).norm() <= 1e-9 * one["x"].norm(), name
            for row, same in zip(two["rows"], one["rows"], strict=True):
                for found in (row, same):  # of a weight that CVaR leaves on its edge, rounding decides
                    found.pop("degenerate_groups", None)
                assert row == pytest.approx(same, rel=1e-6, abs=1e-9), name


def test_the_parts_alone_would_give_another_gradient() -> None:
    """The comparison above can fail: a rank that centred on its own rows only is far from one process."""
    enumeration = lm.Enumeration.random(1)
    follower = worker.scripted(enumeration)
    problem = align_cbrl.Problem(worker.start_of(enumeration), align_cbrl.ExpectedUtility(enumeration.judge), follower)
    mean = torch.zeros(5, dtype=torch.float64)
    for part in (slice(0, 13), slice(13, 20)):
        problem.leader.zero_grad()
        align_cbrl.PolicyResponse().backward(problem, follower.rollouts.select(part))
        mean += problem.parameters[0].grad * (part.stop - part.start) / 20
    whole = worker.gradients()["expected, correction off, float64"]["gradient"]
    assert (mean - whole).norm() > 0.01 * whole.norm()


def test_what_ends_one_rank_ends_all_after_the_same_step(numbers: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = numbers
    assert first["stops"]["judge"] == (
        2,
        "RunStopped",
        "computing the utilities failed on rank 1, whose message says why",
    )
    assert second["stops"]["judge"] == (2, "RunStopped", "the judge's budget is spent")
    for rank in (first, second):  # the signal reached rank 1 only, in its third step, which both finish
        assert rank["stops"]["interrupt"][:2] == (3, "KeyboardInterrupt")
    for reason, step in (("judge", 2), ("interrupt", 3)):
        assert [row["step"] for row in MetricsLog.read(folder / reason / "metrics.jsonl")] == list(range(1, step + 1))
        assert [c.name for c in (folder / reason / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]


def test_what_knows_only_its_own_rows_is_refused(numbers: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in numbers[1]:
        assert "ZerothOrder: expected one process, got 2" in rank["stops"]["estimator"]
        assert "expected one step in a run of 2 processes" in rank["stops"]["horizon"]


@pytest.mark.slow
def test_a_leader_in_somebodys_script_steps_on_the_batch_of_all_processes(tmp_path: Path) -> None:
    """On every rank the weights are those that one process would take on all completions, from rank 0's start."""
    lm.build(tmp_path / "model")
    done = launch(TORCHRUN, "script", tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = results(tmp_path, "script")
    for scale, gradient in worker.script(tmp_path)["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][scale], gradient, rtol=1e-10, atol=0)
    leader = worker.two_terms(0.1)
    objective = align_cbrl.KLPriced(align_cbrl.ExpectedUtility(Judge(lm.length_reward)), 0.1)
    optimizer = torch.optim.Adam(leader.parameters(), lr=0.1, maximize=True)
    problem = align_cbrl.Problem(leader, objective, TrainerPolicy(1.0))
    run = align_cbrl.HPGD(problem, optimizer, align_cbrl.StepResponse())
    batches = [list(parts) for parts in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert len(batches) == 2
    for step, parts in enumerate(batches):
        assert set(parts[0]["group"].flatten().tolist()) & set(parts[1]["group"].flatten().tolist()) == {1}
        steps = {name: [row for part in parts for row in part["steps"][name]] for name in parts[0]["steps"]}
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "steps"}
        whole = align_cbrl.Rollouts(**tensors, steps=steps)
        if step == 0:
            leader.rescale(whole)
        run.leader_step(whole)
    for rank in ranks:
        torch.testing.assert_close(rank["weight"], leader.weight.detach(), rtol=1e-9, atol=1e-12)
    assert ranks[0]["calls"] and ranks[0]["calls"][0] > 6  # of both


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("data", "follower.prompts: expected the same on every process, got '4 rows "),
        ("leader", "leader.kind: expected the same on every process, got 'Budgeted' on rank 0 and 'Other' on rank 1"),
        ("leader's budget", "leader.budget: expected the same on every process, got 1.0 on rank 0 and 2.0 on rank 1"),
        ("reward", "leader.enumeration.features: expected the same"),
        ("judge", "objective.objective.utility_function"),
        ("judge's closure", "objective.objective.utility_function"),
        ("judge's budget", "objective.objective.utility_function.budget: expected the same on every process, got 100 "),
        ("objective", "objective.share: expected the same on every process, got 0.5 on rank 0 and 0.6 on rank 1"),
        ("config", "config.seed: expected the same on every process, got 0 on rank 0 and 1 on rank 1"),
        ("chunks", "hypergradient.chunks: expected the same on every process, got 1 on rank 0 and 2 on rank 1"),
        ("optimizer", "optimizer.groups.lr: expected the same on every process, got 0.05 on rank 0 and 0.1 "),
        ("learning rate", "follower.learning_rate: expected the same on every process, got 0.001 on rank 0"),
    ],
)
def test_ranks_that_were_built_from_different_things_are_refused(
    numbers: tuple[Path, list[dict[str, Any]]], case: str, words: str
) -> None:
    for rank in numbers[1]:
        assert rank["different"]["nothing"] is None
        assert words in rank["different"][case]


def test_a_leader_step_takes_few_messages(numbers: tuple[Path, list[dict[str, Any]]]) -> None:
    """Rows that belong together travel together, and their number with them once."""
    assert {rank["messages"] for rank in numbers[1]} == {25}  # 44 when each tensor travelled on its own


def test_a_killed_rank_ends_the_others_and_the_run_resumes(tmp_path: Path) -> None:
    """torchrun first, then accelerate with the configuration that is shipped for a CPU."""
    lm.build(tmp_path / "model")
    before = files(tmp_path)
    killed = launch(TORCHRUN, "die", tmp_path, ACCELERATE_USE_CPU="true")
    assert killed.returncode != 0
    assert time.time() - float((tmp_path / "killed").read_text()) < 60
    assert len(MetricsLog.read(tmp_path / "run" / "metrics.jsonl")) == 2

    config = ["--config_file", str(CONFIGS / "two_processes_cpu.yaml")]
    resumed = launch([*ACCELERATE, *config], "run", tmp_path, ACCELERATE_USE_CPU="true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    first, second = results(tmp_path, "run")
    assert first["world"] == second["world"] == 2
    assert first["steps"] == second["steps"] == 4

    # Both ended with one leader and one policy, made of different completions; a group was cut in two.
    assert torch.equal(first["x"], second["x"])
    assert all(torch.equal(first["policy"][name], second["policy"][name]) for name in first["policy"])
    assert len(first["seen"]) == len(second["seen"]) == 2 * 9
    straddling = {prompt for prompt, _ in first["seen"][:9]} & {prompt for prompt, _ in second["seen"][:9]}
    assert straddling
    assert first["seen"] != second["seen"]

    # What rank 1 does not write it has not copied either, but for the look before the start.
    assert (first["copies"], second["copies"]) == (3, 1)

    # Rank 0 alone has written, and wrote what both ended with.
    run = {"run/metrics.jsonl", "run/checkpoints/.lock"} | {
        f"run/checkpoints/step-{k:08d}/{name}" for k in (3, 4) for name in ("manifest.json", "tensors.safetensors")
    }
    assert files(tmp_path) - before == run | {"killed", "run-0.pt", "run-1.pt"}
    assert [row["step"] for row in MetricsLog.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    found = load_checkpoint(tmp_path / "run" / "checkpoints", fingerprint=first["mark"])
    assert found is not None
    _, state = found
    assert torch.equal(state["leader"]["x"], first["x"])
    assert state["follower"]["handed_out"]["token_ids"] == [ids for _, ids in first["seen"][9:] + second["seen"][9:]]


def test_a_rank_finds_its_part_of_a_response_that_the_leader_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = RLOOFollower(
        lm.build(tmp_path), lm.prompt_dataset(), 2.0, max_completion_length=lm.LENGTH,
        prompts_per_step=3, group_size=6, interval=1,
    )  # fmt: skip
    enumeration = lm.Enumeration.random(1)

    def stop(rollouts: align_cbrl.Rollouts, metrics: dict[str, float]) -> bool:
        raise RunStopped("the judge's budget is spent")

    with pytest.raises(RunStopped):
        follower.follow(worker.start_of(enumeration), stop, start=0, steps=1, contexts_per_step=3, group_size=6, seed=0)
    state = follower.state_dict()
    everyone = state["handed_out"]["token_ids"]
    assert len(everyone) == 18
    monkeypatch.setattr("align_cbrl.distributed.world_size", lambda: 2)
    monkeypatch.setattr("align_cbrl.distributed.rank", lambda: 1)
    follower.load_state_dict(state)
    assert follower._handed_out is not None
    assert follower._handed_out.rollouts().steps["completion_ids"] == everyone[9:]


def test_what_a_sharded_policy_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = RLOOFollower(
        lm.build(tmp_path), lm.prompt_dataset(), 2.0, max_completion_length=lm.LENGTH, prompts_per_step=2, group_size=4
    )
    monkeypatch.setattr(follower._built(), "is_fsdp_enabled", True)
    follower.state_dict()  # one process holds all of it
    monkeypatch.setattr("align_cbrl.llm.followers.trained.world_size", lambda: 2)
    for attempt in (
        follower.state_dict,
        lambda: follower.load_state_dict({"policy": {}}),
        lambda: follower.sample(torch.arange(2), 2, torch.Generator()),
    ):
        with pytest.raises(InputError, match="got one that FSDP shards"):
            attempt()


def test_a_recipe_in_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align_cbrl.distributed.world_size", lambda: 2)
    assert main(["run", "tune_weights"]) == 2
    assert "recipe 'tune_weights': expected one process, got 2" in capsys.readouterr().err


def test_a_command_that_would_start_one_process_is_refused(tmp_path: Path) -> None:
    refused = launch([*ACCELERATE, "--cpu", "--num_processes", "2"], "numbers", tmp_path)
    assert refused.returncode != 0
    assert "InputError: launch command: expected several processes, as it asks for, got one" in refused.stderr
    assert "torchrun --nproc_per_node 2" in refused.stderr
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        # What these commands were seen to leave, on accelerate 1.x:
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "got one"),  # launch --num_processes 2
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "as many separate runs"),  # mpirun -n 2
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),  # launch --num_processes 1
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, None),  # --multi_gpu
        ({"MASTER_ADDR": "node1"}, None),  # python, on a cluster that exports an address
        ({}, None),
    ],
)
def test_launch_environments(environment: dict[str, str], message: str | None) -> None:
    if message is None:
        check_launch(environment)
    else:
        with pytest.raises(InputError, match=message):
            check_launch(environment)


def test_accelerate_reads_the_configurations() -> None:
    from accelerate.commands.config import load_config_from_file  # slow to import

    kinds = {}
    for file in sorted(CONFIGS.glob("*.yaml")):
        config = load_config_from_file(str(file))
        assert config.num_processes > 1
        kinds[file.stem] = config.distributed_type.value
    assert kinds == {
        "ddp": "MULTI_GPU",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
        "fsdp": "FSDP",
        "two_processes_cpu": "MULTI_GPU",
    }


def test_fewer_contexts_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_cbrl.distributed.world_size", lambda: 3)
    monkeypatch.setattr("align_cbrl.distributed.rank", lambda: 1)
    assert share(8) == slice(2, 5)
    with pytest.raises(InputError, match="at least one context for each of 3 processes, got 2"):
        share(2)
