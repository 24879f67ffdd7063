"""Memory of a leader step by its batch (`python -m align_cbrl.recipes.benchmarks.leader_step_memory`).

The leader is all 10^8 parameters of a reward model, a Llama with random weights. The batch is cut into chunks of eight
completions, so that memory should not depend on the batch. A batch of one chunk takes less: there the gradients come
into being while the activations go, from the second chunk on they are there already. Each measurement is a process of
its own, whose peak is what the system reports at its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from align_cbrl import ExpectedUtility, Follower, PolicyResponse, Problem, Rollouts
from align_cbrl.llm import RewardModel, RewardModelLeader

_WORDS = 512


class _NoFollower(Follower):
    """Stands for a follower whose completions are there already."""

    temperature, discount = 1.0, 0.0

    def sample_contexts(self, count: int, generator: torch.Generator) -> torch.Tensor:
        raise NotImplementedError

    def respond(self, leader: Any, contexts: torch.Tensor) -> dict[str, float]:
        raise NotImplementedError

    def rollout(self, contexts: torch.Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one PolicyResponse.backward.

    Attributes:
        parameters: number of the leader's parameters.
        batch: completions.
        chunk: completions in a chunk.
        gradient_checkpointing: whether layers are recomputed instead of kept.
        held: the process's largest resident set before the step, in bytes.
        peak: its largest resident set.
        seconds: of the step.
    """

    parameters: int
    batch: int
    chunk: int
    gradient_checkpointing: bool
    held: int
    peak: int
    seconds: float

    @property
    def beyond(self) -> int:
        """What the step takes beside the gradient, which is as large as the parameters."""
        return self.peak - self.held - 4 * self.parameters


def build(path: Path, width: int, layers: int) -> None:
    """Save a Llama classifier with random weights; 768 and 12 make 10^8 of them."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width * 21 // 6,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.utils.logging.disable_progress_bar()  # of the writing of one file
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(path)


def measure(path: Path, batch: int, chunk: int, length: int, gradient_checkpointing: bool) -> Usage:
    """One hypergradient from `batch` completions, in this process."""
    leader = RewardModelLeader(RewardModel(path), "all", gradient_checkpointing=gradient_checkpointing)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(_WORDS, (batch, length), generator=generator).tolist()
    rollouts = Rollouts.bandit(
        contexts=torch.arange(batch) // 4,
        steps={"prompt": ["w0 "] * batch, "completion": [" ".join(f"w{i}" for i in row) for row in rows]},
    )
    utility = torch.randn(batch, generator=generator, dtype=torch.float64)
    by_text = dict(zip(rollouts.steps["completion"], utility.tolist(), strict=True))
    judge = ExpectedUtility(lambda leader, piece: torch.tensor([[by_text[text]] for text in piece.steps["completion"]]))
    problem = Problem(leader, judge, _NoFollower())
    held, began = _peak(), time.perf_counter()
    PolicyResponse(chunks=-(-batch // chunk)).backward(problem, rollouts)
    seconds = time.perf_counter() - began
    count = sum(p.numel() for p in problem.parameters)
    return Usage(count, batch, chunk, gradient_checkpointing, held, _peak(), seconds)


def measure_apart(path: Path, settings: Mapping[str, Any]) -> Usage:
    """The same in a fresh process."""
    code = (
        "import dataclasses, json, pathlib, sys; from .leader_step_memory import measure; "
        "path, settings = sys.argv[1:]; "
        "print(json.dumps(dataclasses.asdict(measure(pathlib.Path(path), **json.loads(settings)))))"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measurement {settings} failed:\n{done.stderr}")
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def _peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Print a line for each batch, and how much more the largest takes than the smallest; write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 64], help="completions of a leader step")
    parser.add_argument("--chunk", type=int, default=8, help="completions in a chunk")
    parser.add_argument("--length", type=int, default=12, help="tokens of a completion")
    parser.add_argument("--width", type=int, default=768, help="of the reward model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12, help="of the reward model")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    usages = []
    print(" parameters  batch  chunk  held MiB  peak MiB  beyond gradients  seconds")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.width, arguments.layers)
        for batch in arguments.batches:
            settings = {
                "batch": batch,
                "chunk": arguments.chunk,
                "length": arguments.length,
                "gradient_checkpointing": arguments.gradient_checkpointing,
            }
            usage = measure_apart(Path(folder), settings)
            usages.append(usage)
            megabytes = [number / 2**20 for number in (usage.held, usage.peak, usage.beyond)]
            print(
                "{:11,} {:6} {:6} {:9.0f} {:9.0f} {:17.0f} {:8.1f}".format(
                    usage.parameters, batch, usage.chunk, *megabytes, usage.seconds
                ),
                flush=True,
            )
    several = [usage for usage in usages if usage.batch > usage.chunk]
    if len(several) > 1:
        first, last = several[0], several[-1]
        print(
            f"{last.batch} completions against {first.batch}, in chunks of {first.chunk}: "
            f"{last.peak / first.peak:.3f} times the peak, {(last.peak - first.peak) / 2**20:+.0f} MiB"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([dataclasses.asdict(usage) for usage in usages], indent=2) + "\n")


if __name__ == "__main__":
    main()
