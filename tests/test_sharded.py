"""A policy in parts: FSDP 2 on two processes of a CPU takes the steps of DDP, and what needs all of it gathers it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import enumerable_lm as lm
import pytest
import sharded_worker as worker
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import align_cbrl
from align_cbrl import InputError
from align_cbrl.llm.followers.trl.observed import whole_parameters

WORKER = Path(worker.__file__)
ROOT = Path(align_cbrl.__file__).parent.parent


def run(how: str, folder: Path) -> list[dict[str, object]]:
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(WORKER), how, str(folder)],
        env={
            **clean,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(map(str, (WORKER.parent, ROOT))),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{how}-{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_a_sharded_policy_is_trained_and_saved_as_a_whole_one(tmp_path: Path) -> None:
    lm.build(tmp_path / "model")
    whole, sharded = run("ddp", tmp_path), run("fsdp", tmp_path)

    # It was sharded, on every rank, and the leaders ended at the same bits.
    for rank in (0, 1):
        assert set(whole[rank]["local"].values()) == {"Parameter"}  # type: ignore[attr-defined]
        assert set(sharded[rank]["local"].values()) == {"DTensor"}  # type: ignore[attr-defined]
        assert torch.equal(sharded[rank]["x"], whole[0]["x"])  # type: ignore[arg-type]
        assert sharded[rank]["gaps"] == pytest.approx(whole[0]["gaps"], abs=1e-6)
        assert whole[rank]["refused"] == []
        refused = sharded[rank]["refused"]
        assert len(refused) == 2 and all("got one that FSDP shards" in text for text in refused)  # type: ignore

    # What was saved has the shapes of its configuration, and the numbers of the policy that was never cut.
    config = AutoConfig.from_pretrained(tmp_path / "fsdp")
    expected = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    saved, other = (load_file(tmp_path / how / "model.safetensors") for how in ("fsdp", "ddp"))
    assert {name: value.shape for name, value in saved.items()} == expected
    untrained = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in saved.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)
    assert any(not torch.equal(value, untrained[name]) for name, value in saved.items())


class Incomplete:
    """Stands for accelerate under ZeRO-3: parameters are empty where they stand, and one was not gathered."""

    is_main_process = True

    def __init__(self, model: torch.nn.Module, gathered: dict[str, torch.Tensor] | ValueError) -> None:
        self.model, self.gathered = model, gathered
        self.state = type("State", (), {"deepspeed_plugin": type("Plugin", (), {"zero_stage": 3})})

    def get_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        if isinstance(self.gathered, ValueError):
            raise self.gathered
        return self.gathered

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.model


def test_parts_that_were_not_gathered_are_not_written() -> None:
    model = torch.nn.Linear(3, 2)
    whole = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]  # as DeepSpeed does
        parameter.data = torch.empty(0)

    def gathered(found: dict[str, torch.Tensor] | ValueError) -> dict[str, torch.Tensor] | None:
        trainer = type("Trainer", (), {"is_fsdp_enabled": False, "is_deepspeed_enabled": True, "model": model})()
        trainer.accelerator = Incomplete(model, found)
        return whole_parameters(trainer)

    assert gathered(whole) == whole
    with pytest.raises(InputError, match=r"expected weight of shape \(2, 3\), gathered \(0,\); nothing is written"):
        gathered({**whole, "weight": torch.empty(0)})
    with pytest.raises(InputError, match="cannot be gathered: Cannot get 16bit model weights"):
        gathered(ValueError("Cannot get 16bit model weights because `stage3_gather_16bit_weights` is False"))
