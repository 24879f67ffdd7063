"""What tests/test_sharded.py starts in two processes: a follower whose policy accelerate shards, on a CPU.

accelerate shards over devices only and falls back to plain DDP on a CPU, without a word. So it is told here that the
CPU is one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate.state
import enumerable_lm as lm
import torch
from accelerate.utils import DistributedType

from align_cbrl import HPGD, ExpectedUtility, HPGDConfig, InputError, Problem
from align_cbrl.distributed import initialize, rank
from align_cbrl.llm import RLOOFollower

warnings.filterwarnings("ignore", category=FutureWarning)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def a_cpu_is_a_device() -> None:
    prepare = accelerate.state.PartialState._prepare_backend

    def prepared(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        backend, kind = prepare(self, *args, **kwargs)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    accelerate.state.PartialState._prepare_backend = prepared
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main(how: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    if how == "fsdp":
        os.environ.update(FSDP)
        a_cpu_is_a_device()
    initialize()
    enumeration = lm.Enumeration.random(1)
    follower = RLOOFollower(
        folder / "model", lm.prompt_dataset(), 2.0, max_completion_length=lm.LENGTH,
        prompts_per_step=2, group_size=6, learning_rate=1e-3, interval=2,
    )  # fmt: skip
    leader = lm.LinearLeader(enumeration, torch.full((5,), 0.1, dtype=torch.float64))
    problem = Problem(leader, ExpectedUtility(enumeration.judge), follower)
    optimizer = torch.optim.Adam(leader.parameters(), lr=0.05, maximize=True)
    config = HPGDConfig(steps=3, contexts_per_step=2, group_size=6, progress=False)
    run = HPGD(problem, optimizer, config=config)
    run.run()
    found: dict[str, Any] = {"x": leader.x.detach(), "gaps": [row["gap"] for row in run.history]}
    found["local"] = {name: type(p).__name__ for name, p in follower.policy.named_parameters()}
    found["refused"] = []
    for attempt in (follower.state_dict, lambda: follower.sample(torch.arange(2), 2, torch.Generator())):
        try:
            attempt()
        except InputError as error:
            found["refused"].append(str(error))
    follower.save_pretrained(folder / how)
    torch.save(found, folder / f"{how}-{rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
